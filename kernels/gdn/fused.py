"""The Triton twins of `kernels.gdn.reference`."""

from kernels.gdn.chunk import chunk_gdn
from kernels.gdn.commit import commit_states
from kernels.gdn.decode import decode_gdn, verify_gdn
from kernels.gdn.gates import gates

__all__ = ["chunk_gdn", "commit_states", "decode_gdn", "gates", "verify_gdn"]
