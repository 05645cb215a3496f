"""What the studies share: traces with the sizes worth looking at, models, and how results are kept and drawn."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.provenance import FIGURES, RESULTS, ROOT, write_json_lines
from hybridcache.costs import ModelGeometry
from hybridcache.simulate import SimulationResult, simulate
from hybridcache.simulation.result import RunResult
from hybridcache.trace import Trace
from hybridcache.traces import open_trace

QWEN3_NEXT = ModelGeometry.preset("qwen3-next")
MARCONI_7B = ModelGeometry(
    name="Marconi-7B",
    num_full_layers=4,
    num_linear_layers=24,
    kv_bytes_per_token=65_536,
    recurrent_elements=24 * 4096 * 128,
    conv_bytes=24 * (2 * 4096 + 2 * 128) * 4 * 2,
    state_dtype="bfloat16",
    active_params=7_000_000_000,
    total_params=7_000_000_000,
    scan_flops_per_token=6 * 24 * 4096 * 128,
    attention_flops_per_pair=4 * 4 * 4096,
)
"""The hybrid of Marconi's evaluation: 4 attention layers (multi-head), 24 Mamba layers, fp16."""

GB = 1e9 / 2**30
"""A decimal gigabyte in GiB."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One trace and the sizes at which something happens to it."""

    spec: str
    gib: str
    geometry: ModelGeometry = QWEN3_NEXT
    grid: int = 64
    quick: int | None = None
    """First so many requests, unless everything is asked for."""
    data: str = ""
    """File it needs; not part of the repository."""

    def open(self, name: str, full: bool) -> Trace:
        """The trace, or its beginning, under a short name."""
        trace = replace(open_trace(self.spec), name=name)
        return trace if full or self.quick is None else trace.head(self.quick)

    @property
    def is_here(self) -> bool:
        return not self.data or (ROOT / self.data).exists()


_TRACES = "data/traces"
WORKLOADS: dict[str, Workload] = {
    "chat": Workload("chat", "1:32:15"),
    "few-shot": Workload("few-shot", "0.5:16:15"),
    "agent": Workload("agent", "0.5:32:15"),
    "branch": Workload("branch", "0.5:16:15"),
    "resend": Workload("resend", "0.5:16:15"),
    "short": Workload("short", "0.5:16:15"),
    "conversations": Workload("conversations?live=128", "4:200:15", quick=2000),
    "sharegpt-like": Workload("sharegpt-like", "1:40:15", MARCONI_7B, grid=1),
    "mooncake": Workload(
        f"{_TRACES}/mooncake_conversation_trace.jsonl.gz",
        "20:2560:15",
        quick=3000,
        data=f"{_TRACES}/mooncake_conversation_trace.jsonl.gz",
    ),
    "coding-agent": Workload(
        f"{_TRACES}/weka_claude_code_train.rle.jsonl.gz?starts=fixed:0.002",
        "20:1280:15",
        quick=2000,
        data=f"{_TRACES}/weka_claude_code_train.rle.jsonl.gz",
    ),
    "tau-bench": Workload(
        "data/agent/taubench_gpt-4o-airline.json.gz",
        "0.5:64:15",
        quick=1000,
        data="data/agent/taubench_gpt-4o-airline.json.gz",
    ),
}


def arguments(description: str | None, *traces: str) -> argparse.Namespace:
    """The flags that every study has: which traces, all of them or their beginnings, how many processes."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--traces", default=",".join(traces), help="words of WORKLOADS")
    parser.add_argument("--full", action="store_true", help="whole traces, not their beginnings")
    parser.add_argument("--points", type=int, help="sizes per trace instead of 15")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--resume", type=Path, help="folder that keeps runs until the study is done"
    )
    return parser.parse_args()


def sweep(
    word: str, options: argparse.Namespace, bar: tqdm[Any], **settings: Any
) -> SimulationResult:
    """``simulate`` over the sizes of a workload; ``settings`` go to it and win over the workload's."""
    workload = WORKLOADS[word]
    gib = workload.gib
    if options.points:
        gib = ":".join([*gib.split(":")[:2], str(options.points)])
    settings = {"gib": gib, "model": workload.geometry, "grid": workload.grid} | settings
    bar.set_description(word)

    def show(done: int, total: int) -> None:
        bar.set_postfix_str(f"{done} of {total}")

    return simulate(
        workload.open(word, options.full),
        processes=options.processes,
        resume_from=options.resume / f"{word}.jsonl" if options.resume else None,
        progress=show,
        **settings,
    )


def workloads(options: argparse.Namespace) -> tqdm[Any]:
    """The traces asked for that are here, with a progress bar."""
    words = [word for word in options.traces.split(",") if WORKLOADS[word].is_here]
    return tqdm(words, disable=None)


KEPT = (
    "requests",
    "prompt_tokens",
    "token_hit_rate",
    "request_hit_rate",
    "flops_saved_rate",
    "share_of_bound",
    "share_of_optimum",
    "losses",
    "ttft_s",
    "ttft_mean_s",
    "regret_tokens",
    "checkpoints_made",
    "checkpoint_copies",
    "copied_bytes",
    "bypassed",
)


def slim(trace: str, run: RunResult, **more: Any) -> dict[str, Any]:
    """One run as a results file keeps it: rates in six digits, no bins."""
    record = run.as_record()
    kept = {name: _rounded(record[name]) for name in KEPT if record[name] is not None}
    config = {name: value for name, value in run.config.items() if value is not None}
    return {"trace": trace} | config | more | kept


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return value


def keep(name: str, records: Iterable[dict[str, Any]]) -> Path:
    """Write a study's records; returns where."""
    path = RESULTS / f"{name}.jsonl"
    write_json_lines(path, records)
    return path


def figure_path(name: str) -> Path:
    return FIGURES / f"{name}.png"
