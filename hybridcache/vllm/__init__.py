"""Plug-in for vLLM: ``--scheduler-cls hybridcache.vllm.HybridScheduler`` uses HybridRadixCache.

Importing this module imports neither vLLM nor torch. Settings are given to vLLM as
``--additional-config '{"hybridcache": {"placement": "adaptive"}}'``.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from contextlib import suppress
from json import JSONDecodeError
from math import inf
from typing import Any, NamedTuple

from hybridcache.policies.registry import (
    DEFAULT_EVICTION,
    DEFAULT_PLACEMENT,
    make_eviction,
    parse_placement,
)
from hybridcache.radix.tree import SESSION_END

NAME = "hybridcache"
"""Key of the settings in ``--additional-config``, and of the hints in ``extra_args``."""
TESTED = ("0.32", "0.33")
"""Minor versions of vLLM that the tests run with."""


class Settings(NamedTuple):
    """Value of ``additional_config["hybridcache"]``.

    >>> Settings.read({"hybridcache": {"eviction": "lru"}}).eviction
    'lru'
    >>> Settings.read({"hybridcache": {"evict": "lru"}})
    Traceback (most recent call last):
    ValueError: hybridcache has no setting 'evict'; known: eviction, placement.
    """

    eviction: str = DEFAULT_EVICTION
    """Name of the eviction policy."""
    placement: str = DEFAULT_PLACEMENT
    """Name of the placement of checkpoints."""

    @classmethod
    def read(cls, additional_config: Any) -> Settings:
        """Read the settings of vLLM's ``additional_config``. Raises ValueError for wrong ones."""
        given = additional_config.get(NAME, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise ValueError(f"the value of {NAME} must be a JSON object (got {given!r}).")
        for name in given.keys() - set(cls._fields):
            raise ValueError(f"{NAME} has no setting {name!r}; known: {', '.join(cls._fields)}.")
        settings = cls(**given)
        make_eviction(settings.eviction)
        parse_placement(settings.placement)
        return settings


def session_marks(extra_args: Mapping[str, Any], salt: str | None) -> tuple[str, float | None, str]:
    """Return the stop reason ("session_end" or ""), the seconds until the next turn, and the name
    of the session, from this project's hints or vLLM's ``agent_hint``. Wrong hints count as none.

    All tenants share one tree, whose keys contain the ``salt`` of a request. So does the name.

    >>> session_marks({"agent_hint": {"session": "a", "cache_ttl_ms": 500}}, "tenant")
    ('', 0.5, 'tenant/a')
    >>> session_marks({"hybridcache_session": "a", "hybridcache_session_end": True}, None)
    ('session_end', None, '/a')
    >>> session_marks({"agent_hint": 3, "hybridcache_session_end": "yes"}, None)
    ('', None, '')
    >>> session_marks({"agent_hint": {"release": True, "cache_ttl_ms": -1}}, None)
    ('session_end', None, '')
    """
    hints = extra_args.get("agent_hint")
    hints = hints if isinstance(hints, Mapping) else {}
    name = extra_args.get(f"{NAME}_session", hints.get("session"))
    ends = extra_args.get(f"{NAME}_session_end", hints.get("release"))
    within_s, ttl_ms = extra_args.get(f"{NAME}_returns_within_s"), hints.get("cache_ttl_ms")
    if within_s is None and isinstance(ttl_ms, int | float):
        within_s = ttl_ms / 1000
    is_valid = isinstance(within_s, int | float) and 0 <= within_s < inf
    reason = SESSION_END if ends is True else ""
    return reason, within_s if is_valid else None, f"{salt or ''}/{name}" if name else ""


def require_version(installed: str) -> None:
    """Raise RuntimeError unless ``installed`` is a tested version of vLLM.

    >>> require_version("0.33.0+cpu")
    >>> require_version("0.40.1")
    Traceback (most recent call last):
    RuntimeError: hybridcache works with vLLM 0.32 and 0.33 (installed: 0.40.1). Install one of these, or a newer hybridcache.
    """  # noqa: E501
    if ".".join(installed.split(".")[:2]) not in TESTED:
        raise RuntimeError(
            f"hybridcache works with vLLM {' and '.join(TESTED)} (installed: {installed}). Install "
            "one of these, or a newer hybridcache."
        )


def plug_in() -> None:
    """Check the settings of ``vllm serve`` before weights are loaded, if it uses this scheduler.

    vLLM calls this plug-in (``vllm.general_plugins``) in each of its processes. It resolves the
    scheduler class only after the weights are loaded. Raises ValueError for wrong settings.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--scheduler-cls", "--scheduler_cls")
    parser.add_argument("--additional-config", "--additional_config", default="{}")
    flags, _ = parser.parse_known_args(sys.argv[1:])
    if flags.scheduler_cls == f"{__name__}.HybridScheduler":
        with suppress(JSONDecodeError):  # vLLM names this mistake itself.
            Settings.read(json.loads(flags.additional_config))


def __getattr__(name: str) -> object:
    """Import the scheduler when vLLM resolves its name."""
    if name == "HybridScheduler":
        from hybridcache.vllm.scheduler import HybridScheduler

        return HybridScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
