"""Names of models and tokenizers: folders, the built-in model, or ``ORG/NAME`` on the Hugging Face
Hub.

Downloads use ``huggingface_hub``: its cache, ``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and
tokens apply. Interrupted downloads are resumed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from engine.config import BUILTIN_DIR, BUILTIN_NAME, EngineConfig, HubError
from engine.weights.layer_names import INDEX_NAMES
from hybridcache.geometry.units import counted, format_bytes

SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "quant_model_description.json",
    "hf_quant_config.json",
    *INDEX_NAMES,
]
"""Files besides the weights that the engine reads, all in the top folder of a repository."""
CHECK_TIMEOUT_S = 300.0
CHECK = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from engine.hub import check; print(json.dumps(check(*json.loads(sys.argv[2]))))"
)
"""Program that runs ``check`` in a process of its own, so that no device context remains."""

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
        has_weights = config.load_format != "dummy"
        model = str(_fetch(model, config, report or _to_stderr, with_weights=has_weights))
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
    # Models that are only converted do not have to fit into memory.
    return str(_fetch(model, None, report or _to_stderr, with_weights=with_weights))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fetch(
    name: str,
    config: EngineConfig | None,
    report: Callable[[str], object],
    *,
    with_weights: bool,
) -> Path:
    """Return the folder of ``name`` on the hub with its config, tokenizer and templates, and
    ``with_weights`` with all files that the engine reads.

    Before weights are downloaded, they must fit on the disk. If ``config`` is given, the model must
    be of a supported family and fit into the device's memory. Raises HubError.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """Progress bar that is hidden outside of a terminal."""

        def __init__(self, *values: Any, **options: Any) -> None:
            options = {"disable": None} | options
            super().__init__(*values, **options)  # type: ignore[no-untyped-call]

    revision = None if config is None else config.revision
    get = partial(snapshot_download, name, revision=revision, ignore_patterns="*/*", tqdm_class=Bar)
    with _in_sentences(name, revision):
        folder = Path(str(get(allow_patterns=SMALL_FILES)))
        if not with_weights:
            return folder
        if not (folder / "config.json").is_file():
            raise HubError(f"{name} has no config.json: choose a repository in Hugging Face form.")
        weights = _weight_files(folder)
        with suppress(errors.DryRunError):  # The hub is unreachable; the cache may have all.
            files: Any = get(allow_patterns=weights, dry_run=True)
            if not files:
                raise HubError(f"{name} has no .safetensors files: choose another repository.")
            if any(file.will_download for file in files):
                _announce(name, folder, files, config, report)
        return Path(str(get(allow_patterns=[*SMALL_FILES, *weights])))


def _weight_files(folder: Path) -> list[str]:
    """List the weight files to load: those of the index, or all if there is none.

    A repository may hold the same weights twice, as ``consolidated.safetensors`` for example.
    """
    for name in INDEX_NAMES:
        # Loading reports the error, except for an absent index.
        with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            index = json.loads((folder / name).read_text(encoding="utf-8"))
            return sorted({*index["weight_map"].values()})
    return ["*.safetensors"]


def _announce(
    name: str,
    folder: Path,
    files: Sequence[Any],
    config: EngineConfig | None,
    report: Callable[[str], object],
) -> None:
    """Report the size of a download and whether the model fits. Raises HubError if not."""
    missing = [file for file in files if file.will_download]
    to_load, free = sum(file.file_size for file in missing), shutil.disk_usage(folder).free
    if to_load > free:
        raise HubError(
            f"{name} needs {format_bytes(to_load)} more on the disk of {folder}, which has "
            f"{format_bytes(free)} free: make room, or set HF_HOME to a folder elsewhere."
        )
    line = (
        f"Downloading {name} (commit {missing[0].commit_hash[:8]}): {format_bytes(to_load)} in "
        f"{counted(len(missing), 'file')}"
    )
    if num_there := len(files) - len(missing):
        line += f"; {counted(num_there, 'file')} of weights are here already"
    if config is not None:
        line += f". {_memory_words(name, folder, sum(file.file_size for file in files), config)}"
    report(f"{line}.")


def check(
    folder: str, weights_bytes: int, device: str | None, dtype: str, quantization: str | None
) -> dict[str, object]:
    """Check from its ``config.json`` whether a model can be served. Imports torch.

    Returns ``{"refusal": sentence}`` for a model that is not supported, and otherwise the name of
    the device, the free bytes of its memory and the bytes that the weights take there.
    """
    from engine.models import read_model
    from engine.runner.device import Device
    from engine.runner.loading import DTYPES, resolve_dtype
    from engine.weights.model_config import ModelError, read_config

    try:
        _, model = read_model(read_config(Path(folder)))
        chosen = Device.resolve(device)
        run_bytes = resolve_dtype(dtype, model, chosen).itemsize
    except ModelError as error:
        return {"refusal": str(error)}
    file_bytes = DTYPES[model.dtype].itemsize if model.dtype in DTYPES else 2
    needed = weights_bytes * (1 if quantization else run_bytes) / file_bytes
    name = "cpu" if chosen.is_cpu else str(chosen.torch_device)
    return {"device": name, "free_bytes": chosen.free_bytes(), "needed_bytes": int(needed)}


def _memory_words(name: str, folder: Path, weights_bytes: int, config: EngineConfig) -> str:
    """Return a sentence on the share of device memory that the weights take. Raises HubError if it
    is too small."""
    facts = (str(folder), weights_bytes, config.device, config.dtype, config.quantization)
    command = [sys.executable, "-c", CHECK, json.dumps(sys.path), json.dumps(facts)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S)
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise HubError(
            f"{name} could not be checked before its download in {CHECK_TIMEOUT_S:g} s: try again "
            "when this machine is less busy."
        ) from None
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise HubError(f"{name} could not be checked before its download: {last}") from None
    if "refusal" in found:
        raise HubError(f"{name} is not downloaded: {found['refusal']}")
    ranks = config.num_ranks if found["device"] != "cpu" else 1
    needed, free = found["needed_bytes"] / ranks, found["free_bytes"]
    if needed > free:
        raise HubError(
            f"{name} is not downloaded: its weights take {format_bytes(needed)}, and "
            f"{found['device']} has {format_bytes(free)} free. Choose a smaller model, "
            f"--quantization int8, or --tp; `hf download {name}` skips this check."
        )
    return f"Its weights take about {format_bytes(needed)} of {format_bytes(free)} free on " + (
        f"each of {found['device']}" if ranks > 1 else found["device"]
    )


@contextmanager
def _in_sentences(name: str, revision: str | None) -> Iterator[None]:
    """Raise HubError with one sentence for the errors of the library."""
    from huggingface_hub import constants, errors

    where, log_in = constants.ENDPOINT, "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError:
        why = f"{name} is gated: accept its terms at {where}/{name}, then {log_in}."
    except errors.RevisionNotFoundError:
        why = f"{name} has no revision {revision!r}: give a branch, a tag or a commit."
    except errors.RepositoryNotFoundError:
        why = (
            f"There is no folder {name} here, and {where} has no model of that name that this "
            f"machine may read: check the name; for a private model {log_in}."
        )
    except errors.LocalEntryNotFoundError as error:  # Also an incomplete snapshot.
        has = (
            "does not have all files of"
            if isinstance(error, errors.IncompleteSnapshotError)
            else "does not have"
        )
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            reason = f"{where} answers {cause.response.status_code}"
        elif constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it"
        else:
            reason = f"{where} cannot be reached: check the network, or HF_ENDPOINT"
        why = (
            f"There is no folder {name} here, the cache in {constants.HF_HUB_CACHE} {has} that "
            f"model, and {reason}."
        )
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        response = getattr(error, "response", None)
        status = None if response is None else response.status_code
        said = str(error).split("\n")[0] if status is None else f"the hub answered {status}"
        why = (
            f"The download of {name} broke off ({said.rstrip('.') or type(error).__name__}). Run "
            "the same command again: complete files are kept."
        )
        if status in (401, 403):
            why = (
                f"{where} refuses access to {name} ({status}) with this machine's token: {log_in}."
            )
    else:
        return
    raise HubError(why) from None
