"""Every mutation can be tried on today's code; ``make mutate`` says whether it is caught."""

from __future__ import annotations

import pytest

from experiments.mutate import LISTS
from experiments.provenance import ROOT


@pytest.mark.parametrize("name", LISTS)
def test_what_a_mutation_breaks_stands_once_in_its_file(name: str) -> None:
    texts: dict[str, str] = {}
    for mutation in LISTS[name].breakages:
        path = mutation.path
        text = texts.setdefault(path, (ROOT / path).read_text(encoding="utf-8"))
        assert text.count(mutation.old) == 1, f"{path}: {mutation.what}"
        if path.endswith(".py"):
            compile(text.replace(mutation.old, mutation.new), path, "exec")
        assert mutation.new != mutation.old


@pytest.mark.parametrize("name", LISTS)
def test_mutations_differ_and_the_tests_that_must_notice_are_run_unbroken(name: str) -> None:
    breakages, tests, machines, _ = LISTS[name]
    named = [mutation.what for mutation in breakages]
    assert len(set(named)) == len(named)
    assert {test for mutation in breakages for test in mutation.tests} <= set(tests)
    assert all((ROOT / test).exists() for test in (*tests, *machines))
