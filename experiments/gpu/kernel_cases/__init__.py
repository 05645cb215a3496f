"""Cases of `experiments.gpu.kernels`: a module per kernel folder, each with ``cases(setup)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch

from kernels.attention.sequences import Sequences
from kernels.packed import TILE, Exports, Packed
from tests.kernels.records import taking

LENGTHS = ((8192,), (1024,) * 8, (64, 1000, 3000, 17, 2048, 500, 1500, 63))
"""Packed prompts: a long one, several of equal length, and several of mixed lengths."""


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

    def int32(self, values: Any) -> torch.Tensor:
        """Return an int32 table for a kernel."""
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one shape. The first call of each contender is compared, later ones are
    timed."""

    name: str
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


Kernels = tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]
"""Kernel and its reference."""
Inputs = Sequence[torch.Tensor | None]
Rivals = Mapping[str, Callable[[], torch.Tensor]]


def prompt_case(
    setup: Setup,
    name: str,
    kernels: Kernels,
    inputs: Inputs,
    output: torch.Tensor,
    states: torch.Tensor,
    lengths: Sequence[int],
    num_flops: int = 0,
    rivals: Callable[[Packed], Rivals] = lambda packed: {},
) -> Case:
    """Return a case of packed prompts from zero. The result is like ``output``.

    The rival ``exporting`` also saves two states of the longest prompt, in the last two of
    ``states``.
    """
    ours, reference = map(taking, kernels)
    slots = setup.int32(range(len(lengths)))
    resumed = torch.zeros(len(lengths), dtype=torch.bool, device=setup.device)
    packed, on_cpu = (Packed.from_lengths(lengths, device) for device in (setup.device, "cpu"))
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    ends = sorted({TILE, lengths[longest] // 2 // TILE * TILE} - {0})
    exports = [(longest, end, len(lengths) + i) for i, end in enumerate(ends)]
    run = partial(ours, *inputs, states=states, packed=packed, slots=slots, resumed=resumed)
    shape = f"x {lengths[0]}" if len(set(lengths)) == 1 else "mixed"
    return Case(
        name=f"{name} {len(lengths)} {shape}",
        run=partial(run, exports=None),
        expected=lambda: reference(
            *(None if x is None else x.float().cpu() for x in inputs),
            states=states.float().cpu(),
            packed=on_cpu,
            slots=slots.cpu(),
            resumed=resumed.cpu(),
            exports=None,
        ),
        num_bytes=num_bytes(inputs, output) + states[:-2].nbytes,
        num_flops=num_flops,
        rivals={"exporting": partial(run, exports=Exports.plan(packed, exports))} | rivals(packed),
    )


def decode_case(
    setup: Setup,
    name: str,
    kernels: Kernels,
    inputs: Inputs,
    output: torch.Tensor,
    states: torch.Tensor,
    rivals: Rivals | None = None,
    loaded_bytes: int | None = None,
) -> Case:
    """Return a case of one token of each state's sequence, which changes the states."""
    slots, changed = setup.int32(range(len(states))), states.clone()
    ours, reference = (partial(taking(one), *inputs, slots=slots) for one in kernels)
    return Case(
        name=f"{name} {len(states)}",
        run=partial(ours, states=changed),
        expected=partial(reference, states=states.clone()),
        num_bytes=2 * states.nbytes + num_bytes(inputs, output),
        rivals={"torch": partial(reference, states=states.clone()), **(rivals or {})},
        moved_bytes=None if loaded_bytes is None else 2 * states.nbytes + loaded_bytes,
        reset=lambda: changed.copy_(states),
    )


def verify_case(
    setup: Setup,
    name: str,
    kernels: Kernels,
    inputs: Inputs,
    output: torch.Tensor,
    states: torch.Tensor,
    num_steps: int,
) -> Case:
    """Return a case of ``num_steps`` tokens per sequence, with a new state after each of them.

    ``states`` has those of the sequences, followed by those of the steps.
    """
    num_sequences = len(states) // (num_steps + 1)
    layout = {
        "packed": Packed.from_lengths([num_steps] * num_sequences, setup.device),
        "slots": setup.int32(range(num_sequences)),
        "step_slots": setup.int32(range(num_sequences, len(states))),
    }
    ours, reference = (partial(taking(one), *inputs, states=states, **layout) for one in kernels)
    return Case(
        name=f"{name} {num_sequences} x {num_steps}",
        run=ours,
        expected=reference,
        num_bytes=states.nbytes + num_bytes(inputs, output),
        rivals={"torch": reference},
    )


def gates_case(
    name: str, kernels: tuple[ModuleType, ModuleType], inputs: Inputs, rivals: Rivals | None = None
) -> Case:
    """Return a case of the gates of a recurrence, for its fused module and its reference."""
    ours, plain = (lambda module=module: module.gates(*inputs)[0] for module in kernels)
    results = kernels[1].gates(*inputs)
    return Case(
        name, ours, plain, num_bytes(inputs, *results), rivals={"torch": plain, **(rivals or {})}
    )


def num_bytes(inputs: Inputs, *outputs: torch.Tensor) -> int:
    """Return the bytes of inputs, which are read once, and of outputs, which are written once."""
    return sum(x.nbytes for x in (*inputs, *outputs) if x is not None)


def scattered(setup: Setup, num: int, length: int) -> dict[str, Any]:
    """Return the layout of ``num`` sequences whose rows are scattered over a pool."""
    table = setup.int32(torch.randperm(num * length).tolist()).view(num, length)
    return {"table": table, "sequences": Sequences.of(range(num), [length] * num, setup.device)}
