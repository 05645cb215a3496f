"""What every layer reads of one step: the batch, as tensors on the device."""

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
    """The V tokens after them, packed: of each decoding sequence with drafts its next token and the
    drafted ones."""

    packed: Packed
    sequences: Sequences
    slots: torch.Tensor
    """int32[B], only read; empty for an attention-only model."""
    step_slots: torch.Tensor
    """int32[V]: where the state after each token goes; empty for an attention-only model."""
    before: torch.Tensor
    """int64[V]: which of the V tokens comes before each; V and the sequence's rank for its
    first."""


def tokens_before(lengths: Sequence[int], num_tokens: int) -> npt.NDArray[np.int64]:
    """``VerifyPart.before`` of sequences of ``lengths``, where ``num_tokens`` are the V tokens:
    int64[sum of lengths]."""
    before = np.arange(-1, sum(lengths) - 1)
    before[running_sum(lengths)[:-1]] = num_tokens + np.arange(len(lengths))
    return before


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """The tokens after them, packed: pieces of prompts."""

    packed: Packed
    sequences: Sequences
    slots: torch.Tensor
    """int32[B]; empty for an attention-only model."""
    resumed: torch.Tensor
    """bool[B]: whether the slot's state continues; False starts from zero."""
    exports: Exports | None


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """T = D + V + P tokens, in this order. Hidden states have ``num_rows >= T`` rows; those past T
    are padding."""

    num_tokens: int
    num_decode: int
    num_rows: int
    cos: torch.Tensor
    """[T, R] in the model's dtype."""
    sin: torch.Tensor
    kv_indices: torch.Tensor
    """int64[T]: the KV row each token writes."""
    table: torch.Tensor
    """int32[rows, max_model_len]: the request table."""
    decode: DecodePart | None
    prefill: PrefillPart | None
    num_verify: int = 0
    verify: VerifyPart | None = None
    on_mixed: Callable[[int], None] | None = None
    """Called with the rank of every mixer when its work is launched: rows and states up to there
    are those after the step."""


def pad_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``x [T, N]`` with zero rows up to ``num_rows``."""
    return x if len(x) == num_rows else F.pad(x, (0, 0, 0, num_rows - len(x)))
