"""Triton versions of the functions in `kernels.gdn.reference`."""

from kernels.gdn.chunk import chunk_gdn
from kernels.gdn.decode import decode_gdn
from kernels.gdn.gates import gates

__all__ = ["chunk_gdn", "decode_gdn", "gates"]
