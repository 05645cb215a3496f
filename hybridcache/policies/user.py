"""Loading of users' policies. Errors are reported in one sentence.

A policy is given as ``module:Class`` or ``module:Class(alpha=2)``, as a class, as a factory
function, or as an instance.
"""

from __future__ import annotations

import ast
import copy
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from hybridcache.policies.eviction.scored import SampledPolicy, ScorePolicy
from hybridcache.policies.guards import GUARDS


@dataclass(frozen=True, slots=True)
class OwnPolicy:
    """Factory of a user's policy, with its label in tables."""

    label: str
    make: Callable[[], Any] = field(compare=False)

    def __str__(self) -> str:
        return self.label


def load(spec: str, protocol: type[Any]) -> OwnPolicy:
    """Load ``module:Class`` or ``module:Class(alpha=2)``, a subclass of ``protocol``.

    Arguments are Python literals. Raises ValueError with one sentence if the module or the class is
    not found or does not fit.
    """
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
    make = partial(found, *arguments, **keywords) if arguments or keywords else found
    return OwnPolicy(spec, make)


def import_module(spec: str, module_name: str) -> ModuleType:
    """Import the module of ``spec``. Raises ValueError.

    It is installed or in the working directory, which is appended to ``sys.path`` because installed
    commands start without it.
    """
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


def own_policy(given: object) -> OwnPolicy:
    """Wrap a class, a factory function or an instance. An instance is copied for each use."""
    if isinstance(given, OwnPolicy):
        return given
    if callable(given):
        return OwnPolicy(_name_of(given), given)
    if type(given).__module__ == "builtins":
        return OwnPolicy(repr(given), partial(copy.deepcopy, given))
    facts = ", ".join(
        f"{name}={value!r}"
        for name, value in getattr(given, "__dict__", {}).items()
        if name[0] != "_" and name != "now" and isinstance(value, int | float | str)
    )
    return OwnPolicy(f"{type(given).__name__}({facts})", partial(copy.deepcopy, given))


def _name_of(make: Callable[..., Any]) -> str:
    if isinstance(make, partial):
        arguments = [repr(value) for value in make.args]
        arguments += [f"{name}={value!r}" for name, value in make.keywords.items()]
        return f"{_name_of(make.func)}({', '.join(arguments)})"
    name = getattr(make, "__qualname__", type(make).__name__).rpartition("<locals>.")[2]
    return f"{make.__module__}:{name}" if isinstance(make, type) else name


def factory_of(given: object, protocol: type[Any]) -> Callable[[], Any]:
    """Return the factory of the policy that ``given`` is or makes, guarded unless it is built in.

    Raises ValueError if it is a class that does not implement ``protocol``, one of the three
    interfaces of policies.
    """
    own = own_policy(given)
    if isinstance(own.make, type):
        _refuse_unfit(own.label, own.make, protocol)
        if _is_built_in(own.make):
            return own.make

    def make() -> Any:
        policy = _made(own, protocol)
        return policy if _is_built_in(type(policy)) else GUARDS[protocol](own.label, policy)

    return make


def _is_built_in(kind: type[Any]) -> bool:
    return kind.__module__.startswith("hybridcache.policies.")


def _made(own: OwnPolicy, protocol: type[Any]) -> Any:
    try:
        policy = own.make()
    except Exception as error:  # a user's class can raise anything
        hint = ": it is created without arguments: give them defaults, or write Class(alpha=2)"
        raise ValueError(
            f"{own.label!r}: it cannot be created ({type(error).__name__}: {error})"
            f"{hint if isinstance(own.make, type) else ''}"
        ) from error
    kind = type(policy)
    _refuse_unfit(own.label, kind, protocol)
    if isinstance(policy, ScorePolicy | SampledPolicy) and not hasattr(policy, "now"):
        raise ValueError(
            f"{own.label!r}: the __init__ of {kind.__name__} must call super().__init__()"
        )
    return policy


def _refuse_unfit(label: str, found: type[Any], protocol: type[Any]) -> None:
    """Raise ValueError if the class ``found`` does not implement ``protocol``."""
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if not issubclass(found, protocol):
        fault = f"derive {found.__name__} from {protocol.__module__}.{protocol.__name__}"
        if found.__module__ == "builtins":
            fault = f"give a name, or a class derived from {fault.rpartition(' ')[2]}"
    elif missing:
        fault = f"it lacks {', '.join(missing)}"
    else:
        return
    raise ValueError(f"{label!r}: it does not implement {protocol.__name__}: {fault}")
