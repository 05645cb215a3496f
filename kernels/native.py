"""Calls of the native kernels' library (``kernels.library``).

The library is optional: without one the references are used. Its results differ from the references
in the last bits, so the choice is made once, before the first step.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Unpack

import torch

from kernels import library
from kernels.packed import ScanInputs, StepInputs

KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "t": ctypes.c_int}

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Supported dtypes, and the suffixes of the exported functions."""
LANES = 16
"""Elements per register. Native kernels require head sizes that are multiples of it."""


@cache
def loaded_library() -> library.Library | None:
    """Return the library, loaded once per process. None if there is none; see ``library.load``."""
    return library.load()


def shared_library() -> ctypes.CDLL | None:
    """Return the functions of the library, or None."""
    found = loaded_library()
    return None if found is None else found.functions


def has(name: str) -> bool:
    """Return True if the library has this function. Some functions need certain processors."""
    found = shared_library()
    return found is not None and hasattr(found, name)


@cache
def function(name: str, kinds: str) -> Callable[..., None]:
    """Return an exported function with its argument types.

    ``kinds`` has one letter per argument: ``p`` for an address or None, ``i`` for int64, ``f`` for
    float, ``t`` for a number of threads.
    """
    found = shared_library()
    assert found is not None
    exported = getattr(found, name)
    exported.restype = None
    exported.argtypes = [KINDS[kind] for kind in kinds]

    def call(*arguments: float | None) -> None:
        note(NativeCall(exported, arguments))
        exported(*arguments)

    return call


@cache
def kernel_choices() -> dict[str, str]:
    """Return the method that computes each operation, the build of the library, and the C library.

    Made once per process, after asking the system for permission to use AMX. Processes with equal
    choices compute equal bits. The names of exported functions for linear layers and for prompts
    (attention and scans) have the method:

    - ``amx``: tiles of 16 words;
    - ``pairs``: products of two bfloat16, summed in one instruction (AVX512_BF16);
    - ``halves``: float32 products of bfloat16 numbers, for processors where ``pairs`` is slower;
    - ``lanes``: one output per lane of a register, in float32 or int32;
    - ``half_lanes``: the same for small integers in groups, in registers of 256 bits (AVX2).

    "reference" if the native library lacks the operation. ``build`` is ``library.Library.build``.
    """
    tiles = "amx" if _answers("permit_amx") else None
    pairs = "pairs" if _answers("has_fast_pairs") else None
    choices = {
        "linear_float32": _first("linear_float32_{}", "lanes"),
        "linear_bfloat16": _first("linear_bfloat16_{}", tiles, pairs, "halves"),
        "linear_int8": _first("linear_int8_{}_float32", tiles, "lanes"),
        "linear_groups": _first("linear_groups_{}_float32", tiles, "lanes", "half_lanes"),
        "prompts_float32": _first("prefill_attention_float32_{}", "lanes"),
        "prompts_bfloat16": _first("prefill_attention_bfloat16_{}", tiles, pairs, "lanes"),
    }
    found = loaded_library()
    build = "none" if found is None else found.build
    libc = " ".join(platform.libc_ver()) or "unknown"
    return choices | {"build": build, "libc": libc}


MAX_KEY = 512
"""Maximum key size of a recurrence."""


def fits_states(tokens: Sequence[torch.Tensor], states: torch.Tensor) -> bool:
    """Return True if native recurrences serve tokens and ``states [S, HV, K, V]`` of these dtypes
    and sizes."""
    dtype, (key_dim, value_dim) = tokens[0].dtype, states.shape[2:]
    return (
        dtype in DTYPES
        and states.dtype in DTYPES
        and all(x.dtype is dtype for x in tokens)
        and key_dim % LANES == 0
        and value_dim % LANES == 0
        and key_dim <= MAX_KEY
        and has_whole_rows(states)
    )


def scan(
    kernel: str,
    tokens: tuple[torch.Tensor, ...],
    factors: tuple[torch.Tensor, ...],
    out_like: torch.Tensor,
    num_groups: int,
    scale: float | None = None,
    **where: Unpack[ScanInputs],
) -> torch.Tensor | None:
    """Scan prompts by tiles, as the reference of ``kernel`` does. None if the library cannot.

    Inputs are tokens and float32 factors. Threads share the work by head and sequence.
    """
    states, packed, exports = where["states"], where["packed"], where["exports"]
    kinds = "p" * len(tokens + factors) + "piipppppppiiiiiii" + ("t" if scale is None else "ft")
    run = prompts_function(kernel, tokens[0].dtype, kinds)
    if run is None or not fits_states(tokens, states):
        return None
    tokens = same_stride(tokens)
    factors = tuple(part.float().contiguous() for part in factors)
    tables = packed.no_exports if exports is None else exports.tables
    out = torch.empty(out_like.shape, dtype=out_like.dtype)
    run(
        *(part.data_ptr() for part in tokens + factors),
        states.data_ptr(), states.dtype is not torch.float32, states.stride(0),
        where["slots"].data_ptr(), where["resumed"].data_ptr(), packed.cu_seqlens.data_ptr(),
        *(table.data_ptr() for table in tables),
        out.data_ptr(), tokens[0].stride(0), packed.tile_size, len(where["slots"]), num_groups,
        *states.shape[1:], *([] if scale is None else [scale]), torch.get_num_threads(),
    )  # fmt: skip
    return out


def prompts_function(kernel: str, dtype: torch.dtype, kinds: str) -> Callable[..., None] | None:
    """Return the function of a kernel for prompts of ``dtype``. None if the library has none."""
    name = DTYPES.get(dtype)
    method = kernel_choices().get(f"prompts_{name}", "reference")
    return None if method == "reference" else function(f"{kernel}_{name}_{method}", kinds)


def _first(name: str, *methods: str | None) -> str:
    """Return the first method with an exported function."""
    return next((word for word in methods if word and has(name.format(word))), "reference")


def _answers(question: str) -> bool:
    """Return the answer of an exported function to a question about the processor."""
    if not has(question):
        return False
    answer = ctypes.c_int64(0)
    function(question, "p")(ctypes.addressof(answer))
    return answer.value != 0


@dataclass(frozen=True, slots=True)
class NativeCall:
    """Native function with its arguments."""

    function: Any
    arguments: tuple[float | None, ...]

    def __call__(self) -> None:
        self.function(*self.arguments)


def note(step: Callable[[], object]) -> None:
    """Add ``step`` to the recording of this thread, if there is one."""
    if _observer.notes is not None:
        _observer.notes(step)


@contextmanager
def recorded(note: Callable[[Callable[[], object]], None]) -> Iterator[None]:
    """Pass every native call of this thread to ``note``, as a callable that repeats the call."""
    _observer.notes = note
    try:
        yield
    finally:
        _observer.notes = None


class _Observer(threading.local):
    notes: Callable[[Callable[[], object]], None] | None = None


_observer = _Observer()


def has_whole_rows(x: torch.Tensor) -> bool:
    """Return True if ``x[0]`` and every other row are contiguous."""
    if x.is_contiguous():
        return True
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x if its rows are contiguous, else a copy."""
    return x if has_whole_rows(x) else x.contiguous()


def same_stride(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return parts ``[B, ...]`` with equal strides between sequences and contiguous rows.

    Slices of one tensor are returned unchanged; others are copied into one tensor.
    """
    stride = parts[0].stride(0)
    if all(has_whole_rows(part) for part in parts) and (
        len(parts[0]) <= 1 or all(part.stride(0) == stride for part in parts)
    ):
        return parts
    together = torch.cat([part.flatten(1) for part in parts], dim=1)
    sizes = [part[0].numel() for part in parts]
    return tuple(
        slice.unflatten(1, part.shape[1:])
        for slice, part in zip(together.split(sizes, dim=1), parts, strict=True)
    )


def address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def step_addresses(where: StepInputs) -> tuple[int, int | None]:
    """Return the addresses of the slots of the states after each token, and of the sequences'
    starts.

    Without ``packed``, each sequence has one token: the state returns to its slot, and the starts
    are None.
    """
    packed, step_slots = where.get("packed"), where.get("step_slots")
    if packed is None or step_slots is None:
        return where["slots"].data_ptr(), None
    return step_slots.data_ptr(), packed.cu_seqlens.data_ptr()
