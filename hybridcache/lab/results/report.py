"""Results for people: metrics, tables and notes. Figures are in ``figures.py``."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Generic, TypeVar

from hybridcache.command.parser import or_known
from hybridcache.config import GRID
from hybridcache.geometry.units import counted
from hybridcache.lab.results.result import ClosedLoopRun, RunResult, SweepRuns, text_table
from hybridcache.lab.rivals.systems import UNCHARGED
from hybridcache.lab.scenario import MEMORIES
from hybridcache.lab.traces.intervals import FEWEST_UNITS
from hybridcache.lab.traces.statistics import Summary, TraceStats, doubts
from hybridcache.policies.registry import make_eviction, parse_placement
from hybridcache.radix.api import Losses

_Run = TypeVar("_Run", RunResult, ClosedLoopRun)


@dataclass(frozen=True, slots=True)
class Metric(Generic[_Run]):
    """One figure of a run, and how to write it."""

    title: str
    value: Callable[[_Run], float | None]
    form: str = "{:.1f}"
    over_seeds: Callable[[Iterable[float]], float] = fmean
    """Combination of the values of runs that differ in their seed."""

    def text(self, *runs: _Run) -> str:
        values = [value for run in runs if (value := self.value(run)) is not None]
        return "-" if len(values) < len(runs) else self.form.format(self.over_seeds(values))


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


METRICS: dict[str, Metric[RunResult]] = {
    "hit": Metric("token hit rate, %", lambda run: 100 * run.token_hit_rate),
    "request-hit": Metric("request hit rate, %", lambda run: 100 * run.request_hit_rate),
    "bound": Metric("share of the bound, %", lambda run: _percent(run.share_of_bound)),
    "optimum": Metric("% of best plan", lambda run: _percent(run.share_of_optimum)),
    "seconds": Metric("prefill seconds spent", lambda run: run.seconds, "{:.3g}"),
    "ttft-mean": Metric("mean TTFT, ms", lambda run: 1e3 * run.ttft_mean_s),
    "ttft-p50": Metric("TTFT P50, ms", lambda run: 1e3 * run.ttft_s[50]),
    "ttft-p95": Metric("TTFT P95, ms", lambda run: 1e3 * run.ttft_s[95]),
    "ttft-p99": Metric("TTFT P99, ms", lambda run: 1e3 * run.ttft_s[99]),
    "checkpoints": Metric("checkpoints made", lambda run: run.checkpoints_made, "{:.0f}"),
    "control": Metric("cache code, us a request", lambda run: run.control_us, "{:.0f}"),
}


def find_metric(word: str) -> Metric[RunResult]:
    """Return the metric ``word``. ValueError lists the known names."""
    if word not in METRICS:
        raise ValueError(f"unknown metric {word!r}{or_known(word, METRICS)}")
    return METRICS[word]


TIE = 0.0005
"""Difference of token hit rates below which competitors have equal hits."""


def ties(run: RunResult, best: RunResult) -> bool:
    """Return True if the hits of ``run`` do not differ from those of ``best``: by less than
    ``TIE``, or by less than the interval of their difference, paired by session."""
    return abs(best.token_hit_rate - run.token_hit_rate) < TIE or best.above(run).low <= 0


def leading(labels: Sequence[str]) -> str:
    """Return the sentence on the policies with the most hits, which are equal."""
    verb = "has the most hits" if len(labels) == 1 else "have the most hits (equal)"
    return f"{', '.join(labels)} {verb}"


def most_hits(runs: Sequence[RunResult], units: str) -> tuple[RunResult, str]:
    """Return the policy of our own with the most hits among ``runs`` of one size, and a sentence:
    policies with equal hits, its paired difference to each other one with a 95 % interval over
    ``units``, the policies that do not differ from it, and rebuilt systems that have more."""
    ordered = sorted(runs, key=lambda run: -run.token_hit_rate)
    first, *others = [run for run in ordered if run.config["baseline"] is None]
    text, num_units = "no policy has a hit", len(first.by_session)
    if first.cached_tokens:
        same = [run.label for run in others if run.cached_tokens == first.cached_tokens]
        equal = ", ".join(r.label for r in others if ties(r, first) and r.label not in same)
        text = leading((first.label, *same))
        for n, one in enumerate(one for one in others if not ties(one, first)):
            text += f", {first.above(one)} {'points more ' * (n == 0)}than {one.label}"
        if equal:
            text += f" (not different: {equal})"
        if num_units < FEWEST_UNITS:
            text += f" (no interval: {counted(num_units, units)})"
    for run in ordered:
        if (points := 100 * (run.token_hit_rate - first.token_hit_rate)) > 0:
            text += f"; {run.label} has {points:.1f} points more"
    return first, text


SERVE = {
    "policy": ("--eviction ", None),
    "checkpoints": ("--checkpoints ", None),
    "grid": ("--grid ", GRID),
    "checkpoint_dtype": ("--checkpoint-dtype ", "auto"),
    "host_gib": ("--host-gib ", 0.0),
    "disk_gib": ("--state-dir DIR --disk-gib ", 0.0),
}
"""Flags of ``engine serve`` and their defaults, by the setting."""


def to_serve(run: RunResult, model: str) -> str:
    """Return the command that serves ``model`` with the settings of ``run``, its flags if the model
    has no path, or the settings that ``engine serve`` does not support."""
    config = run.config
    names = "state_dtype", "page_size", "grid", "memory"
    state_dtype, page_size, grid, memory = (config[name] for name in names)
    unsupported = {
        f"--memory {memory}": MEMORIES[memory] != "arena",
        f"--state-dtype {state_dtype}": state_dtype != "float32",
        f"--page-size {page_size}": page_size != 1,
        f"--grid {grid}": grid % GRID and grid not in (16, 32),
    }
    try:
        orders_classes = make_eviction(config["policy"])().orders_classes
        parse_placement(config["checkpoints"])
        unsupported["--no-priority-classes"] = not (orders_classes or config["priority_classes"])
    except ValueError:
        unsupported["unnamed policies"] = True
    if found := ", ".join(name for name, is_so in unsupported.items() if is_so):
        return f"engine serve does not support {found}"
    flags = f"--cache-gib {run.gib:.4g}"
    for name, (flag, usual) in SERVE.items():
        if (value := config[name]) != usual:
            flags += f" {flag}{shlex.quote(str(value))}"
    if not model:
        return f"flags of engine serve: {flags}"
    return f"to serve: engine serve --model {model} {flags}"


LOOP_METRICS: tuple[Metric[ClosedLoopRun], ...] = (
    Metric("hit, %", lambda run: 100 * run.token_hit_rate),
    Metric("TTFT mean, s", lambda run: run.ttft_mean_s, "{:.3g}"),
    Metric("p50", lambda run: run.ttft_p50_s, "{:.3g}"),
    Metric("p99", lambda run: run.ttft_p99_s, "{:.3g}"),
    Metric("goodput/s", lambda run: run.goodput, "{:.3g}"),
    Metric("makespan, s", lambda run: run.makespan_s, "{:.4g}"),
    Metric("oldest wait, s", lambda run: run.oldest_wait_s, "{:.3g}", max),
    Metric("live mean", lambda run: run.live_mean),
    Metric("most", lambda run: run.live_most, "{}", max),
)


def notes_on(result: SweepRuns, words: Sequence[str]) -> list[str]:
    """Return the notes under a table or figure of the metrics ``words``."""
    notes = plan_notes(result, words)
    if result.times and any(word.startswith(("ttft", "seconds")) for word in words):
        notes.append(f"prefill times: {result.times}")
    return [*notes, *uncharged_notes(result.runs), *result.trace_notes]


def uncharged_notes(runs: Sequence[RunResult | ClosedLoopRun]) -> list[str]:
    """Return the notes on memory that rebuilt systems use in addition to their size."""
    notes = []
    for memory in dict.fromkeys(UNCHARGED.values()):
        users = (run for run in runs if UNCHARGED.get(run.config["baseline"]) == memory)
        if names := ", ".join(dict.fromkeys(run.label for run in users)):
            notes.append(f"in addition to their GiB, not counted: {memory} ({names})")
    return notes


def interval_notes(result: SweepRuns) -> list[str]:
    """Explain the intervals of token hit rates, and why there are none."""
    if not result.runs:
        return []
    num_units = min(len(run.by_session) for run in result.runs)
    units = counted(num_units, result.units)
    if result.units == "group":
        units += " of requests that share half of a prompt (no sessions in the trace)"
    if num_units < FEWEST_UNITS:
        return [f"no intervals: {units}, fewer than {FEWEST_UNITS}"]
    return [f"intervals: 95 %, over {units}, cut at 0 and 100 %"]


def marked(run: RunResult, word: str) -> str:
    """Return the text of a cell, with half of its interval, or both limits if one is cut."""
    text, percent = METRICS[word].text(run), run.interval.scaled(100)
    if word == "hit" and run.interval.is_cut:
        return f"{percent:.1f}"
    if word == "hit" and not math.isnan(percent.low):
        return f"{text} ± {percent.half_width:.1f}"
    return text


def plan_notes(result: SweepRuns, words: Sequence[str]) -> list[str]:
    """Explain the plan with hindsight."""
    planned = [run for run in result.runs if run.optimum_tokens is not None]
    if not planned and "optimum" in words:
        return ["no plan was computed: add optimum=True (--optimum)"]
    if not planned or not {"hit", "optimum"} & set(words):
        return []
    notes = [
        "best plan with hindsight: a greedy plan, which is not always the optimum; running "
        "requests take none of its memory"
    ]
    if above := [run for run in planned if run.cached_tokens > (run.optimum_tokens or 0)]:
        names = ", ".join(dict.fromkeys(run.label for run in above))
        keeps = f" and keeps to --grid {above[0].config['grid']}"
        notes.append(f"above the plan, which is no bound{keeps}: {names}")
    return notes


def hindsight_percent(run: RunResult) -> float:
    """Token hit rate of the best plan with hindsight, %."""
    return 100 * (run.optimum_tokens or 0) / run.prompt_tokens


def limit_percent(run: RunResult) -> float:
    """Token hit rate that no cache of this memory exceeds, %."""
    return 100 * (run.limit_tokens or 0) / run.prompt_tokens


def size_label(run: RunResult) -> str:
    """Return a run's GiB, as short as it can be read."""
    return f"{run.gib:.0f}" if run.gib >= 100 else f"{run.gib:.3g}"


def losses_table(runs: Sequence[RunResult]) -> str:
    """Return a table of the prompt tokens in %: reused, or lost by cause, which is ``-`` where it
    is not recorded. ``LOSSES_NOTE`` explains the causes."""
    header = ["% of prompt tokens", "GiB", "reused"]
    header += [cause.replace("_", " ") for cause in Losses._fields]
    rows = []
    for run in runs:
        shares = [f"{100 * part / run.prompt_tokens:.1f}" for part in run.losses or ()]
        lost = shares or ["-"] * len(Losses._fields)
        rows.append([run.label, size_label(run), f"{100 * run.token_hit_rate:.1f}", *lost])
    unknown = ", ".join(dict.fromkeys(run.label for run in runs if run.losses is None))
    note = f"\n-: no causes are known for {unknown}" if unknown else ""
    return f"{text_table(header, rows)}\n{LOSSES_NOTE}{note}"


LOSSES_NOTE = (
    "Each token is counted under the first cause on its path (its KV before its checkpoint). "
    "Without that cause it may have been lost to another one. The KV up to an evicted checkpoint "
    "soon follows it, so most of these tokens count as kv evicted (--requests names checkpoints)."
)


def stats_table(stats: TraceStats) -> str:
    """Return the statistics of a trace as a table."""

    def spread(name: str, values: Summary) -> list[str]:
        cells = [values.mean, *values.percentiles.values(), values.largest]
        return [name, *(f"{cell:,.0f}" for cell in cells)]

    header = [stats.name, "mean", *(f"P{rank}" for rank in stats.prompt.percentiles), "largest"]
    rows = [
        spread("prompt, tokens", stats.prompt),
        spread("answer, tokens", stats.output),
        spread("reuse after new tokens", stats.reuse_new_tokens),
    ]
    share = 100 / stats.prompt_tokens
    counting = f"one id is {'one token' if stats.unit == 1 else f'{stats.unit} tokens'}"
    if stats.counted_by:
        counting = f"counted by: {stats.counted_by}"
    sessions = counted(stats.num_sessions, "session") if stats.num_sessions else "no sessions"
    duration = f"{stats.duration_s:,.{1 if stats.duration_s < 10 else 0}f}"
    lines = [
        text_table(header, rows),
        "",
        f"requests {stats.num_requests:,} in {sessions} and "
        f"{counted(stats.num_namespaces, 'namespace')}, over {duration} s; "
        f"{counted(stats.num_bad, 'bad record')} skipped",
        f"prompt tokens {stats.prompt_tokens:,}; {counting}",
        f"distinct tokens, answers included {stats.distinct_tokens:,}",
        f"ideal token hit rate {100 * stats.ideal_hit_rate:.2f} %, "
        f"of requests {100 * stats.ideal_requests / stats.num_requests:.2f} %",
        *doubts(stats.ideal_hit_rate),
    ]
    if stats.repeated_answers is not None:
        lines.append(
            f"answers found again in the next prompt {100 * stats.repeated_answers:.1f} % of their "
            "tokens"
        )
        if stats.repeated_answers < 0.9:
            lines[-1] += " (the rest is unknown, left out, or in other tokens there)"
    if stats.limits:
        lines.append(stats.limits)
    if stats.arrivals:
        lines.append(f"arrivals: {stats.arrivals}")
    if stats.times:
        lines.append(f"times: {stats.times}")
    if stats.columns:
        lines.append(f"columns: {stats.columns}")
    if stats.ideal_by_page:
        pages = (f"{page}: {share * hit:.2f} %" for page, hit in stats.ideal_by_page.items())
        lines.append(f"ideal token hit rate in whole pages of {', '.join(pages)}")
    return "\n".join(lines)
