"""Compare kernels with tiles of 16 or 32 tokens with those of 64 tokens.

Measures prefill, decode, and the TTFT of short branching prompts, replayed on such a grid.

    python -m experiments.benchmarks.grid                       # about 4 minutes of one idle core
    python -m experiments.benchmarks.grid --parts replay --models built-in

Times are CPU time of one thread. The grids alternate in one process. A part replaces only its own
results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine import Engine, EngineConfig, SamplingParams, engine_config
from engine.runner.build import load_runner
from engine.runner.model_runner import ModelRunner
from experiments.benchmarks.engine import GEOMETRY_530M, Decode, prefill
from experiments.provenance import RESULTS, write_json_lines
from hybridcache import open_trace
from hybridcache.lab.report import text_table

GRIDS = (64, 32, 16)
SHAPE = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
LAYERS = {"intermediate_size": 2048, "num_hidden_layers": 4, "max_position_embeddings": 4096}
MODELS: dict[str, dict[str, Any] | None] = {
    "built-in": None,
    "530M, Gated DeltaNet": GEOMETRY_530M
    | {
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
    },
    "KDA": SHAPE
    | LAYERS
    | {
        "model_type": "kimi_linear",
        "num_key_value_heads": 8,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "linear_attn_config": {
            "num_heads": 8,
            "head_dim": 128,
            "short_conv_kernel_size": 4,
            "full_attn_layers": [4],
            "kda_layers": [1, 2, 3],
        },
        "num_experts": 0,
    },
    "Mamba-2": SHAPE
    | LAYERS
    | {
        "model_type": "falcon_h1",
        "head_dim": 128,
        "mamba_n_heads": 32,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_d_ssm": 2048,
    },
    "Mamba-1": SHAPE
    | LAYERS
    | {
        "model_type": "jamba",
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "mamba_d_state": 16,
        "num_experts": 1,
    },
}
"""Models by kind of state. All but the first have seeded weights, and the last three have few
layers."""
PREFILL, CONTEXT, STREAMS = 512, 128, 8
REPLAYED = {"built-in": 825, "530M, Gated DeltaNet": 60}
"""Requests of the trace: three problems, or the start of one."""


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    path = RESULTS / "bench_grid.jsonl"
    records = _earlier_records(path, options.parts)
    with tempfile.TemporaryDirectory() as directory:
        for part in options.parts:
            found = list(PARTS[part](options, Path(directory)))
            records += [{"part": part} | record for record in found]
            print(TABLES[part](found), end="\n\n")
    write_json_lines(path, records)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--parts", type=lambda names: names.split(","), default=list(PARTS), help=", ".join(PARTS))
    add("--models", default=";".join(MODELS), help="separated by semicolons (default %(default)s)")
    add("--share", type=float, default=1.0, help="share of the timed turns")
    options = parser.parse_args()
    options.models = options.models.split(";")
    for names, known in ((options.parts, PARTS), (options.models, MODELS)):
        if unknown := {*names} - {*known}:
            parser.error(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    return options


def _earlier_records(path: Path, parts: list[str]) -> list[dict[str, Any]]:
    """Return the results of other parts from an earlier run."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [record for record in lines if record["part"] not in parts]


def config_of(model: str, directory: Path, **settings: Any) -> EngineConfig:
    """Return the configuration of a model: float32 for the built-in model, bfloat16 for others."""
    raw = MODELS[model]
    if raw is not None:
        directory = directory / model.split(",")[0]
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(raw))
        settings |= {"model": str(directory), "load_format": "dummy", "dtype": "bfloat16"}
    return engine_config(device="cpu", **settings)


def speed(options: argparse.Namespace, directory: Path) -> Iterator[dict[str, Any]]:
    """Measure prefill and decode of each model with tiles of each size, alternating."""
    for model in tqdm(options.models, disable=None):
        config = config_of(model, directory, grid=16, max_running=9, cache_gib=0.75)
        runner = load_runner(config)
        tokens = np.random.default_rng(0).integers(0, 256, PREFILL).astype(np.int32)

        def prefilled(grid: int, runner: ModelRunner = runner, tokens: Any = tokens) -> None:
            runner.step_inputs.tile_size = grid
            prefill(runner, tokens)

        turns = 5 if model.startswith("530M") else 9
        yield _speeds(model, "prefill", PREFILL, prefilled, round(turns * options.share))
        decodes = {}
        for grid in GRIDS:
            runner.step_inputs.tile_size = grid
            decodes[grid] = Decode(runner, tokens[:CONTEXT], STREAMS)

        def decoded(grid: int, decodes: dict[int, Decode] = decodes) -> None:
            decodes[grid].step()

        yield _speeds(model, "decode", STREAMS, decoded, round(3 * turns * options.share))


def _speeds(
    model: str, measure: str, num_tokens: int, call: Callable[[int], None], turns: int
) -> dict[str, Any]:
    seconds = in_turns(call, max(turns, 2))
    return {
        "model": model,
        "measure": measure,
        "grids": GRIDS,
        "tokens_per_s": [num_tokens / statistics.median(seconds[grid]) for grid in GRIDS],
        "beside_64": [
            statistics.median(a / b for a, b in zip(seconds[64], seconds[grid], strict=True))
            for grid in GRIDS
        ],
    }


def in_turns(call: Callable[[int], None], turns: int) -> dict[int, list[float]]:
    """Return the CPU seconds of ``call`` at every grid, after one unmeasured turn."""
    seconds: dict[int, list[float]] = {grid: [] for grid in GRIDS}
    for turn in range(turns + 1):
        for grid in GRIDS:
            start = time.process_time()
            call(grid)
            if turn:
                seconds[grid].append(time.process_time() - start)
    return seconds


def _speed_table(records: list[dict[str, Any]]) -> str:
    rows = [
        [
            record["model"],
            record["measure"],
            *(f"{rate:,.0f}" for rate in record["tokens_per_s"]),
            *(f"{ratio:.2f}x" for ratio in record["beside_64"][1:]),
        ]
        for record in records
    ]
    header = ["model", "measure", *(f"tokens/s at {grid}" for grid in GRIDS)]
    return text_table([*header, *(f"{grid} / 64" for grid in GRIDS[1:])], rows)


def replay(options: argparse.Namespace, directory: Path) -> Iterator[dict[str, Any]]:
    """Replay every request on an engine of each grid, and measure CPU time up to the first
    token."""
    first = SamplingParams(max_tokens=1, temperature=0)
    for model in (model for model in options.models if model in REPLAYED):
        engines = {
            grid: Engine(config_of(model, directory, grid=grid, cache_gib=0.5)) for grid in GRIDS
        }
        head = max(round(REPLAYED[model] * options.share), 3)
        seconds: dict[int, list[float]] = {grid: [] for grid in GRIDS}
        cached = dict.fromkeys(GRIDS, 0)
        num_tokens = 0
        for request in tqdm(open_trace(f"tree-of-thoughts?head={head}"), total=head, disable=None):
            prompt = (request.tokens % 256).tolist()
            num_tokens += len(prompt)
            for grid, engine in engines.items():
                start = time.process_time()
                engine.submit(prompt, first, boundaries=request.boundaries)
                while engine.has_work():
                    outputs = engine.step()
                seconds[grid].append(time.process_time() - start)
                cached[grid] += outputs[-1].cached_len
        yield {
            "model": model,
            "requests": head,
            "prompt_tokens": num_tokens,
            "grids": GRIDS,
            "token_hit_rate": [cached[grid] / num_tokens for grid in GRIDS],
            "ttft_p50_ms": [1e3 * float(np.percentile(seconds[grid], 50)) for grid in GRIDS],
            "ttft_p95_ms": [1e3 * float(np.percentile(seconds[grid], 95)) for grid in GRIDS],
            "ttft_mean_ms": [1e3 * statistics.mean(seconds[grid]) for grid in GRIDS],
        }


def _replay_table(records: list[dict[str, Any]]) -> str:
    rows = [
        [
            record["model"],
            str(grid),
            f"{100 * record['token_hit_rate'][i]:.1f}",
            *(f"{record[f'ttft_{figure}_ms'][i]:.1f}" for figure in ("p50", "p95", "mean")),
        ]
        for record in records
        for i, grid in enumerate(GRIDS)
    ]
    return text_table(["model", "grid", "hit, %", "TTFT P50, ms", "P95", "mean"], rows)


PARTS = {"speed": speed, "replay": replay}
TABLES = {"speed": _speed_table, "replay": _replay_table}

if __name__ == "__main__":
    main()
