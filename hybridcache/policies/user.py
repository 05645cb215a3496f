"""Policies of the user's own, named ``module:Class`` wherever a word stands; what is wrong with one is said in one sentence."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from hybridcache.policies.eviction.scored import SampledPolicy, ScorePolicy
from hybridcache.policies.protocol import (
    EvictionPolicy,
    Item,
    Kind,
    Placed,
    PlacementPolicy,
    PolicyError,
    Prefill,
)

MAX_OUTSIDE = 50
"""Positions outside of every prompt after which a placement is warned of."""


def load_eviction(word: str) -> Callable[[], EvictionPolicy]:
    """Makes the eviction policies that ``module:Class`` names, watched over. ValueError where that is none, or can not be made."""
    make = partial(OwnEviction, word, _load_class(word, EvictionPolicy))
    make()
    return make


def load_placement(word: str) -> PlacementPolicy:
    """The placement policy that ``module:Class`` names, watched over. ValueError where that is none, or can not be made."""
    return OwnPlacement(word, _load_class(word, PlacementPolicy))


class OwnEviction(EvictionPolicy):
    """Passes every call on, and turns what goes wrong into a PolicyError that names the class, the method and the line.

    Also where ``victim`` gives what it was never offered. O(1) beside the policy's own work.
    """

    def __init__(self, word: str, policy_class: type[EvictionPolicy]) -> None:
        self._word = word
        self._policy = _made(word, policy_class)
        self._held: set[Item] = set()
        self.ranks_structure: bool = getattr(self._policy, "ranks_structure", False)

    def add(self, item: Item) -> None:
        self._held.add(item)
        try:
            self._policy.add(item)
        except Exception as error:
            _blame(self._word, self._policy, "add", error)

    def discard(self, item: Item, evicted: bool) -> None:
        self._held.discard(item)
        try:
            self._policy.discard(item, evicted)
        except Exception as error:
            _blame(self._word, self._policy, "discard", error)

    def touch(self, item: Item) -> None:
        try:
            self._policy.touch(item)
        except Exception as error:
            _blame(self._word, self._policy, "touch", error)

    def missed(self, item: Item) -> None:
        try:
            self._policy.missed(item)
        except Exception as error:
            _blame(self._word, self._policy, "missed", error)

    def candidates(self) -> Iterable[Item]:
        """All it was told of, in no order."""
        return self._held

    def victim(self, kind: Kind | None) -> Item | None:
        try:
            victim: Item | None = self._policy.victim(kind)
            known = victim is None or victim in self._held
        except Exception as error:
            _blame(self._word, self._policy, "victim", error)
        if victim is not None and (not known or kind not in (None, victim.kind)):
            raise PolicyError(
                f"{self._word!r}: victim({kind!r}) gave {victim!r}, which is no candidate of that kind; "
                "give an item that was added and not discarded since, or None"
            )
        return victim


class OwnPlacement(PlacementPolicy):
    """Passes every call on; what goes wrong becomes a PolicyError that names the class, the method and the line."""

    def __init__(self, word: str, policy_class: type[PlacementPolicy]) -> None:
        self._word = word
        self._policy = _made(word, policy_class)
        self._num_outside: int | None = 0
        """Positions given of which none was of use; None once one was, or it was said."""

    def positions(self, prefill: Prefill) -> Iterator[Placed]:
        try:
            for placed in self._policy.positions(prefill):
                checked = self._checked(placed)
                if self._num_outside is not None:
                    self._watch(checked.position, prefill)
                yield checked
        except Exception as error:
            _blame(self._word, self._policy, "positions", error)

    def _watch(self, position: int, prefill: Prefill) -> None:
        """Warn once where the first ``MAX_OUTSIDE`` positions all lie where nothing can be saved."""
        assert self._num_outside is not None
        if prefill.cached_len < position - position % prefill.grid <= prefill.prompt_len:
            self._num_outside = None
            return
        self._num_outside += 1
        if self._num_outside == MAX_OUTSIDE:
            self._num_outside = None
            warnings.warn(
                f"{self._word!r}: none of its first {MAX_OUTSIDE} positions lay within what a prefill computes; give "
                f"cached_len < position <= prompt_len, tokens from the prompt's start, of at least {prefill.grid} (the grid)",
                stacklevel=2,
            )

    def _checked(self, placed: Any) -> Placed:
        if isinstance(placed, tuple) and len(placed) == 2:
            position, label = placed
            if hasattr(position, "__index__") and isinstance(label, str):
                return Placed(int(position), label)
        raise PolicyError(
            f"{self._word!r}: positions gave {placed!r}; "
            "give Placed(position, label) with a whole position and a word for a label"
        )

    def decode_interval(self) -> int | None:
        try:
            interval: int | None = self._policy.decode_interval()
        except Exception as error:
            _blame(self._word, self._policy, "decode_interval", error)
        if interval is None or (type(interval) is int and interval >= 1):
            return interval
        raise PolicyError(
            f"{self._word!r}: decode_interval gave {interval!r}; give tokens between checkpoints, or None"
        )


def word_of(own: object) -> str:
    """``module:Class`` for a class that its module knows by name, also one of a notebook's cell. ValueError for any other object."""
    if not isinstance(own, type):
        raise ValueError(f"{own!r} is no policy: give a word, module:Class or the class itself")
    module_name, name = own.__module__, own.__qualname__
    if getattr(sys.modules.get(module_name), name, None) is not own:
        raise ValueError(
            f"{name} can not be found in {module_name}: define it at the top of a module or of a notebook's cell"
        )
    return f"{module_name}:{name}"


def source_of(word: str) -> str:
    """The text of the module that a word like ``module:Class`` names; empty for other words, numbered ones (``ttl:500``) too.
    ValueError where it has none to read."""
    module_name, colon, rest = word.strip().partition(":")
    if not colon or rest.replace(".", "", 1).isdecimal():
        return ""
    try:
        return inspect.getsource(_imported(word, module_name))
    except (OSError, TypeError) as error:
        raise ValueError(
            f"{word!r}: its source can not be read, so whether a kept run is of this very class can not be told; put the class in "
            "a file, or keep no runs"
        ) from error


def _load_class(word: str, protocol: type[Any]) -> type[Any]:
    """The class that ``module:Class`` names, from an installed module or one in the working directory, with the methods of
    ``protocol``.

    The working directory joins the end of ``sys.path``: installed commands start without it. ValueError says in one sentence
    what can not be found.
    """
    module_name, _, class_name = word.partition(":")
    module = _imported(word, module_name)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise ValueError(f"{word!r}: {module_name} has no class {class_name!r}")
    methods = [name for name in vars(protocol) if name[0] != "_"]
    missing = [
        name for name in methods if getattr(found, name, None) in (None, getattr(protocol, name))
    ]
    missing += sorted(getattr(found, "__abstractmethods__", frozenset()))
    if missing:
        raise ValueError(f"{word!r}: it is no {protocol.__name__}, it has no {', '.join(missing)}")
    return found


def _imported(word: str, module_name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # whatever a stranger's module raises while it is read
        hint = "; leave out .py" if module_name.endswith(".py") else ""
        raise ValueError(
            f"{word!r}: no module {module_name!r} can be imported ({error}){hint}"
        ) from error


def _made(word: str, policy_class: type[Any]) -> Any:
    try:
        policy = policy_class()
    except Exception as error:  # whatever a stranger's class raises
        name = policy_class.__name__
        raise ValueError(
            f"{word!r}: {name}() can not be made ({type(error).__name__}: {error}); "
            "it is made without arguments, so give them defaults"
        ) from error
    if isinstance(policy, ScorePolicy | SampledPolicy) and not hasattr(policy, "now"):
        raise ValueError(
            f"{word!r}: the __init__ of {policy_class.__name__} must call super().__init__()"
        )
    return policy


def _blame(word: str, policy: object, method: str, error: Exception) -> NoReturn:
    """Raise a PolicyError that says where a stranger's method failed."""
    if isinstance(error, PolicyError):
        raise error
    file = inspect.getfile(type(policy))
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file
    ]
    where = f" ({Path(file).name}, line {frames[-1].lineno})" if frames else ""
    raise PolicyError(
        f"{word!r}: {method} raised {type(error).__name__}: {error}{where}"
    ) from error
