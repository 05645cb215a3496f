"""Names of the published distributions and of their extras, and the commands that install them.

The distributions are not called like the packages: the index has an unrelated one of that name.
"""

from __future__ import annotations

import re
from contextlib import suppress
from importlib import metadata

CACHE_DISTRIBUTION = "hybrid-radix-cache"
"""Distribution that holds ``hybridcache``."""
ENGINE_DISTRIBUTION = "hybrid-radix-engine"
"""Distribution that holds ``engine`` and ``kernels``, and depends on the other."""

IMPORT_NAMES = {"pyzmq": "zmq"}
"""Import names of packages that are called otherwise than their distribution."""


def version() -> str:
    """Return the version of the installed distribution; "unknown" if it runs uninstalled."""
    try:
        return metadata.version(CACHE_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


def extras_of(package: str) -> list[str]:
    """Return the extras, except ``dev``, that install the package with this import name, as the
    installed distributions declare them. ``engine`` stands for the engine's distribution."""
    found: list[str] = []
    for distribution, own in ((ENGINE_DISTRIBUTION, ["engine"]), (CACHE_DISTRIBUTION, [])):
        with suppress(metadata.PackageNotFoundError):
            for line in metadata.requires(distribution) or ():
                declared = re.fullmatch(r"([\w.-]+)[^;]*(;.*\bextra == .(?!dev)([\w-]+).)?", line)
                if declared is not None:
                    name = declared[1].replace("-", "_").lower()
                    extras = [declared[3]] if declared[2] else own
                    found += extras * (package == IMPORT_NAMES.get(name, name))
    return found


def how_to_install(error: ModuleNotFoundError, prefer: str | None = None) -> str:
    """Explain a missing package in one sentence. ``prefer`` is the extra to name if it has it.

    >>> missing = ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken.core")
    >>> how_to_install(missing).endswith("[lab]'")
    True
    """
    package = (error.name or "").split(".")[0]
    extras = extras_of(package)
    if not extras:
        return str(error)
    extra = prefer if prefer in extras else extras[0]
    if extra == "engine":
        return f"{package} is not installed: pip install {_source(ENGINE_DISTRIBUTION)}"
    return f"{package} is not installed: pip install '{_source(CACHE_DISTRIBUTION)}[{extra}]'"


def _source(distribution: str) -> str:
    """Return the folder or file from which a distribution was installed, or its name if that was
    an index."""
    with suppress(metadata.PackageNotFoundError):
        url = metadata.distribution(distribution).read_text("direct_url.json") or ""
        if found := re.search(r'"url": *"file://([^"]*)"', url):
            return found[1]
    return distribution
