"""Token ids and KV indices: the two arrays of integers that everything here is about."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
"""Token ids of a prompt: contiguous int32, ids in [0, 2**31)."""

Indices = npt.NDArray[np.int32]
"""KV indices: contiguous int32, one per token."""

INT32 = np.dtype(np.int32)
_BLOCK = 4096
"""Tokens that are compared at once: prompts that part early are not read to their ends."""


def require_int32(array: object, what: str) -> None:
    """ValueError unless ``array`` is int32[n]: bytes of another type would be taken for other ids.
    O(1)."""
    if not isinstance(array, np.ndarray):
        kind = type(array).__name__
    elif array.dtype != INT32 or array.ndim != 1:
        kind = f"{array.dtype} of shape {array.shape}"
    else:
        return
    raise ValueError(f"{what} must be a numpy array int32[n], not {kind}: convert them first")


def common_prefix_len(left: Tokens, right: Tokens, page_size: int = 1) -> int:
    """Tokens that both share from their starts, whole pages only. O(what they share).

    >>> prompt = np.array([5, 6, 7, 8], dtype=np.int32)
    >>> common_prefix_len(prompt[:3], prompt), common_prefix_len(prompt[:3], prompt, page_size=2)
    (3, 2)
    """
    shared = shorter = min(len(left), len(right))
    for start in range(0, shorter, _BLOCK):
        end = min(start + _BLOCK, shorter)
        differs = left[start:end] != right[start:end]
        first = int(differs.argmax())
        if differs[first]:
            shared = start + first
            break
    return shared - shared % page_size
