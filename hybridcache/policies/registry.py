"""Policy registry: names of eviction, placement and admission policies, and their parser.

>>> from hybridcache.radix.protocol import Prefill
>>> prefill = Prefill(1000, cached_len=0, kv_match_len=0, seen_len=300, boundaries=(996,), grid=64)
>>> planned = prefill.on_grid(parse_placement("branch,boundary,backoff,every:512").plan(prefill))
>>> [(placed.position, placed.label) for placed in planned]
[(256, 'branch'), (960, 'boundary'), (512, 'every')]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from typing import Any, NamedTuple

from hybridcache.command.parser import or_known
from hybridcache.policies import admission, placement
from hybridcache.policies.eviction.fifo import FIFO
from hybridcache.policies.eviction.gdsf import GDSF
from hybridcache.policies.eviction.lhd import LHD
from hybridcache.policies.eviction.lru import LRU
from hybridcache.policies.eviction.marconi import Marconi
from hybridcache.policies.eviction.sieve import BothKinds, Sieve
from hybridcache.policies.eviction.survival import Survival
from hybridcache.policies.user import OwnPolicy, factory_of, load
from hybridcache.radix.protocol import EvictionPolicy, PlacementPolicy
from hybridcache.scheduling.request import AdmissionPolicy

EvictionSpec = str | OwnPolicy | EvictionPolicy | Callable[[], EvictionPolicy]
"""Policy name, ``module:Class`` or ``module:Class(alpha=2)``, a class, a factory function, or an
instance (copied for each cache)."""
AdmissionSpec = str | OwnPolicy | AdmissionPolicy | Callable[[], AdmissionPolicy]
PlacementSpec = str | OwnPolicy | PlacementPolicy | Callable[[], PlacementPolicy]


DEFAULT_EVICTION = "survival"
"""Eviction policy if none is named. It takes more CPU time per request than ``lru``, and hits more
(``hybridcache/README.md``)."""
DEFAULT_PLACEMENT = "adaptive"
"""Checkpoint placement if none is named."""


class NamedPolicy(NamedTuple):
    """One policy name."""

    make: Callable[..., Any]
    counts: str = ""
    """Unit of the number in ``name:number``. Empty if the name takes no number."""
    example: str = ""
    """Example of the number, if it is required."""


EVICTION_NAMES: dict[str, NamedPolicy] = {
    "lru": NamedPolicy(LRU),
    "fifo": NamedPolicy(FIFO),
    "sieve": NamedPolicy(partial(BothKinds, Sieve)),
    "gdsf": NamedPolicy(GDSF),
    "lhd": NamedPolicy(LHD),
    "marconi": NamedPolicy(Marconi, "alpha"),
    "survival": NamedPolicy(Survival),
}
"""Names for ``CacheConfig.eviction``. Simulations have more (``hybridcache/lab/rivals``)."""
SIMULATED = "arc", "clock", "lfu", "random", "s3-fifo", "w-tinylfu"
"""Names of eviction policies that only simulations have."""

PLACEMENT_NAMES: dict[str, NamedPolicy] = {
    "end": NamedPolicy(placement.End),
    "branch": NamedPolicy(placement.Branch),
    "boundary": NamedPolicy(placement.Boundary),
    "backoff": NamedPolicy(placement.Backoff, "checkpoints"),
    "adaptive": NamedPolicy(placement.Adaptive),
    "every": NamedPolicy(placement.Every, "tokens", "1024"),
}
"""Names of checkpoint placement rules, combined with commas."""

ADMISSION_NAMES: dict[str, NamedPolicy] = {
    "oldest": NamedPolicy(admission.Oldest),
    "cached-first": NamedPolicy(admission.CachedFirst),
    "longest-match": NamedPolicy(admission.LongestMatch),
    "sessions": NamedPolicy(admission.SessionGate, "seconds"),
    "live": NamedPolicy(admission.LiveSessions, "sessions", "16"),
}
"""Names of admission policies."""


def known_names(table: Mapping[str, NamedPolicy]) -> list[str]:
    """Return the names of ``table``, as ``name:N`` if a number is possible."""
    plain = [name for name, entry in table.items() if not entry.example]
    return [*plain, *(f"{name}:N" for name, entry in table.items() if entry.counts)]


def make_eviction(
    spec: EvictionSpec, names: Mapping[str, NamedPolicy] = EVICTION_NAMES
) -> Callable[[], EvictionPolicy]:
    """Return a factory of the eviction policy that ``spec`` names, makes or is. Raises ValueError
    if it is none of ``names``, or the class does not fit."""
    return _maker("eviction policy", names, spec, EvictionPolicy)


def parse_placement(spec: PlacementSpec) -> PlacementPolicy:
    """Parse a placement such as ``"branch,boundary,backoff,every:1024"``, or a user's policy given
    as a class, a factory function or an instance. ``"none"`` (alone) saves nothing.

    Raises:
        ValueError: a name is unknown, or its number is missing, superfluous or wrong.
    """
    if not isinstance(spec, str):
        own: PlacementPolicy = factory_of(spec, PlacementPolicy)()
        return own
    if spec.strip() == "none":
        return placement.Placement(())
    parts = split_specs(spec)
    if "" in parts:
        raise ValueError(f"{spec!r} has an empty name between its commas: leave out the comma")
    if "none" in parts:
        raise ValueError(f"{spec!r}: none saves nothing, so it must be alone")
    rules: list[PlacementPolicy] = [
        _maker("checkpoint placement", PLACEMENT_NAMES, part, PlacementPolicy)() for part in parts
    ]
    return rules[0] if len(rules) == 1 else placement.Placement(tuple(rules))


def make_admission(spec: AdmissionSpec) -> AdmissionPolicy:
    """Return a new admission policy that ``spec`` names, makes or is. Raises ValueError if the name
    is unknown or the class does not fit."""
    policy: AdmissionPolicy = _maker("admission policy", ADMISSION_NAMES, spec, AdmissionPolicy)()
    return policy


def split_specs(text: str) -> list[str]:
    """Split at commas outside parentheses. Empty parts are kept.

    >>> split_specs("lru, mine:Class(a=1, b=2),marconi:2")
    ['lru', 'mine:Class(a=1, b=2)', 'marconi:2']
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _maker(
    what: str, table: Mapping[str, NamedPolicy], spec: object, protocol: type[Any]
) -> Callable[[], Any]:
    """Return the factory for a name of ``table``, ``module:Class``, or a user's object."""
    if not isinstance(spec, str):
        return factory_of(spec, protocol)
    if protocol is EvictionPolicy and "@" in spec.rpartition(")")[2]:
        raise ValueError(
            f"{what} {spec!r}: only benchmark and leaderboard take eviction@placement; here "
            "checkpoints (--checkpoints) names the placement"
        )
    name, colon, number = spec.partition(":")
    entry = table.get(name)
    if entry is None:
        if colon and not number.isdecimal():
            return factory_of(load(spec, protocol), protocol)
        if name in SIMULATED and protocol is EvictionPolicy:
            raise ValueError(f"{what} {name!r} is for simulations only; known: {', '.join(table)}")
        known = [*known_names(table), *["none"] * (table is PLACEMENT_NAMES)]
        raise ValueError(f"unknown {what} {name!r}{or_known(name, known)}, or module:Class")
    if not colon and not entry.example:
        make: Callable[[], Any] = entry.make
        return make
    if not entry.counts:
        raise ValueError(
            f"{what} {name!r} takes no number (got {spec!r}): rename a module of this name"
        )
    least = 0 if entry.counts == "alpha" else 1
    try:
        value = (int if least else float)(number)
    except ValueError:
        value = -1
    if not least <= value < inf:
        raise ValueError(
            f"{what} {name!r} needs a {'whole ' * least}number of at least {least} "
            f"({entry.counts}), as in {name}:{entry.example or least}, got {spec!r}"
        )
    return partial(entry.make, value)
