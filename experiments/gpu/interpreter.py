"""Triton's interpreter, which runs kernels on the CPU, with repairs of four of its faults."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


@functools.cache
def repair() -> None:
    """Repair the interpreter, once per process. Does nothing if triton is not installed.

    - ``tl.dot`` multiplies the bit patterns of bfloat16 operands, so they are widened first.
    - ``tl.dot`` leaves the order of a sum to BLAS. On some CPUs it differs for the last columns of
      a tile, while tensor cores use one order for all.
    - Up to triton 3.6, a loaded bound of ``range`` fails on numpy 2.4.
    - An autotuner needs a device's clock, so it uses its first candidate.
    """
    try:
        from triton.runtime import autotuner, interpreter
    except ImportError:
        return
    multiply = interpreter.InterpreterBuilder.create_dot
    patch_tensor = interpreter._patch_lang_tensor

    def widen(x: Any) -> Any:
        if x.dtype.scalar != interpreter.tl.bfloat16:
            return x
        data = interpreter._convert_float(
            x.data, interpreter.tl.bfloat16, interpreter.tl.float32, None
        )
        return interpreter.TensorHandle(data.view(np.float32), interpreter.tl.float32)

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = widen(a), widen(b)
        if a.data.dtype != np.float32:
            return multiply(builder, a, b, *rest)
        accumulated, *_ = rest
        # In float64 the products are exact, and the sum runs along k for each element separately.
        product = np.einsum("ik,kj->ij", a.data, b.data, dtype=np.float64)
        total = product + accumulated.data
        return interpreter.TensorHandle(
            total.astype(accumulated.data.dtype), accumulated.dtype.scalar
        )

    def patch_tensor_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda x: int(x.handle.data.item()))

    def time_nothing(tuner: Any, *arguments: Any, config: Any, **keywords: Any) -> list[float]:
        return [0.0, 0.0, 0.0]

    autotuner.Autotuner._bench = time_nothing
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_tensor_index
