"""Environment, hypothesis profiles and the choice of tests, for all tests.

Triton reads `TRITON_INTERPRET` when it is first imported, which may be by transformers: without a
GPU it must interpret. With `KERNELS_ON_DEVICE=1`, as `make gpu` sets it, nothing may be
interpreted.

OpenMP's threads sleep while they wait: two processes with two threads each on two cores would spend
most of their time spinning.

The hypothesis profile is `quick` in `make test` and `long` in `make test-all`; HYPOTHESIS_PROFILE
names another one: `thorough` for hours, `mutate` to ask only whether a test fails.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests import selection

pytest_plugins = ["tests.forked"]

if os.environ.get("KERNELS_ON_DEVICE") == "1":
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError(
            "KERNELS_ON_DEVICE forbids what TRITON_INTERPRET asks for: unset one of the two."
        )
elif not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ["TRITON_INTERPRET"] = "1"

# Read once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Every HTTP client of a test would read all root certificates, 25 ms each: they share them.
ssl.create_default_context = functools.cache(ssl.create_default_context)

QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
settings.register_profile(
    "dev", deadline=None, max_examples=50, stateful_step_count=40, suppress_health_check=QUIET
)
settings.register_profile(
    "quick",
    settings.get_profile("dev"),
    max_examples=selection.num_examples(50),
    stateful_step_count=30,
    derandomize=True,
    print_blob=True,
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.register_profile(
    "mutate", settings.get_profile("quick"), phases=(Phase.explicit, Phase.generate)
)
settings.register_profile(
    "long", settings.get_profile("dev"), max_examples=150, stateful_step_count=50
)
settings.register_profile(
    "thorough", settings.get_profile("dev"), max_examples=2000, stateful_step_count=100
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "quick" if selection.level() == "quick" else "long")
)

HAS_TORCH = importlib.util.find_spec("torch") is not None
"""Not every Python has a build of torch: without it runs what needs none."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Pass over folders whose fixtures need torch where there is none."""
    return True if not HAS_TORCH and selection.has_torch_fixtures(collection_path) else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[Any]:
    """Skip test files that import torch where there is none."""
    report = yield
    if not HAS_TORCH and report.failed and "No module named 'torch'" in str(report.longrepr):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, "needs torch")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Skip tests that need torch at last where there is none."""
    report = yield
    said = ("No module named 'torch'", "torch is not installed")
    if not HAS_TORCH and report.failed:
        shown = f"{report.longreprtext}{report.capstdout}{report.capstderr}"
        if any(text in shown for text in said):
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, "needs torch")
    return report


def pytest_collection_finish() -> None:
    """Exempt what is imported from garbage collection, and collect less often: 5 % of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


LEFT_OUT = pytest.StashKey[int]()
HASHES = pytest.StashKey[dict[str, str]]()
REMEMBERED = "hybridcache/sources"
"""Key of the cache of pytest: hashes of the sources that the last green run has tested."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `make test-all` alone runs."""
    is_all = selection.level() == "all"
    known = config.cache.get(REMEMBERED, {}) if getattr(config, "cache", None) else {}
    chosen = selection.Selection(known)
    is_picked = any("::" in argument for argument in config.args)
    kept = items if is_picked else chosen.choose(items)
    for item in items if not is_all else ():
        selection.draw_fewer(item)
    config.stash[HASHES] = chosen.hashes
    if is_all or is_picked:
        return
    config.stash[LEFT_OUT] = len(chosen.left_out)
    config.hook.pytest_deselected(items=chosen.left_out)
    items[:] = kept


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remember the sources that were tested, if all went well and nothing was picked by hand."""
    config = session.config
    if hasattr(config, "workerinput"):  # of pytest-xdist: it does not know how the others fared
        return
    asked = (getattr(config.option, name, None) for name in ("keyword", "markexpr", "lf", "ff"))
    picked = any(asked)
    if exitstatus == 0 and not picked and getattr(config, "cache", None) is not None:
        known = config.cache.get(REMEMBERED, {})
        config.cache.set(REMEMBERED, known | config.stash.get(HASHES, {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say in one line how much of the suite this was."""
    left_out = config.stash.get(LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(
            f"A representative part of the suite; `make test-all` runs {left_out:,} cases more."
        )
