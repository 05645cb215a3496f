"""Policies of the user's own, wherever a word stands; what is wrong with one is said in one
sentence.

``module:Class`` or ``module:Class(alpha=2)``, a class, a function that makes one, or one itself.
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
)

MAX_OUTSIDE = 50
"""Positions outside of every prompt after which a placement is warned of."""
OURS = "hybridcache.policies."
"""Where this project's own policies are: they need no guard."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class OwnPolicy:
    """A policy of the user's own: how tables call it, and what makes one."""

    label: str
    make: Callable[[], Any] = field(compare=False)

    def __str__(self) -> str:
        return self.label


def own_policy(given: object) -> OwnPolicy:
    """What stands for a class, a function that makes a policy, or a policy, of which it makes
    copies."""
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
    """What makes the eviction policy that ``given`` is or makes, watched over."""
    own = own_policy(given)
    if isinstance(own.make, type):
        _refuse_unfit(own, own.make, EvictionPolicy)
        if own.make.__module__.startswith(OURS):
            return own.make
    return lambda: GuardedEviction(own.label, _made(own, EvictionPolicy))


def placement_of(given: object) -> Callable[[], PlacementPolicy]:
    """What makes the placement policy that ``given`` is or makes, watched over."""
    own = own_policy(given)
    if isinstance(own.make, type):
        _refuse_unfit(own, own.make, PlacementPolicy)
    return lambda: GuardedPlacement(own.label, _made(own, PlacementPolicy))


def admission_of(given: object) -> AdmissionPolicy:
    """The admission policy that ``given`` is or makes, guarded."""
    own = own_policy(given)
    policy: AdmissionPolicy = _made(own, AdmissionPolicy)
    ours = type(policy).__module__.startswith(OURS)
    return policy if ours else GuardedAdmission(own.label, policy)


class _Guarded:
    """Calls a stranger's methods; what they raise becomes a PolicyError that names policy, method
    and line."""

    def __init__(self, label: str, policy: Any) -> None:
        self._label = label
        self._policy = policy

    def _call(self, method: Callable[..., Result], *arguments: object) -> Result:
        try:
            return method(*arguments)
        except Exception as error:  # whatever a stranger's method raises
            _blame(self._label, self._policy, method.__name__, error)


class GuardedEviction(_Guarded, EvictionPolicy):
    """A user's eviction policy. It gets every call that a built-in policy gets.

    Also refuses a victim that was never offered. O(1) besides the policy's own work.
    """

    def __init__(self, label: str, policy: EvictionPolicy) -> None:
        super().__init__(label, policy)
        self._held: set[Item] = set()
        self.orders_tiers = bool(policy.orders_tiers)

    def add(self, item: Item) -> None:
        self._held.add(item)
        self._call(self._policy.add, item)

    def discard(self, item: Item, evicted: bool) -> None:
        self._held.discard(item)
        self._call(self._policy.discard, item, evicted)

    def touch(self, item: Item) -> None:
        self._call(self._policy.touch, item)

    def missed(self, item: Item) -> None:
        self._call(self._policy.missed, item)

    def missed_above(self, item: Item) -> None:
        self._call(self._policy.missed_above, item)

    def below(self) -> EvictionPolicy | None:
        """Return the policy's own answer, guarded as well."""
        lower = self._call(self._policy.below)
        if lower is None:
            return None
        if not isinstance(lower, EvictionPolicy):
            raise PolicyError(
                f"{self._label!r}: below returned {lower!r}; return an EvictionPolicy, or None"
            )
        return GuardedEviction(self._label, lower)

    def candidates(self) -> Iterable[Item]:
        """List all items that the policy was offered, in any order."""
        return self._held

    def victim(self, kind: Kind | None) -> Item | None:
        victim, is_fit = self._call(self._victim, kind)
        if is_fit:
            return victim
        raise PolicyError(
            f"{self._label!r}: victim({kind!r}) gave {victim!r}, which is no candidate of that "
            "kind; "
            "give an item that was added and not discarded since, or None"
        )

    def _victim(self, kind: Kind | None) -> tuple[Item | None, bool]:
        """Return (the policy's choice, whether it is a candidate of ``kind``)."""
        victim = self._policy.victim(kind)
        is_fit = victim is None or (victim in self._held and kind in (None, victim.kind))
        return victim, is_fit


class GuardedAdmission(_Guarded, AdmissionPolicy):
    """A user's admission policy. It gets every call that a built-in policy gets.

    Also refuses requests that do not wait, and requests that are named twice.
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
    """A user's placement policy. It gets every call that a built-in policy gets.

    Also refuses malformed positions, and warns once if all of them lie outside the prompt.
    """

    def __init__(self, label: str, policy: PlacementPolicy) -> None:
        super().__init__(label, policy)
        self._num_outside: int | None = 0
        """Positions so far, none of which was usable; None after the first usable one or the
        warning."""

    def plan(self, prefill: Prefill) -> list[Placed]:
        return self._call(self._plan, prefill)

    def _plan(self, prefill: Prefill) -> list[Placed]:
        wanted = []
        for placed in self._policy.plan(prefill):
            wanted.append(self._checked(placed))
            if self._num_outside is not None:
                self._watch(wanted[-1].position, prefill)
        return wanted

    def _watch(self, position: int, prefill: Prefill) -> None:
        """Warn once if the first ``MAX_OUTSIDE`` positions all lie where nothing can be saved."""
        assert self._num_outside is not None
        if prefill.floor(position) is not None:
            self._num_outside = None
            return
        self._num_outside += 1
        if self._num_outside == MAX_OUTSIDE:
            self._num_outside = None
            warnings.warn(
                f"{self._label!r}: none of its first {MAX_OUTSIDE} positions lay within what a "
                "prefill computes; give "
                "cached_len < position <= prompt_len, tokens from the prompt's start, of at least "
                f"{prefill.grid} (the grid)",
                stacklevel=2,
            )

    def _checked(self, placed: Any) -> Placed:
        if isinstance(placed, tuple) and len(placed) == 2:
            position, label = placed
            if hasattr(position, "__index__") and isinstance(label, str):
                return Placed(int(position), label)
        raise PolicyError(
            f"{self._label!r}: plan gave {placed!r}; "
            "give Placed(position, label) with a whole position and a word for a label"
        )

    def decode_interval(self) -> int | None:
        interval = self._call(self._policy.decode_interval)
        if interval is None or (type(interval) is int and interval >= 1):
            return interval
        raise PolicyError(
            f"{self._label!r}: decode_interval gave {interval!r}; give tokens between checkpoints, "
            "or None"
        )

    def on_prefill(self, prefill: Prefill) -> None:
        self._call(self._policy.on_prefill, prefill)

    def on_hit(self, item: Item) -> None:
        self._call(self._policy.on_hit, item)

    def on_ghost_hit(self, item: Item, num_tokens: int) -> None:
        self._call(self._policy.on_ghost_hit, item, num_tokens)

    def on_saved(self, position: int, label: str) -> None:
        self._call(self._policy.on_saved, position, label)

    def on_dropped(self, position: int, label: str) -> None:
        self._call(self._policy.on_dropped, position, label)


def word_of(own: type[Any]) -> str | None:
    """``module:Class`` for a class that its module knows by name, also one of a notebook's cell;
    None for another."""
    module_name, name = own.__module__, own.__qualname__
    if getattr(sys.modules.get(module_name), name, None) is not own:
        return None
    return f"{module_name}:{name}"


def source_of(word: str) -> str:
    """The text of the module that a word like ``module:Class`` names; empty for other words,
    numbered ones (``ttl:500``) too. ValueError where it has none to read."""
    module_name, colon, rest = word.strip().partition(":")
    if not colon or rest.replace(".", "", 1).isdecimal():
        return ""
    try:
        return inspect.getsource(_imported(word, module_name))
    except (OSError, TypeError) as error:
        raise ValueError(
            f"{word!r}: its source can not be read, so whether a kept run is of this very class "
            "is not known; put the class in "
            "a file, or keep no runs"
        ) from error


def load(word: str, protocol: type[Any]) -> OwnPolicy:
    """What ``module:Class`` or ``module:Class(alpha=2)`` names, from an installed module or one in
    the working directory, with the methods of ``protocol``; arguments are plain Python values.

    The working directory joins the end of ``sys.path``: installed commands start without it.
    ValueError says in one sentence what can not be found.
    """
    module_name, _, rest = word.partition(":")
    class_name, arguments, keywords = _arguments(word, rest)
    found = getattr(_imported(word, module_name), class_name, None)
    if not isinstance(found, type):
        raise ValueError(f"{word!r}: {module_name} has no class {class_name!r}")
    _refuse_unfit(OwnPolicy(word, found), found, protocol)
    make = partial(found, *arguments, **keywords) if arguments or keywords else found
    return OwnPolicy(word, make)


def _arguments(word: str, call: str) -> tuple[str, list[Any], dict[str, Any]]:
    """(name, arguments, those with names) of ``Class`` or ``Class(1, alpha=2)``."""
    if "(" not in call:
        return call, [], {}
    try:
        tree = ast.parse(call, mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            raise ValueError("it is no call")
        keywords = {str(part.arg): ast.literal_eval(part.value) for part in tree.keywords}
        return tree.func.id, [ast.literal_eval(part) for part in tree.args], keywords
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{word!r}: write module:Class(alpha=2), with numbers, texts, lists and such ({error})"
        ) from error


def _refuse_unfit(own: OwnPolicy, found: type[Any], protocol: type[Any]) -> None:
    """Raise ValueError if ``found``, the class of ``own``, does not implement ``protocol``."""
    if not issubclass(found, protocol):
        home = "hybridcache" if protocol.__module__.startswith(OURS) else protocol.__module__
        raise ValueError(
            f"{own.label!r}: it is no {protocol.__name__}: derive {found.__name__} from "
            f"{home}.{protocol.__name__}"
        )
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ValueError(
            f"{own.label!r}: it is no {protocol.__name__}, it has no {', '.join(missing)}"
        )


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


def _made(own: OwnPolicy, protocol: type[Any]) -> Any:
    try:
        policy = own.make()
    except Exception as error:  # whatever a stranger's class raises
        hint = ""
        if isinstance(own.make, type):
            hint = (
                "; it is made without arguments: give them defaults, or write module:Class(alpha=2)"
            )
        raise ValueError(
            f"{own.label!r}: it can not be made ({type(error).__name__}: {error}){hint}"
        ) from error
    _refuse_unfit(own, type(policy), protocol)
    if isinstance(policy, ScorePolicy | SampledPolicy) and not hasattr(policy, "now"):
        raise ValueError(
            f"{own.label!r}: the __init__ of {type(policy).__name__} must call super().__init__()"
        )
    return policy


def _blame(label: str, policy: object, method: str, error: Exception) -> NoReturn:
    """Raise a PolicyError that says where a stranger's method failed."""
    if isinstance(error, PolicyError):
        raise error
    file = inspect.getfile(type(policy))
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file
    ]
    where = f" ({Path(file).name}, line {frames[-1].lineno})" if frames else ""
    raise PolicyError(
        f"{label!r}: {method.lstrip('_')} raised {type(error).__name__}: {error}{where}"
    ) from error
