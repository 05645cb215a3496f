"""Inputs of the layers in one step: the batch as tensors on the device, and the rotary table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from engine.weights.model_config import LinearScaling, Llama3Scaling, Rope, YarnScaling
from kernels.attention.sequences import Sequences
from kernels.packed import Exports, Packed, running_sum

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

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of ``x`` that may be tokens."""
        return x[: self.count]


@dataclass(frozen=True, slots=True)
class DecodePart:
    """The first D tokens: one of each decoding sequence."""

    sequences: Sequences
    slots: torch.Tensor
    """int32[D]; empty for an attention-only model."""

    @property
    def attention_inputs(self) -> dict[str, Any]:
        """Arguments of the decoding functions of attention."""
        return {"sequences": self.sequences}

    @property
    def scan_inputs(self) -> dict[str, Any]:
        """Arguments of the decoding functions of convolutions and recurrences."""
        return {"slots": self.slots}


@dataclass(frozen=True, slots=True)
class VerifyPart:
    """The next V tokens, packed: the next token and the drafts of each decoding sequence with
    drafts."""

    packed: Packed
    sequences: Sequences
    tokens: Sequences
    """Row and KV length of each of the V tokens, as if it were the last of its sequence."""
    slots: torch.Tensor
    """int32[B], read only; empty for an attention-only model."""
    step_slots: torch.Tensor
    """int32[V]: slot for the state after each token; empty for an attention-only model."""
    before: torch.Tensor
    """int64[V]: index of the token before each of the V tokens; V plus the sequence's rank for its
    first token."""

    @property
    def attention_inputs(self) -> dict[str, Any]:
        """Arguments of the verifying functions of attention."""
        return {"sequences": self.sequences, "packed": self.packed}

    @property
    def scan_inputs(self) -> dict[str, Any]:
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

    packed: Packed
    sequences: Sequences
    slots: torch.Tensor
    """int32[B]; empty for an attention-only model."""
    resumed: torch.Tensor
    """bool[B]: True to continue from the slot's state, False to start from zero."""
    exports: Exports | None

    @property
    def attention_inputs(self) -> dict[str, Any]:
        """Arguments of the prefill functions of attention."""
        return {"sequences": self.sequences, "packed": self.packed}

    @property
    def scan_inputs(self) -> dict[str, Any]:
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
    num_decode: int
    num_rows: int
    cos: torch.Tensor
    """[T, R] in the model's dtype."""
    sin: torch.Tensor
    kv_indices: torch.Tensor
    """int64[T]: KV row that each token writes."""
    table: torch.Tensor
    """int32[rows, max_model_len]: the request table."""
    decode: DecodePart | None
    prefill: PrefillPart | None
    num_verify: int = 0
    verify: VerifyPart | None = None
    live: torch.Tensor | None = None
    """See ``Rows.live``, with T as count."""

    @property
    def rows(self) -> Rows:
        return Rows(self.num_tokens, self.live)

    def by_part(self, compute: Callable[[StepPart, slice], torch.Tensor]) -> torch.Tensor:
        """Call ``compute`` with each part and its range of tokens, and concatenate the results."""
        verified = self.num_decode + self.num_verify
        parts: tuple[tuple[StepPart | None, slice], ...] = (
            (self.decode, slice(self.num_decode)),
            (self.verify, slice(self.num_decode, verified)),
            (self.prefill, slice(verified, self.num_tokens)),
        )
        outs = [compute(part, tokens) for part, tokens in parts if part is not None]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def pad_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Pad ``x [T, N]`` with zero rows up to ``num_rows``."""
    return x if len(x) == num_rows else F.pad(x, (0, 0, 0, num_rows - len(x)))


class RotaryTable:
    """cos and sin ``[max_model_len, R]`` in the model's dtype, with equal halves. A table, so that
    a position always has the same bits. R is 0 for a model without rotation."""

    def __init__(
        self, rope: Rope | None, max_model_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        frequencies, factor = torch.empty(0), 1.0
        if rope is not None:
            frequencies = scaled_frequencies(rope)
            if isinstance(rope.scaling, YarnScaling):
                factor = rope.scaling.attention_factor
        angles = torch.arange(max_model_len, dtype=torch.float)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        self.cos = (angles.cos() * factor).to(device, dtype)
        self.sin = (angles.sin() * factor).to(device, dtype)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of int64[T] positions: ``[T, R]`` each."""
        return self.cos[positions], self.sin[positions]


def scaled_frequencies(rope: Rope) -> torch.Tensor:
    """Return the radians per position of each pair of dimensions: float32 ``[rope.dim / 2]``."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float) / rope.dim
    frequencies, scaling = 1.0 / rope.theta**exponents, rope.scaling
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        rotations = scaling.original_len * frequencies / (2 * math.pi)
        kept = (rotations - scaling.low) / (scaling.high - scaling.low)
    elif isinstance(scaling, YarnScaling):
        kept = 1.0 - _yarn_ramp(rope, scaling)
    else:
        return frequencies
    kept = kept.clamp(0.0, 1.0)
    return frequencies * kept + frequencies / scaling.factor * (1.0 - kept)


def _yarn_ramp(rope: Rope, scaling: YarnScaling) -> torch.Tensor:
    """Return a ramp from 0 at the last index that is kept to 1 at the first that is divided, and
    linear beyond."""
    first, last = (
        _index_of(rotations, rope, scaling.original_len)
        for rotations in (scaling.fast, scaling.slow)
    )
    if scaling.truncates:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    if first == last:
        last += 0.001
    return (torch.arange(rope.dim // 2, dtype=torch.float) - first) / (last - first)


def _index_of(rotations: float, rope: Rope, length: float) -> float:
    """Return the (fractional) index of the frequency with the given number of rotations within
    ``length``."""
    return rope.dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
