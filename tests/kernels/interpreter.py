"""Triton's interpreter, which runs kernels on the CPU, with repairs of eight of its faults."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


@functools.cache
def repair() -> None:
    """Repair the interpreter, once per process. Does nothing if triton is not installed.

    - ``tl.dot`` multiplies the bit patterns of bfloat16 operands, so they are widened first.
    - Sums, differences and products of bfloat16 are those of the bit patterns, too, and it has no
      constants.
    - Rounding to fp8 loses the carry into the exponent.
    - ``tl.dot`` leaves the order of a sum to BLAS. On some CPUs it differs for the last columns of
      a tile, while tensor cores use one order for all.
    - Up to triton 3.6, a loaded bound of ``range`` fails on numpy 2.4.
    - An autotuner needs a device's clock, so it uses its first candidate.
    - Each launch, and each call of a function in it, replaces the functions of the language again,
      which takes longer than a small kernel. They stay replaced from the first launch on. Each
      operation also makes the table of dtypes again, and the types of its blocks.
    - Each operation on integers is also computed in 64 bits and compared with the limits of its
      type, but without ``debug`` the result is not asserted.
    """
    try:
        from triton.runtime import autotuner, interpreter
    except ImportError:
        return
    multiply = interpreter.InterpreterBuilder.create_dot
    operate = interpreter.InterpreterBuilder.binary_op
    patch, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    numpy_dtype_of, dtypes = interpreter._get_np_dtype, dict[str, Any]()
    block_types = dict[tuple[str, Any], Any]()

    tl, convert = interpreter.tl, interpreter._convert_float

    def convert_float(data: Any, dtype: Any, wanted: Any, rounding: Any) -> Any:
        if (dtype, wanted) != (tl.float32, tl.float8e4nv):
            return convert(data, dtype, wanted, rounding)
        values = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float32)
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    def widen(x: Any) -> Any:
        dtype = x.dtype.scalar
        if dtype == tl.float8e4nv:
            data = torch.from_numpy(np.ascontiguousarray(x.data)).view(torch.float8_e4m3fn)
            return interpreter.TensorHandle(data.float().numpy(), tl.float32)
        if dtype != tl.bfloat16:
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

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

    def rounded(data: Any) -> Any:
        values = torch.from_numpy(np.ascontiguousarray(data, np.float32)).to(torch.bfloat16)
        return interpreter.TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)

    def get_bf16(builder: Any, value: float) -> Any:
        return rounded([value])

    def binary_op(builder: Any, a: Any, b: Any, operation: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16 or operation not in (np.add, np.subtract, np.multiply):
            return operate(builder, a, b, operation)
        return rounded(operation(widen(a).data, widen(b).data))

    def patch_tensor_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda x: int(x.handle.data.item()))

    def time_nothing(tuner: Any, *arguments: Any, config: Any, **keywords: Any) -> list[float]:
        return [0.0, 0.0, 0.0]

    @functools.cache
    def patch_all() -> Any:
        patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        return SimpleNamespace(restore=lambda: None)

    def numpy_dtype(dtype: Any) -> Any:
        if dtype.name not in dtypes:
            dtypes[dtype.name] = numpy_dtype_of(dtype)
        return dtypes[dtype.name]

    def block_type(element: Any, shape: Any) -> Any:
        key = element.name, tuple(shape)
        if key not in block_types:
            block_types[key] = tl.block_type(element, shape)
        return block_types[key]

    autotuner.Autotuner._bench = time_nothing
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.binary_op = binary_op
    interpreter.InterpreterBuilder.get_bf16 = get_bf16
    interpreter._convert_float = convert_float
    interpreter._patch_lang_tensor = patch_tensor_index
    interpreter._patch_lang = lambda function: patch_all()
    interpreter._get_np_dtype = numpy_dtype
    interpreter.InterpreterBuilder.get_block_ty = lambda builder, *given: block_type(*given)
    tl.block_type.with_element_ty = lambda block, element: block_type(element, block.shape)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
