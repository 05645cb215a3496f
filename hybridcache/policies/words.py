"""Policy registry: names of eviction, placement and admission policies, and their parser.

>>> from hybridcache.policies.protocol import Prefill
>>> prefill = Prefill(1000, cached_len=0, kv_len=0, branch_len=300, boundaries=(996,), grid=64)
>>> prefill.on_grid(parse_placement("branch,boundary,backoff,every:512").plan(prefill))
{256: 'branch', 960: 'boundary', 512: 'every'}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

from hybridcache.policies.admission.base import AdmissionPolicy
from hybridcache.policies.admission.live import Live
from hybridcache.policies.admission.matched import CachedFirst, LongestMatch, Window
from hybridcache.policies.admission.oldest import Oldest
from hybridcache.policies.admission.session_gate import SessionGate
from hybridcache.policies.eviction.arc import ARC
from hybridcache.policies.eviction.class_age import ClassAge
from hybridcache.policies.eviction.clock import Clock
from hybridcache.policies.eviction.coverage import Coverage
from hybridcache.policies.eviction.fifo import FIFO
from hybridcache.policies.eviction.gdsf import GDSF
from hybridcache.policies.eviction.hits_per_token import HitsPerToken
from hybridcache.policies.eviction.hyperbolic import Hyperbolic
from hybridcache.policies.eviction.lfu import LFU
from hybridcache.policies.eviction.lhd import LHD
from hybridcache.policies.eviction.lru import LRU
from hybridcache.policies.eviction.marconi import Marconi
from hybridcache.policies.eviction.random_choice import Random
from hybridcache.policies.eviction.regret import Regret
from hybridcache.policies.eviction.s3_fifo import S3Fifo
from hybridcache.policies.eviction.seglen import SegLen
from hybridcache.policies.eviction.sieve import Sieve
from hybridcache.policies.eviction.slru import SLRU
from hybridcache.policies.eviction.tail_lru import TailLRU
from hybridcache.policies.eviction.ttl import TTL
from hybridcache.policies.eviction.two_queue import TwoQueue
from hybridcache.policies.eviction.w_tiny_lfu import WTinyLFU
from hybridcache.policies.placement.by_length import (
    Aligned,
    Balanced,
    Chunks,
    Dyadic,
    Sqrt,
    Thinned,
)
from hybridcache.policies.placement.learned import Learned
from hybridcache.policies.placement.planned import Planned
from hybridcache.policies.placement.rules import (
    Backoff,
    Boundary,
    Branch,
    End,
    Every,
    Placement,
    Prompt,
)
from hybridcache.policies.protocol import EvictionPolicy, PlacementPolicy
from hybridcache.policies.user import OwnPolicy, admission_of, eviction_of, load, placement_of

EvictionSpec = str | OwnPolicy | EvictionPolicy | Callable[[], EvictionPolicy]
"""Policy name, ``module:Class`` or ``module:Class(alpha=2)``, a class, a factory function, or an
instance (copied for each cache)."""
AdmissionSpec = str | OwnPolicy | AdmissionPolicy | Callable[[], AdmissionPolicy]
PlacementSpec = str | OwnPolicy | PlacementPolicy | Callable[[], PlacementPolicy]


DEFAULT_EVICTION = "regret"
"""Eviction policy if none is named. It takes more CPU time per request than ``lru``, and hits more
(``hybridcache/README.md``)."""
DEFAULT_PLACEMENT = "regret"
"""Checkpoint placement if none is named."""


class Word(NamedTuple):
    """One policy name."""

    make: Callable[..., Any]
    counts: str = ""
    """Unit of the number in ``name:number``. Empty if the name takes no number."""
    example: str = ""
    """Example of the number, if it is required."""


EVICTION_WORDS: dict[str, Word] = {
    "lru": Word(LRU),
    "fifo": Word(FIFO),
    "lfu": Word(LFU),
    "slru": Word(SLRU),
    "2q": Word(TwoQueue),
    "clock": Word(Clock),
    "sieve": Word(Sieve),
    "s3-fifo": Word(S3Fifo),
    "arc": Word(ARC),
    "w-tinylfu": Word(WTinyLFU),
    "lhd": Word(LHD),
    "gdsf": Word(GDSF),
    "hyperbolic": Word(Hyperbolic),
    "random": Word(Random),
    "hits-per-token": Word(HitsPerToken),
    "tail-lru": Word(TailLRU, "tokens"),
    "ttl": Word(TTL, "requests"),
    "marconi": Word(Marconi, "alpha"),
    "seglen": Word(SegLen),
    "coverage": Word(Coverage),
    "class-age": Word(ClassAge),
    "regret": Word(Regret),
}
"""Names for ``CacheConfig.eviction``."""

EVICTION: Mapping[str, Callable[..., EvictionPolicy]] = {
    name: word.make for name, word in EVICTION_WORDS.items()
}
"""Classes of the eviction policies, by name."""

PLACEMENT_WORDS: dict[str, Word] = {
    "end": Word(End),
    "branch": Word(Branch),
    "boundary": Word(Boundary),
    "backoff": Word(Backoff, "checkpoints"),
    "prompt": Word(Prompt),
    "sqrt": Word(Sqrt),
    "dyadic": Word(Dyadic),
    "regret": Word(Learned),
    "every": Word(Every, "tokens", "1024"),
    "aligned": Word(Aligned, "tokens", "1024"),
    "chunks": Word(Chunks, "tokens", "1024"),
    "balanced": Word(Balanced, "checkpoints", "4"),
    "thinned": Word(Thinned, "checkpoints", "4"),
    "planned": Word(Planned, "checkpoints", "4"),
}
"""Names of checkpoint placement rules, combined with commas."""

ADMISSION_WORDS: dict[str, Word] = {
    "oldest": Word(Oldest),
    "cached-first": Word(CachedFirst),
    "longest-match": Word(LongestMatch),
    "sessions": Word(SessionGate),
    "window": Word(Window, "requests", "32"),
    "live": Word(Live, "sessions", "16"),
}
"""Names of admission policies."""

_CAP = Word(int, "checkpoints", "2")
_PLACEMENT_AND_CAP = PLACEMENT_WORDS | {"cap": _CAP}


def known_words(table: Mapping[str, Word]) -> list[str]:
    """Return the names of ``table``, as ``name:N`` if a number is possible."""
    plain = [name for name, word in table.items() if not word.example]
    return [*plain, *(f"{name}:N" for name, word in table.items() if word.counts)]


def eviction_words() -> list[str]:
    """Return the names that ``make_eviction`` accepts in addition to ``module:Class``."""
    return known_words(EVICTION_WORDS)


def placement_words() -> list[str]:
    """Return the names for ``parse_placement``, in addition to ``none`` and ``module:Class``."""
    return known_words(_PLACEMENT_AND_CAP)


def admission_words() -> list[str]:
    """Return the names that ``make_admission`` accepts in addition to ``module:Class``."""
    return known_words(ADMISSION_WORDS)


def make_eviction(spec: EvictionSpec) -> Callable[[], EvictionPolicy]:
    """Return a factory of the eviction policy that ``spec`` names, makes or is.

    Raises:
        ValueError: the name is unknown, or a class lacks methods. The message lists them.
    """
    if not isinstance(spec, str):
        return eviction_of(spec)
    found = _maker("eviction policy", EVICTION_WORDS, spec)
    return eviction_of(load(spec, EvictionPolicy)) if found is None else found


def parse_placement(spec: PlacementSpec) -> Placement:
    """Parse a placement such as ``"branch,boundary,backoff,every:1024"``.

    ``"none"`` (alone) saves nothing. ``cap:N`` limits the checkpoints of a prefill. A user's
    placement policy can be given as a class, a factory function or an instance.

    Raises:
        ValueError: a name is unknown, or its number is missing, superfluous or wrong.
    """
    if not isinstance(spec, str):
        return Placement((placement_of(spec)(),))
    if spec.strip() == "none":
        return Placement(())
    rules, cap = [], None
    for word in split_words(spec):
        make = _maker("checkpoint placement", _PLACEMENT_AND_CAP, word)
        if make is None:
            rules.append(placement_of(load(word, PlacementPolicy))())
        elif word.partition(":")[0] == "cap":
            cap = make()
        else:
            rules.append(make())
    if cap is not None and not rules:
        raise ValueError(
            f"{spec!r} saves nothing: cap limits other words, as in branch,every:512,cap:2"
        )
    return Placement(tuple(rules), cap)


def make_admission(spec: AdmissionSpec) -> AdmissionPolicy:
    """Return a new admission policy that ``spec`` names, makes or is.

    Raises:
        ValueError: the name is unknown, or a class lacks methods. The message lists them.
    """
    if not isinstance(spec, str):
        return admission_of(spec)
    make = _maker("admission policy", ADMISSION_WORDS, spec)
    policy: AdmissionPolicy = make() if make else admission_of(load(spec, AdmissionPolicy))
    return policy


def split_words(text: str) -> list[str]:
    """Split at commas outside parentheses. Empty words are kept.

    >>> split_words("lru, mine:Class(a=1, b=2),ttl:5")
    ['lru', 'mine:Class(a=1, b=2)', 'ttl:5']
    """
    words, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            words.append("")
        else:
            words[-1] += letter
    return [word.strip() for word in words]


def in_units(words: str, unit: int) -> str:
    """Convert the lengths in placement ``words`` from tokens to units of ``unit`` tokens."""

    def convert() -> Iterator[str]:
        for text in split_words(words):
            name, _, number = text.partition(":")
            word = PLACEMENT_WORDS.get(name)
            is_length = word is not None and word.counts == "tokens" and number.isdecimal()
            yield f"{name}:{max(1, int(number) // unit)}" if is_length else text

    return ",".join(convert())


def _maker(what: str, table: Mapping[str, Word], text: str) -> Callable[[], Any] | None:
    """Return the factory for ``text``, or None if it has the form ``module:Class``."""
    name, colon, number = text.partition(":")
    word = table.get(name)
    if word is None:
        if colon:
            return None
        raise ValueError(
            f"unknown {what} {name!r}; known: {', '.join(known_words(table))}, or module:Class"
        )
    if not colon and not word.example:
        make: Callable[[], Any] = word.make
        return make
    if not word.counts:
        raise ValueError(f"{what} {name!r} takes no number, got {text!r}")
    value = _number(word.counts, number)
    if value is None:
        kind = "number of at least 0" if word.counts == "alpha" else "whole number of at least 1"
        as_in = f", as in {name}:{word.example}" if word.example else ""
        raise ValueError(f"{what} {name!r} needs a {kind} ({word.counts}){as_in}, got {text!r}")
    return partial(word.make, value)


def _number(counts: str, text: str) -> float | None:
    """Parse a number. Returns None if it is not a valid count (or alpha)."""
    if counts != "alpha":
        return int(text) if text.isdecimal() and int(text) >= 1 else None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) and value >= 0 else None
