"""Calls of operations that take a record of tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_type_hints


def taking(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel as a function of the fields of its record, or itself if it takes tensors."""
    record: Any = next(iter(get_type_hints(kernel).values()))
    if not hasattr(record, "_fields"):
        return kernel

    @functools.wraps(kernel)
    def call(*fields: Any, **where: Any) -> Any:
        return kernel(record(*fields), **where)

    return call
