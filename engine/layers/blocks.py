"""Blocks of which a decoder consists, and their inputs in one step.

A mixer runs in three parts: ``project`` (input product), ``mix`` (attention or scan), ``finish``
(output product). The first and last are dense and can be captured as device graphs; the middle one
works on the pools. Its inputs are the batch as tensors on the device, and the rotary table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from engine.weights.parameters import Build, Composite, Layer, Role
from engine.weights.products import SCALE_BLOCK, Linear, Part, QuantizedRows
from hybridcache.geometry.sizes import Spec
from kernels.attention.sequences import Sequences
from kernels.packed import Exports, Packed, running_sum

X = TypeVar("X", torch.Tensor, QuantizedRows)
Pools = tuple[torch.Tensor, ...]
"""Tensors that one mixer declares, in its order: KV ``[N, ...]`` by row, states ``[S, ...]`` by
slot."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of hidden states that are tokens. All other rows are padding."""

    count: int
    """Number of rows from the first one on that may be tokens."""
    live: torch.Tensor | None = None
    """int64 ``[count]``: zero for padding among them, which a graph knows on the device only. None
    if all are tokens."""

    def of(self, x: X) -> X:
        """Return the rows of ``x`` that may be tokens."""
        return x[: self.count]


@dataclass(frozen=True, slots=True)
class DecodePart:
    """The first D tokens: one of each decoding sequence."""

    num_tokens: int
    sequences: Sequences
    slots: torch.Tensor
    """int32[D]; empty for an attention-only model."""

    @property
    def attention_inputs(self) -> dict[str, object]:
        """Arguments of the decoding functions of attention."""
        return {"sequences": self.sequences}

    @property
    def scan_inputs(self) -> dict[str, object]:
        """Arguments of the decoding functions of convolutions and recurrences."""
        return {"slots": self.slots}


@dataclass(frozen=True, slots=True)
class VerifyPart:
    """The next V tokens, packed: the next token and the drafts of each sequence with drafts."""

    num_tokens: int
    packed: Packed
    sequences: Sequences
    tokens: Sequences
    """Row and KV length of each of the V tokens, as if it were the last of its sequence."""
    slots: torch.Tensor
    """int32[B], read only; empty for an attention-only model."""
    step_slots: torch.Tensor
    """int32[V]: slot for the state after each token; empty for an attention-only model."""
    before: torch.Tensor
    """int64[V]: index of the token before each of the V tokens; V plus the sequence's number for
    its first token."""

    @property
    def attention_inputs(self) -> dict[str, object]:
        """Arguments of the verifying functions of attention."""
        return {"sequences": self.sequences, "packed": self.packed}

    @property
    def scan_inputs(self) -> dict[str, object]:
        """Arguments of the decoding functions of convolutions and recurrences."""
        return {"slots": self.slots, "packed": self.packed, "step_slots": self.step_slots}


def tokens_before(lengths: Sequence[int], num_tokens: int) -> npt.NDArray[np.int64]:
    """Return ``VerifyPart.before`` for sequences of ``lengths``, with ``num_tokens`` as V:
    int64[sum of lengths]."""
    before = np.arange(-1, sum(lengths) - 1)
    before[running_sum(lengths)[:-1]] = num_tokens + np.arange(len(lengths))
    return before


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """The remaining P tokens, packed: chunks of prompts."""

    num_tokens: int
    packed: Packed
    sequences: Sequences
    slots: torch.Tensor
    """int32[B]; empty for an attention-only model."""
    resumed: torch.Tensor
    """bool[B]: True to continue from the slot's state, False to start from zero."""
    exports: Exports | None

    @property
    def attention_inputs(self) -> dict[str, object]:
        """Arguments of the prefill functions of attention."""
        return {"sequences": self.sequences, "packed": self.packed}

    @property
    def scan_inputs(self) -> dict[str, object]:
        """Arguments of the prefill functions of convolutions and recurrences."""
        return {
            "slots": self.slots,
            "packed": self.packed,
            "resumed": self.resumed,
            "exports": self.exports,
        }


StepPart = DecodePart | VerifyPart | PrefillPart


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """Inputs for T = D + V + P tokens, in this order. Hidden states have ``num_rows >= T`` rows;
    the rows after T are padding."""

    num_tokens: int
    num_rows: int
    angles: tuple[torch.Tensor, torch.Tensor]
    """cos and sin, ``[T, R]`` in the model's dtype."""
    kv_indices: torch.Tensor
    """int64[T]: KV row that each token writes."""
    table: torch.Tensor
    """int32[rows, max_model_len]: the request table."""
    parts: Sequence[StepPart]
    """Parts with tokens: the decoding, the verifying and the prefill part, in this order."""
    live: torch.Tensor | None = None
    """See ``Rows.live``, with T as count."""

    def by_part(self, compute: Callable[[StepPart, slice], torch.Tensor]) -> torch.Tensor:
        """Call ``compute`` with each part and its range of tokens, and concatenate the results."""
        bounds = running_sum([part.num_tokens for part in self.parts])
        ranges = zip(self.parts, map(slice, bounds, bounds[1:]), strict=True)
        outs = [compute(part, tokens) for part, tokens in ranges]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def padded_count(count: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``count``."""
    return -(-count // multiple) * multiple


def pad_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Pad ``x [T, N]`` with zero rows up to ``num_rows``."""
    return x if len(x) == num_rows else F.pad(x, (0, 0, 0, num_rows - len(x)))


def multiplied(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Return ``x * factor``, or ``x`` itself for a factor of 1."""
    return x if factor == 1.0 else x * factor


def summed(x: Any) -> Any:
    """Return x if it is a tensor, or the result of ``ExpertSums``."""
    return x if isinstance(x, torch.Tensor) else x.sum()


B = TypeVar("B", bound=Layer)


class RMSNorm(Composite):
    """``x / rms(x) * weight``, or ``* (1 + weight)`` with ``centred``."""

    def __init__(
        self, name: str, size: int, build: Build, *, eps: float, centred: bool = False
    ) -> None:
        self.size, self.eps, self._offset = size, eps, 1.0 if centred else 0.0
        self.weight = build.weights.empty(size)
        role: Role = "centred_norm" if centred else "norm"
        self.own = [build.parameter(f"{name}.weight", self.weight, role)]
        self._norm = build.kernels["norm"].rms_norm
        self._norm_rows = getattr(build.kernels["norm"], "rms_norm_rows", None)
        self._quantizes = False

    def quantize_for(self, block: object) -> None:
        """Also quantise the results of ``add`` if ``block``, which is sealed, takes such inputs."""
        takes = self._norm_rows is not None and self.size % SCALE_BLOCK == 0
        self._quantizes = takes and getattr(block, "takes_fp8_rows", False)

    def seal(self) -> None:
        super().seal()
        self.weight = self.weight.float() + self._offset

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x, self.weight, self.eps)

    def add(self, x: Any, residual: torch.Tensor | None) -> tuple[Any, torch.Tensor]:
        """Return (norm of x + residual, x + residual). ``residual`` is None in the first layer. x
        is a tensor, or ``ExpertSums`` that only Triton kernels leave to the next norm.

        The norm is a tensor, or ``QuantizedRows`` after ``quantize_for``.
        """
        if not isinstance(x, torch.Tensor) and (self._norm_rows is None or residual is None):
            x = x.sum()
        if self._quantizes and self._norm_rows is not None:
            return self._norm_rows(x, self.weight, self.eps, residual=residual)
        if residual is None:
            return self._norm(x, self.weight, self.eps), x
        return self._norm(x, self.weight, self.eps, residual=residual)


class Mixer(Layer, Protocol):
    """A block that reads other tokens: attention, a scan, or several in parallel."""

    @property
    def keeps(self) -> tuple[Spec, ...]:
        """Declared tensors per token and per sequence; ``mix`` gets a pool for each."""

    @property
    def projected_size(self) -> int:
        """Number of values that ``project`` returns per token."""

    @property
    def mixed_shape(self) -> tuple[int, ...]:
        """Shape of the result of ``mix`` per token."""

    def project(self, hidden: Any) -> torch.Tensor:
        """Convert ``[num_rows, H]`` to ``[num_rows, projected_size]``. Blocks with
        ``takes_fp8_rows`` also get ``QuantizedRows``."""

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Return ``[T, *mixed_shape]`` and update the pools."""

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the block's output, ``[num_rows, H]``."""


class OneProduct(Composite):
    """A mixer whose inputs are one product."""

    _projection: Linear

    @property
    def takes_fp8_rows(self) -> bool:
        return self._projection.takes_fp8_rows

    def project(self, hidden: torch.Tensor | QuantizedRows) -> torch.Tensor:
        return self._projection(hidden)


class FeedForward(Layer, Protocol):
    """A block that processes each token separately."""

    def __call__(self, x: torch.Tensor | QuantizedRows, rows: Rows) -> torch.Tensor:
        """Convert ``[num_rows, H]`` to the same shape; ``rows`` are those that are tokens."""


class MLP(Composite):
    """SwiGLU, ``down(silu(gate(x)) * up(x))``, in which gate and up are one product; or without
    gate ``down(relu(up(x))^2)``."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        intermediate_size: int,
        build: Build,
        *,
        inputs: Sequence[str] = ("gate_proj", "up_proj"),
        output: str = "down_proj",
        bias: bool = False,
        gated: bool = True,
        gate_multiplier: float = 1.0,
    ) -> None:
        """``inputs``, ``output``: names of gate and up, which may be one matrix, and of down.
        ``gated``: False if there is no gate. ``gate_multiplier``: factor before silu."""
        num_parts = 1 + gated
        rows = num_parts * intermediate_size // len(inputs)
        parts = [Part(f"{name}.{word}", rows) for word in inputs]
        kinds = [(intermediate_size, 1)] * num_parts
        self.gate_up = Linear(hidden_size, parts, build, outputs=kinds, bias=bias)
        outputs = [Part(f"{name}.{output}", hidden_size)]
        self.down = Linear(intermediate_size, outputs, build, bias=bias, sums=True)
        self.layers = self.gate_up, self.down
        self._gate_multiplier = gate_multiplier
        activation = build.kernels["activation"]
        self._activate = activation.silu_and_mul if gated else activation.relu_squared

    @property
    def takes_fp8_rows(self) -> bool:
        return self.gate_up.takes_fp8_rows

    def __call__(self, x: torch.Tensor | QuantizedRows, rows: Rows) -> torch.Tensor:
        gate_up = self.gate_up(x)
        if self._gate_multiplier != 1.0:
            gate, up = gate_up.chunk(2, dim=-1)
            gate_up = torch.cat([gate * self._gate_multiplier, up], dim=-1)
        return self.down(self._activate(gate_up))


class Residual(Composite, Generic[B]):
    """A block with its norms, before or after it or both, and the multiplier of its output."""

    def __init__(
        self,
        block: B,
        *,
        before: RMSNorm | None = None,
        after: RMSNorm | None = None,
        multiplier: float = 1.0,
    ) -> None:
        self.block = block
        self._before, self._after, self._multiplier = before, after, multiplier
        self.layers = [part for part in (before, block, after) if part is not None]

    def seal(self) -> None:
        super().seal()
        if self._before is not None:
            self._before.quantize_for(self.block)

    def enter(
        self, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[Any, torch.Tensor]:
        """Return (the block's input, the residual stream).

        ``hidden`` is the output of the previous block, not yet added; ``residual`` is the stream
        before that block, or None.
        """
        if self._before is not None:
            return self._before.add(hidden, residual)
        stream = summed(hidden) if residual is None else summed(hidden) + residual
        return stream, stream

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the block's output in the form that is added to the stream."""
        if self._after is None and self._multiplier == 1.0:
            return hidden
        hidden = summed(hidden)
        return multiplied(hidden if self._after is None else self._after(hidden), self._multiplier)


class MixerStep(Residual[Mixer]):
    """A mixer and its norms."""


class FeedForwardStep(Residual[FeedForward]):
    """An MLP or experts, and their norms."""


class Parallel(Composite):
    """Mixers in parallel on one input, with summed outputs."""

    def __init__(self, mixers: Sequence[Mixer], factors: Sequence[tuple[float, float]]) -> None:
        """``factors``: multipliers of the input and the output of each mixer."""
        self.layers = self.mixers = mixers
        self._factors = factors
        self.keeps = tuple(spec for mixer in mixers for spec in mixer.keeps)
        self._inputs = [mixer.projected_size for mixer in mixers]
        self._outputs = [torch.Size(mixer.mixed_shape).numel() for mixer in mixers]
        self.projected_size, self.mixed_shape = sum(self._inputs), (sum(self._outputs),)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.mixers, self._factors, strict=True)
        return torch.cat(
            [mixer.project(multiplied(hidden, factor)) for mixer, (factor, _) in pairs], dim=-1
        )

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        mixed, first = [], 0
        for mixer, part in zip(self.mixers, projected.split(self._inputs, dim=-1), strict=True):
            own = pools[first : first + len(mixer.keeps)]
            first += len(own)
            mixed.append(mixer.mix(part, inputs, own).flatten(1))
        return torch.cat(mixed, dim=-1)

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        parts = zip(
            self.mixers,
            mixed.split(self._outputs, dim=-1),
            projected.split(self._inputs, dim=-1),
            self._factors,
            strict=True,
        )
        outs = [
            multiplied(mixer.finish(own.unflatten(-1, mixer.mixed_shape), part), factor)
            for mixer, own, part, (_, factor) in parts
        ]
        return sum(outs[1:], outs[0])
