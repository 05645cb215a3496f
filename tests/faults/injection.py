"""Injection of faults, and the checks of the suite that must detect them.

A fault replaces a public method of a class for one test, so that it does not depend on source
lines. A check is a state machine or a test of the suite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

Check = Callable[[], None]
Replacement = Callable[..., Any]
"""Function that receives the original method before its arguments."""


def do_nothing(*_: Any, **__: Any) -> None:
    pass


class Fault(NamedTuple):
    """Replacement of the method ``owner.name``, and the check that must detect it."""

    check: Check
    """Function that fails with the fault and passes without it."""
    owner: Any
    name: str
    replacement: Replacement = do_nothing

    def inject(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(self.owner, self.name)
        original = getattr(original, "__func__", original)

        def method(*args: Any, **kwargs: Any) -> Any:
            return self.replacement(original, *args, **kwargs)

        is_class_method = isinstance(vars(self.owner).get(self.name), classmethod)
        monkeypatch.setattr(
            self.owner, self.name, classmethod(method) if is_class_method else method
        )


def machine(machine_class: type, max_examples: int = 100, steps: int = 30) -> Check:
    """Return the check that runs a state machine, with the same examples each time."""

    def run() -> None:
        run_state_machine_as_test(
            machine_class,
            settings=settings(
                max_examples=max_examples,
                stateful_step_count=steps,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )

    run.__name__ = machine_class.__name__
    return run


class Faults(dict[str, Fault]):
    """Faults by description."""

    def of(self, check: Check, owner: Any, name: str) -> Callable[[Replacement], Replacement]:
        """Return a decorator that adds a fault. The name of the replacement is its description."""

        def add(replacement: Replacement) -> Replacement:
            description = replacement.__name__.replace("_", " ")
            self[description] = Fault(check, owner, name, replacement)
            return replacement

        return add

    @property
    def checks(self) -> list[Check]:
        """List of all different checks."""
        return list(dict.fromkeys(fault.check for fault in self.values()))


def assert_detected(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless an assertion or an argument check of the code fails with the fault."""
    fault.inject(monkeypatch)
    try:
        fault.check()
    except (AssertionError, ValueError, KeyError, RuntimeError) as error:
        if "unexpected field names" in str(error):  # the fault itself is outdated
            raise
        return
    pytest.fail(f"{fault.check.__name__} does not detect the fault")
