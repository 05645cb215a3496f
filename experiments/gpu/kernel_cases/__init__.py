"""Cases of `experiments.gpu.kernels`: a module per group of kernels.

Each has ``plans(is_dry)``, which yields a function and its arguments for each case, so that a case
has a name before its tensors are made. The function receives a `Setup` first.

Kernels of flash-linear-attention (fla-core 0.6) are called with the same tensors for comparison.
fla-core must be in a separate folder, because transformers would use it if it found it. `make
rivals` installs it into ``out/rivals``, like `pip install --no-deps --target`. Only the benchmark
uses that folder, with the same torch and triton. A rival that is not installed is left out; one
that fails is reported.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch

from engine.runner.device import Device
from experiments.provenance import ROOT


@dataclass(frozen=True, slots=True)
class Setup:
    """Device and sizes of the cases."""

    device: str
    is_dry: bool
    """True for tiny shapes, which only check that every case runs. Times are then meaningless."""

    is_float32: bool = False
    """True for float32 activations at full shapes."""

    @property
    def dtype(self) -> torch.dtype:
        """Number format of activations. Triton's interpreter cannot multiply bfloat16."""
        return torch.float32 if self.is_dry or self.is_float32 else torch.bfloat16

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return normal numbers, by default in the activations' dtype."""
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def require(self, format: str) -> None:
        """Skip the case on a device without a number format."""
        if not Device.resolve(self.device).supports(format):
            pytest.skip(f"The device has no {format}.")

    def int32(self, values: Any) -> torch.Tensor:
        """Return an int32 table for a kernel."""
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one shape. The first call of each contender is compared, later ones are
    timed."""

    run: Callable[[], torch.Tensor]
    """Runs our kernel. The returned tensor is compared with ``expected``."""
    expected: Callable[[], torch.Tensor]
    """Returns the correct result. It is called once, on any device."""
    num_bytes: int
    """Minimum number of bytes to read and write."""
    num_flops: int = 0
    """Minimum number of operations to compute."""
    rivals: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    """Other implementations of the same work, also compared."""
    tolerance: float = 2e-2
    """Root mean square error over the root mean square of ``expected``."""
    rival_tolerance: float | None = None
    """Tolerance of rivals that round more than ours, or None for ``tolerance``."""
    moved_bytes: int | None = None
    """Bytes of all loads and stores of our kernel with its own launch parameters. The excess over
    ``num_bytes`` is read twice."""
    reset: Callable[[], object] | None = None
    """Restores the tensors that calls of ours changed, or None if there are none."""

    def first_call(self) -> torch.Tensor:
        """Return a copy of the result on fresh inputs."""
        if self.reset:
            self.reset()
        return self.run().clone()


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square error relative to that of ``expected``. NaN counts as
    infinite."""
    result, expected = (x.detach().to("cpu", torch.float64) for x in (result, expected))
    size = expected.square().mean().sqrt().clamp(1e-30)
    ratio = (result - expected).square().mean().sqrt() / size
    return float(ratio.nan_to_num(nan=float("inf"), posinf=float("inf")))


Inputs = Sequence[torch.Tensor | None]
Rivals = Mapping[str, Callable[[], torch.Tensor]]


def find_rivals() -> None:
    """Add the folder of fla-core to the end of the import path."""
    sys.path.append(str(ROOT / "out" / "rivals"))


def fla(path: str, run: Callable[[Callable[..., Any]], torch.Tensor]) -> Rivals:
    """Return the rival that passes the function ``path`` of the package to ``run``. It is imported
    by each call, so that a missing function is a failure of this rival only."""
    module, _, name = path.rpartition(".")
    if not find_spec("fla"):
        return {}
    return {"fla": lambda: run(getattr(import_module(f"fla.{module}"), name))}


class Plan(NamedTuple):
    """Case whose tensors are not made yet."""

    group: str
    build: Callable[..., Case]
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        kind = self.build.__name__.strip("_").replace("_", " ")
        return " ".join([self.group, kind, *map(_word, self.arguments)])

    def case(self, setup: Setup) -> Case:
        """Return the case, with tensors of a fixed seed."""
        torch.manual_seed(0)
        return self.build(setup, *self.arguments)


def _word(argument: object) -> str:
    """Return an argument in a name. Lengths are those of packed prompts."""
    if isinstance(argument, tuple):
        same = f"x {argument[0]}" if len({*argument}) == 1 else "mixed"
        return f"{len(argument)} {same}"
    return str(argument)


def plans(is_dry: bool, *groups: str) -> Iterator[Plan]:
    """Yield all plans, or those of some groups, with tiny shapes if ``is_dry``."""
    for module in pkgutil.iter_modules(__path__):
        if module.name in (groups or (module.name,)):
            declared = import_module(f"{__name__}.{module.name}").plans(is_dry)
            yield from (Plan(module.name, build, tuple(of)) for build, *of in declared)


def num_bytes(inputs: Inputs, *outputs: torch.Tensor) -> int:
    """Return the bytes of inputs, which are read once, and of outputs, which are written once."""
    return sum(x.nbytes for x in (*inputs, *outputs) if x is not None)
