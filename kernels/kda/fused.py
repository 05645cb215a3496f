"""Triton versions of the functions in `kernels.kda.reference`."""

from kernels.kda.chunk import chunk_kda
from kernels.kda.decode import decode_kda
from kernels.kda.gates import gates

__all__ = ["chunk_kda", "decode_kda", "gates"]
