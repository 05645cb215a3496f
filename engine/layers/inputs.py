"""Inputs of the layers in one step: the batch as tensors on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from kernels.attention.sequences import Sequences
from kernels.packed import Exports, Packed, running_sum


@dataclass(frozen=True, slots=True)
class DecodePart:
    """The first D tokens: one of each decoding sequence."""

    sequences: Sequences
    slots: torch.Tensor
    """int32[D]; empty for an attention-only model."""


@dataclass(frozen=True, slots=True)
class VerifyPart:
    """The next V tokens, packed: the next token and the drafts of each decoding sequence with
    drafts."""

    packed: Packed
    sequences: Sequences
    slots: torch.Tensor
    """int32[B], read only; empty for an attention-only model."""
    step_slots: torch.Tensor
    """int32[V]: slot for the state after each token; empty for an attention-only model."""
    before: torch.Tensor
    """int64[V]: index of the token before each of the V tokens; V plus the sequence's rank for its
    first token."""


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
    on_mixed: Callable[[int], None] | None = None
    """Called with the rank of every mixer when its work was launched. Rows and states up to this
    mixer are then those after the step."""


def pad_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Pad ``x [T, N]`` with zero rows up to ``num_rows``."""
    return x if len(x) == num_rows else F.pad(x, (0, 0, 0, num_rows - len(x)))
