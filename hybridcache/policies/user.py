"""Loading and guarding of users' policies. Errors are reported in one sentence.

A policy is given as ``module:Class`` or ``module:Class(alpha=2)``, as a class, as a factory
function, or as an instance.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from hybridcache.policies.admission.base import AdmissionPolicy, Load, WaitingRequest
from hybridcache.policies.eviction.scored import SampledPolicy, ScorePolicy
from hybridcache.policies.protocol import (
    EvictionPolicy,
    Item,
    Kind,
    Placed,
    PlacementPolicy,
    PolicyError,
    Prefill,
    raise_failure,
)

MAX_WITHOUT = 50
"""Number of successive calls of ``victim`` without a result, although there are candidates, after
which a policy has failed. Memory that is never freed would let requests wait for ever."""
OURS = "hybridcache.policies."
"""Package prefix of built-in policies, which need no guard."""


@dataclass(frozen=True, slots=True)
class OwnPolicy:
    """Factory of a user's policy, with its label in tables."""

    label: str
    make: Callable[[], Any] = field(compare=False)

    def __str__(self) -> str:
        return self.label


def own_policy(given: object) -> OwnPolicy:
    """Wrap a class, a factory function or an instance. An instance is copied for each use."""
    if isinstance(given, OwnPolicy):
        return given
    if callable(given):
        return OwnPolicy(_name_of(given), given)
    facts = [
        f"{name}={value!r}"
        for name, value in getattr(given, "__dict__", {}).items()
        if name[0] != "_" and name != "now" and isinstance(value, int | float | str)
    ]
    label = f"{type(given).__name__}({', '.join(facts)})"
    return OwnPolicy(label, partial(copy.deepcopy, given))


def _name_of(make: Callable[..., Any]) -> str:
    if isinstance(make, partial):
        arguments = [repr(value) for value in make.args]
        arguments += [f"{name}={value!r}" for name, value in make.keywords.items()]
        return f"{_name_of(make.func)}({', '.join(arguments)})"
    name = getattr(make, "__qualname__", type(make).__name__).rpartition("<locals>.")[2]
    return f"{make.__module__}:{name}" if isinstance(make, type) else name


def eviction_of(given: object) -> Callable[[], EvictionPolicy]:
    """Return the factory of the eviction policy that ``given`` is or makes, guarded."""
    own = own_policy(given)
    if isinstance(own.make, type):
        _refuse_unfit(own, own.make, EvictionPolicy)
        if own.make.__module__.startswith(OURS):
            return own.make
    return lambda: GuardedEviction(own.label, _made(own, EvictionPolicy))


def placement_of(given: object) -> Callable[[], PlacementPolicy]:
    """Return the factory of the placement policy that ``given`` is or makes, guarded."""
    own = own_policy(given)
    if isinstance(own.make, type):
        _refuse_unfit(own, own.make, PlacementPolicy)
    return lambda: GuardedPlacement(own.label, _made(own, PlacementPolicy))


def admission_of(given: object) -> AdmissionPolicy:
    """Return the admission policy that ``given`` is or makes, guarded."""
    own = own_policy(given)
    policy: AdmissionPolicy = _made(own, AdmissionPolicy)
    ours = type(policy).__module__.startswith(OURS)
    return policy if ours else GuardedAdmission(own.label, policy)


# --- Guards ---------------------------------------------------------------------------------------


def _called(name: str) -> Any:
    """Return a method that calls the method ``name`` of the user's policy."""
    return lambda self, *arguments: self._call(name, *arguments)


def _noted(name: str) -> Any:
    """Return a method that calls the method ``name`` of the user's policy until one fails."""
    return lambda self, *arguments: self._note(name, *arguments)


class _Guarded:
    """Caller of a user's methods. Their exceptions become a PolicyError with method and line."""

    def __init__(self, label: str, policy: Any) -> None:
        self._label = label
        self._policy = policy
        self.failure: PolicyError | None = None
        """First failure of ``_note``."""

    def __str__(self) -> str:
        return self._label

    def _call(self, name: str, *arguments: object, as_list: bool = False) -> Any:
        try:
            found = getattr(self._policy, name)(*arguments)
            return list(found) if as_list else found
        except PolicyError:
            raise
        except Exception as error:  # user code can raise anything
            file = inspect.getfile(type(self._policy))
            frames = [
                one for one in traceback.extract_tb(error.__traceback__) if one.filename == file
            ]
            where = f" ({Path(file).name}, line {frames[-1].lineno})" if frames else ""
            # The method of the user may have been called by one of its base class.
            name = frames[0].name if frames else name
            raise self._error(f"{name} raised {type(error).__name__}: {error}{where}") from error

    def _note(self, name: str, *arguments: object) -> None:
        """Call a method that returns nothing. A failure is kept, so that the operation of the cache
        is finished, and ends all notifications."""
        if self.failure is None:
            try:
                self._call(name, *arguments)
            except PolicyError as error:
                self.failure = error

    def _error(self, fault: str) -> PolicyError:
        return PolicyError(f"{self._label!r}: {fault}")


class GuardedEviction(_Guarded, EvictionPolicy):
    """Wrapper of a user's eviction policy. Forwards every call that a built-in policy gets.

    Refuses a victim that was never offered. A policy that has failed is not called any more; see
    ``failure``. O(1) in addition to the policy.
    """

    touch = _noted("touch")
    on_relabelled = _noted("on_relabelled")
    on_ghost_hit = _noted("on_ghost_hit")
    on_ghost_hit_above = _noted("on_ghost_hit_above")
    set_clock = _called("set_clock")

    def __init__(self, label: str, policy: EvictionPolicy) -> None:
        super().__init__(label, policy)
        self._held: dict[Item, None] = {}
        self._num_without = 0
        """Number of calls since the last victim that had none although there were candidates."""
        self.orders_classes = bool(policy.orders_classes)

    def add(self, item: Item) -> None:
        self._held[item] = None
        self._note("add", item)

    def discard(self, item: Item, evicted: bool) -> None:
        self._held.pop(item, None)
        self._note("discard", item, evicted)

    def for_tier(self) -> EvictionPolicy | None:
        """Return the policy's result, guarded as well."""
        lower = self._call("for_tier")
        if lower is not None and not isinstance(lower, EvictionPolicy):
            raise self._error(f"for_tier returned {lower!r}; return an EvictionPolicy, or None")
        return None if lower is None else GuardedEviction(self._label, lower)

    def candidates(self) -> Iterable[Item]:
        """Return all items that the policy was offered, unordered."""
        return self._held

    def victim(self, kind: Kind | None) -> Item | None:
        if self.failure is None:
            try:
                return self._checked(kind, self._call("victim", kind))
            except PolicyError as error:
                self.failure = error
        return next((item for item in self._held if kind in (None, item.kind)), None)

    def _checked(self, kind: Kind | None, victim: Item | None) -> Item | None:
        if victim is None:
            self._num_without += any(kind in (None, item.kind) for item in self._held)
            if self._num_without >= MAX_WITHOUT:
                raise self._error(
                    f"victim returned None {MAX_WITHOUT} times although there were candidates, so "
                    "nothing is evicted; return one of the items that were added"
                )
        elif victim in self._held and kind in (None, victim.kind):
            self._num_without = 0
        else:
            raise self._error(
                f"victim({kind!r}) returned {victim!r}, which is not a candidate of that kind; "
                "return an item that was added and not discarded since, or None"
            )
        return victim


class GuardedAdmission(_Guarded, AdmissionPolicy):
    """Wrapper of a user's admission policy. Forwards every call that a built-in policy gets.

    Refuses requests that do not wait, and repeated requests.
    """

    arrived = _called("arrived")
    admitted = _called("admitted")
    computed = _called("computed")
    left = _called("left")
    session_ended = _called("session_ended")
    wakes_at_s = _called("wakes_at_s")
    report = _called("report")

    def order(self, waiting: Sequence[WaitingRequest], load: Load) -> list[WaitingRequest]:
        ordered: list[WaitingRequest] = self._call("order", waiting, load, as_list=True)
        if len(set(ordered)) < len(ordered) or not set(ordered) <= set(waiting):
            raise self._error(
                f"order must return waiting requests, each at most once (got {len(ordered)} for "
                f"{len(waiting)} that wait)"
            )
        return ordered


class GuardedPlacement(_Guarded, PlacementPolicy):
    """Wrapper of a user's placement policy. Forwards every call that a built-in policy gets.

    Refuses malformed positions. The first failure of a notification is raised by the next ``plan``.
    """

    on_prefill = _noted("on_prefill")
    on_hit = _noted("on_hit")
    on_ghost_hit = _noted("on_ghost_hit")
    on_saved = _noted("on_saved")
    on_dropped = _noted("on_dropped")

    def plan(self, prefill: Prefill) -> list[Placed]:
        raise_failure(self.failure)
        wanted = []
        for placed in self._call("plan", prefill, as_list=True):
            is_pair = isinstance(placed, tuple) and len(placed) == 2
            if not (is_pair and hasattr(placed[0], "__index__") and isinstance(placed[1], str)):
                raise self._error(
                    f"plan returned {placed!r}; return Placed(position, label) with an integer and "
                    "a string"
                )
            wanted.append(Placed(int(placed[0]), placed[1]))
        return wanted

    def decode_interval(self) -> int | None:
        interval: int | None = self._call("decode_interval")
        if interval is None or (type(interval) is int and interval >= 1):
            return interval
        raise self._error(
            f"decode_interval returned {interval!r}; return the number of tokens between "
            "checkpoints, or None"
        )


# --- Loading --------------------------------------------------------------------------------------


def load(spec: str, protocol: type[Any]) -> OwnPolicy:
    """Load ``module:Class`` or ``module:Class(alpha=2)``, a subclass of ``protocol``.

    The module is installed or in the working directory, which is appended to ``sys.path`` because
    installed commands start without it. Arguments are Python literals.

    Raises:
        ValueError: the module or the class is not found or does not fit. The message is one
            sentence.
    """
    module_name, _, call = spec.partition(":")
    class_name = call
    arguments: list[Any] = []
    keywords: dict[str, Any] = {}
    if "(" in call:
        try:
            tree = ast.parse(call, mode="eval").body
            if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
                raise ValueError("it is not a call")
            class_name = tree.func.id
            arguments = [_literal(part) for part in tree.args]
            keywords = {str(part.arg): _literal(part.value) for part in tree.keywords}
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"{spec!r}: write module:Class(alpha=2), with numbers, strings and lists ({error})"
            ) from error
    found = getattr(import_module(spec, module_name), class_name, None)
    if not isinstance(found, type):
        raise ValueError(f"{spec!r}: {module_name} has no class {class_name!r}")
    _refuse_unfit(OwnPolicy(spec, found), found, protocol)
    make = partial(found, *arguments, **keywords) if arguments or keywords else found
    return OwnPolicy(spec, make)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"{ast.unparse(node)} is not a number, string or list") from None


def _refuse_unfit(own: OwnPolicy, found: type[Any], protocol: type[Any]) -> None:
    """Raise ValueError if ``found``, the class of ``own``, does not implement ``protocol``."""
    fault = f"{own.label!r}: it does not implement {protocol.__name__}"
    if not issubclass(found, protocol):
        home = "hybridcache" if protocol.__module__.startswith(OURS) else protocol.__module__
        hint = f"derive {found.__name__} from {home}.{protocol.__name__}"
        if found.__module__ == "builtins":
            hint = f"give a name, or a class derived from {home}.{protocol.__name__}"
        raise ValueError(f"{fault}: {hint}")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ValueError(f"{fault}: it lacks {', '.join(missing)}")


def import_module(spec: str, module_name: str) -> ModuleType:
    """Import the module of ``spec``, from the working directory too. Raises ValueError."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # a user's module can raise anything
        hint = "; leave out .py" if module_name.endswith(".py") else ""
        raise ValueError(
            f"{spec!r}: no module {module_name!r} can be imported ({error}){hint}"
        ) from error


def _made(own: OwnPolicy, protocol: type[Any]) -> Any:
    try:
        policy = own.make()
    except Exception as error:  # a user's class can raise anything
        hint = ""
        if isinstance(own.make, type):
            hint = (
                "; it is created without arguments: give them defaults, or write "
                "module:Class(alpha=2)"
            )
        raise ValueError(
            f"{own.label!r}: it cannot be created ({type(error).__name__}: {error}){hint}"
        ) from error
    _refuse_unfit(own, type(policy), protocol)
    if isinstance(policy, ScorePolicy | SampledPolicy) and not hasattr(policy, "now"):
        raise ValueError(
            f"{own.label!r}: the __init__ of {type(policy).__name__} must call super().__init__()"
        )
    return policy
