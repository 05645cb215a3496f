"""Environment, hypothesis profiles and test selection for the whole suite.

- Triton reads `TRITON_INTERPRET` when it is first imported, possibly by transformers. It must be 1
  without a GPU, and must not be 1 with `KERNELS_ON_DEVICE=1` (set by `make gpu`).
- Waiting OpenMP threads sleep. Otherwise two processes with two threads each on two cores would
  spend most of their time spinning.
- The hypothesis profile is `quick` in `make test` and `long` in `make test-all`. HYPOTHESIS_PROFILE
  selects another: `thorough` runs for hours, `mutate` does not shrink failing examples.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import ssl
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, register_random, settings

from hybridcache import CacheConfig
from tests import selection

pytest_plugins = ["tests.forked", "tests.watchdog"]

if os.environ.get("KERNELS_ON_DEVICE") == "1":
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError(
            "KERNELS_ON_DEVICE=1 and TRITON_INTERPRET=1 exclude each other: unset one of them."
        )
elif not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ["TRITON_INTERPRET"] = "1"

# Read once, when torch is first imported. A forked process that computes with several threads waits
# for ever for those of its parent.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Methods for tests only, read at the import of `kernels.library`, also by servers that tests start.
os.environ["HYBRIDCACHE_CXXFLAGS"] = "-DPLAIN_TILES"

# All HTTP clients share one context: each would take 25 ms to read the root certificates.
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


class TorchRandom:
    """Random numbers of torch, once a test has imported it."""

    def seed(self, seed: int) -> None:
        """Seed the processor's generator, and others if there are devices. For each kind of device
        that this process has not used, ``torch.manual_seed`` keeps a stack in text: 1 ms."""
        if torch := sys.modules.get("torch"):
            generator = torch if torch.accelerator.is_available() else torch.default_generator
            generator.manual_seed(seed)

    def getstate(self) -> Any:
        return sys.modules["torch"].get_rng_state() if "torch" in sys.modules else None

    def setstate(self, state: Any) -> None:
        if state is not None:
            sys.modules["torch"].set_rng_state(state)


TORCH_RANDOM = TorchRandom()
register_random(TORCH_RANDOM)  # Hypothesis seeds each example.


@pytest.fixture(autouse=True)
def seeded_torch() -> None:
    """Make the numbers of a test independent of the tests before it."""
    TORCH_RANDOM.seed(0)


# Caches of tests find misuse when it happens, unless a test says debug=False.
*_given, _ = CacheConfig.__init__.__defaults__ or ()
CacheConfig.__init__.__defaults__ = (*_given, True)


gc.disable()  # Until all tests are collected: imported objects would be searched again and again.


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection and collect less often (saves 5 %)."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that run only in `make test-all`."""
    if selection.level() == "all":
        return
    for item in items:
        selection.draw_fewer(item)
    if any("::" in argument for argument in config.args):
        return
    kept = selection.choose(items)
    chosen = set(kept)
    left_out = [item for item in items if item not in chosen]
    config.stash[LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print how many test cases were deselected."""
    left_out = config.stash.get(LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(
            f"This was a representative part; `make test-all` runs {left_out:,} more cases."
        )


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also in a background shell that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
