"""Names of models and tokenizers: folders, files, the built-in model, or names on the Hugging Face
Hub: ``ORG/NAME``, and ``ORG/NAME:Q4_K_M`` for one of several models in GGUF files.

Downloads use ``huggingface_hub``: its cache, ``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and
tokens apply. Interrupted downloads are resumed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import BUILTIN_DIR, BUILTIN_NAME, EngineConfig, HubError
from engine.weights.layer_names import INDEX_NAMES, MODEL_SLIM_FILE, WEIGHTS_NAME
from engine.weights.model_config import ModelError, RawConfig, read_config
from hybridcache.geometry.gguf import choose_files, is_gguf, label_of, said_of
from hybridcache.geometry.gguf_config import check_architecture
from hybridcache.geometry.units import counted, format_bytes

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "tiktoken.model",
    "chat_template*",
    MODEL_SLIM_FILE,
    *INDEX_NAMES,
    ".gitattributes",  # In every repository: huggingface_hub warns if it finds no file.
]
"""Files besides the weights that the engine reads, all in the top folder of a repository."""
OLLAMA_NAME = re.compile(r"[\w.-]+:[\w.-]+|[\w.-]+/[\w.-]+:(latest|\d+(\.\d+)?[bm].*)")
"""Names with a tag, which is a size or ``latest``, and not a format of GGUF files."""
HUB_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?<!\.json)(?<!\.gguf)(:(?P<label>[\w.-]+))?"
)

CACHED = re.compile(r"/models--(?P<name>[^/]+)/snapshots/[^/]+(/(?P<file>.*))?$")
"""Path of a repository in the hub's cache, and of a file there."""


def display_name(model: Path) -> str:
    """Return ``ORG/NAME`` for a folder of the hub's cache, ``ORG/NAME:Q4_K_M`` for a GGUF file in
    it, and the model's own name otherwise.

    >>> display_name(Path("/cache/models--Qwen--Qwen3-0.6B/snapshots/c1899de2"))
    'Qwen/Qwen3-0.6B'
    >>> display_name(Path("/cache/models--Qwen--Qwen3-8B-GGUF/snapshots/e55/Qwen3-8B-Q8_0.gguf"))
    'Qwen/Qwen3-8B-GGUF:Q8_0'
    >>> display_name(Path("/models/my-model"))
    'my-model'
    """
    found = CACHED.search(model.absolute().as_posix())
    if found is None:
        return (model if is_gguf(model) else model.resolve()).name.removesuffix(".gguf")
    label = label_of(found["file"] or "")
    return found["name"].replace("--", "/", 1) + (label and f":{label}")


def resolve_config(config: EngineConfig, read_model: Callable[[RawConfig], object]) -> EngineConfig:
    """Return ``config`` with folders in place of hub names, downloading the files that are missing.
    The name of the built-in model becomes None. Raises HubError. See ``resolve_folder``."""
    model, tokenizer = config.model, config.tokenizer
    if model is not None:
        reader = None if config.load_format == "dummy" else read_model
        model = resolve_folder(model, reader, config.revision)
    elif config.revision is not None:
        raise HubError(f"--revision {config.revision} needs a model of the hub, --model ORG/NAME.")
    if model == str(BUILTIN_DIR):
        model = None
    if tokenizer is not None:
        tokenizer = resolve_folder(tokenizer)
    return dataclasses.replace(config, model=model, tokenizer=tokenizer, revision=None)


def resolve_folder(
    model: str,
    read_model: Callable[[RawConfig], object] | None = None,
    revision: str | None = None,
) -> str:
    """Return the folder or GGUF file of a hub name, the folder of the built-in model, and any other
    ``model`` as it is. Folders are preferred.

    Config, tokenizer and templates are downloaded, and the weights if ``read_model``, the reader of
    a config.json, raises no ModelError. Raises HubError.
    """
    is_absent = not Path(model).exists()
    _check_kind(model, is_absent)
    if is_absent and (found := HUB_NAME.fullmatch(model)):
        from huggingface_hub import constants, errors

        try:
            return _fetch(found["name"], found["label"], revision, read_model)
        except (ImportError, errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
            cause = said_of(error.__cause__ or error).split("\n")[0].rstrip(".")
            raise HubError(
                f"There is no folder {model} here, and it cannot be loaded from "
                f"{constants.ENDPOINT} or the cache in {constants.HF_HUB_CACHE} "
                f"({cause or type(error).__name__}): check the name, --revision, the network and "
                "HF_HUB_OFFLINE; for a gated or private model accept its terms there, and log in "
                "with `hf auth login` or set HF_TOKEN."
            ) from None
    if revision is not None:
        raise HubError(
            f"--revision {revision} needs a model of the hub, as in --model ORG/NAME (got {model})."
        )
    return str(BUILTIN_DIR) if is_absent and model == BUILTIN_NAME else model


def _check_kind(model: str, is_absent: bool) -> None:
    """Raise HubError for names of models that other programs accept: what to use here."""
    url = re.match(r"https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)|[a-z][a-z0-9+]*://", model)
    if url:
        name = f"--model {url[1]}" if url[1] else "a folder, or ORG/NAME of the Hugging Face Hub"
        raise HubError(f"{model} is a URL, and models are not loaded from URLs: use {name}.")
    if is_absent and OLLAMA_NAME.fullmatch(model):
        raise HubError(
            f"{model} is a name of Ollama's library, which is not supported: use a folder, a GGUF "
            "file, or ORG/NAME of the Hugging Face Hub, as in Qwen/Qwen3-0.6B."
        )
    folder = Path(model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
        raise HubError(
            f"{model} is an adapter (LoRA), which is not supported: merge it into its base model "
            "with peft's merge_and_unload, and use the folder of the result."
        )


def _fetch(
    name: str,
    label: str | None,
    revision: str | None,
    read_model: Callable[[RawConfig], object] | None,
) -> str:
    """Return the folder, or the GGUF file, of ``name`` on the hub; see ``resolve_folder``. Before
    weights are downloaded, the model must be supported and fit on the disk."""
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    get: Any = partial(snapshot_download, name, revision=revision, ignore_patterns="*/*")
    if label is not None:
        return _fetch_gguf(name, label, revision, get)
    folder = Path(get(allow_patterns=SMALL_FILES))
    if not (folder / "config.json").is_file():
        return _fetch_gguf(name, label, revision, get)
    if read_model is None:
        return str(folder)
    weights = [WEIGHTS_NAME, *_weight_files(folder)]
    with suppress(errors.DryRunError):  # The hub is unreachable; the cache may have all.
        files: list[DryRunFileInfo] = get(allow_patterns=weights, dry_run=True)
        if not files:
            return _fetch_gguf(name, label, revision, get)
        if any(file.filename == WEIGHTS_NAME for file in files):
            weights = [WEIGHTS_NAME]
            files = [file for file in files if file.filename in weights]
        _announce(name, files, lambda: read_model(read_config(folder)))
    return str(get(allow_patterns=[*SMALL_FILES, *weights]))


def _fetch_gguf(name: str, label: str | None, revision: str | None, get: Any) -> str:
    """Return the first GGUF file of the model in ``name`` with this label, or of the usual one."""
    from huggingface_hub import HfApi, errors

    get = partial(get, ignore_patterns=None)
    try:
        files: list[DryRunFileInfo] = get(allow_patterns="*.gguf", dry_run=True)
        names = [file.filename for file in files]
    except errors.DryRunError:  # The hub is unreachable; the cache may have the model.
        files, cache = [], Path(get(allow_patterns=[]))
        names = [path.relative_to(cache).as_posix() for path in cache.rglob("*.gguf")]
    if not names:
        raise HubError(
            f"{name} has neither .safetensors files with a config.json nor GGUF files: choose "
            "another repository."
        )
    try:
        chosen = choose_files(names, name, label)
    except ModelError as error:
        fault = str(error).rstrip(".")
        raise HubError(f"{fault}, and write its format or name after {name}:") from None

    def check() -> None:
        facts = HfApi().model_info(name, revision=revision, expand=["gguf"]).gguf or {}
        if "architecture" in facts:
            check_architecture(str(facts["architecture"]), name)

    _announce(name, [file for file in files if file.filename in chosen], check)
    return str(Path(get(allow_patterns=chosen)) / chosen[0])


def _announce(name: str, files: Sequence[DryRunFileInfo], check: Callable[[], object]) -> None:
    """Print a line if some of the files have to be downloaded. Raises HubError if they do not fit
    on the disk, or if ``check`` raises ModelError."""
    from huggingface_hub import constants

    missing = [file for file in files if file.will_download]
    cache = Path(constants.HF_HUB_CACHE).absolute()
    folder = next(one for one in (cache, *cache.parents) if one.exists())
    to_load, free = sum(file.file_size or 0 for file in missing), shutil.disk_usage(folder).free
    if to_load > free:
        raise HubError(
            f"{name} needs {format_bytes(to_load)} more on the disk of {cache}, which has "
            f"{format_bytes(free)} free: make room, or set HF_HOME to a folder elsewhere."
        )
    if missing:
        try:
            check()
        except ModelError as error:
            raise HubError(f"{name} is not downloaded: {error}") from None
        commit, count = missing[0].commit_hash[:8], counted(len(missing), "file")
        line = f"Downloading {name} (commit {commit}): {format_bytes(to_load)} in {count}."
        print(line, file=sys.stderr, flush=True)


def _weight_files(folder: Path) -> list[str]:
    """List the weight files to load if there is no single one: those of the index. A repository may
    hold the same weights again, as ``consolidated.safetensors`` for example."""
    for name in INDEX_NAMES:
        # Loading reports the error, except for an absent index.
        with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            index = json.loads((folder / name).read_text(encoding="utf-8"))
            return sorted({*index["weight_map"].values()})
    return []
