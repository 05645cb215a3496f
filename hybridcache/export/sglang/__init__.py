"""HybridRadixCache inside SGLang: ``--radix-cache-backend hybridcache``.

SGLang calls ``plug_in`` through the entry-point group ``sglang.srt.plugins``; nothing of SGLang or
torch is imported before. The page for its users is ``README.md`` beside this file.
"""

from __future__ import annotations

from typing import Any

NAME = "hybridcache"
"""What ``--radix-cache-backend`` takes."""

PLAIN_LRU = "plain-lru"
"""Least recently used, by a name that is not SGLang's default."""
ADDED_EVICTION = ("regret", PLAIN_LRU)
"""Names that ``--radix-eviction-policy`` takes from then on, next to SGLang's own."""


def eviction_name(asked: str) -> str:
    """Return this project's name of the eviction policy that ``--radix-eviction-policy`` names.

    ``lru`` is SGLang's default, which cannot be told from an explicit ``lru``: it stands for this
    project's default. ``plain-lru`` is LRU.

    >>> [eviction_name(asked) for asked in ("lru", "plain-lru", "slru")]
    ['regret', 'lru', 'slru']
    """
    from hybridcache.policies.words import DEFAULT_EVICTION

    return {"lru": DEFAULT_EVICTION, PLAIN_LRU: "lru"}.get(asked, asked)


def plug_in() -> None:
    """Make the backend and its eviction words known to SGLang, in this process."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.mem_cache import registry

    registry.register_radix_cache_backend(NAME, _build)
    choices.add_radix_eviction_policy_choices(
        [word for word in ADDED_EVICTION if word not in choices.RADIX_EVICTION_POLICY_CHOICES]
    )


def _build(ctx: Any) -> Any:
    """The factory, whose module only a scheduler needs."""
    from hybridcache.export.sglang.build import build_backend

    return build_backend(ctx)
