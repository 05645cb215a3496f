"""Triton versions of the functions in `kernels.conv1d.reference`."""

from kernels.conv1d.causal import decode_conv1d, prefill_conv1d

__all__ = ["decode_conv1d", "prefill_conv1d"]
