"""Plug-in for vLLM: ``--scheduler-cls hybridcache.vllm.HybridScheduler`` uses HybridRadixCache.

Importing this module imports neither vLLM nor torch. Settings are given to vLLM as
``--additional-config '{"hybridcache": {"placement": "adaptive"}}'``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT

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
        """Read the settings of vLLM's ``additional_config``. Raises ValueError for unknown ones."""
        given = additional_config.get(NAME, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise ValueError(f"the value of {NAME} must be a JSON object (got {given!r}).")
        for name in given.keys() - set(cls._fields):
            raise ValueError(f"{NAME} has no setting {name!r}; known: {', '.join(cls._fields)}.")
        return cls(**given)


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


def __getattr__(name: str) -> object:
    """Import the scheduler when vLLM resolves its name."""
    if name == "HybridScheduler":
        from hybridcache.vllm.scheduler import HybridScheduler

        return HybridScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
