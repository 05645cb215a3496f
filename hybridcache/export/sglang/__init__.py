"""Plug-in for SGLang: ``--radix-cache-backend hybridcache`` uses HybridRadixCache.

SGLang calls ``plug_in`` through the entry-point group ``sglang.srt.plugins``. Importing this module
imports neither SGLang nor torch. ``README.md`` in this folder is the user documentation.
"""

from __future__ import annotations

from typing import Any

NAME = "hybridcache"
"""Value of ``--radix-cache-backend``."""

PLAIN_LRU = "plain-lru"
"""Least recently used, under a name that differs from SGLang's default."""
ADDED_EVICTION = ("survival", "regret", PLAIN_LRU)
"""Values added to ``--radix-eviction-policy``. ``regret`` is a former name of ``survival``."""


def eviction_name(asked: str) -> str:
    """Translate a value of ``--radix-eviction-policy`` into this project's policy name.

    ``lru`` is SGLang's default and cannot be distinguished from an explicit ``lru``. It is
    translated to this project's default. ``plain-lru`` is LRU.

    >>> [eviction_name(asked) for asked in ("lru", "plain-lru", "slru")]
    ['survival', 'lru', 'slru']
    """
    from hybridcache.policies.registry import DEFAULT_EVICTION

    names = {"lru": DEFAULT_EVICTION, PLAIN_LRU: "lru", "regret": "survival"}
    return names.get(asked, asked)


def plug_in() -> None:
    """Register the backend and its eviction policies with SGLang, in this process."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.mem_cache import registry

    registry.register_radix_cache_backend(NAME, _build)
    choices.add_radix_eviction_policy_choices(
        [name for name in ADDED_EVICTION if name not in choices.RADIX_EVICTION_POLICY_CHOICES]
    )


def _build(ctx: Any) -> Any:
    """Build the backend. Its module is imported lazily, because only schedulers need it."""
    from hybridcache.export.sglang.build import build_backend

    return build_backend(ctx)
