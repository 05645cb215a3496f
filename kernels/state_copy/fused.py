"""The Triton twins of `kernels.state_copy.reference`."""

from kernels.state_copy.copy import copy_states

__all__ = ["copy_states"]
