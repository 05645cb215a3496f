"""Figures that README and the pages quote from result files.

``quotes`` computes every quoted sentence. If results change, the test prints the new sentences.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import product
from statistics import fmean
from typing import Any

from experiments import provenance
from experiments.benchmarks.second_turn import PUBLISHED, RIVALS
from experiments.reproduce import read_record
from experiments.studies import compare, promises, tiers, vllm, yardsticks
from experiments.studies.common import BEST_REBUILT, grouped
from tests.documents import ROOT

Record = dict[str, Any]


@cache
def result(name: str) -> list[Record]:
    """Return the records of a result file."""
    return provenance.read_json_lines(provenance.RESULTS / f"{name}.jsonl")[1]


def one(name: str, **fields: object) -> Record:
    """Return the only record of a result file with these values."""
    [found] = (each for each in result(name) if fields.items() <= each.items())
    return found


def extent(values: Iterable[float]) -> tuple[float, float]:
    """Return the smallest and the largest value."""
    listed = list(values)
    return min(listed), max(listed)


def vllm_gains(sessions: int) -> str:
    """Return the mean gains of HybridScheduler in the cells with that many sessions at once."""
    cells = vllm.table(result("study_vllm"), sessions)
    gain, over_best = (fmean(cells.means(name)) for name in ("gain", "gain over the best"))
    return (
        f"{gain:.1f} points more token hits than vLLM as it is, and {over_best:.1f} more than the "
        f"best of it and two flags, in the mean of {len(cells.rows)} cells"
    )


def vllm_time(per: str) -> str:
    """Return the processor time of HybridScheduler beside vLLM's own, per step or request."""
    found = one("bench_vllm", per=per, scheduler="hybridcache")
    limits = f"{found['lowest_ratio']:.2f} to {found['highest_ratio']:.2f}"
    return f"{found['ratio']:.2f} times that of vLLM ({limits}), {found['us'] / 1000:.1f} ms"


def promised(client: str) -> str:
    """Return the changes of both tenants' hits by the promises of ``client``, by namespace and
    memory."""

    def hits(client: str, namespaces: str, gib: float, tenant: str) -> float:
        where = {"client": client, "namespaces": namespaces, "gib": gib}
        found = [each for each in result("promises") if where.items() <= each.items()]
        return 100 * fmean(each[f"hits_{tenant}"] for each in found)

    cells = []
    for place in product(promises.NAMESPACES, promises.MEMORIES_GIB):
        changes = [hits(client, *place, one) - hits("silent", *place, one) for one in "AB"]
        cells.append(", ".join("0.0" if abs(by) < 0.05 else f"{by:+.1f}" for by in changes))
    return " | ".join(cells)


# --- Sources --------------------------------------------------------------------------------------


@cache
def closed_loop() -> dict[tuple[str, float, str], Record]:
    """Return the mean over seeds of each figure, by workload, rate and policy."""
    runs: dict[tuple[str, float, str], list[Record]] = {}
    for run in result("admission"):
        run["hit"] = 100 * run["cached_tokens"] / run["prompt_tokens"]
        runs.setdefault((run["trace"], run["rate"], run["admission"]), []).append(run)
    fields = ("hit", "makespan_s", "ttft_mean_s", "ttft_p99_s")
    return {
        key: {name: fmean(run[name] for run in of) for name in fields} for key, of in runs.items()
    }


def hit(rate: float, policy: str) -> float:
    return closed_loop()["agents", rate, policy]["hit"]


def p99(policy: str, trace: str = "agents", rate: float = 0.2) -> float:
    return closed_loop()[trace, rate, policy]["ttft_p99_s"]


def makespan(policy: str) -> float:
    """Return the makespan of agents at 0.2 sessions/s, relative to the best fixed number."""
    seconds = {
        name: run["makespan_s"]
        for (trace, rate, name), run in closed_loop().items()
        if (trace, rate) == ("agents", 0.2)
    }
    return seconds[policy] / min(s for name, s in seconds.items() if name.startswith("live:"))


def near_limits() -> list[bool]:
    """Return whether the mean wait of `sessions` is within 5 % of the best limit, by cell."""
    cells: dict[tuple[str, float], dict[str, float]] = {}
    for (trace, rate, name), run in closed_loop().items():
        cells.setdefault((trace, rate), {})[name] = run["ttft_mean_s"]
    limits = (min(s for name, s in of.items() if name[:5] == "live:") for of in cells.values())
    return [of["sessions"] <= 1.05 * s for of, s in zip(cells.values(), limits, strict=True)]


def gains_of_random() -> list[float]:
    """Return the points by which `random` is above `lru` in each closed loop, the most first."""
    loops = grouped([run for run in result("leaderboard") if run.get("rate")], "trace", "rate")
    gains = ([r["rates"]["random"][0] - r["rates"]["lru"][0] for r in of] for of in loops.values())
    return sorted((100 * fmean(of) for of in gains), reverse=True)


def stop_reasons(trace: str) -> dict[tuple[str, float], float]:
    """Return the mean gain of stop reasons in points, by trace and size."""
    gains: dict[tuple[str, float], list[float]] = {}
    for run in result("study_stop_reasons"):
        if trace in run["trace"]:
            gain = 100 * (run["with_stop_reasons"] - run["without_stop_reasons"])
            gains.setdefault((run["trace"], run["gib"]), []).append(gain)
    return {cell: fmean(of) for cell, of in gains.items()}


def drafts(workload: str, draft: str, streams: int = 1) -> float:
    return one("speculation", workload=workload, draft=draft, streams=streams)["ratio"]


def llama(measure: str, dtype: str) -> float:
    return one("bench_llama", measure=measure, size="530m", dtype=dtype)["ratio"]


def tier_share(column: int) -> tuple[int, float]:
    """Return the number of traces, and the mean share of the savings of 20 GiB on the device."""
    table = tiers.over_seeds(result("study_tiers"))
    shares = table.means(table.columns[column].name)
    return len(shares), fmean(shares)


def rust(cache: str, eviction: str, placement: str) -> list[Record]:
    """Return the runs of one of SGLang's rows, by concurrent conversations."""
    return [
        one("bench_sglang", cache=cache, eviction=eviction, placement=placement, live=live)
        for live in (64, 128, 256)
    ]


def sglang_hits(*row: str) -> list[float]:
    return [100 * run["token_hit_rate"] for run in rust(*row)]


def soaked(field: str) -> int:
    """Return the total over all strategies of the soak in SGLang's scheduler."""
    return sum(run[field] for run in result("soak_sglang"))


def sglang_times(cache: str, eviction: str) -> list[float]:
    """Return median and quiet mean relative to the Rust core, by concurrent conversations."""
    ours, theirs = rust(cache, eviction, "end"), rust("rust", "lru", "end")
    return [
        run[field] / other[field]
        for run, other in zip(ours, theirs, strict=True)
        for field in ("request_us_median", "request_us_quiet_mean")
    ]


def narrow(family: str) -> str:
    """Return the row of a family's checkpoints in fewer bits, without its name."""
    runs = {
        run["checkpoint_dtype"]: run
        for run in result("study_checkpoint_families")
        if run["family"] == family
    }
    size = runs["int8:column"]["state_bytes"] / runs["auto"]["state_bytes"]
    formats = ("bfloat16", "int8:column", "int8:row", "int8:head", "fp8:column")
    cells = [f"{runs[name]['kl_mean']:.1e}".replace("e-0", "e-") for name in formats]
    changed = ", ".join(
        str(runs[name]["answers_changed"]) for name in formats[1:] if name != "int8:row"
    )
    return (
        f" | {size:.0%} | {' | '.join(cells)} | {changed} of {runs['auto']['answers']} |".replace(
            "%", " %"
        )
    )


def steps(graphs: str) -> str:
    """Return the milliseconds of a decode step on a GPU, by concurrent requests."""
    runs = [one("gpu_big", measure="decoding", graphs=graphs, streams=n) for n in (1, 8, 16, 64)]
    return " | ".join(f"{run['decode_step_ms_median']:.2g}" for run in runs)


def served(load: str) -> str:
    """Return requests per second, TTFT and hit rate of a server on a GPU, with cache; without."""
    runs = [one("gpu_http", load=load, cache=name) for name in ("hybrid", "none")]
    rates = "; ".join(f"{run['requests_per_s']:.0f}" for run in runs)
    times = "; ".join(f"{run['ttft_ms']['p50']:.0f}" for run in runs)
    return f"{rates} | {times} | {runs[0]['token_hit_rate']:.2f}; {runs[1]['token_hit_rate']:.0f}"


def back_to_a_branch() -> str:
    """Return the tokens that are read again where a client returns to an earlier branch."""
    rows = "back to the parent", "back to the original after an edit", "two branches in turn"
    ours, theirs = (
        extent(
            one("second_turn", side=side, row=row, **PUBLISHED[0].fields)["read_again_mean"]
            for row in rows
        )
        for side in RIVALS
    )
    return f"at most {ours[1]:.0f} | {theirs[0]:.0f} to {theirs[1]:.0f} |"


def compared() -> list[str]:
    """Return the rows of the README's table of hits and times beside other systems."""
    cells = vllm.table(result("study_vllm"), vllm.TOGETHER)
    hits = [fmean(of) for of in zip(*(row[3] for row in cells.rows), strict=True)]
    gains = (extent(cells.means(name)) for name in ("gain", "gain over the best"))
    rows = [
        f"| {hits[2]:.1f} % | {other:.1f} % | {round(low, 1) + 0.0:.1f} to {high:.1f} points |"
        for other, (low, high) in zip(hits, gains, strict=False)
    ]
    theirs = sglang_hits("rust", "lru", "end")
    ours = sglang_hits("hybridcache", "survival", "end")
    low, high = extent(theirs)
    points = extent(mine - other for mine, other in zip(ours, theirs, strict=True))
    rows.append(
        f"| {fmean(ours):.1f} % | {low:.1f} to {high:.1f} % | {points[0]:.1f} to {points[1]:.1f} points |"
    )
    best = grouped_hits((trace, hit[BEST_REBUILT]) for (trace, *_), hit in rebuilt().items())
    mine = grouped_hits(
        (f"{run['trace']}, {run['rate']:g} sessions/s", 100 * run["rates"]["survival"][0])
        for run in result("leaderboard")
        if run["rate"]
    )
    low, high = extent(mine[name] - best[name] for name in best)
    means = f"{fmean(mine.values()):.1f} % | {fmean(best.values()):.1f} %"
    rows.append(f"| {means} | {low:.1f} to {high:.1f} points |")
    medians = [
        extent(run["request_us_median"] for run in rust(cache, eviction, "end"))
        for cache, eviction in (("direct", "survival"), ("rust", "lru"))
    ]
    (a, b), (c, d), (low, high) = *medians, extent(sglang_times("direct", "survival")[::2])
    rows.append(
        f"| {a:.0f} to {b:.0f} µs | {c:.0f} to {d:.0f} µs | {low:.2f} to {high:.2f} times |"
    )
    for measure in ("prefill", "one stream"):
        runs = [
            one("bench_llama", measure=f"{measure} beside llama.cpp", size="530m", dtype=dtype)
            for dtype in ("bfloat16", "int8", "Q4_0", "Q4_K_M")
        ]
        sides = (extent(run[side] for run in runs) for side in ("ours", "theirs"))
        speeds = " | ".join(f"{low:.0f} to {high:.0f} tokens/s" for low, high in sides)
        low, high = extent(run["ratio"] for run in runs)
        rows.append(f"| {speeds} | {low:.1f} to {high:.1f} times |")
    return rows


def rebuilt() -> dict[tuple[str, int, float], dict[str, float]]:
    """Return the hits of the best rebuilt system in each closed loop."""
    return yardsticks.by_cell(result("yardsticks"), "closed loop")


def grouped_hits(hits: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the mean of each name."""
    found: dict[str, list[float]] = {}
    for name, hit in hits:
        found.setdefault(name, []).append(hit)
    return {name: fmean(of) for name, of in found.items()}


def row(cells: Iterable[float], form: str) -> str:
    return " | ".join(format(cell, form) for cell in cells) + " |"


# --- Sentences ------------------------------------------------------------------------------------


def quotes() -> dict[str, list[str]]:
    """Return the sentences with figures of each page."""
    host_memory = one("bench_tree", measure="host memory")
    slabs = [
        fmean(compare.rates(cells, "points", 1))
        for cells in grouped(result("study_arena"), "trace").values()
    ]
    moved = max(run["kv_moved_per_kv_written"] for run in result("study_arena"))
    claude, tau = stop_reasons("claude"), stop_reasons("taubench")
    least = [
        gain
        for (name, gib), gain in claude.items()
        if gib == min(size for of, size in claude if of == name)
    ]
    above = gains_of_random()
    medians = [run["request_us_median"] for run in rust("rust", "lru", "end")]
    at_once = [
        max(drafts(workload, draft, 8) for draft in ("tree", "mtp", "tree,mtp"))
        for workload in ("agent", "edit", "chat", "few_shot", "fresh", "noise")
    ]
    ordering = {
        run["admission"]: max(run["same_ms"], run["changed_ms"]) for run in result("ordering")
    }
    settings = provenance.read_json_lines(provenance.RESULTS / "speculation.jsonl")[0]["settings"]
    threads = settings["threads"]
    return {
        "README.md": [*compared(), back_to_a_branch()],
        "docs/concepts/admission.md": [
            f"reuse {hit(0.1, 'oldest'):.0f} % of their prompt tokens at 0.1 sessions per second, and {hit(0.2, 'oldest'):.0f} % at 0.2",
            f"`sessions` reuses {hit(0.2, 'sessions'):.0f} % and takes {makespan('sessions'):.2f} times as long",
            f"rises from {p99('oldest'):.0f} to {p99('sessions'):.0f} s",
            f"of the best of four such numbers in {sum(near_limits())} of {len(near_limits())} cells",
        ],
        "experiments/results_page.md": [
            f"All parts ran on {', '.join(sorted({part['commit'][:8] for part in read_record().values()}))} (",
            f"`agent` (+{above[0]:.0f} points) and `append-only-chat` (+{above[1]:.0f})",
            f"`random` gains {above[2]:.0f} points. In {len(above[4:])} of the other 7 cells it loses {-above[4]:.0f} to {-above[-1]:.0f} points",
            f"at most {max(ordering.values()):.2f} ms of processor time per step, and with the default policy {ordering['sessions, in debt']:.2f} ms",
            f"stop reasons add {least[0]:.1f} and {least[1]:.1f} points of hit rate in the two cells with the least memory, and cost at most {-min(claude.values()):.1f} points elsewhere",
            f"On tau-bench the change is within noise, {round(min(tau.values()), 1) + 0:.1f} to {max(tau.values()):.1f} points",
            "0.06 sessions/s the 99th percentile rises from {:.0f} to {:.0f} s".format(
                *(p99(name, "Claude Code", 0.06) for name in ("oldest", "sessions"))
            ),
            *(f"{name}{narrow(family)}" for name, family in FAMILIES.items()),
            f"a state at the end of each answer | {row(sglang_hits('rust', 'lru', 'end'), '.1f')}",
            f"hybridcache, `lru` | {row(sglang_hits('hybridcache', 'lru', 'end'), '.1f')}",
            f"hybridcache, `survival` | {row(sglang_hits('hybridcache', 'survival', 'end'), '.1f')}",
            f"states where `extra_buffer` has them | {row(sglang_hits('rust', 'lru', 'extra_buffer'), '.1f')}",
            f"hybridcache, `lru` | {row(sglang_hits('hybridcache', 'lru', 'extra_buffer'), '.1f')}",
            f"hybridcache, `survival` | {row(sglang_hits('hybridcache', 'survival', 'extra_buffer'), '.1f')}",
            *(
                " | {:.2f}x, {:.2f}x | {:.2f}x, {:.2f}x | {:.2f}x, {:.2f}x |".format(
                    *sglang_times(cache, eviction)
                )
                for cache in ("hybridcache", "direct")
                for eviction in ("lru", "survival")
            ),
            "{:.0f} to {:.0f} microseconds".format(*extent(medians)),
        ],
        "docs/concepts/eviction.md": [
            f"| 20 s where it is true | {promised('truthful')} |",
            f"| 20 s after every answer | {promised('always')} |",
            f"| an hour after every answer | {promised('an hour')} |",
        ],
        "docs/concepts/arena.md": [
            f"loses at most {-min(slabs):.1f} points of token hit rate on a workload, and {abs(fmean(slabs)):.1f} on average",
            f"moves at most {100 * moved:.0f} % as much KV as it writes",
        ],
        "docs/architecture.md": [
            f"costs at most {-min(slabs):.1f} points",
            f"| node | {host_memory['bytes_per_node'] / 1000:.1f} KB; {host_memory['bytes_per_node_of_a_pair_cut_by_a_split'] / 1000:.1f} KB after a split |",
        ],
        "docs/how-to/drafts.md": [
            f"built-in model on {threads} threads",
            f"`tree` decodes {drafts('agent', 'tree'):.1f} times as fast in agent loops, {drafts('edit', 'tree'):.1f} times in repairs of code, {drafts('fresh', 'tree'):.1f} times in fresh code, and {drafts('chat', 'tree'):.1f} times in chat",
            f"Word problems are {100 - 100 * drafts('few_shot', 'tree'):.0f} % slower with `tree`, and {drafts('few_shot', 'mtp'):.1f} times as fast with `mtp`",
            "the best drafter gives {:.2f} to {:.2f} times the speed".format(*extent(at_once)),
        ],
        "docs/how-to/gpu.md": [
            f"| decode step, ms | {steps('all')} |",
            f"| the same without graphs, ms | {steps('off')} |",
            "takes {0[cold_ttft_ms][2]:.0f} ms, and {0[hit_ttft_ms][2]:.0f} ms if {0[cached][2]:,}".format(
                one("gpu_big", measure="prefix hit", graphs="all")
            ),
            *(f"| hybrid; none | {load} | {served(f'{load} at once')} |" for load in (16, 64, 256)),
        ],
        "docs/how-to/eight-bit.md": [
            f"int8 has {llama('prefill beside bfloat16', 'int8'):.1f} times the prefill speed and {llama('one stream beside bfloat16', 'int8'):.1f} times the decoding speed of bfloat16"
        ],
        "docs/how-to/tiers.md": [
            f"host memory saved {tier_share(2)[1]:.1f} % of the prefill time that 20 GiB on the device saved; 4 GiB alone saved {tier_share(1)[1]:.1f} %"
        ],
        "hybridcache/sglang/README.md": [
            f"{soaked('requests') + soaked('aborted'):,} random requests in nine strategies",
            f"{soaked('retracted')} retractions, {soaked('aborted')} aborts and {soaked('flushes')} flushes",
            f"after each of {soaked('steps'):,} steps",
            f"{soaked('resumed_tokens') / 1e6:.2f} million tokens from the cache",
            f"In {soaked('checkpoints_in_flight'):,} publications during a",
            f"The host tier loaded {soaked('loaded_rows'):,} rows",
        ],
        "docs/how-to/vllm.md": [
            f"16 sessions at once: {vllm_gains(vllm.TOGETHER)}",
            f"One request at a time: {vllm_gains(vllm.ALONE)}",
            f"a step of a steady decode of 64 takes {vllm_time('step')}",
            f"a request of 8,192 tokens, half of them cached, {vllm_time('request')}",
            f"`--prefix-match-unit 32` takes {one('bench_vllm', per='step', scheduler='vllm, match unit 32')['ratio']:.2f} and {one('bench_vllm', per='request', scheduler='vllm, match unit 32')['ratio']:.2f} times",
        ],
        "docs/how-to/sglang.md": [
            f"the token hit rate is {sglang_hits('hybridcache', 'survival', 'end')[-1]:.1f} % with `survival`, {sglang_hits('hybridcache', 'lru', 'end')[-1]:.1f} % with `lru`, and {sglang_hits('rust', 'lru', 'end')[-1]:.1f} % with SGLang's own cache",
            f"take {' to '.join(f'{ratio:.2f}' for ratio in extent(sglang_times('hybridcache', 'survival')[::2]))} times the median time of SGLang's Rust core with `survival`, and {' to '.join(f'{ratio:.2f}' for ratio in extent(sglang_times('hybridcache', 'lru')[::2]))} times with `lru`; {' to '.join(f'{ratio:.2f}' for ratio in extent(sglang_times('hybridcache', 'survival')[1::2]))} and {' to '.join(f'{ratio:.2f}' for ratio in extent(sglang_times('hybridcache', 'lru')[1::2]))} times the mean",
        ],
    }


FAMILIES = {
    "Gated DeltaNet (Qwen3-Next, Qwen3.5)": "qwen3_5_text",
    "Gated DeltaNet, steps to 2 (Olmo Hybrid)": "olmo_hybrid",
    "Kimi Delta Attention": "kimi_linear",
    "Mamba-2 (Falcon-H1)": "falcon_h1",
    "Mamba-2 (Granite 4)": "granitemoehybrid",
    "Mamba-2 (Nemotron-H)": "nemotron_h",
    "Mamba-1 (Jamba)": "jamba",
}


def test_pages_quote_the_figures_of_the_results() -> None:
    wrong = []
    for name, sentences in quotes().items():
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
        wrong += [f"{name}: {sentence}" for sentence in sentences if sentence not in text]
    assert not wrong, "these sentences must stand on their pages:\n" + "\n".join(wrong)
