"""Model families, one flat file each. A file is found by the ``model_types`` its class names;
nothing else lists it."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from typing import Any

from engine.run.model_config import Fields, ModelConfig, ModelError
from engine.run.models.decoder import Decoder
from hybridcache.geometry.families import text_part
from hybridcache.geometry.sizes import SizesError


def read_model(raw: dict[str, Any]) -> tuple[type[Decoder], ModelConfig]:
    """The class that serves a ``config.json``, and what it reads there. Raises ModelError."""
    try:
        text = text_part(raw)
    except ValueError as error:
        raise ModelError(str(error)) from None
    model_type = text.get("model_type")
    family = families().get(str(model_type))
    if family is None:
        raise ModelError(
            f"models of type {model_type!r} are not supported; supported are "
            f"{', '.join(sorted(families()))}."
        )
    return family, _read(family, text)


def _read(family: type[Decoder], text: Fields) -> ModelConfig:
    try:
        return family.read(text)
    except KeyError as error:
        raise ModelError(f"the model's config.json has no {error.args[0]!r}.") from None
    except SizesError as error:
        raise ModelError(str(error)) from None
    except ModelError:
        raise
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(
            f"the model's config.json has a value of the wrong type: {error}."
        ) from None


@cache
def families() -> dict[str, type[Decoder]]:
    """``model_type`` of a config.json to the class that serves it."""
    found: dict[str, type[Decoder]] = {}
    for file in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{file.name}")
        for part in vars(module).values():
            if isinstance(part, type) and part.__module__ == module.__name__:
                found.update(dict.fromkeys(getattr(part, "model_types", ()), part))
    return found
