"""A namespace as text in files, and back; no code is run for it."""

from __future__ import annotations

import ast
from collections.abc import Hashable


def read_namespace(text: str) -> Hashable:
    """The namespace that ``write_namespace`` wrote. ValueError: it wrote no such text."""
    try:
        namespace: Hashable = ast.literal_eval(text)
        if write_namespace(namespace) == text:
            hash(namespace)
            return namespace
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        pass
    raise ValueError(f"{text[:40]!r} is no namespace")


def write_namespace(namespace: Hashable) -> str:
    """As text that ``read_namespace`` reads. ValueError: it is not made of None, numbers, texts,
    bytes and tuples of them."""
    text = repr(namespace)
    try:
        same = ast.literal_eval(text) == namespace
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        same = False
    if not same:
        raise ValueError(f"namespace {namespace!r} can not be written as text")
    return text
