"""Plug-in for SGLang: ``--radix-cache-backend hybridcache`` uses HybridRadixCache.

SGLang calls ``plug_in`` through the entry-point group ``sglang.srt.plugins``. Importing this module
imports neither SGLang nor torch. ``README.md`` in this folder is the user documentation.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

NAME = "hybridcache"
"""Value of ``--radix-cache-backend``."""
TESTED = ("0.5.23", "0.5.22")
"""Versions of SGLang that ``make sglang`` has passed with."""
logger = logging.getLogger("hybridcache.sglang")


def version_note() -> str:
    """Return a sentence if the installed SGLang is not a tested version, else an empty string."""
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        installed = "an unknown version"
    if installed in TESTED:
        return ""
    return (
        f"hybridcache is tested with SGLang {', '.join(TESTED)}, and {installed} is installed: "
        "install a tested version, or drop --radix-cache-backend hybridcache if it fails."
    )


def plug_in() -> None:
    """Register the backend and its eviction policies with SGLang, in this process.

    Without the flag, another version of SGLang is not affected: what does not fit is logged.
    """
    try:
        _register()
    except (ImportError, AttributeError) as error:
        logger.warning("%s (%s)", version_note() or "hybridcache is not registered.", error)


def _register() -> None:
    from sglang.srt.arg_groups import choices
    from sglang.srt.mem_cache import registry

    from hybridcache.sglang.translation import ADDED_EVICTION

    registry.register_radix_cache_backend(NAME, _build)
    choices.add_radix_eviction_policy_choices(
        [name for name in ADDED_EVICTION if name not in choices.RADIX_EVICTION_POLICY_CHOICES]
    )


def _build(ctx: object) -> object:
    """Build the backend. Its module is imported lazily, because only schedulers need it.

    Raises ValueError if the interface of an untested version differs.
    """
    note = version_note()
    if note:
        logger.warning(note)
    try:
        from hybridcache.sglang.cache import build_backend

        return build_backend(ctx)
    except (ImportError, AttributeError, TypeError) as error:
        if not note:
            raise
        raise ValueError(f"{note} ({type(error).__name__}: {error})") from error
