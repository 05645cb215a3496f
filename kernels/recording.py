"""Recording of a step of native kernels, to be repeated without Python between the calls.

A recording contains native calls with their arguments and a few PyTorch operations between them. It
keeps their tensors alive, and a repetition reads and writes the same memory, like a device graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kernels.native import NativeCall, function, has, note, recorded

aten = torch.ops.aten
ALLOCATIONS = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default}
REPEATED = {
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.argmax.default,
    aten.cat.default,
    aten.copy_.default,
    aten.div.Tensor,
    aten.embedding.default,
    aten.exp_.default,
    aten.fill_.Scalar,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_select.default,
    aten.mul.Tensor,
    aten.mul_.Tensor,
    aten.neg.default,
    aten.pow_.Scalar,
    aten.relu.default,
    aten.to.dtype,
    aten._to_copy.default,
}
"""Operations that can be repeated. None of them reads a number on the host, and indices are not
negative."""


INTO: dict[OpOverload, Callable[..., object]] = {
    aten.add.Tensor: aten.add.out,
    aten.argmax.default: aten.argmax.out,
    aten.cat.default: aten.cat.out,
    aten.div.Tensor: aten.div.out,
    aten.index_select.default: aten.index_select.out,
    aten.mul.Tensor: aten.mul.out,
    aten.neg.default: aten.neg.out,
}
"""Variants of operations that write into existing memory."""

CALL = np.dtype([("function", "i8"), ("words", "i8", 24), ("floats", "f4", 4)])
"""Layout of a call in ``recording.cpp``."""


class NotRecordableError(Exception):
    """Raised if the work contains operations that cannot be recorded."""


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Run ``work`` and return a function that repeats it.

    Raises:
        NotRecordableError: after running, if the work has operations that may depend on host data.
    """
    steps: list[Callable[[], object]] = []
    with recorded(steps.append), _Watch(steps) as watch:
        work()
    if watch.others:
        names = ", ".join(sorted(watch.others))
        raise NotRecordableError(f"{names} cannot be repeated")

    made = _in_runs(steps)

    def replay() -> None:
        for step in made:
            step()

    # Keeps the tensors alive, because the calls use their addresses.
    replay.kept = watch.kept  # type: ignore[attr-defined]
    return replay


def repeated(work: Callable[..., object], *arguments: object) -> None:
    """Run ``work``, and run it again in each repetition of the present recording.

    It must read and write only tensors with fixed addresses, such as ``arguments``.
    """
    note(partial(work, *arguments))
    with _disable_current_modes():
        work(*arguments)


def _in_runs(steps: list[Callable[[], object]]) -> list[Callable[[], object]]:
    """Merge runs of native calls in ``steps`` into one call each, if the library supports it."""
    if not has("make_calls"):
        return steps
    made: list[Callable[[], object]] = []
    for is_native, run in groupby(steps, key=lambda step: isinstance(step, NativeCall)):
        some = list(run)
        made += [_Calls(some)] if is_native else some
    return made


class _Calls:
    """Several native calls that are started by one call from Python."""

    def __init__(self, calls: list[NativeCall]) -> None:
        self._table = np.zeros(len(calls), dtype=CALL)
        for row, call in zip(self._table, calls, strict=True):
            kinds = [kind is ctypes.c_float for kind in call.function.argtypes]
            pairs = list(zip(kinds, call.arguments, strict=True))
            words = [value or 0 for is_float, value in pairs if not is_float]
            floats = [value for is_float, value in pairs if is_float]
            row["function"] = ctypes.cast(call.function, ctypes.c_void_p).value or 0
            row["words"][: len(words)], row["floats"][: len(floats)] = words, floats
        self._address = self._table.ctypes.data
        self._make = function("make_calls", "pi")

    def __call__(self) -> None:
        self._make(self._address, len(self._table))


class _Watch(TorchDispatchMode):
    def __init__(self, steps: list[Callable[[], object]]) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []
        self.others: set[str] = set()
        self._steps = steps

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False. No code is compiled here, and the default costs a second of imports."""
        return False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = list(_tensors(result))
        self.kept += made
        memory = {x.untyped_storage().data_ptr() for x in _tensors((args, *kwargs.values()))}
        is_view = all(x.untyped_storage().data_ptr() in memory for x in made)
        if func in ALLOCATIONS or (is_view and not func._schema.is_mutable):
            return result
        if func not in REPEATED:
            self.others.add(str(func))
        elif func._schema.is_mutable:
            self._steps.append(partial(func, *args, **kwargs))
        else:
            self._steps.append(_into(result, func, args, kwargs))
        return result


def _into(
    out: torch.Tensor, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], object]:
    """Return a function that computes ``func`` into ``out``."""
    if func in (aten.to.dtype, aten._to_copy.default):
        return partial(out.copy_, args[0])
    if func in INTO:
        return partial(INTO[func], *args, **kwargs, out=out)
    if func is aten.embedding.default and args[1].dim() == 1:
        return partial(torch.index_select, args[0], 0, args[1], out=out)
    if func is aten.index.Tensor and len(args[1]) == 1 and _are_rows(args[1][0]):
        return partial(torch.index_select, args[0], 0, args[1][0], out=out)
    return lambda: out.copy_(func(*args, **kwargs))


def _are_rows(indices: torch.Tensor | None) -> bool:
    return indices is not None and indices.dim() == 1 and indices.dtype is not torch.bool


def _tensors(values: object) -> Iterator[torch.Tensor]:
    """Yield tensors that own memory, which excludes packed weights."""
    if isinstance(values, torch.Tensor):
        if not values.is_mkldnn:
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
