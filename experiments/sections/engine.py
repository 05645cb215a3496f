"""Sections of the engine and its parts: admission, speed, conversations, second turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import median

from experiments.benchmarks import second_turn
from experiments.sections import HITS, Curves, Dots, Section, processor, records_of, says, study
from experiments.studies import admission, closed_loop, overload, vllm
from experiments.studies.common import LRU_ADAPTIVE, Records, grouped
from experiments.tables import Cell, Column, Table

RIVAL = " beside llama.cpp"
SHAREGPT_CAUSES = ("never_seen", "kv_evicted", "checkpoint_evicted", "never_checkpointed")
SHAREGPT_POLICIES = ("survival", "lru", "marconi")
RATIO = Column("TTFT", "ratio", ".2f")
VLLM = says(
    "In vLLM's own scheduler, HybridScheduler hits {gain.mean:.1f} points more of the prompt "
    "tokens than vLLM as it is ({gain.low:.1f} to {gain.high:.1f}), and {best.mean:.1f} more than "
    "the best of it and two flags, in the mean of the cells of the table.",
    gain="gain", best="gain over the best",
)  # fmt: skip
VLLM_CURVES = Curves(vllm.HITS, vllm.SERIES, "memory, GiB", HITS.head, log_y=False)
VERBS = ("match", "insert")
"""Operations of the tree whose growth is shown."""


def default_speed_table() -> Table:
    """Return the comparison of the default policies with LRU, at sizes where both evict."""
    columns = [Column("trace"), Column("GiB", form="g"), Column("hits: default pair", "%")]
    columns += [Column("LRU with fixed rules", "%"), Column("CPU time", "ratio", ".2f")]
    return Table(columns, [
        [one["trace"], one["gib"], 100 * one["default_token_hit_rate"],
         100 * one["lru_token_hit_rate"], one["ratio"]]
        for one in records_of("bench_simulate_default")
    ])  # fmt: skip


def tree_table() -> Table:
    """Return the time of each operation over the size of the tree, in microseconds."""
    rows: list[list[Cell]] = []
    for one in records_of("bench_tree"):
        if "us_without_allocation" in one:
            size, kind = one["measure"].replace(",", "").split(" ", 1)
            times = [one["verb_us_median"][verb] for verb in VERBS] + [one["eviction_us_per_item"]]
            rows.append([f"by {kind}", int(size) / 1000, times])
    times_of = Column(f"{', '.join(VERBS)}, eviction: microseconds")
    return Table([Column("growth"), Column("thousands", form="g"), times_of], rows)


def linear_layers_table() -> Table:
    """Return the speed of the CPU's linear layers, one row per method, dtype and threads."""
    records = [one for one in records_of("bench_cpu_kernels") if "layer" in one]
    counts = sorted({one["rows"] for one in records})
    rows = []
    for key, of in grouped(records, "layer", "dtype", "threads").items():
        speeds = {one["rows"]: one["gflop_s"] for one in of}
        rows.append([*key, *(speeds[count] for count in counts)])
    columns = [Column(name, form="d") for name in ("kernel", "dtype", "threads")]
    return Table([*columns, *(Column(f"rows: {n}", "GFLOP/s", ".0f") for n in counts)], rows)


def decays_table() -> Table:
    """Return the time per token of each recurrence by mean decay, and the largest ratio."""
    records = [one for one in records_of("bench_cpu_kernels") if "kernel" in one]
    rows = []
    for kernel, of in grouped(records, "kernel").items():
        times = [one["us_per_token"] for one in of]
        rows.append([kernel, *times, max(times) / times[0]])
    columns = [Column("microseconds per token")]
    columns += [Column(f"{decay:g}") for decay in dict.fromkeys(one["decay"] for one in records)]
    return Table([*columns, Column("worst / first", form=".2f")], rows)


def llama_table() -> Table:
    """Return the speed of the engine and of llama.cpp."""
    columns = [Column(name) for name in ("measure", "model", "dtype", "unit")]
    columns += [Column(name, form=".4g") for name in ("engine", "llama.cpp")]
    return Table([*columns, Column("ratio", form=".2f")], [
        [one["measure"].removesuffix(RIVAL), one["size"], one["dtype"], one["unit"],
         one["ours"], one["theirs"], one["ratio"]]
        for one in records_of("bench_llama")
        if one.get("measure", "").endswith(RIVAL)
    ])  # fmt: skip


def sharegpt_table() -> Table:
    """Return hits and times of each cache of the engine on conversations."""
    columns = [Column("cache"), Column("GiB", form="g"), HITS, Column("hit tokens", form=",")]
    columns += [Column(cause.replace("_", " "), form=",") for cause in SHAREGPT_CAUSES]
    return Table([*columns, Column("mean TTFT", "ms", ".0f"), Column("p95", "ms", ".0f")], [
        [one["cache"], one["gib"], 100 * one["saved_share"], one["hit_tokens"],
         *(one["lost_tokens"][cause] for cause in SHAREGPT_CAUSES),
         *(1000 * one[name] for name in ("ttft_mean_s", "ttft_p95_s"))]
        for one in records_of("sharegpt")
    ])  # fmt: skip


def sharegpt_simulated_table() -> Table:
    """Return token hit rates on ShareGPT's lengths, one row per size."""
    rates = Column(f"{', '.join(SHAREGPT_POLICIES)}: {HITS.head}")
    return Table([Column("trace"), Column("GiB", form=".3g"), rates], [
        ["ShareGPT", gib, [100 * one["saved_share"] for one in of]]
        for gib, of in grouped(records_of("sharegpt_simulated"), "gib").items()
    ])  # fmt: skip


def checkpoint_dtype_table() -> Table:
    """Return the cost of each format on two kinds of text."""
    records = [one for one in records_of("study_checkpoint_dtype") if "text" in one]
    columns = [Column("format"), Column("KL on code", "millionths of a nat", ".0f")]
    return Table([*columns, Column("KL on problems", "millionths of a nat", ".0f")], [
        [dtype, *(1e6 * one["kl_mean"] for one in of)]
        for dtype, of in grouped(records, "checkpoint_dtype").items()
        if dtype != "auto"
    ])  # fmt: skip


def speculation_table() -> Table:
    """Return the speed of each drafter in times of no drafts, for each number of streams."""
    records = [one for one in records_of("speculation") if one["draft"] != "none"]
    columns = [Column("workload"), Column("drafter")]
    for streams in ("1 stream", "8 streams"):
        columns += [Column(streams, "ratio", ".2f"), Column("acceptance length")]
    return Table(columns, [
        [*cell, *(of for one in found for of in (one["ratio"], one["acceptance_len"] or 1))]
        for cell, found in grouped(records, "workload", "draft").items()
    ])  # fmt: skip


def second_turn_records(plans: Sequence[second_turn.CasePlan]) -> Records:
    """Return the records of ``plans`` in their order. Raises FileNotFoundError if there is none."""
    records = records_of("second_turn")
    wanted = [
        plan.fields | {"case": case, "side": side}
        for plan in plans
        for case in plan.cases
        for side in second_turn.RIVALS
    ]
    found = [one for fields in wanted for one in records if fields.items() <= one.items()]
    if not found:
        raise FileNotFoundError("second_turn.jsonl has no records of these plans")
    return found


def not_run(plans: Sequence[second_turn.CasePlan]) -> str:
    """Return a sentence with the cases of ``plans`` that a server has not run, or an empty text."""
    absent = []
    records = second_turn_records(plans)
    for plan in plans:
        of_plan = [one for one in records if plan.fields.items() <= one.items()]
        ran = {(one["case"], one["side"]) for one in of_plan}
        sides = second_turn.RIVALS
        if cases := [c for c in plan.cases if not all((c, side) in ran for side in sides)]:
            size = f"{plan.model}, {plan.num_tokens} tokens, {plan.at_once} at once"
            absent.append(f"{', '.join(cases)} ({size})")
    return f" Not run yet on both servers: {'; '.join(absent)}." if absent else ""


def second_turn_table(
    plans: Sequence[second_turn.CasePlan] = second_turn.PUBLISHED[:1], without: str = "hits"
) -> Table:
    """Return tokens read again and times of both servers. One plan has no columns of its size."""
    heads = tuple(second_turn.HEADS)[: None if len(plans) > 1 else 1]
    table = second_turn.table(second_turn_records(plans), without, heads)
    times = (table.values(f"{side}: TTFT") for side in second_turn.RIVALS)
    ratios = [ours.mean / theirs.mean for ours, theirs in zip(*times, strict=True)]
    return Table([*table.columns, RATIO], [
        [*row, None if math.isnan(ratio) else ratio]
        for row, ratio in zip(table.rows, ratios, strict=True)
    ])  # fmt: skip


def _admission(table: Table) -> str:
    ratios = table.means("mean TTFT to best of `oldest` and limits")
    worst = table.texts()[ratios.index(max(ratios))]
    return (
        f"The mean TTFT of `sessions` is within 5 % of the best of `oldest` and four limits in "
        f"{sum(ratio <= 1.05 for ratio in ratios)} of {len(ratios)} cells, and at most "
        f"{max(ratios):.2f} times it ({worst[0]}, {worst[1]} sessions/s)."
    )


def _sharegpt(table: Table) -> str:
    none, *_, best = table.texts()
    return (
        f"In the engine, checkpoints save {best[2]} % of the prompt tokens of conversations, and "
        f"the mean TTFT is {best[-2]} instead of {none[-2]} ms; KV alone saves nothing."
    )


def _sharegpt_simulated(table: Table) -> str:
    rates = table.numbers("survival")
    gain, at = max((of[0].mean - of[1].mean, row[1])
                   for of, row in zip(rates, table.texts(), strict=True))  # fmt: skip
    return f"`survival` hits up to {gain:.1f} points more than `lru` (at {at} GiB)."


def _speculation(table: Table) -> str:
    best = max(table.texts(), key=lambda row: float(row[2]))
    slower = sum(ratio < 1 for ratio in table.means("8 streams"))
    return (
        f"Drafts decode up to {best[2]} times as fast (`{best[1]}` on {best[0]}, one stream); with "
        f"eight streams, where most steps have no drafts, {slower} of {len(table.rows)} cells are "
        "slower than without a drafter."
    )


def _overload(table: Table) -> str:
    hits, seconds = ([table.means(f"{name}: `{policy}`")[-1] for policy in overload.POLICIES]
                     for name in ("hits, %", "mean TTFT, s"))  # fmt: skip
    return (
        f"In the last window of {table.rows[-1][0]}, `sessions` hits {hits[1]} % and `oldest` "
        f"{hits[0]} %; the mean TTFT is {seconds[1]} and {seconds[0]} s "
        f"(`{overload.POLICIES[-1]}`: {hits[-1]} %, {seconds[-1]} s)."
    )


def _tree(table: Table) -> str:
    growth: dict[Cell, list[float]] = {}
    for row, us in zip(table.rows, table.means("match"), strict=True):
        growth.setdefault(row[0], []).append(us)
    ratios = [of[-1] / of[0] for of in growth.values()]
    return f"A match in a tree 100 times as large takes at most {max(ratios):.1f} times as long."


def _second_turn(table: Table) -> str:
    ours, theirs = (table.named(f"{side}: read again") for side in second_turn.RIVALS)
    top = max(ours, key=lambda row: ours[row].mean)
    ratios = table.means(RATIO.name)
    found = (
        f"On one {processor('second_turn')}, the engine reads up to {ours[top].mean:.0f} tokens of "
        f"a request again ({top}), {median(one.mean for one in ours.values()):.0f} in the median "
        f"row, and llama-server up to {max(one.mean for one in theirs.values()):.0f}."
    )
    if ratios:
        low, high = min(ratios), max(ratios)
        found += f" Its first token takes {low:.2f} to {high:.2f} times as long as llama-server's."
    if missing := len(table.rows) - len(ratios):
        found += f" {missing} of {len(table.rows)} rows have no times yet."
    return found + not_run(second_turn.PUBLISHED[:1])


def _second_turns(table: Table) -> str:
    ours, theirs = (max(table.means(f"{side}: read again")) for side in second_turn.RIVALS)
    return (
        "With experts, more clients, scarce memory and longer prompts, the engine reads up to "
        f"{ours:.0f} tokens of a request again, and llama-server up to {theirs:.0f}."
        + not_run(second_turn.PUBLISHED[1:])
    )


READ_AGAIN = {side: f"{side}: read again" for side in second_turn.RIVALS}


SECTIONS = {
    "default speed": Section(
        "default-speed", default_speed_table,
        says("The default pair takes {time.low:.2f} to {time.high:.2f} times the CPU time of LRU "
             "per simulated request.", time="CPU time"),
        Dots({"default pair": "CPU time"}, "CPU time of a simulated request, times that of LRU",
             (0, 1)),
    ),
    "admission": Section(
        "admission", study("admission", admission.table), _admission,
        Curves("mean TTFT, s",
               ("oldest", "sessions", "best fixed limit", LRU_ADAPTIVE, "best rebuilt"),
               "sessions/s", "mean TTFT, s"),
    ),
    "overload": Section(
        "overload", study("overload", overload.table), _overload,
        Dots({policy: f"mean TTFT, s: `{policy}`" for policy in overload.POLICIES}
             | {"best rebuilt": "mean TTFT, s: best rebuilt system"}, "mean TTFT, s", (0, 1)),
    ),
    "tree": Section(
        "tree", tree_table, _tree,
        Curves("match", (*VERBS, "eviction"), "thousands", "microseconds", log_y=False),
    ),
    "closed loop": Section(
        "closed-loop", study("closed_loop", closed_loop.table),
        says("The simulator forecasts the engine's hit rate within {hits.most:.1f} points and its "
             "mean TTFT within {ttft.most:.0f} %.",
             hits="forecast less engine", ttft="mean TTFT of the forecast"),
        Dots({"forecast less engine": "forecast less engine"},
             "token hit rate of the forecast less the engine's, points", (0, 1)),
    ),
    "vllm": Section("vllm", study("study_vllm", vllm.table), VLLM, VLLM_CURVES),
    "vllm in turn": Section(
        "vllm", study("study_vllm", partial(vllm.table, sessions=vllm.ALONE)), VLLM, VLLM_CURVES
    ),
    "vllm overload": Section(
        "vllm", study("study_vllm", vllm.overload_table),
        says("In overload, HybridScheduler hits {gain.mean:.1f} points more than vLLM as it is "
             "({gain.low:.1f} to {gain.high:.1f}), and the mean TTFT of the time model changes by "
             "{ttft.mean:.0f} % ({ttft.low:.0f} to {ttft.high:.0f}).",
             gain="gain", ttft="change of the mean TTFT"),
        Dots({"gain": "gain"}, "points of token hit rate", (0, 1)),
    ),
    "vllm host": Section(
        "vllm", study("study_vllm", vllm.host_table),
        says("With as much host memory as device memory, HybridScheduler hits {one.mean:.1f} "
             "points more than vLLM with the same ({one.low:.1f} to {one.high:.1f}), and with "
             "three times as much {three.mean:.1f} ({three.low:.1f} to {three.high:.1f}).",
             one="gain with 1 times", three="gain with 3 times"),
        Dots({"1 times": "gain with 1 times", "3 times": "gain with 3 times"},
             "points of token hit rate", (0, 1)),
    ),
    "sharegpt": Section(
        "sharegpt", sharegpt_table, _sharegpt,
        Dots({"saved": HITS.name}, "saved prompt tokens, %", (0, 1)),
    ),
    "sharegpt simulated": Section(
        "sharegpt-simulated", sharegpt_simulated_table, _sharegpt_simulated,
        Curves("survival", SHAREGPT_POLICIES, "memory, GiB", HITS.head, log_y=False),
    ),
    "checkpoint dtype": Section(
        "checkpoint-dtype", checkpoint_dtype_table,
        says("No format of checkpoints changes the distribution of the next token by more than "
             "{kl.high:.0f} millionths of a nat on code (`{kl.top[0]}`).", kl="KL on code"),
        Dots({"code": "KL on code", "problems": "KL on problems"},
             "KL, millionths of a nat per token"),
    ),
    "speculation": Section(
        "speculation", speculation_table, _speculation,
        Dots({"1 stream": "1 stream", "8 streams": "8 streams"}, "speed, times no drafts", (0, 1)),
    ),
    "linear layers": Section(
        "cpu-kernels", linear_layers_table,
        says("On one {cpu}, the fastest linear layer (8,192 x 2,048, rows: 512, threads: "
             "{speed.top[2]}) is `{speed.top[0]}` with {speed.high:.0f} GFLOP/s.",
             "bench_cpu_kernels", speed="rows: 512"),
        Dots({"512 rows": "rows: 512", "1 row": "rows: 1"}, "GFLOP/s (logarithmic)", (0, 1, 2),
             log=True),
    ),
    "decays": Section(
        "cpu-kernels", decays_table,
        says("On one {cpu}, no decay takes more than {worst.high:.2f} times as long as -0.01 "
             "(`{worst.top[0]}`).", "bench_cpu_kernels", worst="worst / first"),
        Dots({"ratio": "worst / first"}, "slowest decay, times the first"),
    ),
    "second turn": Section(
        "second-turn", second_turn_table, _second_turn,
        Dots(READ_AGAIN, "tokens read again per request"),
    ),
    "second turn sizes": Section(
        "second-turn", partial(second_turn_table, second_turn.PUBLISHED[1:], "memory"),
        _second_turns, Dots(READ_AGAIN, "tokens read again per request", (0, 1, 2, 3)),
    ),
    "llama": Section(
        "llama", llama_table,
        says("On one {cpu}, the engine has {ratio.low:.2f} to {ratio.high:.2f} times the speed of "
             "llama.cpp in 16, 8 and 4 bits.", "bench_llama", ratio="ratio"),
        Dots({"ratio": "ratio"}, "speed, times llama.cpp", (1, 2, 0)),
    ),
}  # fmt: skip
