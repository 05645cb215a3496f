"""Names of models and tokenizers: folders, the built-in model, or ``ORG/NAME`` on the Hugging Face
Hub."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

from engine.config import BUILTIN_DIR, BUILTIN_NAME, EngineConfig, HubError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(model: str) -> bool:
    """Return True if ``model`` names a repository and no folder or file has that name."""
    if model.endswith(".json") or HUB_NAME.fullmatch(model) is None:
        return False
    return not Path(model).exists()


def display_name(folder: Path) -> str:
    """Return ``ORG/NAME`` for a folder of the hub's cache, and the folder's own name otherwise.

    >>> display_name(Path("/cache/models--Qwen--Qwen3-0.6B/snapshots/c1899de2"))
    'Qwen/Qwen3-0.6B'
    >>> display_name(Path("/models/my-model"))
    'my-model'
    """
    folder = folder.absolute()
    repository, snapshots = folder.parent.parent.name, folder.parent.name
    if snapshots == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return folder.resolve().name


def resolve_config(
    config: EngineConfig, report: Callable[[str], object] | None = None
) -> EngineConfig:
    """Return ``config`` with folders in place of hub names, downloading the files that are missing.
    The name of the built-in model becomes None, unless there is a folder of that name.

    ``report`` is called with one line per download, before it starts; by default the line goes to
    the standard error output. Raises HubError.
    """
    model, tokenizer = config.model, config.tokenizer
    if model == BUILTIN_NAME and not Path(model).exists():
        model = None
    if model is not None and is_hub_name(model):
        from engine.plugins.hub.downloads import fetch_model

        model = str(fetch_model(model, config, report or _to_stderr))
    elif config.revision is not None:
        raise HubError(
            f"--revision {config.revision} needs a model of the hub, as in --model ORG/NAME "
            f"(got {'no --model' if model is None else f'--model {model}'})."
        )
    if tokenizer is not None:
        tokenizer = resolve_folder(tokenizer)
    return dataclasses.replace(config, model=model, tokenizer=tokenizer, revision=None)


def resolve_folder(
    model: str, *, with_weights: bool = False, report: Callable[[str], object] | None = None
) -> str:
    """Return the folder of a hub name or of the built-in model, and any other ``model`` as it is.

    Without ``with_weights`` only config, tokenizer and templates are downloaded. Raises HubError.
    """
    if model == BUILTIN_NAME and not Path(model).exists():
        return str(BUILTIN_DIR)
    if not is_hub_name(model):
        return model
    from engine.plugins.hub.downloads import fetch_model, fetch_small_files

    if not with_weights:
        return str(fetch_small_files(model))
    # Models that are only converted do not have to fit into memory.
    return str(fetch_model(model, None, report or _to_stderr))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
