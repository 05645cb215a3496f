"""What goes first: words in a dict -> small classes in sibling modules. Plain LRU is the default."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
from hybridcache.policies.eviction.sieve import Sieve
from hybridcache.policies.eviction.slru import SLRU
from hybridcache.policies.eviction.tail_lru import TailLRU
from hybridcache.policies.eviction.ttl import TTL
from hybridcache.policies.eviction.two_queue import TwoQueue
from hybridcache.policies.eviction.w_tiny_lfu import WTinyLFU
from hybridcache.policies.protocol import EvictionPolicy
from hybridcache.policies.user import load_eviction

EVICTION: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU,
    "fifo": FIFO,
    "lfu": LFU,
    "slru": SLRU,
    "2q": TwoQueue,
    "clock": Clock,
    "sieve": Sieve,
    "s3-fifo": S3Fifo,
    "arc": ARC,
    "w-tinylfu": WTinyLFU,
    "lhd": LHD,
    "gdsf": GDSF,
    "hyperbolic": Hyperbolic,
    "random": Random,
    "hits-per-token": HitsPerToken,
    "tail-lru": TailLRU,
    "ttl": TTL,
    "marconi": Marconi,
    "coverage": Coverage,
    "class-age": ClassAge,
    "regret": Regret,
}
"""Words for ``CacheConfig.eviction``."""


def _whole(word: str, number: float) -> int:
    if number < 1 or number != int(number):
        raise ValueError(f"{word}:N needs a whole number of at least 1, got {number:g}")
    return int(number)


NUMBERED_EVICTION: dict[str, Callable[[float], EvictionPolicy]] = {
    "tail-lru": lambda tokens: TailLRU(_whole("tail-lru", tokens)),
    "ttl": lambda requests: TTL(_whole("ttl", requests)),
    "marconi": Marconi,
}
"""Words that also take a number, written ``word:number``: the target in tokens, the life in requests, alpha."""


def eviction_words() -> list[str]:
    """The words there are, those with a number too: what ``make_eviction`` knows beside ``module:Class``."""
    return [*EVICTION, *(f"{word}:N" for word in NUMBERED_EVICTION)]


def make_eviction(word: str) -> Callable[[], EvictionPolicy]:
    """The policy class ``word`` names: a word of ``EVICTION``, ``word:number``, or ``module:Class``. ValueError lists the words
    that exist, or the methods that a class lacks."""
    name, _, number = word.partition(":")
    if name in NUMBERED_EVICTION and number.replace(".", "", 1).isdecimal():
        make = partial(NUMBERED_EVICTION[name], float(number))
        make()  # a number that can not be is told now
        return make
    if ":" in word:
        return load_eviction(word)
    try:
        return EVICTION[word]
    except KeyError:
        known = ", ".join(eviction_words())
        raise ValueError(f"unknown eviction policy {word!r}; known: {known}") from None
