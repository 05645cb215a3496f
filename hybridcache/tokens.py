"""Token ids, row indices and namespaces: the types that everything else uses.

Namespaces of a cache: the values that may name one, and their text in files.

A namespace is None, a str, bytes, an int that is no bool, or a tuple of these. Other values are
refused, because Python takes some of them for equal (``1 == True == 1.0``) and equal namespaces
share their tokens.
"""

from __future__ import annotations

import ast
from collections.abc import Hashable

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


PLAIN = frozenset({type(None), str, bytes, int})
"""Types that need no closer look."""


def require_namespace(namespace: object) -> None:
    """Raise ValueError unless ``namespace`` may name one. O(its size).

    >>> require_namespace(("tenant", 7))
    >>> require_namespace(True)
    Traceback (most recent call last):
        ...
    ValueError: namespace True is a bool; use None, a str, bytes, an int, or a tuple of these
    """
    if type(namespace) is tuple:
        for part in namespace:
            require_namespace(part)
    elif type(namespace) not in PLAIN and (
        isinstance(namespace, bool) or not isinstance(namespace, str | bytes | int)
    ):
        raise ValueError(
            f"namespace {namespace!r} is a {type(namespace).__name__}; use None, a str, bytes, an "
            "int, or a tuple of these"
        )


def read_namespace(text: str) -> Hashable:
    """Return the namespace that ``write_namespace`` wrote. ValueError: it wrote no such text. No
    code of the text is run."""
    try:
        namespace: Hashable = ast.literal_eval(text)
        if write_namespace(namespace) == text:
            return namespace
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        pass
    raise ValueError(f"{text[:40]!r} is no namespace")


def write_namespace(namespace: Hashable) -> str:
    """Return ``namespace`` as text that ``read_namespace`` reads. ValueError: it cannot be
    written, because it is a subclass of those types or nested too deeply."""
    require_namespace(namespace)
    text = repr(namespace)
    try:
        same = ast.literal_eval(text) == namespace
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        same = False
    if not same:
        raise ValueError(f"namespace {namespace!r} can not be written as text")
    return text
