"""Compute the least and the expected times of steps of Qwen3-Next-80B-A3B from its launches.

    python -m experiments.gpu.limits

The engine loads the geometry onto a device that computes nothing, and records its launches. Each
launch has a least number of bytes to move and operations to compute. The expected times use the
assumptions of this module, which only a device can confirm. Nothing here is measured.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from engine import engine_config
from engine.runner.build import load_runner
from engine.runner.device import Device
from engine.runner.loading import Dummy
from engine.runner.model_runner import ModelRunner
from engine.schedule.batch import Batch, Segment
from experiments.gpu.models import QWEN3_NEXT_80B, write_geometry
from experiments.gpu.serving import BIG
from experiments.gpu.stub_device import Launches, StubDevice, stubbed

MEMORY_BYTES = 141 * 10**9
MEMORY_BYTES_S = 4.8e12
"""Size and bandwidth of an H200's memory by its data sheet."""
COPY_BYTES_S = 4.3e12
"""Assumed bandwidth of a long copy."""
PRODUCT_FLOPS_S = 790e12
"""Assumed rate of large products in bfloat16, to which 8-bit weights are widened."""
GAP_S = 2.5e-6
"""Assumed time of a launch in a graph, beyond that of its work."""
MEMORY_SHARES = {"gate_up_kernel": 0.65, "down_kernel": 0.65, "decode_kernel": 0.82}
"""Assumed shares of the bandwidth; ``MEMORY_SHARE`` for other kernels."""
MEMORY_SHARE = 0.75
PRODUCT_SHARES = {
    "gate_up_kernel": 0.28,
    "down_kernel": 0.28,
    "prefill_attention_kernel": 0.4,
    "solve_kernel": 0.1,
    "scan_kernel": 0.1,
}
"""Assumed shares of the rate of products; ``PRODUCT_SHARE`` for other kernels."""
PRODUCT_SHARE = 0.75

BATCHES = (1, 8, 64, 256)
CONTEXT = BIG.num_input + BIG.num_output // 2
"""Mean length of a sequence in the decode steps of `make gpu`'s part `big`."""
PROMPT = BIG.num_long
NUM_LAYERS, PERIOD = QWEN3_NEXT_80B["num_hidden_layers"], QWEN3_NEXT_80B["full_attention_interval"]
EXPERTS, CHOSEN = QWEN3_NEXT_80B["num_experts"], QWEN3_NEXT_80B["num_experts_per_tok"]


@dataclass(frozen=True, slots=True)
class Work:
    """Least work of one launch."""

    kernel: str
    num_bytes: float
    num_flops: float = 0.0

    @property
    def least_s(self) -> float:
        return max(self.num_bytes / MEMORY_BYTES_S, self.num_flops / PRODUCT_FLOPS_S)

    @property
    def expected_s(self) -> float:
        memory = MEMORY_SHARES.get(self.kernel, MEMORY_SHARE) * COPY_BYTES_S
        products = PRODUCT_SHARES.get(self.kernel, PRODUCT_SHARE) * PRODUCT_FLOPS_S
        return GAP_S + max(self.num_bytes / memory, self.num_flops / products)


Launch = tuple[str, dict[str, Any]]
"""Kernel, and its arguments by name."""


def work_of(launch: Launch, num_tokens: int, context: int) -> Work:
    """Return the least work of a launch for ``num_tokens`` tokens, one of each sequence with
    ``context`` earlier ones, or of one prompt if ``context`` is 0."""
    name, args = launch
    tensors = {key: x for key, x in args.items() if isinstance(x, torch.Tensor)}
    for key in ("counters", "table", "k", "v", "p_states", "key_out", "value_out"):
        tensors.pop(key, None)  # Read or written in part, if at all.
    flops, extra = 0.0, 0.0
    if name in ("linear_kernel", "joined_kernel"):
        spans = tensors.pop("spans", None)
        rows = sum(len(tensors[key]) for key in ("w", "gates_w") if key in tensors)
        flops = 2.0 * tensors["x"].numel() * rows
        if spans is not None:  # Written and read again; of joined products only the gates.
            used = args["GATES_M"] / rows if name == "joined_kernel" else 1.0
            extra = 2 * spans.nbytes * used
    elif name in ("gate_up_kernel", "down_kernel"):
        w, scale = tensors.pop("w"), tensors.pop("w_scale")
        used = 1 + EXPERTS * (1 - (1 - CHOSEN / EXPERTS) ** num_tokens)
        extra = used * (w[0].nbytes + scale[0].nbytes)
        flops = 2.0 * num_tokens * (CHOSEN + 1) * w[0].numel()
    elif "p_states" in args:
        extra = 2.0 * len(args["p_slots"]) * args["p_states"][0].nbytes
    elif name == "rotate_kernel":
        extra = tensors["key"].nbytes + tensors["value"].nbytes
    elif name in ("decode_attention_kernel", "combine_splits_kernel"):
        for key in ("partial_out", "partial_lse"):
            tensors.pop(key, None)
        heads = QWEN3_NEXT_80B["num_attention_heads"]
        partial = num_tokens * heads * (QWEN3_NEXT_80B["head_dim"] + 1) * 4
        extra = math.ceil(context / 256) * partial
        if "k" in args:
            extra += num_tokens * context * (args["k"][0].nbytes + args["v"][0].nbytes)
            flops = 4.0 * context * tensors["q"].numel()
    elif name == "prefill_attention_kernel":
        extra = num_tokens * (args["k"][0].nbytes + args["v"][0].nbytes)
        flops = 2.0 * num_tokens * tensors["q"].numel()
    if name in ("solve_kernel", "scan_kernel"):
        flops = _gated_delta_flops(name, num_tokens)
    return Work(name, extra + sum(x.nbytes for x in tensors.values()), flops)


def _gated_delta_flops(name: str, num_tokens: int) -> float:
    """Return the operations of a prompt in tiles of 64: five products per tile and value head in
    the scan, and those of queries and keys per key head in the solver."""
    size = QWEN3_NEXT_80B["linear_key_head_dim"]
    if name == "solve_kernel":
        return 4.0 * 64 * size * num_tokens * QWEN3_NEXT_80B["linear_num_key_heads"]
    heads = QWEN3_NEXT_80B["linear_num_value_heads"]
    return (6.0 * size * size + 4.0 * 64 * size) * num_tokens * heads


class RecordedModel:
    """Model on a device without memory, with one period of layers, that records its launches."""

    def __init__(self, stack: ExitStack) -> None:
        from kernels.attention import splits  # Imports triton.

        meta = StubDevice(torch_device=torch.device("meta"))
        cpu = Device.resolve("cpu")
        patches = stack.enter_context(pytest.MonkeyPatch.context())
        stack.enter_context(stubbed(patches))
        self._launches: list[Launch] = []
        for owner, name, value in (
            (Device, "resolve", classmethod(lambda cls, name: cpu if name == "cpu" else meta)),
            (torch.Tensor, "pin_memory", lambda x: x),
            (Dummy, "draw", lambda *arguments: None),
            (Launches, "record", self._record),
            (splits, "workspace_bytes", lambda: MEMORY_BYTES // splits.WORKSPACE_SHARE),
        ):
            stack.enter_context(patch.object(owner, name, value))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        config = engine_config(
            model=write_geometry(Path(folder), QWEN3_NEXT_80B | {"num_hidden_layers": PERIOD}),
            load_format="dummy",
            quantization="int8",
            max_running=max(BATCHES),
            max_model_len=2 * PROMPT,
            token_budget=PROMPT,
            warm_up=False,
            cache_gib=0.5,
        )
        self._runner = load_runner(config)
        assert isinstance(self._runner, ModelRunner)

    def decode(self, num_tokens: int) -> list[Work]:
        """Return the work of a decode step of the whole model."""
        self._launches.clear()
        graphs = self._runner.graphs[0]
        assert graphs is not None
        with torch.inference_mode():
            graphs.capture((num_tokens, 2 * PROMPT))
        return self._whole(num_tokens, CONTEXT)

    def prefill(self) -> list[Work]:
        """Return the work of a prompt of ``PROMPT`` tokens."""
        self._launches.clear()
        segment = Segment(1, 1, np.zeros(PROMPT, np.int32), 0, is_decode=False)
        self._runner.forward(Batch((segment,)))
        return self._whole(PROMPT, 0)

    def _record(self, executor: Any, *args: Any, **kwargs: Any) -> None:
        names = executor.arg_names
        given = dict(zip(names, args, strict=False))
        given |= {name: value for name, value in kwargs.items() if name in names}
        self._launches.append((executor.fn.__name__, given))

    def _whole(self, num_tokens: int, context: int) -> list[Work]:
        """Repeat the layers. The last two launches are the head's."""
        works = [work_of(launch, num_tokens, context) for launch in self._launches]
        return works[:-2] * (NUM_LAYERS // PERIOD) + works[-2:]


def rows() -> Iterator[str]:
    """Yield the rows of the table in Markdown."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    with ExitStack() as stack:
        model = RecordedModel(stack)
        for batch in BATCHES:
            measure = f"`big`: decoding, {batch} streams"
            if batch not in BIG.streams:
                measure = "`bench`: cases of all kernels of the step"
            yield _row(f"decode, {batch}", model.decode(batch), measure)
        yield _row(
            f"prompt of {PROMPT:,}", model.prefill(), "`big`: prefix hit, time of a cold prompt"
        )


def _row(name: str, works: Iterable[Work], measure: str) -> str:
    works = list(works)
    least, expected = (sum(getattr(w, key) for w in works) for key in ("least_s", "expected_s"))
    gigabytes, teraflops = (
        sum(w.num_bytes for w in works) / 1e9,
        sum(w.num_flops for w in works) / 1e12,
    )
    times: dict[str, float] = {"launches": GAP_S * len(works)}
    for work in works:
        times[work.kernel] = times.get(work.kernel, 0.0) + work.expected_s - GAP_S
    most = sorted(times, key=times.__getitem__, reverse=True)[:2]
    parts = ", ".join(f"{key.removesuffix('_kernel')} {times[key] / expected:.0%}" for key in most)
    work = f"{gigabytes:.1f} GB, {teraflops:.2f} TFLOP"
    spent = f"{1e3 * least:.2f} ms | {1e3 * expected:.1f} ms | {least / expected:.0%}"
    return f"| {name} | {len(works)} | {work} | {spent} | {parts} | {measure} |"


def main() -> None:
    print("| step | launches | work | least | expected | share | most time | measurement |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows():
        print(row, flush=True)


if __name__ == "__main__":
    main()
