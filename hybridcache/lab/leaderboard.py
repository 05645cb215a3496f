"""Compare a policy with every built-in one on the evaluation split, with intervals.

Each policy runs in every cell, one trace at one memory size, with every seed. Scores are means over
cells, and their intervals and paired differences come from the seeds. Closed loops, admitted by
``sessions``, decide the order of the table; replays are compared with plans with hindsight.

>>> split = Split("tiny", "qwen3-next", (0, 1, 2), {"short?head=20": (1.0,)})
>>> board = leaderboard((), split, built_in=("lru", "fifo"))
>>> [row.name for row in board.rows()]
['lru', 'fifo']
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np

from hybridcache.command.extras import version
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import counted
from hybridcache.lab.evictions import ALL_NAMES
from hybridcache.lab.intervals import FEWEST_UNITS, Interval, interval, paired
from hybridcache.lab.progress import Progress
from hybridcache.lab.report import text_table
from hybridcache.lab.scenario import Scenario, named_policies, sources_of, written_policy
from hybridcache.lab.simulation.closed_loop import ClosedLoopResult, closed_loop
from hybridcache.lab.simulation.grid import RunFailed, Stored, identity_of, run_grid
from hybridcache.lab.simulation.simulate import SimulationResult, optimum, simulate
from hybridcache.lab.simulation.sizes import sizes
from hybridcache.lab.trace import Trace
from hybridcache.lab.traces import open_trace, seeded
from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT, EvictionSpec

BUILT_IN = tuple(sorted(ALL_NAMES))
"""Eviction policies on the board, each with the default placement."""


@dataclass(frozen=True, slots=True)
class Split:
    """Traces, sizes and seeds on which policies are compared."""

    name: str
    model: str
    seeds: tuple[int, ...]
    gib: Mapping[str, tuple[float, ...]]
    """Sizes of the replays, by trace specification."""
    closed_loop: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """Closed loops, by trace specification: (GiB, sessions per second)."""

    def __post_init__(self) -> None:
        """Raise ValueError for values that a scenario refuses, and for settings of no use."""
        if not self.gib or not self.seeds:
            raise ValueError("there are no seeds, or no sizes")
        for trace, own in self.gib.items():
            Scenario(trace, model=self.model, gib=own, seeds=self.seeds)
        for trace, cells in self.closed_loop.items():
            if trace not in self.gib:
                raise ValueError(f"{trace} has closed loops, and must be in [gib]")
            for size, rate in cells:
                Scenario(trace, gib=size, rate=rate)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Split:
        """Read a TOML file of the form of ``leaderboard.toml``; None for the packaged one.
        ValueError if a field is missing, unknown or wrong."""
        source = Path(path) if path else resources.files(__package__) / "leaderboard.toml"
        try:
            read = tomllib.loads(source.read_text(encoding="utf-8"))
            read["seeds"] = tuple(read["seeds"])
            read["gib"] = {trace: sizes(own) for trace, own in read["gib"].items()}
            loops = read.pop("closed-loop", {}).items()
            loops = {trace: tuple((gib, rate) for gib, rate in cells) for trace, cells in loops}
            return cls(source.name if path else "evaluation", closed_loop=loops, **read)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            fault = str(error).removeprefix(f"{cls.__name__}.__init__() ")
            fault += " is missing" if isinstance(error, KeyError) else ""
            raise ValueError(f"{path or source.name}: {fault}") from None

    def head(self, num_seeds: int | None) -> Split:
        """Return the split with its first seeds."""
        if num_seeds is not None and not 1 <= num_seeds <= len(self.seeds):
            raise ValueError(
                f"seeds must be from 1 to {len(self.seeds)}, the seeds of the split (got "
                f"{num_seeds})."
            )
        return replace(self, seeds=self.seeds[:num_seeds])

    def jobs(self, policies: tuple[str, ...]) -> list[BoardJob]:
        """Return the jobs of all cells: a replay of all sizes, or one closed loop."""
        cells = [(trace, sizes, None) for trace, sizes in self.gib.items()]
        loops = [
            (trace, (size,), rate)
            for trace, cells in self.closed_loop.items()
            for size, rate in cells
        ]
        return [
            BoardJob(self.model, trace, seed, sizes, policies, rate)
            for trace, sizes, rate in (*cells, *loops)
            for seed in self.seeds
        ]


@dataclass(frozen=True, slots=True)
class BoardJob:
    """All sizes of one trace with one seed, or one closed loop, under all policies."""

    model: str
    trace: str
    seed: int
    gib: tuple[float, ...]
    policies: tuple[str, ...]
    """``eviction`` or ``eviction@placement``."""
    rate: float | None = None

    @property
    def title(self) -> str:
        """Name of the job in errors."""
        rate = "" if self.rate is None else f", {self.rate:g} sessions/s"
        return f"{self.trace}{rate}, seed {self.seed}"

    def key(self, _trace_identity: bytes) -> str:
        """Return an identity of the job, the version, the model, the trace and own policies."""
        own = sources_of(part for policy in self.policies for part in policy.split("@"))
        trace = identity_of(open_trace(self.trace))
        text = repr((self, version(), ModelGeometry.load(self.model), own))
        return hashlib.sha256(text.encode() + trace).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Scores(Stored):
    """Token hit rates of one job, a number per size, and waiting times of a closed loop."""

    trace: str
    seed: int
    gib: list[float]
    rates: dict[str, list[float]]
    plan: list[float]
    """Best plan found with hindsight, in the whole memory; empty for a closed loop."""
    plan_running: list[float]
    rate: float | None = None
    ttft_s: dict[str, float] = field(default_factory=dict)
    """Mean time to first token in closed loop, by policy."""


def run_job(_trace: Trace, job: BoardJob) -> Scores:
    """Simulate every policy; compute both plans of a replay. O(policies * requests * sizes)."""
    trace = open_trace(seeded(job.trace, job.seed)).kept()
    asked = Scenario(trace, model=job.model, gib=job.gib)
    plans = [  # in the whole memory, and next to the running request
        [best.reached for best in optimum(asked, counts_running=counts, progress=False)]
        if job.rate is None
        else []
        for counts in (False, True)
    ]
    scores = Scores(job.trace, job.seed, list(job.gib), {}, plans[0], plans[1], job.rate)
    for policy in job.policies:
        eviction, _, placement = policy.partition("@")
        cell = replace(asked, policy=eviction, checkpoints=[placement or DEFAULT_PLACEMENT])
        result: SimulationResult | ClosedLoopResult
        if job.rate is None:
            result = simulate(cell, bound=False, progress=False)
        else:
            served = replace(cell, rate=job.rate, admission="sessions", seeds=[job.seed])
            result = closed_loop(served, progress=False)
            scores.ttft_s[policy] = result.runs[0].ttft_mean_s
        if result.failures:
            raise RunFailed(result.failures[0])
        scores.rates[policy] = [run.token_hit_rate for run in result.runs]
    return scores


@dataclass(frozen=True, slots=True)
class Row:
    """One policy on the board; figures are in percent or points, if they are no ratio."""

    name: str
    hit_rate: Interval
    difference: Interval
    """To the first policy, paired by seed."""
    share: Interval
    """Share of the plan in the whole memory."""
    share_running: Interval
    """Share of the plan that leaves room for the running request."""
    served: Interval | None = None
    """Token hit rate in closed loop, or None if the split has no closed loops."""
    served_difference: Interval | None = None
    ttft_ratio: Interval | None = None
    """Mean time to first token in closed loop, relative to the first policy: geometric mean over
    cells."""

    def cells(self) -> list[str]:
        """Return the columns of the table."""
        served = (self.served, self.served_difference, self.ttft_ratio)
        replayed = (self.hit_rate, self.difference, self.share, self.share_running)
        ratio = [] if self.ttft_ratio is None else [f"{self.ttft_ratio:.2f}"]
        shown = [[f"{one:.1f}" for one in of if one] for of in (served[:2], replayed)]
        return [self.name, *shown[0], *ratio, *shown[1]]


@dataclass(frozen=True, slots=True)
class Board:
    """Scores of all jobs of a split."""

    split: Split
    reference: str
    scores: tuple[Scores, ...]
    trace_notes: Sequence[str] = ()

    def rows(self) -> list[Row]:
        """Return a row per policy, the highest hit rate (in closed loop, if known) first."""
        plans = [self._cells(lambda job: job.plan), self._cells(lambda job: job.plan_running)]

        def rates(name: str, is_loop: bool = False) -> np.ndarray:
            return self._cells(lambda job: job.rates[name], is_loop)

        def compared(name: str, is_loop: bool = False) -> tuple[Interval, Interval]:
            """Return a policy's token hit rate, %, and its difference to the first policy."""
            both = (name, self.reference)
            means, of_first = (100 * rates(one, is_loop).mean(axis=1) for one in both)
            return interval(means.tolist()), paired(means.tolist(), of_first.tolist())

        def ttft_s(name: str) -> np.ndarray:
            return self._cells(lambda job: [job.ttft_s[name]], is_loop=True)

        found = []
        for name in self.scores[0].rates:
            shares = [interval((100 * _shares(rates(name), plan)).tolist()) for plan in plans]
            served: tuple[Interval, ...] = ()
            if self.split.closed_loop:
                ratios = np.exp(np.log(ttft_s(name) / ttft_s(self.reference)).mean(axis=1))
                served = (*compared(name, is_loop=True), interval(ratios.tolist()))
            found.append(Row(name, *compared(name), *shares, *served))
        return sorted(found, key=lambda row: -(row.served or row.hit_rate).mean)

    def _cells(self, read: Callable[[Scores], list[float]], is_loop: bool = False) -> np.ndarray:
        """Return numbers of each replay, or closed loop: [seeds, cells]."""
        jobs = [one for one in self.scores if (one.rate is not None) == is_loop]
        return np.array(
            [
                [number for one in jobs if one.seed == seed for number in read(one)]
                for seed in self.split.seeds
            ]
        )

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return f"<pre>{escape(self.table())}</pre>"

    def table(self) -> str:
        """Return the board as text."""
        num_cells = sum(map(len, self.split.gib.values()))
        num_loops = sum(map(len, self.split.closed_loop.values()))
        loops = f"{counted(num_loops, 'closed loop')} and " if num_loops else ""
        cells, traces = counted(num_cells, "replayed cell"), counted(len(self.split.gib), "trace")
        num_seeds = len(self.split.seeds)
        explained = "Mean over cells [95 % interval over seeds]."
        if num_seeds < FEWEST_UNITS:
            explained = (
                f"Mean over cells. No intervals: they need at least {FEWEST_UNITS} seeds (got "
                f"{num_seeds}), so differences can be chance."
            )
        lines = [
            f"{loops}{cells} of {traces}, {counted(num_seeds, 'seed')} each, {self.split.model}. "
            f"{explained}\n",
            text_table(self.heads(), [row.cells() for row in self.rows()]),
            *self.trace_notes,
        ]
        return "\n".join(lines)

    def heads(self) -> list[str]:
        """Return the heads of the table's columns."""
        less = f"less {self.reference}, points"
        served = ["closed loop: hits, %", less, "mean TTFT, ratio"]
        served += ["replay: hits, %", f"replay: {less}"]
        first = served if self.split.closed_loop else ["token hit rate, %", less]
        return ["policy", *first, "% of plan", "% of plan next to running requests"]


def _shares(rates: np.ndarray, plan: np.ndarray) -> np.ndarray:
    """Return the mean share of each seed over the cells where a plan reuses anything; else NaN."""
    known = plan > 0
    shares = np.divide(rates, plan, out=np.zeros(rates.shape), where=known)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN.
        means: np.ndarray = shares.sum(axis=1) / known.sum(axis=1)
    return means


def leaderboard(
    policies: EvictionSpec | Sequence[EvictionSpec] = (),
    split: Split | str | Path | None = None,
    *,
    built_in: Sequence[str] = BUILT_IN,
    processes: int = 1,
    seeds: int | None = None,
    resume_from: str | Path | None = None,
    progress: Progress = None,
) -> Board:
    """Run ``policies`` and the built-in ones on a split.

    Args:
        policies: ``eviction`` or ``eviction@placement``; own ones as classes or ``module:Class``.
        split: traces, sizes and seeds, or the path of their file; None for the packaged one.
        built_in: names of built-in evictions; each uses the default placement.
        seeds: number of the first seeds to use; None for all.
        processes, resume_from, progress: as in ``simulate``, for jobs in place of runs.

    Raises ValueError if a policy or a trace is unknown, if a policy fails or has no name, and if
    there is none.
    """
    if split is None or isinstance(split, str | Path):
        split = Split.load(split)
    split = split.head(seeds)
    for trace in split.gib:
        if len(split.seeds) > 1 and seeded(trace, 0) == trace:
            raise ValueError(f"{trace} is a single draw: give one seed, and compare by sessions")
    named = (one for given in (policies, built_in) for one in named_policies(given, split=True))
    names = tuple(dict.fromkeys(map(written_policy, named)))
    if not names:
        raise ValueError("nothing to compare: name a policy, or keep the built-in ones")
    jobs = split.jobs(names)
    scores, failures = run_grid(
        Trace("leaderboard", 1, tuple),
        jobs,
        run_job,
        processes=processes,
        resume_from=resume_from,
        kind=Scores,
        progress=progress,
    )
    if failures:
        raise ValueError(failures[0])
    reference = DEFAULT_EVICTION if DEFAULT_EVICTION in names else names[0]
    notes = [f"{one}: {note}" for one in split.gib for note in open_trace(one).notes]
    return Board(split, reference, scores, notes)
