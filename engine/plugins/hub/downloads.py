"""Downloads of models and tokenizers of the Hugging Face Hub.

Downloads use ``huggingface_hub``: its cache, ``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and
tokens apply. This module does not import torch. The check before a download runs in a separate
process, so no device context remains.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from engine.config import EngineConfig, HubError
from hybridcache.geometry.units import counted, format_bytes

Report = Callable[[str], object]
"""Called with one line before a download."""

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

SMALL_FILES = (
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
    "*.safetensors.index.json",
)
"""Files besides the weights that the engine reads, all in the top folder of a repository."""
CHECK_TIMEOUT_S = 300.0
CHECK = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from engine.plugins.hub.downloads import check; "
    "print(json.dumps(check(*json.loads(sys.argv[2]))))"
)


class _Unreachable(Exception):
    """The hub does not answer; the message completes a sentence that gives the reason."""


class _Listing(NamedTuple):
    """Files of one repository at one commit, with their sizes in bytes."""

    commit: str
    sizes: dict[str, int]


def fetch_small_files(name: str, revision: str | None = None) -> Path:
    """Return the folder of ``name`` with its config, tokenizer and templates. Raises HubError."""
    try:
        listing = _list_files(name, revision)
    except _Unreachable as error:
        return _cached_folder(name, revision, str(error), with_weights=False)
    return _download(name, revision, _small_files(listing.sizes))


def fetch_model(name: str, config: EngineConfig | None, report: Report) -> Path:
    """Return the folder of ``name`` with all files that the engine reads.

    Before weights are downloaded, the model must be of a supported family and fit on the disk. If
    ``config`` is given, it must also fit into the device's memory. A broken connection is resumed;
    after a failed download, complete files are kept. Raises HubError.
    """
    revision = None if config is None else config.revision
    if config is not None and config.load_format == "dummy":
        return fetch_small_files(name, revision)
    try:
        listing = _list_files(name, revision)
    except _Unreachable as error:
        return _cached_folder(name, revision, str(error), with_weights=True)
    if not any(_is_weights(file) for file in listing.sizes):
        others = sorted({Path(file).suffix for file in listing.sizes} & {".bin", ".gguf", ".pt"})
        has = f"; it has {', '.join(others)} files, which are not served" if others else ""
        raise HubError(f"{name} has no .safetensors files{has}: choose another repository.")
    if "config.json" not in listing.sizes:
        raise HubError(f"{name} has no config.json: choose a repository in Hugging Face form.")
    small = _small_files(listing.sizes)
    folder = _download(name, revision, small)
    weights = _weight_files(folder, listing.sizes)
    missing = [file for file in weights if not (folder / file).is_file()]
    if missing:
        _announce(name, folder, listing, weights, missing, config, report)
    return _download(name, revision, [*small, *weights], show_progress=bool(missing))


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


def _announce(
    name: str,
    folder: Path,
    listing: _Listing,
    weights: Sequence[str],
    missing: Sequence[str],
    config: EngineConfig | None,
    report: Report,
) -> None:
    """Report the size of a download and whether the model fits. Raises HubError if not."""
    to_load = sum(listing.sizes[file] for file in missing)
    free = shutil.disk_usage(folder).free
    if to_load > free:
        raise HubError(
            f"{name} needs {format_bytes(to_load)} more on the disk of {folder}, which has "
            f"{format_bytes(free)} free: make room, or set HF_HOME to a folder elsewhere."
        )
    line = (
        f"Downloading {name} (commit {listing.commit[:8]}): {format_bytes(to_load)} in "
        f"{counted(len(missing), 'file')}"
    )
    if len(missing) < len(weights):
        line += f"; {counted(len(weights) - len(missing), 'file')} of weights are here already"
    if config is not None:
        line += f". {_memory_words(name, folder, sum(map(listing.sizes.get, weights)), config)}"  # type: ignore[arg-type]
    report(f"{line.rstrip('.')}.")


def _memory_words(name: str, folder: Path, weights_bytes: int, config: EngineConfig) -> str:
    """Return a sentence on the share of device memory that the weights take. Raises HubError if it
    is too small."""
    facts = (str(folder), weights_bytes, config.device, config.dtype, config.quantization)
    command = [sys.executable, "-c", CHECK, json.dumps(sys.path), json.dumps(facts)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHECK_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise HubError(
            f"{name} could not be checked before its download in {CHECK_TIMEOUT_S:g} s: try again "
            "when this machine is less busy."
        ) from None
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise HubError(f"{name} could not be checked before its download: {last}") from None
    if "refusal" in found:
        raise HubError(f"{name} is not downloaded: {found['refusal']}")
    ranks = config.num_ranks if found["device"] != "cpu" else 1
    needed, free = found["needed_bytes"] / ranks, found["free_bytes"]
    each = "each of " if ranks > 1 else ""
    if needed > free:
        ways = "a smaller model, --quantization int8, or --tp"
        raise HubError(
            f"{name} is not downloaded: its weights take {format_bytes(needed)}, and "
            f"{found['device']} has {format_bytes(free)} free. Choose {ways}; "
            f"`hf download {name}` skips this check."
        )
    return (
        f"Its weights take about {format_bytes(needed)} of {format_bytes(free)} free on "
        f"{each}{found['device']}"
    )


def _is_weights(file: str) -> bool:
    return "/" not in file and file.endswith(".safetensors")


def _small_files(files: Iterable[str]) -> list[str]:
    return [
        file
        for file in files
        if "/" not in file and any(fnmatch(file, pattern) for pattern in SMALL_FILES)
    ]


def _weight_files(folder: Path, sizes: Iterable[str]) -> list[str]:
    """List the weight files to load: those of the index, or all if there is none.

    A repository may hold the same weights twice, as ``consolidated.safetensors`` for example.
    """
    every = sorted(filter(_is_weights, sizes))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            continue  # Loading reports the error.
        if named <= set(every):
            return sorted(named)
    return every


def _list_files(name: str, revision: str | None) -> _Listing:
    """List the files of ``name`` on the hub. Raises HubError, and _Unreachable."""
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        raise _Unreachable("HF_HUB_OFFLINE is set, so nothing is downloaded: unset it")
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except errors.HfHubHTTPError as error:
        if (refusal := _refusal(name, revision, error)) is not None:
            raise HubError(refusal) from None
        raise _Unreachable(f"{constants.ENDPOINT} answers {error.response.status_code}") from None
    except (errors.HTTPError, OSError):  # type: ignore[attr-defined]
        raise _Unreachable(
            f"{constants.ENDPOINT} cannot be reached: check the network, or HF_ENDPOINT"
        ) from None
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    return _Listing(info.sha or "", sizes)


def _refusal(name: str, revision: str | None, error: HfHubHTTPError) -> str | None:
    """Explain an error that would occur again, or return None for a temporary one."""
    from huggingface_hub import constants, errors

    log_in = "log in with `hf auth login` or set HF_TOKEN"
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name}, then {log_in}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}: give a branch, a tag or a commit."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"There is no folder {name} here, and {constants.ENDPOINT} has no model of that name "
            f"that this machine may read: check the name; for a private model {log_in}."
        )
    if status in (401, 403):
        return (
            f"{constants.ENDPOINT} refuses access to {name} ({status}) with the token of this "
            f"machine: {log_in}."
        )
    return None


def _download(
    name: str, revision: str | None, files: list[str], *, show_progress: bool = False
) -> Path:
    """Return the folder with ``files``, downloading those that are missing. Raises HubError."""
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hides_progress = not ((show_progress and sys.stderr.isatty()) or are_progress_bars_disabled())
    if hides_progress:
        disable_progress_bars()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except errors.HfHubHTTPError as error:
        if (refusal := _refusal(name, revision, error)) is not None:
            raise HubError(refusal) from None
        raise _broken_off(name, f"the hub answered {error.response.status_code}") from None
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise _broken_off(name, str(error).split("\n")[0] or type(error).__name__) from None
    finally:
        if hides_progress:
            enable_progress_bars()


def _cached_folder(name: str, revision: str | None, why: str, *, with_weights: bool) -> Path:
    """Return the folder of ``name`` in the cache. Raises HubError with the reason ``why`` the hub
    is unreachable if files are missing."""
    from huggingface_hub import constants, errors, get_cached_repo_tree, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except errors.IncompleteSnapshotError as error:  # Also for missing files not used here.
        folder = Path(error.snapshot_path)
    except errors.LocalEntryNotFoundError:
        raise HubError(
            f"There is no folder {name} here, the cache in {constants.HF_HUB_CACHE} does not have "
            f"that model, and {why}."
        ) from None
    files = [file.path for file in get_cached_repo_tree(name, revision=revision)]
    wanted = _small_files(files) + (_weight_files(folder, files) if with_weights else [])
    if missing := [file for file in wanted if not (folder / file).is_file()]:
        raise HubError(
            f"The cache in {constants.HF_HUB_CACHE} has {name} without "
            f"{', '.join(missing[:3])}{' ...' if missing[3:] else ''}, and {why}."
        )
    return folder


def _broken_off(name: str, why: str) -> HubError:
    return HubError(
        f"The download of {name} broke off ({why.rstrip('.')}). Run the same command again: "
        "complete files are kept."
    )
