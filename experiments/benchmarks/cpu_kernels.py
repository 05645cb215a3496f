"""Measure the kernels of the CPU: speed of linear layers, and time of recurrences by their decay.

    python -m experiments.benchmarks.cpu_kernels       # about 3 minutes on two idle cores

Linear layers of 8,192 outputs and 2,048 inputs are compared with oneDNN's. Contenders alternate.
Integers and scales of the formats of GGUF files are drawn.
Recurrences are measured for mean decays (logarithms, per token) from -0.01 to -100 with one thread.
Strong decays must not take longer. Figures are medians; the processor is part of the provenance.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from experiments.benchmarks.timing import Call, medians
from experiments.studies.common import keep, plain_table, positive
from kernels.linear import native as linear
from kernels.linear import prepacked, reference
from kernels.linear.blocks import GGML_TYPES
from kernels.linear.formats import Matrix
from kernels.linear.grouped import Grouped
from kernels.native import has, kernel_choices
from kernels.packed import Packed
from tests.kernels.records import Model, taking

OUTPUTS, INPUTS = 8192, 2048
ROWS = (1, 8, 64, 512)
TURNS = 15
DECAYS = (-0.01, -0.5, -1.5, -3.0, -10.0, -50.0, -100.0)
PROMPT, STREAMS = 512, 8
HEADS, KEY, VALUE, SIZE = 16, 128, 128, 2048
"""Sizes of a recurrent layer: value heads, their key and value sizes, and channels of Mamba-1."""
FORMATS = [*map(GGML_TYPES.__getitem__, (2, 8, 12, 13, 14, 23, 39)), Grouped(4, 128)]
"""Formats of small integers: Q4_0, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_XS, MXFP4, and groups of 128."""
RECURRENCES = ("gdn", "kda", "mamba2", "mamba1")


def layers() -> dict[tuple[str, str], Callable[[torch.Tensor], torch.Tensor]]:
    """Return the linear layers of this processor by method and dtype of x."""
    weight = torch.randn(OUTPUTS, INPUTS)
    found: dict[tuple[str, str], Callable[[torch.Tensor], torch.Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for method in ("lanes", "pairs", "halves", "amx"):
            if has(f"linear_{name}_{method}") and is_usable(method):
                layer = linear.NativeLinear(weight.to(dtype), None, None, method)
                found[f"native {method}", name] = layer
        if prepacked.is_available(weight.to(dtype)):
            found["oneDNN", name] = prepacked.PrepackedLinear(weight.to(dtype))
    quantized, scale = reference.quantize(weight, "int8")
    for method in ("lanes", "amx"):
        if has(f"linear_int8_{method}_bfloat16") and is_usable(method):
            layer8 = linear.NativeInt8Linear(quantized, scale, None, method)
            found[f"native int8 {method}", "bfloat16"] = layer8
    for format in FORMATS:
        if format.has_product(linear):
            matrix = Matrix.empty(format, (OUTPUTS, INPUTS), torch.zeros)
            for part in matrix.fields.values():
                part.random_() if part.dtype is torch.uint8 else part.normal_()
            found[f"native {format.describe()}", "bfloat16"] = format.product(
                linear, matrix, None, torch.bfloat16
            )
    return found


def is_usable(method: str) -> bool:
    return method != "amx" or kernel_choices()["linear_bfloat16"] == "amx"


def speeds(num_threads: int, turns: int) -> Iterator[dict[str, Any]]:
    """Measure all layers, in turn."""
    found = layers()
    for threads in sorted({1, num_threads}):
        torch.set_num_threads(threads)
        for rows in ROWS:
            x = torch.randn(rows, INPUTS)
            calls: dict[Any, Call] = {
                (name, dtype): partial(layer, x.to(getattr(torch, dtype)))
                for (name, dtype), layer in found.items()
            }
            clock = time.thread_time if threads == 1 else time.perf_counter
            for (layer, dtype), seconds in medians(calls, turns, clock).items():
                gflop_s = 2 * rows * OUTPUTS * INPUTS / seconds / 1e9
                place = {"layer": layer, "dtype": dtype, "rows": rows, "threads": threads}
                yield place | {"gflop_s": gflop_s}


def decay_times(turns: int) -> Iterator[dict[str, Any]]:
    """Measure every recurrence of prompts and of decoding at every decay, with one thread."""
    torch.set_num_threads(1)
    for name in RECURRENCES:
        for backend in ("native", "reference"):
            try:
                module = importlib.import_module(f"kernels.{name}.{backend}")
            except ImportError:
                continue
            prompt, decode = getattr(module, f"chunk_{name}"), getattr(module, f"decode_{name}")
            prompts: dict[Any, Call] = {decay: prompt_call(name, prompt, decay) for decay in DECAYS}
            for decay, seconds in medians(prompts, turns, time.thread_time).items():
                us = seconds / PROMPT * 1e6
                yield {"kernel": f"chunk_{name} {backend}", "decay": decay, "us_per_token": us}
            for decay in DECAYS:
                call, restore = decode_call(name, decode, decay)
                [seconds] = medians({"": call}, turns, time.thread_time, restore).values()
                us = seconds / STREAMS * 1e6
                yield {"kernel": f"decode_{name} {backend}", "decay": decay, "us_per_token": us}


def around(decay: float, *shape: int) -> torch.Tensor:
    return decay * (0.5 + torch.rand(*shape))


def shapes_of(name: str) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Return the shapes of a token and of a state."""
    if name == "mamba1":
        return [(SIZE,), (16,), (16,)], (16, SIZE)
    model = Model(name, 1 if name == "mamba2" else HEADS, HEADS, KEY, VALUE)
    return model.tokens, model.state


def prompt_call(name: str, kernel: Callable[..., object], decay: float) -> Call:
    """Return a call that computes a prompt with this mean decay."""
    torch.manual_seed(0)
    kernel, (shapes, state) = taking(kernel), shapes_of(name)
    where = {
        "states": torch.zeros(1, *state),
        "packed": Packed.from_lengths([PROMPT]),
        "slots": torch.zeros(1, dtype=torch.int32),
        "resumed": torch.zeros(1, dtype=torch.bool),
        "exports": None,
    }
    inputs = draw(PROMPT, *shapes)
    if name == "mamba1":
        inputs += [torch.rand(PROMPT, SIZE) + 0.5, around(decay, 16, SIZE), torch.ones(SIZE)]
    else:
        gate = around(decay, PROMPT, HEADS, *([KEY] if name == "kda" else []))
        inputs += [gate, torch.rand(PROMPT, HEADS)]
        inputs += [torch.ones(HEADS)] if name == "mamba2" else []
    return lambda: kernel(*inputs, **where)


def decode_call(name: str, kernel: Callable[..., object], decay: float) -> tuple[Call, Call]:
    """Return a call that decodes a token of each stream, and one that restores its states.

    The states have decayed for long: their numbers are near the smallest normal one, and the token
    adds nothing.
    """
    torch.manual_seed(0)
    kernel, (shapes, state) = taking(kernel), shapes_of(name)
    inputs = draw(STREAMS, *shapes)
    if name.startswith("mamba"):
        inputs = [x * 0 for x in inputs]
    if name == "mamba1":
        inputs += [torch.ones(STREAMS, SIZE).bfloat16(), around(decay, 16, SIZE)]
        inputs += [torch.zeros(SIZE), torch.ones(SIZE)]
    else:
        gates = (HEADS, KEY) if name == "kda" else (HEADS,)
        zeros, bias = torch.zeros(STREAMS, *gates).bfloat16(), torch.zeros(*gates)
        rate = torch.full((HEADS,), math.log(-decay / math.log(2)))
        off = torch.full((STREAMS, HEADS), -200.0).bfloat16()
        is_mamba = name == "mamba2"
        inputs += [zeros, rate, bias, torch.ones(HEADS)] if is_mamba else [zeros, off, rate, bias]
    former = torch.randn(STREAMS, *state) * 1e-37
    states, slots = former.clone(), torch.arange(STREAMS, dtype=torch.int32)
    return lambda: kernel(*inputs, states=states, slots=slots), lambda: states.copy_(former)


def draw(num_tokens: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Return random bfloat16 tensors that are slices of one, as in a model."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = torch.split(torch.randn(num_tokens, sum(sizes)).bfloat16(), sizes, dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--turns", type=positive, default=TURNS)
    args = parser.parse_args()
    with torch.inference_mode():
        found = list(tqdm(speeds(args.threads, args.turns), desc="layers", disable=None))
        times = list(tqdm(decay_times(args.turns), desc="decays", disable=None))
    settings = {"outputs": OUTPUTS, "inputs": INPUTS, "kernels": kernel_choices()}
    keep("bench_cpu_kernels", [*found, *times], settings)
    for lines in (found, times):
        print(plain_table(lines))


if __name__ == "__main__":
    main()
