"""Plug-in for SGLang: ``--radix-cache-backend hybridcache`` uses HybridRadixCache.

SGLang calls ``plug_in`` through the entry-point group ``sglang.srt.plugins``. Importing this module
imports neither SGLang nor torch. ``README.md`` in this folder is the user documentation.
"""

from __future__ import annotations

NAME = "hybridcache"
"""Value of ``--radix-cache-backend``."""


def plug_in() -> None:
    """Register the backend and its eviction policies with SGLang, in this process."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.mem_cache import registry

    from hybridcache.sglang.translation import ADDED_EVICTION

    registry.register_radix_cache_backend(NAME, _build)
    choices.add_radix_eviction_policy_choices(
        [name for name in ADDED_EVICTION if name not in choices.RADIX_EVICTION_POLICY_CHOICES]
    )


def _build(ctx: object) -> object:
    """Build the backend. Its module is imported lazily, because only schedulers need it."""
    from hybridcache.sglang.cache import build_backend

    return build_backend(ctx)
