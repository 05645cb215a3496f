"""Triton versions of the functions in `kernels.attention.reference`."""

from kernels.attention.decode import decode_attention, verify_attention
from kernels.attention.prefill import prefill_attention
from kernels.attention.splits import is_one_chunk

__all__ = ["decode_attention", "is_one_chunk", "prefill_attention", "verify_attention"]
