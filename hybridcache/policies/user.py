"""Users' policies: how they are loaded, and guards that report each failure in one sentence.

A policy is given as ``module:Class`` or ``module:Class(alpha=2)``, as a class, as a factory
function, or as an instance. No guard changes a decision of a policy that works.
"""

from __future__ import annotations

import ast
import copy
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

from hybridcache.radix.protocol import (
    EvictionPolicy,
    Item,
    Kind,
    Placed,
    PlacementPolicy,
    PolicyError,
    Prefill,
    is_built_in,
    raise_failure,
)
from hybridcache.radix.tokens import require_index
from hybridcache.radix.warm_state import array_as_json
from hybridcache.scheduling.request import AdmissionPolicy, ServerLoad, WaitingRequest

PACKAGE = f"{Path(__file__).parents[1]}/"
"""Folder of the code that is not a user's."""


@dataclass(frozen=True, slots=True)
class OwnPolicy:
    """Factory of a user's policy, with its label in tables."""

    label: str
    make: Callable[[], Any] = field(compare=False)

    def __str__(self) -> str:
        return self.label


def load(spec: str, protocol: type[Any]) -> OwnPolicy:
    """Load ``module:Class`` or ``module:Class(alpha=2)``, a subclass of ``protocol``.

    Arguments are Python literals. Raises ValueError if it is not found or does not fit."""
    module_name, _, class_name = spec.partition(":")
    arguments: list[Any] = []
    keywords: dict[str, Any] = {}
    if "(" in class_name:
        try:
            call: Any = ast.parse(class_name, mode="eval").body
            class_name = call.func.id
            arguments = [ast.literal_eval(part) for part in call.args]
            keywords = {part.arg: ast.literal_eval(part.value) for part in call.keywords}
        except (SyntaxError, ValueError, TypeError, AttributeError):
            raise ValueError(
                f"{spec!r}: write module:Class(alpha=2), with numbers, lists, and strings in quotes"
            ) from None
    found = getattr(import_module(spec, module_name), class_name, None)
    if not isinstance(found, type):
        raise ValueError(f"{spec!r}: {module_name} has no class {class_name!r}")
    _refuse_unfit(spec, found, protocol)
    return OwnPolicy(spec, partial(found, *arguments, **keywords))


def import_module(spec: str, module_name: str) -> ModuleType:
    """Import the module of ``spec``, installed or in the working directory. Raises ValueError."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:  # Installed commands start without it.
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except MemoryError:
        raise
    except Exception as error:  # a user's module can raise anything
        raise ValueError(
            f"{spec!r}: no module {module_name!r} can be imported ({error}); a class in "
            "mine.py is mine:Class"
        ) from error


def own_policy(given: object) -> OwnPolicy:
    """Wrap a class, a factory function or an instance. An instance is copied for each use."""
    if isinstance(given, OwnPolicy):
        return given
    if callable(given):
        return OwnPolicy(_name_of(given), given)
    facts = {
        name: value
        for name, value in getattr(given, "__dict__", {}).items()
        if name[0] != "_" and name != "now" and isinstance(value, int | float | str)
    }
    return OwnPolicy(_name_of(partial(type(given), **facts)), partial(copy.deepcopy, given))


def _name_of(make: Callable[..., Any]) -> str:
    if isinstance(make, partial):
        arguments = [repr(value) for value in make.args]
        arguments += [f"{name}={value!r}" for name, value in make.keywords.items()]
        return f"{_name_of(make.func)}({', '.join(arguments)})"
    name = getattr(make, "__qualname__", type(make).__name__).rpartition("<locals>.")[2]
    return f"{make.__module__}:{name}" if isinstance(make, type) else name


def factory_of(given: object, protocol: type[Any]) -> Callable[[], Any]:
    """Return the factory of the policy that ``given`` is or makes, guarded unless it is built in.

    ``protocol`` is one of the three interfaces of policies. The factory raises ValueError if the
    policy cannot be created, or does not implement it, and MemoryError as it is.
    """
    own = own_policy(given)
    if isinstance(own.make, type) and is_built_in(own.make) and issubclass(own.make, protocol):
        return own.make

    def make() -> Any:
        try:
            policy = own.make()
        except MemoryError:
            raise
        except Exception as error:  # a user's class can raise anything
            raise ValueError(
                f"{own.label!r}: it cannot be created ({type(error).__name__}: {error}); "
                "define its abstract methods, give arguments defaults, or write Class(alpha=2)"
            ) from error
        _refuse_unfit(own.label, type(policy), protocol)
        return policy if is_built_in(type(policy)) else GUARDS[protocol](own.label, policy)

    return make


def _refuse_unfit(label: str, found: type[Any], protocol: type[Any]) -> None:
    """Raise ValueError if the class ``found`` does not implement ``protocol``."""
    if not issubclass(found, protocol):
        known = f"{protocol.__module__}.{protocol.__name__}"
        raise ValueError(
            f"{label!r}: it does not implement {protocol.__name__}: give a name, or a class "
            f"derived from {known}"
        )


# --- Guards ---------------------------------------------------------------------------------------


def _called(name: str) -> Any:
    """Return a method that calls the method ``name`` of the user's policy."""
    return lambda self, *arguments: self.call(
        name, lambda policy: getattr(policy, name)(*arguments)
    )


def _noted(name: str) -> Any:
    """Return a method that calls the method ``name`` of the user's policy until a call fails, and
    stores the failure."""

    def note(self: Guard, *arguments: object) -> None:
        if self.failure is None:
            try:
                _called(name)(self, *arguments)
            except PolicyError as error:
                self.failure = error

    return note


def _asked(name: str) -> Any:
    """Return a method that returns the state of the user's policy, or None after a failed call. The
    first failure is stored."""

    def ask(self: Guard, *arguments: object) -> Any:
        def state(policy: Any) -> Any:
            found = getattr(policy, name)(*arguments)
            try:
                json.dumps(found, default=array_as_json)
            except (TypeError, ValueError) as error:
                raise PolicyError(f"{self._label!r}: the result of {name}: {error}") from error
            return found

        if self.failure is None:
            try:
                return self.call(name, state)
            except PolicyError as error:
                self.failure = error
        return None

    return ask


class Guard:
    """Caller of a user's methods. Their exceptions become a PolicyError with method and line. A
    MemoryError stays as it is, because it is no failure of the policy that meets it."""

    def __init__(self, label: str, policy: Any) -> None:
        self._label, self._policy = label, policy
        self.failure: PolicyError | None = None
        """First failure of a notification, which ends all notifications."""

    def __str__(self) -> str:
        return self._label

    def __getattr__(self, name: str) -> Any:
        """Return a further attribute of the user's policy, for inspection."""
        if name.startswith("_"):  # Not set yet, as in a copy under construction.
            raise AttributeError(name)
        return getattr(self._policy, name)

    def call(self, name: str, call: Callable[[Any], Any]) -> Any:
        """Return ``call(policy)``, which calls the method ``name`` of the user's policy."""
        try:
            return call(self._policy)
        except (PolicyError, MemoryError):
            raise
        except (Exception, SystemExit) as error:  # user code can raise anything
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if not frame.filename.startswith(PACKAGE)]
            fault = f"{type(error).__name__}: {error}"
            if own:
                where = f"{Path(own[0].filename).name}, line {own[0].lineno}"
                fault = f"{own[0].name} raised {fault} ({where})"
            else:
                fault = f"the parameters or the result of {name} are wrong: {fault}"
                if isinstance(error, AttributeError):  # of an attribute that a base class sets
                    fault += "; its __init__ must call super().__init__()"
                elif name == "plan":
                    fault += "; plan must return a list of Placed(position, label)"
            raise PolicyError(f"{self._label!r}: {fault}") from error


class GuardedEviction(Guard, EvictionPolicy):
    """A user's eviction policy. Refuses a victim that is no candidate. O(1) in addition to it.

    After its first failure it is not called any more; see ``EvictionPolicy.failure``.
    """

    touch = _noted("touch")
    on_relabelled = _noted("on_relabelled")
    on_ghost_hit = _noted("on_ghost_hit")
    on_ghost_hit_above = _noted("on_ghost_hit_above")
    state_dict = _asked("state_dict")
    load_state_dict = _noted("load_state_dict")
    memo_state = _asked("memo_state")
    load_memo = _noted("load_memo")
    _add = _noted("add")
    _discard = _noted("discard")

    def __init__(self, label: str, policy: EvictionPolicy) -> None:
        super().__init__(label, policy)
        self._held: dict[Kind, dict[Item, None]] = {"kv": {}, "checkpoint": {}}
        self.orders_classes = bool(policy.orders_classes)

    def set_clock(self, clock: Callable[[], float]) -> None:
        super().set_clock(clock)
        self._policy.set_clock(clock)

    def add(self, item: Item) -> None:
        self._held[item.kind][item] = None
        self._add(item)

    def discard(self, item: Item, evicted: bool) -> None:
        del self._held[item.kind][item]
        self._discard(item, evicted)

    def for_tier(self) -> EvictionPolicy | None:
        lower = self._policy.for_tier()
        return None if lower is None else GuardedEviction(self._label, lower)

    def candidates(self) -> Iterable[Item]:
        return chain(*self._held.values())

    def victim(self, kind: Kind | None) -> Item | None:
        held = [*self._held.values()] if kind is None else [self._held[kind]]
        oldest = next(chain(*held), None)

        def victim(policy: EvictionPolicy) -> Item | None:
            chosen = policy.victim(kind)
            # Without a victim memory would never be freed, and requests would wait for ever.
            if chosen is not oldest and not any(chosen in items for items in held):
                raise ValueError(f"victim(kind={kind!r}) returned {chosen!r}, no candidate")
            return chosen

        if self.failure is None:
            try:
                found: Item | None = self.call("victim", victim)
                return found
            except PolicyError as error:
                self.failure = error
        return oldest


class GuardedPlacement(Guard, PlacementPolicy):
    """A user's placement policy. Refuses malformed positions.

    The first failure of a notification is raised by the next ``plan``.
    """

    on_prefill = _noted("on_prefill")
    on_hit = _noted("on_hit")
    on_ghost_hit = _noted("on_ghost_hit")
    on_saved = _noted("on_saved")
    on_dropped = _noted("on_dropped")
    state_dict = _asked("state_dict")
    load_state_dict = _noted("load_state_dict")

    def plan(self, prefill: Prefill) -> list[Placed]:
        def plan(policy: PlacementPolicy) -> list[Placed]:
            return [
                Placed(position, str(label), require_index(distance, "the distance", 0))
                for position, label, distance in prefill.on_grid(policy.plan(prefill))
            ]

        raise_failure(self.failure)
        found: list[Placed] = self.call("plan", plan)
        return found

    def decode_interval(self) -> int | None:
        def interval(policy: PlacementPolicy) -> int | None:
            found = policy.decode_interval()
            return None if found is None else require_index(found, "the interval", 1)

        found: int | None = self.call("decode_interval", interval)
        return found


class GuardedAdmission(Guard, AdmissionPolicy):
    """A user's admission policy. Refuses requests that do not wait, and repeated requests.

    A failure of ``arrived`` refuses the request. The first one of another method is raised by
    ``order``, and the base class takes the place of the policy.
    """

    def __init__(self, label: str, policy: AdmissionPolicy) -> None:
        super().__init__(label, policy)
        self.recognises_sessions = bool(policy.recognises_sessions)

    arrived = _called("arrived")
    admitted = _noted("admitted")
    computed = _noted("computed")
    left = _noted("left")
    _reason: Mapping[str, str] = {}

    def report(self) -> Mapping[str, float | str]:
        try:
            return {**self._reason, **self.call("report", lambda policy: dict(policy.report()))}
        except PolicyError as error:
            return {"reason": str(error)}

    def order(self, waiting: Sequence[WaitingRequest], load: ServerLoad) -> list[WaitingRequest]:
        def order(policy: AdmissionPolicy) -> list[WaitingRequest]:
            ordered = list(islice(policy.order(waiting, load), len(waiting) + 1))
            if len({id(one) for one in ordered} & {id(one) for one in waiting}) < len(ordered):
                raise ValueError("return waiting requests, each at most once")
            self.wakes_at_s = None if policy.wakes_at_s is None else float(policy.wakes_at_s)
            return ordered

        try:
            raise_failure(self.failure)
            found: list[WaitingRequest] = self.call("order", order)
        except PolicyError as error:
            self._policy, self.failure, self.wakes_at_s = AdmissionPolicy(), None, None
            self._reason = {"reason": f"oldest first, because a policy failed: {error}"}
            raise
        return found


GUARDS: dict[type[Any], type[Any]] = {
    AdmissionPolicy: GuardedAdmission,
    EvictionPolicy: GuardedEviction,
    PlacementPolicy: GuardedPlacement,
}
