"""Triton versions of the functions in `kernels.mamba2.reference`."""

from kernels.mamba2.chunk import chunk_mamba2
from kernels.mamba2.decode import decode_mamba2
from kernels.mamba2.gates import gates

__all__ = ["chunk_mamba2", "decode_mamba2", "gates"]
