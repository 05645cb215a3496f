"""What to run a trace with: policy, placement, interval, precision of states, split of the memory,
with what each should give.

One question after the other, each with the answers so far: eviction policy and placement together;
a periodic checkpoint beside the placement; the precision of states; the grid of checkpoints; the
split of the memory into a pool for KV and one for states (for engines that need it fixed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybridcache.geometry.model import DTYPE_BYTES, ModelGeometry
from hybridcache.geometry.times import MeasuredTimes, Roofline
from hybridcache.geometry.units import format_bytes
from hybridcache.lab.defaults import MODEL
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.result import RunResult
from hybridcache.lab.simulation.serving import Serving
from hybridcache.lab.simulation.sizes import budget_bytes, sizes, tier_bytes
from hybridcache.lab.simulation.sweep import Job, run_sweep
from hybridcache.lab.simulation.target import RunConfig
from hybridcache.lab.tier_worth import TierWorth, tier_worth
from hybridcache.lab.trace import Trace

DEFAULT_POLICIES = ("survival", "lru")
PLACEMENTS = (
    "branch,boundary,backoff,end",
    "adaptive",
    "branch,boundary,backoff",
    "branch,backoff",
    "boundary,end",
    "backoff,end",
)
INTERVALS = (512, 1024, 2048, 4096, 8192)
"""Tokens between periodic checkpoints, beside none."""
FINER_GRIDS = (32, 16)
"""Tokens: what the engine's kernels have beside the default. On a CPU they are as quick; on a GPU
that was not measured."""
KV_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SERVABLE_PRECISIONS = ("float32", "bfloat16")
"""What the engine can keep states in; others are tried only where they are asked for."""
PRECISIONS = (*SERVABLE_PRECISIONS, "int8")
"""A smaller state never reuses less, but what it costs in logits is not seen here."""
FORECAST = (
    "of this very trace, from an empty cache; on later requests of five traces that grow while "
    "they run, the hit rate came out up to 47 points lower: advise on traffic as heavy as what "
    "will come"
)
"""What the expected figures stand for."""
WORTH = 0.005
"""Token hit rate that a periodic checkpoint, a coarser precision or a finer grid must gain to be
advised."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """One option of one question, and what it gave."""

    question: str
    option: str
    run: RunResult
    chosen: bool


@dataclass(frozen=True, slots=True)
class Advice:
    """Every option that was tried, and the configuration that came out."""

    trace: str
    model: str
    gib: float
    answers: tuple[Answer, ...]
    policy: str
    checkpoints: str
    state_dtype: str
    grid: int
    kv_share: float
    """Of the memory, if it has to be split once and for all."""
    result: RunResult
    """Of the advice, with one budget for both."""
    tiers: TierWorth | None = None
    """What the memory below the device would be worth, where it was asked."""

    def text(self) -> str:
        """The advice, then the table it rests on."""
        kv_gib = self.gib * self.kv_share
        run = self.result
        lines = [
            f"{self.trace}, {self.model}, {self.gib:g} GiB:",
            f"  eviction {self.policy}, checkpoints {self.checkpoints}, states in "
            f"{self.state_dtype}, grid {self.grid}",
            f"  expected token hit rate {100 * run.token_hit_rate:.1f} %, "
            f"TTFT P50 {1e3 * run.ttft_s[50]:.1f} ms, P99 {1e3 * run.ttft_s[99]:.1f} ms",
            f"  forecast {FORECAST}",
            f"  with two fixed pools: {kv_gib:.3g} GiB for KV, {self.gib - kv_gib:.3g} GiB for "
            "states",
            *([] if self.tiers is None else [f"  {self.tiers.text()}"]),
            "",
        ]
        rows = [
            [
                answer.question,
                answer.option + (" *" if answer.chosen else ""),
                f"{100 * answer.run.token_hit_rate:.1f}",
                f"{1e3 * answer.run.ttft_s[50]:.1f}",
                f"{1e3 * answer.run.ttft_s[99]:.1f}",
            ]
            for answer in self.answers
        ]
        header = ["question", "option (* chosen)", "token hit, %", "TTFT P50, ms", "TTFT P99, ms"]
        return "\n".join(lines) + text_table(header, rows)

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "trace": self.trace,
            "model": self.model,
            "gib": self.gib,
            "policy": self.policy,
            "checkpoints": self.checkpoints,
            "state_dtype": self.state_dtype,
            "grid": self.grid,
            "kv_share": self.kv_share,
            "token_hit_rate": self.result.token_hit_rate,
            "ttft_s": self.result.ttft_s,
            "forecast": FORECAST,
            "tiers": None if self.tiers is None else self.tiers.as_record(),
            "answers": [
                {
                    "question": answer.question,
                    "option": answer.option,
                    "token_hit_rate": answer.run.token_hit_rate,
                    "ttft_s": answer.run.ttft_s,
                    "chosen": answer.chosen,
                }
                for answer in self.answers
            ],
        }


def advise(
    trace: Trace,
    *,
    gib: float,
    model: str | ModelGeometry = MODEL,
    policies: Sequence[str] = DEFAULT_POLICIES,
    state_dtypes: Sequence[str] = SERVABLE_PRECISIONS,
    grids: Sequence[int] = FINER_GRIDS,
    servers: int = 1,
    times: str | None = None,
    host_gib: float = 0.0,
    disk_gib: float = 0.0,
    processes: int = 1,
    progress: Progress | None = None,
) -> Advice:
    """Advice for ``gib`` of memory; some thirty runs over ``trace``. The option that reuses most
    tokens is chosen, the first of equals; of intervals none, of precisions the finest, of grids the
    coarsest, where that is within ``WORTH`` of the best. ``state_dtypes``, ``grids`` (coarsest
    first): those to choose among beside the model's own and the default. ``host_gib``,
    ``disk_gib``: also what so much memory below the device would be worth.

    The figures are those of ``trace`` itself, not of later traffic. Raises what ``simulate``
    raises."""
    (size,) = sizes(gib)
    host_bytes, disk_bytes = tier_bytes("host", host_gib), tier_bytes("disk", disk_gib)
    geometry = ModelGeometry.load(model) if isinstance(model, str) else model
    precisions(
        RunConfig(geometry), state_dtypes
    )  # an unknown word is reported before anything runs
    _check_room(RunConfig(geometry, budget_bytes=budget_bytes(size)), state_dtypes, trace.unit)
    timing = MeasuredTimes.load(times) if times else Roofline.fitting(geometry)
    adviser = _Adviser(trace, Serving(timing, servers), processes, progress)
    config = RunConfig(geometry, budget_bytes=budget_bytes(size))
    options = {
        f"{policy} @ {placement}": replace(config, policy=policy, checkpoints=placement)
        for policy in policies
        for placement in PLACEMENTS
    }
    config = adviser.ask("policy @ checkpoints", options)
    if not geometry.num_linear_layers:  # no state: nothing to save, to split or to shrink
        return adviser.advice(config, size, kv_share=1.0, result=adviser.chosen_run())
    config = adviser.ask("periodic checkpoints", intervals(config, trace.unit), WORTH)
    config = adviser.ask("precision of states", precisions(config, state_dtypes), WORTH)
    if finer := [word for word in grids if word % trace.unit == 0]:
        options = {str(word): replace(config, grid=word) for word in (config.grid, *finer)}
        config = adviser.ask("grid of checkpoints", options, WORTH)
    result = adviser.chosen_run()
    split = adviser.ask("KV share of two pools", splits(config))
    assert split.kv_share is not None
    advice = adviser.advice(config, size, split.kv_share, result)
    if not host_bytes and not disk_bytes:
        return advice
    tiered = replace(config, host_bytes=host_bytes, disk_bytes=disk_bytes)
    worth = tier_worth(trace, tiered, adviser.serving, processes=processes, progress=progress)
    return replace(advice, tiers=worth)


def _check_room(config: RunConfig, words: Sequence[str], unit: int) -> None:
    """ValueError for memory in which no checkpoint fits beside an id's KV, whatever is chosen."""
    tried = precisions(config, words) if config.geometry.num_linear_layers else {"": config}
    states = min(one.geometry.state_bytes for one in tried.values())
    least = states + unit * config.geometry.kv_bytes_per_token
    if (config.budget_bytes or 0) < least:
        raise ValueError(
            f"nothing fits in {format_bytes(config.budget_bytes or 0)}: the smallest checkpoint of "
            f"{config.geometry.name} and its KV take {format_bytes(least)}"
        )


def intervals(config: RunConfig, unit: int) -> dict[str, RunConfig]:
    """``config`` without and with periodic checkpoints."""
    return {"none": config} | {
        f"every {interval}": replace(config, checkpoints=f"{config.checkpoints},every:{interval}")
        for interval in INTERVALS
        if interval >= unit
    }


def splits(config: RunConfig) -> dict[str, RunConfig]:
    """``config`` with its memory in two fixed pools."""
    return {f"{share:.0%}": replace(config, memory="pools", kv_share=share) for share in KV_SHARES}


def precisions(config: RunConfig, words: Sequence[str] = PRECISIONS) -> dict[str, RunConfig]:
    """``config`` with states in the model's own precision and in those of ``words`` below it,
    finest first. ValueError for a word that is no precision."""
    own = config.geometry.state_dtype
    unknown = [word for word in words if word not in DTYPE_BYTES]
    if unknown:
        raise ValueError(f"state_dtype {unknown[0]!r} is none of {', '.join(DTYPE_BYTES)}")
    coarser = sorted(
        (word for word in words if DTYPE_BYTES[word] < DTYPE_BYTES[own]),
        key=DTYPE_BYTES.__getitem__,
        reverse=True,
    )
    return {
        word: replace(config, geometry=config.geometry.with_state_dtype(word))
        for word in (own, *coarser)
    }


class _Adviser:
    """Asks questions and keeps the answers."""

    def __init__(
        self, trace: Trace, serving: Serving, processes: int, progress: Progress | None
    ) -> None:
        self._trace, self.serving = trace, serving
        self._processes, self._progress = processes, progress
        self.answers: list[Answer] = []

    def ask(self, question: str, options: dict[str, RunConfig], worth: float = 0.0) -> RunConfig:
        """The first of ``options`` whose token hit rate is within ``worth`` of the best."""
        jobs = [Job(config, self.serving) for config in options.values()]
        runs = run_sweep(self._trace, jobs, processes=self._processes, progress=self._progress)
        least = max(run.token_hit_rate for run in runs) - worth
        best = next(number for number, run in enumerate(runs) if run.token_hit_rate >= least)
        self.answers += [
            Answer(question, option, run, number == best)
            for number, (option, run) in enumerate(zip(options, runs, strict=True))
        ]
        return jobs[best].config

    def advice(self, config: RunConfig, gib: float, kv_share: float, result: RunResult) -> Advice:
        """``config`` with all the answers so far."""
        return Advice(
            self._trace.name,
            config.geometry.name,
            gib,
            tuple(self.answers),
            str(config.policy),
            str(config.checkpoints),
            config.geometry.state_dtype,
            config.grid,
            kv_share,
            result,
        )

    def chosen_run(self) -> RunResult:
        """What the latest choice gave."""
        return next(answer.run for answer in reversed(self.answers) if answer.chosen)
