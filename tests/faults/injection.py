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
Inject = Callable[["Patch"], None]


class Patch:
    """Replacement of methods until the end of a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
        """Return a decorator that replaces ``owner.name`` by a function. The function receives the
        original method before the other arguments."""
        original = getattr(owner, name)
        original = getattr(original, "__func__", original)

        def install(replacement: Callable[..., Any]) -> None:
            def method(*args: Any, **kwargs: Any) -> Any:
                return replacement(original, *args, **kwargs)

            is_class_method = isinstance(vars(owner).get(name), classmethod)
            self._monkeypatch.setattr(
                owner, name, classmethod(method) if is_class_method else method
            )

        return install


class Fault(NamedTuple):
    """Fault with the check that must detect it."""

    inject: Inject
    check: Check
    """Function that fails with the fault and passes without it."""


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

    def detected_by(self, check: Check) -> Callable[[Inject], None]:
        """Return a decorator that adds a fault. The function's name is its description."""

        def add(inject: Inject) -> None:
            self[inject.__name__.strip("_").replace("_", " ")] = Fault(inject, check)

        return add

    def add_silent(self, description: str, owner: Any, name: str, check: Check) -> None:
        """Add the fault that the method ``owner.name`` does nothing."""

        def inject(patch: Patch) -> None:
            @patch(owner, name)
            def do_nothing(*_: Any, **__: Any) -> None:
                pass

        self[description] = Fault(inject, check)

    @property
    def checks(self) -> list[Check]:
        """List of all different checks."""
        return list(dict.fromkeys(fault.check for fault in self.values()))


def assert_detected(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless an assertion or an argument check of the code fails with the fault."""
    fault.inject(Patch(monkeypatch))
    try:
        fault.check()
    except (AssertionError, ValueError, KeyError, RuntimeError) as error:
        if "unexpected field names" in str(error):  # the fault itself is outdated
            raise
        return
    pytest.fail(f"{fault.check.__name__} does not detect the fault")
