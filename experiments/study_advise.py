"""Is the advice good? `hybridcache advise` on one half of a trace, every alternative simulated on
the half it has not seen.

    python -m experiments.study_advise [--traces chat,agent]

Halves are made in two ways: of every second session (more of the same traffic), and of the later
requests (traffic that moved on). Both are replayed from an empty cache. What was forecast stands
beside what came, the advised configuration beside all others that were asked for, the answer to
each question beside the best answer there was.
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator

from experiments.hindsight import Hindsight, Hindsights
from experiments.lab import WORKLOADS, arguments, figure_path, keep, rounded, workloads
from hybridcache import Trace, TraceRequest, advise
from hybridcache.geometry.times import Roofline
from hybridcache.lab.advise import (
    PLACEMENTS,
    PRECISIONS,
    Advice,
    intervals,
    precisions,
    splits,
)
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.result import RunResult
from hybridcache.lab.simulation.serving import Serving
from hybridcache.lab.simulation.sizes import budget_bytes
from hybridcache.lab.simulation.sweep import Job, run_sweep
from hybridcache.lab.simulation.target import RunConfig

Requests = tuple[TraceRequest, ...]

TRACES = ("chat", "agent", "resend", "sharegpt-like", "coding-agent")
SIZES = (0.29, 0.5)
"""Where on a workload's logarithmic axis of sizes: memory short, and less so."""
POLICIES = ("regret", "lru", "gdsf", "lhd", "s3-fifo")
"""Evictions tried on the unseen half: the two that are advised between, and three that were not
asked."""
QUESTIONS = ("policy @ checkpoints", "periodic checkpoints", "precision of states", "KV share")


@dataclass(frozen=True, slots=True)
class Trial:
    """One trace, half and size: what was advised, and what the unseen half made of it and of
    everything else."""

    trace: str
    half: str
    requests: int
    gib: float
    advice: Advice
    answers: dict[str, dict[str, RunResult]]
    """By question and option, on the unseen half; the questions before it answered as advised."""
    plan: Hindsight

    def chosen(self, question: str) -> RunResult:
        return self.answers[question][self._options[question]]

    @property
    def result(self) -> RunResult:
        """Of the advised policy, placement, interval and precision."""
        return self.chosen("precision of states")

    @property
    def _options(self) -> dict[str, str]:
        return {
            "KV share" if answer.question.startswith("KV") else answer.question: answer.option
            for answer in self.advice.answers
            if answer.chosen
        }

    def lost(self, question: str) -> float:
        """Points of token hit rate below the best answer to the question."""
        most = max(run.token_hit_rate for run in self.answers[question].values())
        return 100 * (most - self.chosen(question).token_hit_rate)

    def record(self) -> dict[str, Any]:
        run = self.result
        return {
            "trace": self.trace,
            "half": self.half,
            "requests": self.requests,
            "gib": self.gib,
            "advised": {
                "policy": self.advice.policy,
                "checkpoints": self.advice.checkpoints,
                "state_dtype": self.advice.state_dtype,
                "kv_share": self.advice.kv_share,
            },
            "forecast": _figures(self.advice.result),
            "token_hit_rate": rounded(run.token_hit_rate),
            "share_of_optimum": rounded(run.cached_tokens / self.plan.cached_tokens),
            "plan_token_hit_rate": self.plan.reached,
            "came": _figures(run),
            "points_lost": {question: rounded(self.lost(question)) for question in QUESTIONS},
            "answers": {
                question: {
                    option: rounded(found.token_hit_rate) for option, found in options.items()
                }
                for question, options in self.answers.items()
            },
        }


def _figures(run: RunResult) -> dict[str, float]:
    found = {"token_hit_rate": run.token_hit_rate, "ttft_p50_s": run.ttft_s[50]}
    return {
        name: rounded(value) for name, value in (found | {"ttft_p99_s": run.ttft_s[99]}).items()
    }


def main() -> None:
    options = arguments(__doc__, *TRACES, policy=True)
    trials: list[Trial] = []
    for word in (bar := workloads(options)):
        bar.set_description(word)
        workload = WORKLOADS[word]
        requests = tuple(workload.open(word, options.full))
        sizes = workload.sizes(options.points)
        places = [round(place * (len(sizes) - 1)) for place in SIZES]
        for half, seen, unseen in _halves(requests):
            for gib in (sizes[place] for place in places):
                bar.set_postfix_str(f"{half}, {gib:.3g} GiB")
                trace = workload.open(word, options.full)
                first = replace(trace, source=seen.__iter__)
                second = replace(trace, source=unseen.__iter__)
                trials.append(_try(word, half, first, second, gib, options))
        records = [trial.record() for trial in trials]
        path = keep("study_advise", records)
        draw(records)
    print(table(trials))
    print(path)


def _halves(requests: Requests) -> Iterator[tuple[str, Requests, Requests]]:
    """What the unseen half is, the half that is advised from, the unseen half."""
    numbers: dict[Hashable, int] = {}
    turns = [numbers.setdefault(request.session, len(numbers)) % 2 for request in requests]
    seen, unseen = (
        tuple(request for request, turn in zip(requests, turns, strict=True) if turn == wanted)
        for wanted in (0, 1)
    )
    if seen and unseen:
        yield "other sessions", seen, unseen
    middle = len(requests) // 2
    yield "later", requests[:middle], requests[middle:]


def _try(
    word: str,
    half: str,
    first: Trace,
    second: Trace,
    gib: float,
    options: argparse.Namespace,
) -> Trial:
    geometry = WORKLOADS[word].geometry
    advice = advise(
        first,
        gib=gib,
        model=geometry,
        state_dtypes=PRECISIONS,
        grids=(),
        processes=options.processes,
    )
    serving = Serving(Roofline.fitting(geometry))
    plain = RunConfig(geometry, budget_bytes=budget_bytes(gib), policy="lru")
    placed = next(a.option for a in advice.answers if a.chosen).partition(" @ ")[2]
    chosen = replace(plain, policy=advice.policy, checkpoints=placed)
    periodic = replace(chosen, checkpoints=advice.checkpoints)
    precise = replace(periodic, geometry=geometry.with_state_dtype(advice.state_dtype))
    asked = {
        QUESTIONS[0]: {
            f"{policy} @ {placement}": replace(plain, policy=policy, checkpoints=placement)
            for policy in (*POLICIES, *options.policy)
            for placement in (PLACEMENTS if policy in ("regret", "lru") else PLACEMENTS[:1])
        },
        QUESTIONS[1]: intervals(chosen, second.unit),
        QUESTIONS[2]: precisions(periodic),
        QUESTIONS[3]: splits(precise),
    }
    runs = iter(
        run_sweep(
            second,
            [Job(config, serving) for configs in asked.values() for config in configs.values()],
            processes=options.processes,
        )
    )
    answers = {
        question: dict(zip(configs, islice(runs, len(configs)), strict=True))
        for question, configs in asked.items()
    }
    plan = Hindsights(second).at(gib, precise.geometry, plain.grid)
    num_requests = next(iter(answers[QUESTIONS[0]].values())).requests
    return Trial(word, half, num_requests, gib, advice, answers, plan)


def table(trials: Iterable[Trial]) -> str:
    """What was advised, forecast and came."""
    rows = []
    for trial in trials:
        forecast, run = trial.advice.result, trial.result
        share = 100 * run.cached_tokens / trial.plan.cached_tokens
        rows.append(
            [
                f"{trial.trace} {trial.gib:.3g}, {trial.half}",
                f"{trial.advice.policy} @ {trial.advice.checkpoints}",
                f"{trial.advice.state_dtype}, {trial.advice.kv_share:.0%}",
                f"{100 * forecast.token_hit_rate:.1f}",
                f"{100 * run.token_hit_rate:.1f}",
                f"{share:.0f}",
                *(
                    f"{1e3 * forecast.ttft_s[rank]:.0f} > {1e3 * run.ttft_s[rank]:.0f}"
                    for rank in (50, 99)
                ),
                *(f"{trial.lost(question):.1f}" for question in QUESTIONS),
            ]
        )
    header = ["GiB", "advised", "state, KV share", "forecast, %", "came, %", "% of plan"]
    header += ["P50, ms", "P99, ms", "lost: policy", "interval", "precision", "split"]
    return text_table(header, rows)


def draw(records: list[dict[str, Any]]) -> None:
    """A row a trace and size. Left the hit rates, then what each answer lost against the best, then
    the times."""
    figure, axes = panels(3, width=5.4, height=0.25 * len(records) + 1.0, columns=3)
    hit, lost, times = axes
    for place, record in enumerate(records):
        rates = [100 * rate for rate in record["answers"][QUESTIONS[0]].values()]
        hit.plot([min(rates), max(rates)], [place] * 2, color="#cccccc", linewidth=7, zorder=1)
        plan = 100 * record["plan_token_hit_rate"]
        hit.plot(plan, place, "|", color="black", markersize=11, markeredgewidth=1.6)
        forecast, came = (100 * record[name]["token_hit_rate"] for name in ("forecast", "came"))
        hit.plot(forecast, place, "o", color=COLOURS[1], markerfacecolor="white", markersize=6)
        hit.plot(came, place, "o", color=COLOURS[0], markersize=6)
        share = 100 * record["share_of_optimum"]
        hit.text(112, place, f"{share:.0f}", fontsize=7.5, ha="center", va="center")
        for number, question in enumerate(QUESTIONS):
            lost.plot(
                record["points_lost"][question],
                place + 0.14 * (number - 1.5),
                "osD^"[number],
                color=COLOURS[number],
                markersize=4.5,
            )
        for name, colour in (("ttft_p50_s", COLOURS[0]), ("ttft_p99_s", COLOURS[1])):
            ratio = record["came"][name] / record["forecast"][name]
            times.plot(ratio, place, "o", color=colour, markersize=5)
    hit.text(112, -1, "% of plan", fontsize=7.5, ha="center", va="center")
    _name(hit, lost, times)
    for axis in axes:
        axis.set_yticks(range(len(records)))
        axis.set_ylim(len(records) - 0.4, -1.6)
        axis.set_yticklabels([])
    names = [f"{record['trace']}, {record['gib']:.3g} GiB, {record['half']}" for record in records]
    hit.set_yticklabels(names, fontsize=8)
    hit.set_xlim(0, 120)
    hit.set_xticks(range(0, 101, 20))
    hit.set_xlabel("token hit rate on the unseen half, %")
    lost.set_xlabel("points lost against the best answer")
    times.set_xscale("log")
    times.axvline(1, color="black", linewidth=0.6)
    times.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    times.xaxis.set_major_formatter("{x:g}")
    times.xaxis.set_minor_locator(NullLocator())
    times.set_xlabel("TTFT that came / TTFT forecast")
    caption = (
        "Advice from one half of each trace, tried on the other from an empty cache: every second "
        "session, or the later requests. Left: what came (full) against what was forecast "
        "(open), the other policies and placements in the model's own precision (grey) and the "
        "best plan with hindsight (clairvoyant greedy, "
        "states as advised); full dots right of the grey owe it to smaller states. Middle: what "
        "each answer gave away. Right: how well the "
        "times were forecast."
    )
    save(figure, axes, figure_path("study_advise"), caption)


def _name(hit: Any, lost: Any, times: Any) -> None:
    """Legend entries, one of each kind."""
    hit.plot([], [], color="#cccccc", linewidth=7, label="other policies and placements")
    hit.plot([], [], "o", color=COLOURS[0], label="advised, unseen half")
    hit.plot([], [], "o", color=COLOURS[1], markerfacecolor="white", label="forecast")
    hit.plot([], [], "|", color="black", markersize=11, label="best plan with hindsight")
    for number, question in enumerate(QUESTIONS):
        lost.plot([], [], "osD^"[number], color=COLOURS[number], label=question)
    for rank, colour in ((50, COLOURS[0]), (99, COLOURS[1])):
        times.plot([], [], "o", color=colour, label=f"TTFT P{rank}")


if __name__ == "__main__":
    main()
