"""Calls of operations that take a record of tensors, and the shapes of the recurrences' tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints


def taking(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel as a function of the fields of its record, or itself if it takes tensors."""
    record: Any = next(iter(get_type_hints(kernel).values()))
    if not hasattr(record, "_fields"):
        return kernel

    @functools.wraps(kernel)
    def call(*fields: Any, **where: Any) -> Any:
        return kernel(record(*fields), **where)

    return call


class Model(NamedTuple):
    """Recurrence of a layer and its sizes. Mamba-2 has groups and a state where others have key
    heads and keys. Convolutions have ``key`` channels and ``value`` taps."""

    kernel: str
    groups: int
    heads: int
    key: int
    value: int

    @property
    def state(self) -> tuple[int, ...]:
        """Shape of the state of a sequence."""
        return (self.key, self.value - 1) if self.kernel == "conv1d" else self[2:]

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        """Shapes of the tokens of ``Prompt`` and ``Step``, without the number of tokens."""
        keys, own = (self.groups, self.key), (self.heads, self.value)
        by_kernel = {"conv1d": [(self.key,)], "mamba2": [own, keys, keys]}
        return by_kernel.get(self.kernel, [keys, keys, own])

    @property
    def gate_inputs(self) -> list[tuple[int, ...]]:
        """Shapes of the inputs of gates, without the number of tokens."""
        if self.kernel == "kda":
            return [(self.heads, self.key), (self.heads,)]
        return [(self.heads,)] * {"gdn": 2, "mamba2": 1}.get(self.kernel, 0)

    @property
    def gate_parameters(self) -> list[tuple[int, ...]]:
        """Shapes of A_log and dt_bias."""
        bias = (self.heads, self.key) if self.kernel == "kda" else (self.heads,)
        return [] if self.kernel == "conv1d" else [(self.heads,), bias]
