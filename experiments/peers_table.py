"""Do the rebuilt peers do what the peers do? Every figure that was measured on a stated workload, cell by cell.

`python -m experiments.peers_table` writes results/peers_table.jsonl and .md. A cell is within when the median of its seeds
is within 2 points of the published figure; the published runs drew their ids and lengths from seeds of their own, so the
spread over ours is printed beside it.

Not here, because the trace is not stated well enough to draw it again: Marconi's own tables on LMSys, ShareGPT and SWE-bench
sessions (the traces are not public) and the artifact's runs on synthetic chats "like" them. What the artifact did on the
public Mooncake trace is here.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from tqdm import tqdm

from experiments.lab import keep
from experiments.provenance import RESULTS, ROOT
from hybridcache.baselines import Baseline, BaselineConfig, replay
from hybridcache.baselines.lightllm import LightllmCache
from hybridcache.baselines.marconi import MarconiCache
from hybridcache.baselines.sglang import SglangCache
from hybridcache.baselines.vllm import VllmCache
from hybridcache.generators import GENERATORS
from hybridcache.trace import Trace
from hybridcache.traces import open_trace

GIB = 1 << 30
KV_BYTES = 24_576
FP32_STATE = 36 * (49_152 + 2_097_152)
BF16_STATE = 36 * (49_152 + 1_048_576)
MARCONI_KV, MARCONI_STATE = 65_536, 24 * 1_116_160
MOONCAKE = "data/traces/mooncake_conversation_trace.jsonl.gz"
WITHIN = 0.02
APART = """Where cells are apart: all have vLLM's match unit at 6 GiB, where the working set is within a tenth of the memory and
least-recently-used order turns from all hits to none. Which of a resumed tail's blocks a resume refreshes was not published:
refreshing the attention's but not the states' fits best (refreshing both gives .76 on agent and 0 on short, neither .95 and
.34 on resend). On resend the blocks that one round touches are 480 to 520 with our seeds and 482 fit; the published prompts
were some percent shorter."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One published figure: a peer on a workload at a size."""

    peer: str
    workload: str
    size: str
    published: float
    make: Callable[[], Baseline]
    trace: Callable[[int], Trace]
    seeds: int = 5


def vllm_cells() -> Iterator[Cell]:
    """The matrix of vLLM 0.33 at 40 and 6 GiB: blocks of 1,056 (float32 states) or 544 (bfloat16)."""
    variants = (
        ("vLLM, block 1056", FP32_STATE, None, 0),
        ("vLLM, match unit 32", FP32_STATE, 32, 0),
        ("vLLM, retention None", FP32_STATE, None, None),
        ("vLLM bf16, block 544", BF16_STATE, None, 0),
        ("vLLM bf16, match unit 32", BF16_STATE, 32, 0),
    )
    published: dict[tuple[str, int], tuple[float, ...]] = {
        ("chat", 40): (0.716, 0.840, 0.777, 0.782, 0.837),
        ("chat", 6): (0.493, 0.380, 0.513, 0.644, 0.522),
        ("few-shot", 40): (0.456, 0.456, 0.456, 0.470, 0.470),
        ("few-shot", 6): (0.456, 0.437, 0.456, 0.470, 0.470),
        ("agent", 40): (0.907, 0.948, 0.917, 0.927, 0.948),
        ("agent", 6): (0.907, 0.905, 0.917, 0.927, 0.948),
        ("branch", 40): (0.804, 0.804, 0.804, 0.911, 0.911),
        ("branch", 6): (0.804, 0.804, 0.804, 0.911, 0.911),
        ("resend", 40): (0.578, 0.663, 0.578, 0.614, 0.663),
        ("resend", 6): (0.578, 0.000, 0.578, 0.614, 0.663),
        ("short", 40): (0.000, 0.555, 0.000, 0.000, 0.555),
        ("short", 6): (0.000, 0.555, 0.000, 0.000, 0.555),
    }
    for (workload, gib), rates in published.items():
        for (name, state_bytes, unit, retention), rate in zip(variants, rates, strict=True):
            config = BaselineConfig(gib * GIB, KV_BYTES, state_bytes)
            make = partial(VllmCache, config, unit, retention)
            yield Cell(name, workload, f"{gib} GiB", rate, make, partial(drawn, workload))


def lightllm_cells() -> Iterator[Cell]:
    """LightLLM at pages of 512, at big pages of 1,024, and at pages of 64; its states stand in host memory beside the size."""
    published: dict[str, tuple[float, float]] = {
        "chat": (0.750, 0.781),
        "few-shot": (0.000, 0.454),
        "agent": (0.928, 0.928),
        "branch": (0.000, 0.779),
        "resend": (0.611, 0.611),
        "short": (0.000, 0.000),
    }
    for workload, (plain, big) in published.items():
        for gib in (40, 6):
            config = BaselineConfig(gib * GIB, KV_BYTES, FP32_STATE)
            trace = partial(drawn, workload)
            size = f"{gib} GiB"
            yield Cell(
                "LightLLM, page 512", workload, size, plain, partial(LightllmCache, config), trace
            )
            make = partial(LightllmCache, config, big_page=1024)
            yield Cell("LightLLM, page 512 x 2", workload, size, big, make, trace)
    config = BaselineConfig(40 * GIB, KV_BYTES, FP32_STATE)
    make = partial(LightllmCache, config, page=64)
    yield Cell("LightLLM, page 64", "short", "40 GiB", 0.704, make, partial(drawn, "short"))


def sglang_cells() -> Iterator[Cell]:
    """SGLang's tree core on live conversations: 1.07 M KV tokens, so many state slots."""
    rates: dict[tuple[int, str], tuple[float, float, float]] = {
        (64, "end"): (0.652, 0.752, 0.763),
        (128, "end"): (0.483, 0.667, 0.749),
        (256, "end"): (0.317, 0.504, 0.657),
        (64, "extra_buffer"): (0.554, 0.707, 0.754),
        (128, "extra_buffer"): (0.433, 0.595, 0.704),
        (256, "extra_buffer"): (0.338, 0.462, 0.590),
    }
    capped: dict[tuple[int, str, int], float] = {
        (128, "end", 1): 0.729,
        (128, "end", 2): 0.729,
        (128, "end", 4): 0.670,
        (128, "extra_buffer", 1): 0.678,
        (128, "extra_buffer", 2): 0.678,
        (128, "extra_buffer", 4): 0.586,
        (256, "end", 1): 0.547,
        (256, "extra_buffer", 1): 0.492,
        (256, "extra_buffer", 4): 0.431,
    }
    for (live, placement), triple in rates.items():
        for num_slots, rate in zip((150, 320, 600), triple, strict=True):
            yield sglang_cell(live, placement, num_slots, None, rate)
    for (live, placement, cap), rate in capped.items():
        yield sglang_cell(live, placement, 320, cap, rate)


def sglang_cell(live: int, placement: str, num_slots: int, cap: int | None, rate: float) -> Cell:
    make = partial(
        SglangCache,
        BaselineConfig(0, KV_BYTES, FP32_STATE),
        placement,
        cap,
        num_kv_tokens=1_070_000,
        num_slots=num_slots,
    )
    name = f"SGLang, {placement}" + (f", cap {cap}" if cap else "")
    size = f"{num_slots} states"
    return Cell(name, f"conversations, live {live}", size, rate, make, partial(live_chats, live), 1)


def marconi_cells() -> Iterator[Cell]:
    """The artifact on the first 1,000 requests of Mooncake's conversation trace, 7B sizes."""
    if not (ROOT / MOONCAKE).exists():
        return
    variants: tuple[tuple[str, dict[str, Any], tuple[float, float]], ...] = (
        ("SGLang+ of Marconi", {"leaf_lru": True}, (0.0372, 0.0375)),
        ("Marconi artifact, tuned", {"reading": "artifact"}, (0.0365, 0.0372)),
        ("Marconi artifact, alpha 0", {"reading": "artifact", "alpha": 0.0}, (0.037, 0.037)),
        ("Marconi artifact, alpha 1", {"reading": "artifact", "alpha": 1.0}, (0.036, 0.037)),
        ("Marconi artifact, alpha 2", {"reading": "artifact", "alpha": 2.0}, (0.037, 0.046)),
    )
    for name, settings, rates in variants:
        for gigabytes, rate in zip((20, 80), rates, strict=True):
            config = BaselineConfig(gigabytes * 10**9, MARCONI_KV, MARCONI_STATE, unit=512)
            make = partial(MarconiCache, config, **settings)
            yield Cell(name, "Mooncake, first 1,000", f"{gigabytes} GB", rate, make, mooncake, 1)


def drawn(workload: str, seed: int) -> Trace:
    """The workload under a seed. In which order "short" visits its conversations was not published; only the same order in
    every round fits what was measured at 6 GiB, so that is taken."""
    trace = GENERATORS[workload](seed=seed)
    if workload != "short":
        return trace
    rounds: Counter[Any] = Counter()
    keyed = []
    for request in trace:
        keyed.append((rounds[request.session], request.session, request))
        rounds[request.session] += 1
    ordered = [request for _, _, request in sorted(keyed, key=lambda entry: entry[:2])]
    return replace(trace, source=ordered.__iter__)


def live_chats(live: int, seed: int) -> Trace:
    return GENERATORS["conversations"](live=live, seed=seed)


def mooncake(seed: int) -> Trace:
    return open_trace(MOONCAKE).head(1000)


def measure(cell: Cell) -> dict[str, Any]:
    """Token hit rate of every seed, and whether their median is within reach of the published figure."""
    rates = [hit_rate(cell.make(), cell.trace(seed)) for seed in range(cell.seeds)]
    middle = median(rates)
    return {
        "peer": cell.peer,
        "workload": cell.workload,
        "size": cell.size,
        "published": cell.published,
        "rebuilt": round(middle, 4),
        "lowest": round(min(rates), 4),
        "highest": round(max(rates), 4),
        "within": abs(middle - cell.published) <= WITHIN,
    }


def hit_rate(peer: Baseline, trace: Iterable[Any]) -> float:
    reused = total = 0
    for request in trace:
        reused += replay(peer, request.tokens, request.output, request.namespace)
        total += len(request.tokens)
    peer.check()
    return reused / total


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows as markdown, and how many are within."""
    yield "| peer | workload | size | published | rebuilt | seeds from - to | |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        spread = (
            "" if row["lowest"] == row["highest"] else f"{row['lowest']:.3f} - {row['highest']:.3f}"
        )
        verdict = "within" if row["within"] else "**apart**"
        yield (
            f"| {row['peer']} | {row['workload']} | {row['size']} | {row['published']:.3f} "
            f"| {row['rebuilt']:.3f} | {spread} | {verdict} |"
        )
    yield ""
    yield f"{sum(row['within'] for row in rows)} of {len(rows)} cells within {WITHIN:.0%}."
    yield ""
    yield APART


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", default="", help="peers whose name contains this; nothing is written"
    )
    options = parser.parse_args()
    cells = [
        cell
        for cell in (*vllm_cells(), *lightllm_cells(), *sglang_cells(), *marconi_cells())
        if options.only in cell.peer
    ]
    rows = []
    for cell in (bar := tqdm(cells, disable=None)):
        bar.set_description(f"{cell.peer}, {cell.workload}")
        rows.append(measure(cell))
    text = "\n".join(table(rows))
    if not options.only:
        keep("peers_table", rows)
        (RESULTS / "peers_table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
