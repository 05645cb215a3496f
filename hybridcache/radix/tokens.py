"""Token ids and namespaces, which are the keys of the tree, and checks of arguments.

A namespace is None, a str, bytes, an int, or a tuple of these. Other values, those of subclasses
included, are refused, because Python compares some of them as equal (``1 == True == 1.0``), and
equal namespaces share their tokens.
"""

from __future__ import annotations

import ast
from collections.abc import Hashable
from math import lcm
from operator import index
from sys import float_info

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
"""Token ids of a prompt: contiguous int32, ids in [0, 2**31)."""

INT32 = np.dtype(np.int32)
EMPTY: Tokens = np.empty(0, np.int32)
"""No tokens, or no rows: int32[0], read-only."""
EMPTY.setflags(write=False)
_BLOCK = 4096
"""Number of tokens compared at once, so that prompts that differ early are not read to the end."""


def require_int32(array: object, what: str) -> None:
    """Raise ValueError unless ``array`` is int32[n] without a mask, because other types would be
    read as other ids. O(1)."""
    if not isinstance(array, np.ndarray) or hasattr(array, "mask"):
        kind = type(array).__name__
    elif array.dtype != INT32 or array.ndim != 1:
        kind = f"{array.dtype} of shape {array.shape}"
    else:
        return
    raise ValueError(f"{what} must be a numpy array int32[n], not {kind}: convert them first")


def require_index(number: object, what: str, least: int | None = None) -> int:
    """Return ``number`` as an int. Raises TypeError if it is not an integer, or a truth value, and
    ValueError if it is less than ``least``."""
    try:
        found = None if isinstance(number, bool) else index(number)  # type: ignore[arg-type]
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"{what} must be an integer (got {number!r}).")
    if least is not None and found < least:
        raise ValueError(f"{what} must be at least {least} (got {number}).")
    return found


def require_seconds(seconds: object, what: str) -> float:
    """Return ``seconds`` as a float. Raises TypeError if it is no number, and ValueError unless it
    is finite and at least 0.

    >>> require_seconds(2, "returns_within_s")
    2.0
    """
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise TypeError(f"{what} must be a number of seconds (got {seconds!r}).")
    if not 0 <= seconds <= float_info.max:
        raise ValueError(f"{what} must be finite and at least 0 (got {seconds}).")
    return float(seconds)


def require_bool(value: object, what: str) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    if type(value) is not bool:
        raise TypeError(f"{what} must be True or False (got {value!r}).")


def require_grid(grid: int, page_size: int) -> None:
    """Raise ValueError unless one of the two numbers divides the other."""
    if grid % page_size and page_size % grid:
        raise ValueError(
            f"grid {grid} must be a multiple of page_size {page_size}, or divide it: checkpoints "
            f"are saved at common multiples, here only at those of {lcm(grid, page_size)} tokens"
        )


def whole_bytes(tokens: Tokens) -> bytes | None:
    """Return the ``bytes`` object with exactly these tokens as their own memory, or None. O(1)."""
    whole: object = tokens.base
    if type(whole) is bytes and len(whole) == tokens.nbytes:
        flags = tokens.flags  # An unpickled array can be written, another one reversed.
        return None if flags.writeable or not flags.c_contiguous else whole
    return None


def immutable(tokens: Tokens) -> Tokens:
    """Return ``tokens`` as they are if they are ``whole_bytes``, else a copy. O(1) or O(n)."""
    return np.frombuffer(tokens.tobytes(), np.int32) if whole_bytes(tokens) is None else tokens


def common_prefix_len(left: Tokens, right: Tokens, page_size: int = 1) -> int:
    """Return the number of leading tokens that two arrays share, in whole pages. O(result).

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
"""Types of namespaces that need no further check."""


def require_namespace(namespace: object) -> None:
    """Raise ValueError unless ``namespace`` is valid. O(its size).

    >>> require_namespace(("tenant", 7))
    >>> require_namespace(True)
    Traceback (most recent call last):
        ...
    ValueError: namespace True is a bool; use None, a str, bytes, an int, or a tuple of these
    """
    if type(namespace) is tuple:
        for part in namespace:
            require_namespace(part)
    elif type(namespace) not in PLAIN:
        raise ValueError(
            f"namespace {namespace!r} is a {type(namespace).__name__}; use None, a str, bytes, an "
            "int, or a tuple of these"
        )


def read_namespace(text: str) -> Hashable:
    """Return the namespace with this ``repr``. Executes no code of the text. Raises ValueError if
    the text is damaged."""
    try:
        namespace: Hashable = ast.literal_eval(text)
        require_namespace(namespace)
        return namespace
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"expected a namespace (got {text[:40]!r})") from error
