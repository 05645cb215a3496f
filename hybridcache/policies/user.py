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
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from hybridcache.policies.admission.base import (
    AdmissionPolicy,
    AdmittedRequest,
    Load,
    Session,
    WaitingRequest,
)
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

MAX_OUTSIDE = 50
"""Number of positions outside of every prompt after which a warning is issued."""
MAX_WITHOUT = 50
"""Number of successive calls of ``victim`` without a result, although there are candidates, after
which a policy has failed. Memory that is never freed would let requests wait for ever."""
OURS = "hybridcache.policies."
"""Package prefix of built-in policies, which need no guard."""

Result = TypeVar("Result")


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


class _Guarded:
    """Caller of a user's methods. Their exceptions become a PolicyError with method and line."""

    def __init__(self, label: str, policy: Any) -> None:
        self._label = label
        self._policy = policy
        self._failure: PolicyError | None = None
        """First failure of ``_notify``."""

    def __str__(self) -> str:
        return self._label

    def _call(self, method: Callable[..., Result], *arguments: object) -> Result:
        try:
            return method(*arguments)
        except Exception as error:  # user code can raise anything
            _blame(self._label, self._policy, method.__name__, error)

    def _notify(self, method: Callable[..., None], *arguments: object) -> None:
        """Call ``method``. A failure is kept, so that the operation of the cache is finished, and
        ends all notifications."""
        if self._failure is None:
            try:
                self._call(method, *arguments)
            except PolicyError as error:
                self._failure = error


class GuardedEviction(_Guarded, EvictionPolicy):
    """Wrapper of a user's eviction policy. Forwards every call that a built-in policy gets.

    Refuses a victim that was never offered. A policy that has failed is not called any more; see
    ``failure``. O(1) in addition to the policy.
    """

    def __init__(self, label: str, policy: EvictionPolicy) -> None:
        super().__init__(label, policy)
        self._held: dict[Item, None] = {}
        self._num_without = 0
        """Number of calls since the last victim that had none although there were candidates."""
        self.orders_classes = bool(policy.orders_classes)

    @property
    def failure(self) -> PolicyError | None:
        return self._failure

    def set_clock(self, clock: Callable[[], float]) -> None:
        self._policy.set_clock(clock)

    def add(self, item: Item) -> None:
        self._held[item] = None
        self._notify(self._policy.add, item)

    def discard(self, item: Item, evicted: bool) -> None:
        self._held.pop(item, None)
        self._notify(self._policy.discard, item, evicted)

    def touch(self, item: Item) -> None:
        self._notify(self._policy.touch, item)

    def on_relabelled(self, item: Item) -> None:
        self._notify(self._policy.on_relabelled, item)

    def on_ghost_hit(self, item: Item) -> None:
        self._notify(self._policy.on_ghost_hit, item)

    def on_ghost_hit_above(self, item: Item) -> None:
        self._notify(self._policy.on_ghost_hit_above, item)

    def for_tier(self) -> EvictionPolicy | None:
        """Return the policy's result, guarded as well."""
        lower = self._call(self._policy.for_tier)
        if lower is None:
            return None
        if not isinstance(lower, EvictionPolicy):
            raise PolicyError(
                f"{self._label!r}: for_tier returned {lower!r}; return an EvictionPolicy, or None"
            )
        return GuardedEviction(self._label, lower)

    def candidates(self) -> Iterable[Item]:
        """Return all items that the policy was offered, unordered."""
        return self._held

    def victim(self, kind: Kind | None) -> Item | None:
        if self._failure is None:
            try:
                return self._call(self._victim, kind)
            except PolicyError as error:
                self._failure = error
        return next((item for item in self._held if kind in (None, item.kind)), None)

    def _victim(self, kind: Kind | None) -> Item | None:
        victim: Item | None = self._policy.victim(kind)
        if victim is None:
            self._watch(kind)
            return None
        if victim in self._held and kind in (None, victim.kind):
            self._num_without = 0
            return victim
        raise PolicyError(
            f"{self._label!r}: victim({kind!r}) returned {victim!r}, which is not a candidate of "
            "that kind; "
            "return an item that was added and not discarded since, or None"
        )

    def _watch(self, kind: Kind | None) -> None:
        """Count a call without a victim. PolicyError after ``MAX_WITHOUT`` of them."""
        if any(kind in (None, item.kind) for item in self._held):
            self._num_without += 1
        if self._num_without >= MAX_WITHOUT:
            raise PolicyError(
                f"{self._label!r}: victim returned None {MAX_WITHOUT} times although there were "
                "candidates, so nothing is evicted; return one of the items that were added"
            )


class GuardedAdmission(_Guarded, AdmissionPolicy):
    """Wrapper of a user's admission policy. Forwards every call that a built-in policy gets.

    Refuses requests that do not wait, and repeated requests.
    """

    def arrived(self, request: WaitingRequest, load: Load) -> None:
        self._call(self._policy.arrived, request, load)

    def order(self, waiting: Sequence[WaitingRequest], load: Load) -> list[WaitingRequest]:
        return self._call(self._order, waiting, load)

    def _order(self, waiting: Sequence[WaitingRequest], load: Load) -> list[WaitingRequest]:
        ordered = list(self._policy.order(waiting, load))
        if len(set(ordered)) < len(ordered) or not set(ordered) <= set(waiting):
            raise PolicyError(
                f"{self._label!r}: order must return waiting requests, each at most once (got "
                f"{len(ordered)} for {len(waiting)} that wait)"
            )
        return ordered

    def admitted(self, request: AdmittedRequest, load: Load) -> None:
        self._call(self._policy.admitted, request, load)

    def computed(self, num_tokens: int, seconds: float, load: Load) -> None:
        self._call(self._policy.computed, num_tokens, seconds, load)

    def left(self, request: WaitingRequest, load: Load) -> None:
        self._call(self._policy.left, request, load)

    def session_ended(self, session: Session, load: Load) -> None:
        self._call(self._policy.session_ended, session, load)

    def wakes_at_s(self) -> float | None:
        wakes_at_s: float | None = self._call(self._policy.wakes_at_s)
        return wakes_at_s

    def report(self) -> Mapping[str, float | str]:
        return self._call(self._policy.report)


class GuardedPlacement(_Guarded, PlacementPolicy):
    """Wrapper of a user's placement policy. Forwards every call that a built-in policy gets.

    Refuses malformed positions, and warns once if all positions are outside the prompt. The first
    failure of a notification is raised by the next ``plan``.
    """

    def __init__(self, label: str, policy: PlacementPolicy) -> None:
        super().__init__(label, policy)
        self._num_outside: int | None = 0
        """Number of positions so far, all unusable. None after the first usable one or the
        warning."""

    def plan(self, prefill: Prefill) -> list[Placed]:
        raise_failure(self._failure)
        return self._call(self._plan, prefill)

    def _plan(self, prefill: Prefill) -> list[Placed]:
        wanted = []
        for placed in self._policy.plan(prefill):
            wanted.append(self._checked(placed))
            if self._num_outside is not None:
                self._watch(wanted[-1].position, prefill)
        return wanted

    def _watch(self, position: int, prefill: Prefill) -> None:
        """Warn once if none of the first ``MAX_OUTSIDE`` positions can be saved at."""
        assert self._num_outside is not None
        if prefill.floor(position) is not None:
            self._num_outside = None
            return
        self._num_outside += 1
        if self._num_outside == MAX_OUTSIDE:
            self._num_outside = None
            warnings.warn(
                f"{self._label!r}: none of its first {MAX_OUTSIDE} positions can be saved at; "
                "return positions with "
                "cached_len < position <= prompt_len, in tokens from the prompt's start, of at "
                f"least {prefill.grid} (the grid)",
                stacklevel=2,
            )

    def _checked(self, placed: Any) -> Placed:
        if isinstance(placed, tuple) and len(placed) == 2:
            position, label = placed
            if hasattr(position, "__index__") and isinstance(label, str):
                return Placed(int(position), label)
        raise PolicyError(
            f"{self._label!r}: plan returned {placed!r}; "
            "return Placed(position, label) with an integer and a string"
        )

    def decode_interval(self) -> int | None:
        interval = self._call(self._policy.decode_interval)
        if interval is None or (type(interval) is int and interval >= 1):
            return interval
        raise PolicyError(
            f"{self._label!r}: decode_interval returned {interval!r}; return the number of tokens "
            "between checkpoints, or None"
        )

    def on_prefill(self, prefill: Prefill) -> None:
        self._notify(self._policy.on_prefill, prefill)

    def on_hit(self, item: Item) -> None:
        self._notify(self._policy.on_hit, item)

    def on_ghost_hit(self, item: Item, num_tokens: int) -> None:
        self._notify(self._policy.on_ghost_hit, item, num_tokens)

    def on_saved(self, position: int, label: str) -> None:
        self._notify(self._policy.on_saved, position, label)

    def on_dropped(self, position: int, label: str) -> None:
        self._notify(self._policy.on_dropped, position, label)


def load(spec: str, protocol: type[Any]) -> OwnPolicy:
    """Load ``module:Class`` or ``module:Class(alpha=2)``, a subclass of ``protocol``.

    The module is installed or in the working directory, which is appended to ``sys.path`` because
    installed commands start without it. Arguments are Python literals.

    Raises:
        ValueError: the module or the class is not found or does not fit. The message is one
            sentence.
    """
    module_name, _, rest = spec.partition(":")
    class_name, arguments, keywords = _arguments(spec, rest)
    found = getattr(import_module(spec, module_name), class_name, None)
    if not isinstance(found, type):
        raise ValueError(f"{spec!r}: {module_name} has no class {class_name!r}")
    _refuse_unfit(OwnPolicy(spec, found), found, protocol)
    make = partial(found, *arguments, **keywords) if arguments or keywords else found
    return OwnPolicy(spec, make)


def _arguments(spec: str, call: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Parse ``Class`` or ``Class(1, alpha=2)`` into (name, arguments, keyword arguments)."""
    if "(" not in call:
        return call, [], {}
    try:
        tree = ast.parse(call, mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            raise ValueError("it is not a call")
        keywords = {str(part.arg): _literal(part.value) for part in tree.keywords}
        return tree.func.id, [_literal(part) for part in tree.args], keywords
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{spec!r}: write module:Class(alpha=2), with numbers, strings and lists ({error})"
        ) from error


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"{ast.unparse(node)} is not a number, string or list") from None


def _refuse_unfit(own: OwnPolicy, found: type[Any], protocol: type[Any]) -> None:
    """Raise ValueError if ``found``, the class of ``own``, does not implement ``protocol``."""
    if not issubclass(found, protocol):
        home = "hybridcache" if protocol.__module__.startswith(OURS) else protocol.__module__
        hint = f"derive {found.__name__} from {home}.{protocol.__name__}"
        if found.__module__ == "builtins":
            hint = f"give a name, or a class derived from {home}.{protocol.__name__}"
        raise ValueError(f"{own.label!r}: it does not implement {protocol.__name__}: {hint}")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ValueError(
            f"{own.label!r}: it does not implement {protocol.__name__}: it lacks "
            f"{', '.join(missing)}"
        )


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
    _warn_of_misspelled(own.label, type(policy))
    if isinstance(policy, ScorePolicy | SampledPolicy) and not hasattr(policy, "now"):
        raise ValueError(
            f"{own.label!r}: the __init__ of {type(policy).__name__} must call super().__init__()"
        )
    return policy


def _warn_of_misspelled(label: str, found: type[Any]) -> None:
    """Warn if a user's class has a name that is nearly, and not quite, one of its base classes."""
    ours = [base for base in found.__mro__ if base.__module__.startswith(OURS)]
    theirs = [base for base in found.__mro__ if base not in (*ours, object)]
    own = {name for base in theirs for name in vars(base)}
    known = {name for base in ours for name in vars(base) if not name.startswith("_")}
    for name in sorted(own - known):
        if name.startswith("_"):
            continue
        near = get_close_matches(name, known - own, n=1, cutoff=0.85)
        if near:
            warnings.warn(
                f"{label!r}: {found.__name__} has an attribute {name!r}, which has no effect; did "
                f"you mean {near[0]!r}?",
                stacklevel=2,
            )


def _blame(label: str, policy: object, method: str, error: Exception) -> NoReturn:
    """Raise a PolicyError with the method and line at which a user's policy failed."""
    if isinstance(error, PolicyError):
        raise error
    file = inspect.getfile(type(policy))
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file
    ]
    where = f" ({Path(file).name}, line {frames[-1].lineno})" if frames else ""
    # The method of the user may have been called by one of its base class.
    name = frames[0].name if frames else method.lstrip("_")
    raise PolicyError(f"{label!r}: {name} raised {type(error).__name__}: {error}{where}") from error
