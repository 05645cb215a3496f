"""Faults that are injected by behaviour, and the checks of the suite that must notice them.

A fault replaces a public method of a class for one test; nothing here names a line of source, so
renames inside a module do not matter. A check is a state machine or a test of the suite.
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
    """Replaces methods until the end of a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
        """Return a decorator: the function stands in for ``owner.name``, and receives the original
        before the other arguments."""
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
    """One way in which something could be wrong."""

    inject: Inject
    check: Check
    """Fails with the fault, and passes without."""


def machine(machine_class: type, max_examples: int = 100, steps: int = 30) -> Check:
    """Return the check that runs a state machine; the same examples each time."""

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
    """Faults by what is wrong, in words."""

    def noticed_by(self, check: Check) -> Callable[[Inject], None]:
        """Return a decorator that adds a fault: its name is the function's."""

        def add(inject: Inject) -> None:
            self[inject.__name__.strip("_").replace("_", " ")] = Fault(inject, check)

        return add

    @property
    def checks(self) -> list[Check]:
        """Every check once."""
        return list(dict.fromkeys(fault.check for fault in self.values()))


def assert_noticed(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless an assertion, or a guard of the code itself, fails with the fault."""
    fault.inject(Patch(monkeypatch))
    try:
        fault.check()
    except (AssertionError, ValueError, KeyError, RuntimeError):
        return
    pytest.fail(f"{fault.check.__name__} does not notice it")
