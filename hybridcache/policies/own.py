"""A policy of the user's own, named ``module:Class`` wherever a word stands."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load_class(word: str, protocol: type[Any]) -> type[Any]:
    """The class that ``module:Class`` names, from an installed module or one in the working directory, with the methods of
    ``protocol``.

    The working directory joins the end of ``sys.path``: installed commands start without it. ValueError says in one sentence
    what can not be found.
    """
    module_name, _, class_name = word.partition(":")
    module = _imported(word, module_name)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise ValueError(f"{word!r}: {module_name} has no class {class_name!r}")
    missing = [name for name in vars(protocol) if not (name[0] == "_" or hasattr(found, name))]
    if missing:
        raise ValueError(f"{word!r}: it is no {protocol.__name__}, it has no {', '.join(missing)}")
    return found


def _imported(word: str, module_name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # whatever a stranger's module raises while it is read
        raise ValueError(
            f"{word!r}: no module {module_name!r} can be imported ({error})"
        ) from error


def source_of(word: str) -> str:
    """The text of the module that a word like ``module:Class`` names; empty for other words, numbered ones (``ttl:500``) too."""
    module_name, colon, rest = word.strip().partition(":")
    if not colon or rest.replace(".", "", 1).isdecimal():
        return ""
    return inspect.getsource(_imported(word, module_name))
