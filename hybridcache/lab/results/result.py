"""Results: the figures of a run, and the runs of a sweep."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import fmean, median
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from hybridcache.command.parser import or_known
from hybridcache.geometry.model import ModelGeometry
from hybridcache.lab.rivals.optimum import Optimum
from hybridcache.lab.traces.intervals import Interval, RateInterval, linear_ratio
from hybridcache.lab.traces.trace import Tabular, Trace, has_sessions
from hybridcache.radix.api import Losses

PLAN = "best plan"
"""Label of a plan with hindsight in comparisons."""
SAME_SIZE = 1e-3
"""Relative difference up to which two sizes are the same: tables show four digits."""

Plain = dict[str, Any]
"""Settings or figures of a run, by name, as values of JSON."""


@dataclass(frozen=True, slots=True)
class StoredResult:
    """Result that ``run_grid`` can keep in a file. Its fields are values of JSON."""

    def as_record(self) -> Plain:
        """Return a record for JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Plain) -> Self:
        """Return the result of an ``as_record`` after a trip through JSON."""
        return cls(**{one.name: record[one.name] for one in fields(cls) if one.name in record})


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns, the first to the left and the others to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


class SessionResult(NamedTuple):
    """One session of a run. The interval of a run is over these."""

    session: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were reused."""
    losses: Losses | None = None
    """Tokens not reused, by cause; None where the target does not say."""


class RequestRecord(NamedTuple):
    """One request of a run. Ages are numbers of requests. Items are named by the cache of this
    project alone, whose checkpoints have labels; a rebuilt system also tells no cause."""

    session: str
    arrival_s: float
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were reused."""
    ttft_s: float
    """Time to first token, waiting included."""
    cause: str
    """Cause of most of its lost tokens (``Losses``)."""
    hit: str = ""
    """Label of the checkpoint that it resumed from."""
    hit_uses: int = 0
    """Earlier uses of that checkpoint."""
    lost: str = ""
    """Label of the evicted checkpoint that it would have resumed from: the deepest of its prompt.
    Empty if there is none."""
    lost_uses: int = 0
    """Uses of that checkpoint before its eviction."""
    lost_age: int = 0
    """Requests since its eviction."""


class EvictionRecord(NamedTuple):
    """One eviction of a run."""

    request: int
    """Number of the request that took the memory, from 1 on."""
    kind: str
    """``kv`` or ``checkpoint``."""
    label: str
    """Placement rule and stop reason of a checkpoint."""
    superseded: bool
    """True if the same conversation had a later checkpoint."""
    uses: int
    age: int
    """Requests since the last use, or since it was saved."""
    position: int
    """Tokens from the start of the prompt to its end."""
    tokens: int
    """Tokens to compute again without it: down to the checkpoint above."""
    bytes: int
    missed: int | None = None
    """Number of the first request that would have resumed from it (a *ghost hit*), or None."""


class _Run(StoredResult):
    """Figures of every run, from its identity and its counts."""

    __slots__ = ()
    config: Plain
    prompt_tokens: int
    cached_tokens: int

    @property
    def label(self) -> str:
        """Name of the competitor: the cache's policies, or the rebuilt system."""
        return str(self.config["label"])

    @property
    def gib(self) -> float:
        """Memory for KV and states, GiB."""
        return float(self.config["gib"])

    @property
    def token_hit_rate(self) -> float:
        """Reused share of the prompt tokens, 0 to 1."""
        return self.cached_tokens / max(1, self.prompt_tokens)


@dataclass(frozen=True, slots=True, repr=False)
class RunResult(_Run):
    """One cell of a sweep. Counts are in tokens, for any unit of the trace."""

    config: Plain
    requests: int
    hits: int
    """Requests that reused anything."""
    bypassed: int
    """Requests larger than the memory there was: computed without the cache."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were reused."""
    losses: Losses | None
    """Tokens not reused, by cause; None where the target does not say."""
    seconds: float
    """Prefill time that was spent, with the copies from lower tiers that it waited for."""
    seconds_saved: float
    """Prefill time of an empty cache, less ``seconds``."""
    ttft_s: dict[int, float]
    """Percentiles of the time to first token, waiting included."""
    ttft_mean_s: float
    """Mean time to first token, waiting included."""
    checkpoints_made: int | None
    """Checkpoints that entered the cache; None, here and below, where the target does not say
    (rebuilt peers), which is not 0."""
    written_kv_bytes: int | None
    by_session: tuple[SessionResult, ...]
    """Sessions in the order of their first requests."""
    control_us: float
    """Microseconds per request in the cache's own code, mean. Not reproducible; all else is."""
    moved_slabs: int | None = None
    """Slabs that were emptied for a state. None, here and below, unless the memory is ``moves``."""
    moved_kv_bytes: int | None = None
    """KV that was copied for that."""
    copy_seconds: float = 0.0
    """Seconds of copies from lower tiers, which are part of ``seconds``."""
    tier_bytes: dict[str, int] | None = None
    """Copied between tiers, by ``source_to_destination_bytes``; None where there is one tier."""
    bound_tokens: int | None = None
    """Tokens that an infinite token-granular cache would reuse."""
    optimum_tokens: int | None = None
    """Tokens that the best known plan with hindsight reuses with this memory. It is the optimum
    only if a bound proves it."""
    limit_tokens: int | None = None
    """Tokens that no cache of this memory exceeds (``Optimum.bound``)."""
    by_request: tuple[RequestRecord, ...] | None = None
    """Requests in the order of the trace; None, also below, without the setting ``by_request``."""
    evictions: tuple[EvictionRecord, ...] | None = None
    """Evictions of the device's memory, in their order; None for rebuilt systems too."""
    draws: tuple[RunResult, ...] = ()
    """Runs of the seeds, if these are several; they are not in a record."""

    def __repr__(self) -> str:
        """Return one line: competitor, size and token hit rate. ``as_record`` has all figures."""
        rate = 100 * self.token_hit_rate
        return f"RunResult({self.label}, {self.gib:.4g} GiB: token hit rate {rate:.1f} %)"

    @property
    def interval(self) -> RateInterval:
        """Token hit rate, 0 to 1, with its 95 % interval over sessions; NaN limits for fewer than
        five. Printed in percent."""
        parts = [one.cached_tokens for one in self.by_session]
        return RateInterval(*linear_ratio(parts, [one.prompt_tokens for one in self.by_session]))

    def above(self, other: RunResult) -> Interval:
        """Return this run's token hit rate less that of ``other``, in points, paired by session.
        ValueError if they ran over different sessions."""
        ours, theirs = sorted(self._sums()), sorted(other._sums())
        if [one[:3] for one in ours] != [one[:3] for one in theirs]:
            raise ValueError(f"{self.label} and {other.label} ran over different sessions.")
        parts = [one[3] - two[3] for one, two in zip(ours, theirs, strict=True)]
        return linear_ratio(parts, [one[2] for one in ours]).scaled(100)

    def compare(self, other: RunResult | Optimum) -> Difference:
        """Return the requests in which this run and ``other``, another run over the same trace or a
        plan with hindsight, reused different numbers of tokens, and why. O(requests). ValueError
        without the setting ``by_request``, for several seeds, and over different requests."""
        ours, label, theirs = self.by_request or (), PLAN, list[RequestRecord]()
        if isinstance(other, RunResult):
            label, theirs = other.label, [*(other.by_request or ())]
        else:  # It has the same requests, if as many.
            for one, tokens in zip(ours, other.cached_tokens.tolist(), strict=False):
                theirs.append(RequestRecord(*one[:3], tokens, 0.0, "not kept"))
        if not ours or [one[:3] for one in ours] != [one[:3] for one in theirs]:
            missing = f"{self.label} and {label} have no records of the same requests"
            advice = "with by_request=True and one seed (of several: run.draws[i])"
            raise ValueError(f"{missing}: simulate both at once, {advice}")
        rows, turns = [], Counter[str]()
        for number, (one, two) in enumerate(zip(ours, theirs, strict=True), 1):
            turns[one.session] += 1
            if tokens := one.cached_tokens - two.cached_tokens:
                more, less = (one, two) if tokens > 0 else (two, one)
                turn = turns[one.session] - 1
                facts = number, one.session, turn, one.prompt_tokens, tokens, _reason(less)
                ages = less.lost_age if less.lost else None, more.hit, more.hit_uses
                rows.append(dict(zip(Difference.columns, (*facts, *ages), strict=True)))
        if math.isclose(self.gib, other.gib, rel_tol=SAME_SIZE):
            return Difference(self.label, label, self.gib, self.prompt_tokens, rows)
        mine, its = (f" at {one.gib:.4g} GiB" for one in (self, other))
        return Difference(self.label + mine, label + its, None, self.prompt_tokens, rows)

    def _sums(self) -> list[tuple[str, int, int, int]]:
        return [one[:4] for one in self.by_session]

    @property
    def request_hit_rate(self) -> float:
        """Share of the requests that reused anything, 0 to 1."""
        return self.hits / self.requests if self.requests else 0.0

    @property
    def share_of_bound(self) -> float | None:
        """Share of the tokens of an infinite cache; None if it was not computed."""
        return self.cached_tokens / self.bound_tokens if self.bound_tokens else None

    @property
    def share_of_optimum(self) -> float | None:
        """Share of the tokens of the best known plan. It can be above 1: the plan may be a
        greedy's, keep to a coarser grid than a peer, or count memory that a peer does not."""
        return self.cached_tokens / self.optimum_tokens if self.optimum_tokens else None

    def as_record(self) -> Plain:
        """Return a record for JSON, with the rates next to the counts that they are made of."""
        record = StoredResult.as_record(replace(self, draws=()))
        for name in KEPT:
            if not record[name]:
                del record[name]
        return record | {
            "losses": None if self.losses is None else self.losses._asdict(),
            "token_hit_rate": self.token_hit_rate,
            "request_hit_rate": self.request_hit_rate,
            "share_of_bound": self.share_of_bound,
            "share_of_optimum": self.share_of_optimum,
        }

    def as_row(self) -> Plain:
        """Return settings and figures as one flat dictionary."""
        figures = self.as_record()
        for name in ("config", "losses", "ttft_s", "by_session", "tier_bytes", *KEPT):
            figures.pop(name, None)
        lost = self.losses or (None,) * len(Losses._fields)
        return {
            **self.config,
            **figures,
            "token_hit_rate_low": self.interval.low,
            "token_hit_rate_high": self.interval.high,
            **{f"ttft_p{rank}_s": value for rank, value in self.ttft_s.items()},
            **{f"lost_{cause}": tokens for cause, tokens in zip(Losses._fields, lost, strict=True)},
        }

    @classmethod
    def from_record(cls, record: Plain) -> Self:
        """Return the run of an ``as_record`` after a trip through JSON."""
        values = record.copy()
        values["ttft_s"] = {int(rank): value for rank, value in record["ttft_s"].items()}
        if record["losses"] is not None:
            values["losses"] = Losses(**record["losses"])
        values["by_session"] = tuple(
            SessionResult._make((*figures, None if lost is None else Losses(*lost)))
            for *figures, lost in record["by_session"]
        )
        for name, kind in KEPT.items():
            if name in values:
                values[name] = tuple(map(kind._make, values[name]))
        return super(RunResult, cls).from_record(values)


KEPT: dict[str, Any] = {"by_request": RequestRecord, "evictions": EvictionRecord, "draws": None}
"""Fields that a row of a table does not have, and a record only if they are kept."""


def _reason(less: RequestRecord) -> str:
    """Return why the one of two runs with fewer tokens did not have the others."""
    if less.lost:
        return f"evicted {less.lost}, {'used' if less.lost_uses else 'never used'}"
    return less.cause.replace("_", " ") or "not told"


@dataclass(frozen=True, slots=True, repr=False)
class Difference(Tabular):
    """Requests in which two runs over the same trace reused different numbers of tokens."""

    ours: str
    theirs: str
    gib: float | None
    """Memory of both runs, GiB; None if it differs: ``ours`` and ``theirs`` then end with it."""
    prompt_tokens: int
    """Of all requests."""
    rows: list[Plain]
    """A dictionary per request: its number, its ``generation`` (earlier requests of its session),
    ``tokens`` (above 0 where ``ours`` reused more), the ``reason`` why the other one did not have
    them with the requests since the eviction (``lost_age``), and the checkpoint that was hit."""
    columns: ClassVar = (
        *("request", "session", "generation", "prompt_tokens", "tokens", "reason"),
        *("lost_age", "hit", "hit_uses"),
    )

    def to_dicts(self) -> list[Plain]:
        return self.rows

    @property
    def title(self) -> str:
        """Line with the two runs, the size and the difference of their token hit rates."""
        share = f"{100 * sum(row['tokens'] for row in self.rows) / self.prompt_tokens:+.2f} points"
        size = "" if self.gib is None else f" at {self.gib:.4g} GiB"
        return f"{self.ours} less {self.theirs}{size}: {share}"

    def by_reason(self, key: str = "reason") -> dict[str, list[Plain]]:
        """Return the rows by the run with fewer tokens, and why it did not have the others, or by
        another column."""
        found: dict[str, list[Plain]] = {}
        for row in self.rows:
            name = self.theirs if row["tokens"] > 0 else self.ours
            word = row["reason"] if key == "reason" else f"{key} {row[key]}"
            found.setdefault(f"{name}: {word}", []).append(row)
        return dict(sorted(found.items(), key=lambda one: -sum(row["tokens"] for row in one[1])))

    def table(self, by: str = "reason") -> str:
        """Return a row per reason and checkpoint that was hit, most tokens won first. The last
        column has the median of the requests since the eviction. ``by`` is the column that takes
        the place of the reason, such as ``generation``; ValueError for another word."""
        if by not in self.columns:
            raise ValueError(f"by must be one of {', '.join(self.columns)} (got {by!r})")
        lines = []
        for reason, of_reason in self.by_reason(by).items():
            for hit in dict.fromkeys(row["hit"] for row in of_reason):
                rows = [row for row in of_reason if row["hit"] == hit]
                ages = [row["lost_age"] for row in rows if row["lost_age"] is not None]
                tokens = sum(row["tokens"] for row in rows)
                points = f"{100 * tokens / self.prompt_tokens:+.2f}"
                counts = f"{tokens:+,}", points, f"{len(rows):,}"
                lines.append([reason, hit or "-", *counts, f"{median(ages):.0f}" if ages else "-"])
        header = ["the run with fewer", "the other resumed from", "tokens", "points", "requests"]
        return f"{self.title}\n{text_table([*header, 'evicted before'], lines)}"


def merged(runs: Sequence[RunResult], seeds: Sequence[int]) -> RunResult:
    """Return one run for those of several draws of a trace. Counts are summed, times averaged; each
    draw is one unit of its intervals, which so contain the chance of the arrivals."""
    first = runs[0]
    counts: Plain = {}
    for name in SUMMED:
        values = [getattr(run, name) for run in runs]
        counts[name] = None if None in values else sum(values)
    ranks = {rank: fmean(run.ttft_s[rank] for run in runs) for rank in first.ttft_s}
    bytes_of = [run.tier_bytes for run in runs if run.tier_bytes is not None]
    losses = [run.losses for run in runs if run.losses is not None]
    return replace(
        first,
        config=first.config | {"seeds": list(seeds)},
        draws=tuple(runs),
        by_request=None,
        evictions=None,
        losses=Losses(*map(sum, zip(*losses, strict=True))) if losses else None,
        ttft_s=ranks,
        ttft_mean_s=fmean(run.ttft_mean_s for run in runs),
        control_us=fmean(run.control_us for run in runs),
        tier_bytes={name: sum(of[name] for of in bytes_of) for name in bytes_of[0]}
        if bytes_of
        else None,
        by_session=tuple(
            SessionResult(
                f"seed {seed}", run.requests, run.prompt_tokens, run.cached_tokens, run.losses
            )
            for seed, run in zip(seeds, runs, strict=True)
        ),
        **counts,
    )


def grouped(runs: Sequence[RunResult], trace: Trace) -> tuple[tuple[RunResult, ...], bool]:
    """Return runs whose intervals are over groups of requests (``groups_of``), and True; unchanged
    runs and False if the trace names a session. O(tokens)."""
    names = [one.session for run in runs[:1] for one in run.by_session]
    if not names or has_sessions(names, runs[0].requests):
        return tuple(runs), False
    groups = groups_of(trace)
    found = []
    for run in runs:
        sums: dict[int, list[SessionResult]] = {}
        for one in run.by_session:
            sums.setdefault(groups[one.session], []).append(one)
        by_group = []
        for number, of in sums.items():
            losses = [one.losses for one in of if one.losses is not None]
            requests, prompt, cached = (
                sum(column) for column in zip(*(one[1:4] for one in of), strict=True)
            )
            total = Losses(*map(sum, zip(*losses, strict=True))) if losses else None
            by_group.append(SessionResult(f"group {number}", requests, prompt, cached, total))
        found.append(replace(run, by_session=tuple(by_group)))
    return tuple(found), True


GROUP_STEP = 64
"""Tokens, or a block if it is longer, in which prompts are compared."""


def groups_of(trace: Trace) -> dict[str, int]:
    """Return a number of each request's group by its session, which has one request. A request is
    in the group of the first one that shares at least half of its prompt. O(tokens)."""
    step = max(1, GROUP_STEP // trace.unit)
    seen: dict[int, int] = {}
    found: dict[str, int] = {}
    for number, request in enumerate(trace):
        whole = np.concatenate((request.tokens, request.output))
        digests, last = list[int](), hash(request.namespace)
        for end in range(step, len(whole) + 1, step):
            last = hash((last, whole[end - step : end].tobytes()))
            digests.append(last)
        half = -(-len(request.tokens) // (2 * step))
        group = seen.get(digests[half - 1], number) if half <= len(digests) else number
        found[str(request.session)] = group
        for digest in digests:
            seen.setdefault(digest, group)
    return found


SUMMED = (
    *("requests", "hits", "bypassed", "prompt_tokens", "cached_tokens", "seconds"),
    *("seconds_saved", "checkpoints_made", "written_kv_bytes", "moved_slabs", "moved_kv_bytes"),
    *("copy_seconds", "bound_tokens", "optimum_tokens", "limit_tokens"),
)
"""Fields of a run that ``merged`` adds."""


@dataclass(frozen=True, slots=True)
class ClosedLoopRun(_Run):
    """Figures of one run in closed loop. Times in seconds."""

    trace_name: str
    admission: str
    rate: float
    seed: int
    num_requests: int
    num_refused: int
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were reused."""
    lost_tokens: int | None
    """Prompt tokens computed again because they, or a checkpoint after them, were evicted; None for
    a rebuilt peer, which does not say."""
    ttft_mean_s: float
    """Mean time to first token, waiting included."""
    ttft_p50_s: float
    ttft_p99_s: float
    oldest_wait_s: float
    """Longest time from arrival to admission."""
    limit_s: float
    """Time to first token up to which an answer counts for ``goodput``."""
    goodput: float
    """Requests a second that were answered in time."""
    makespan_s: float
    """Time from the start of the simulated clock to the last answer."""
    live_mean: float
    """Sessions between their first request and their last answer, over time."""
    live_most: int
    """Largest number of such sessions."""
    token_budget: int
    tells_ends: bool
    """True if clients say when a session has ended."""
    config: Plain

    def as_record(self) -> Plain:
        derived = {"trace": self.config["trace"], "token_hit_rate": self.token_hit_rate}
        return StoredResult.as_record(self) | derived

    def as_row(self) -> Plain:
        """Return settings and figures as one flat dictionary."""
        figures = self.as_record()
        return figures.pop("config") | figures  # type: ignore[no-any-return]


class Runs(Tabular):
    """Runs that can be iterated, counted, named and tabulated."""

    __slots__ = ()
    runs: tuple[Any, ...]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, place: int | slice | str) -> Any:
        """Return the run at a place, or the list of those with a label. KeyError for a label that
        no run has."""
        if not isinstance(place, str):
            return self.runs[place]
        labels = dict.fromkeys(run.label for run in self.runs)
        if place not in labels:
            raise KeyError(f"no run is labelled {place!r}{or_known(place, labels)}")
        return [run for run in self.runs if run.label == place]

    def to_dicts(self) -> list[Plain]:
        """Return a flat dictionary per run that did not fail: its settings and figures. Replays
        have lost tokens by cause (``lost_`` and the cause; None where a rebuilt system does not
        tell). ``draws`` of a run have those of its seeds."""
        return [run.as_row() for run in self.runs]

    def labelled(self, names: Mapping[str, str]) -> Self:
        """Return the same runs with other labels in tables and figures: old label to new, and in
        closed loop also old admission policy to new. ValueError for a label that no run has, and if
        two competitors get one label."""
        loops = [run.admission for run in self.runs if isinstance(run, ClosedLoopRun)]
        labels = dict.fromkeys([*(run.label for run in self.runs), *loops])
        if unknown := [name for name in names if name not in labels]:
            raise ValueError(f"no run is labelled {unknown[0]!r}{or_known(unknown[0], labels)}")
        for name, count in Counter(names.get(label, label) for label in labels).items():
            if count > 1:
                raise ValueError(f"{count} competitors would be labelled {name!r}: use other names")
        configs = [run.config | {"label": names.get(run.label, run.label)} for run in self.runs]
        runs = [replace(run, config=of) for run, of in zip(self.runs, configs, strict=True)]
        if loops:
            runs = [replace(run, admission=names.get(run.admission, run.admission)) for run in runs]
        return replace(self, runs=tuple(runs))  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class SweepRuns(Runs):
    """All runs of one sweep over one trace, by competitor and size."""

    trace: str
    geometry: ModelGeometry
    runs: tuple[RunResult, ...]
    bound_rate: float | None
    """Token hit rate of an infinite token-granular cache; None where it was not asked for."""
    times: str = ""
    """Source of the prefill times: the assumed machine or the measured file. Empty for times of a
    user's own model."""
    trace_notes: Sequence[str] = ()
    failures: tuple[str, ...] = ()
    """A sentence per run that failed, because of its policy. It is not among ``runs``."""
    working_set_bytes: int = 0
    """Bytes of all that a cache could keep, if sizes were given as shares of them; else 0."""
    units: str = "session"
    """Units of the intervals: ``session``, ``seed``, or ``group`` of requests without sessions."""
    drawn_once: str = ""
    """Part of the trace that is drawn, and of which the runs have one draw; else empty."""

    def by_label(self) -> dict[str, list[RunResult]]:
        """Runs of each competitor, by size."""
        found: dict[str, list[RunResult]] = {}
        for run in self.runs:
            found.setdefault(run.label, []).append(run)
        return found

    def best(self, gib: float) -> RunResult:
        """Return the run of highest token hit rate at the size ``gib``, to three digits or more.
        ValueError, which names the sizes, for another."""
        near = [run for run in self.runs if math.isclose(run.gib, gib, rel_tol=SAME_SIZE)]
        if not near:
            known = ", ".join(f"{size:.4g}" for size in sorted({run.gib for run in self.runs}))
            raise ValueError(f"gib must be a simulated size: {known} (got {gib:g}).")
        return max(near, key=lambda run: run.token_hit_rate)
