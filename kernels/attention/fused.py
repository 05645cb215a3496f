"""The Triton twins of `kernels.attention.reference`."""

from kernels.attention.decode import decode_attention, verify_attention
from kernels.attention.prefill import prefill_attention

__all__ = ["decode_attention", "prefill_attention", "verify_attention"]
