"""A step of the native kernels, recorded once and repeated without Python between its calls.

What is recorded are the native calls with their arguments, and the few operations of PyTorch that
may stand between them. The tensors they work on are kept, so a repetition reads and writes the same
memory: as a device graph does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kernels.native import Call, function, has, note, recorded

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.new_empty.default,
    aten.empty_like.default,
}
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
    aten.mul.Tensor,
    aten.mul_.Tensor,
    aten.neg.default,
    aten.pow_.Scalar,
    aten.relu.default,
    aten.to.dtype,
    aten._to_copy.default,
}
"""Repeated as they are. None of them reads a number on the host; what indexes counts from the
front."""


INTO: dict[Any, Callable[..., object]] = {
    aten.add.Tensor: aten.add.out,
    aten.argmax.default: aten.argmax.out,
    aten.cat.default: aten.cat.out,
    aten.div.Tensor: aten.div.out,
    aten.mul.Tensor: aten.mul.out,
    aten.neg.default: aten.neg.out,
}
"""What computes the same into memory that is there, in one operation."""

CALL = np.dtype([("function", "i8"), ("words", "i8", 24), ("floats", "f4", 4)])
"""As ``recording.cpp`` has it."""


class NotRecordableError(Exception):
    """Something else than native calls, views and a few operations was computed."""


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Do ``work``, and return what does it again. Raises NotRecordableError, when it is done, for
    operations that may depend on what was on the host."""
    steps: list[Callable[[], object]] = []
    with recorded(steps.append), _Watch(steps) as watch:
        work()
    if watch.others:
        names = ", ".join(sorted(watch.others))
        raise NotRecordableError(f"{names} can not be repeated")

    made = _in_runs(steps)

    def replay() -> None:
        for step in made:
            step()

    # The tensors live as long as what repeats the calls on them.
    replay.kept = watch.kept  # type: ignore[attr-defined]
    return replay


def repeated(work: Callable[..., object], *arguments: object) -> None:
    """Do ``work``, and again whenever what is being recorded is repeated, whatever it computes: it
    must read and write nothing but tensors that stay where they are, as ``arguments`` do."""
    note(partial(work, *arguments))
    with _disable_current_modes():
        work(*arguments)


def _in_runs(steps: list[Callable[[], object]]) -> list[Callable[[], object]]:
    """``steps`` with each run of native calls as one, where the library makes several at a time."""
    if not has("make_calls"):
        return steps
    made: list[Callable[[], object]] = []
    for is_native, run in groupby(steps, key=lambda step: isinstance(step, Call)):
        some = list(run)
        made += [_Calls(some)] if is_native else some  # type: ignore[arg-type]
    return made


class _Calls:
    """Native calls that Python begins once."""

    def __init__(self, calls: list[Call]) -> None:
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
        """Nothing is compiled in here, and to say so costs a second of imports."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
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
    out: torch.Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], object]:
    """What computes ``func`` into ``out``."""
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


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Those that have memory of their own: a packed weight has not."""
    if isinstance(values, torch.Tensor):
        if not values.is_mkldnn:
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
