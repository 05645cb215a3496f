"""Published traces, and their download into the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from hybridcache.lab.progress import Progress, shown_progress

_GITHUB = "https://raw.githubusercontent.com"
_MOONCAKE = f"{_GITHUB}/kvcache-ai/Mooncake/main/FAST25-release/traces"
_BAILIAN = f"{_GITHUB}/alibaba-edu/qwen-bailian-usagetraces-anon/main"
CHUNK_BYTES = 1 << 16
TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Published:
    """One trace that others publish."""

    content: str
    word: str
    """Reader of the format."""
    address: str
    licence: str
    sha256: str = ""
    """Checksum of the file, or empty if no copy was available to compute it."""

    @property
    def file_name(self) -> str:
        return self.address.rpartition("/")[2]


PUBLISHED = {
    "mooncake-conversation": Published(
        "12,031 requests of a chat service, block hashes",
        "mooncake",
        f"{_MOONCAKE}/conversation_trace.jsonl",
        "Apache-2.0",
        "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
    ),
    "mooncake-toolagent": Published(
        "23,608 requests of tool agents, block hashes",
        "mooncake",
        f"{_MOONCAKE}/toolagent_trace.jsonl",
        "Apache-2.0",
    ),
    "mooncake-synthetic": Published(
        "3,993 synthetic requests, block hashes",
        "mooncake",
        f"{_MOONCAKE}/synthetic_trace.jsonl",
        "Apache-2.0",
    ),
    "bailian-chat": Published(
        "two hours of a chat service, block hashes",
        "bailian",
        f"{_BAILIAN}/qwen_traceA_blksz_16.jsonl",
        "Apache-2.0",
    ),
    "bailian-api": Published(
        "two hours of an API service, block hashes",
        "bailian",
        f"{_BAILIAN}/qwen_traceB_blksz_16.jsonl",
        "Apache-2.0",
    ),
    "bailian-coder": Published(
        "requests to a coding model, block hashes",
        "bailian",
        f"{_BAILIAN}/qwen_coder_blksz_16.jsonl",
        "Apache-2.0",
    ),
    "bailian-thinking": Published(
        "requests to a reasoning model, block hashes",
        "bailian",
        f"{_BAILIAN}/qwen_thinking_blksz_16.jsonl",
        "Apache-2.0",
    ),
    "taubench-airline": Published(
        "200 trajectories of a tool agent, texts",
        "taubench",
        f"{_GITHUB}/sierra-research/tau-bench/main/historical_trajectories/gpt-4o-airline.json",
        "MIT",
        "e9e6c0297660c537f83d4fd9c476ce7a9a86ecd2784874b7bfc13be598e37bfa",
    ),
}
"""Published traces by name."""


def find_published(name: str) -> Published:
    """Return the trace called ``name``. Raises ValueError with all names if there is none."""
    if name not in PUBLISHED:
        raise ValueError(f"There is no published trace {name!r}; known: {', '.join(PUBLISHED)}.")
    return PUBLISHED[name]


def path_of(name: str) -> Path:
    """Return the path of a published trace in the user's cache folder, fetched or not."""
    published = find_published(name)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hybridcache" / "traces" / name / published.file_name


def fetch(name: str, *, progress: Progress = None) -> Path:
    """Download a published trace unless it is in the cache folder, and return its path.

    ``progress`` is a function of (bytes done, all), False for none, or None for a bar in terminals
    and notebooks. After a failure nothing is left behind. Raises ValueError for an unknown name,
    OSError if the download fails, is incomplete, or has another checksum.
    """
    published, path = find_published(name), path_of(name)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    number, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with open(number, "wb") as file, shown_progress(progress, "bytes", name) as show:
            digest = _download(published.address, file.write, show)
        if published.sha256 and digest != published.sha256:
            raise OSError(
                f"{published.address} has the checksum {digest}, expected {published.sha256}: it "
                "has changed, or something on the way changed it"
            )
        os.replace(part, path)
    except (OSError, HTTPException) as error:
        raise OSError(f"trace {name} was not fetched: {error}") from error
    finally:
        Path(part).unlink(missing_ok=True)
    return path


def _download(
    address: str, write: Callable[[bytes], object], show: Callable[[int, int], None]
) -> str:
    """Pass the content of ``address`` to ``write`` and return its SHA-256. OSError if it ends
    early."""
    hashed, done = hashlib.sha256(), 0
    with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response:
        total = int(response.headers.get("Content-Length") or 0)
        while chunk := response.read(CHUNK_BYTES):
            hashed.update(chunk)
            write(chunk)
            done += len(chunk)
            show(done, total)
    if total and done != total:
        raise OSError(f"{address} ended after {done:,} of {total:,} bytes")
    return hashed.hexdigest()
