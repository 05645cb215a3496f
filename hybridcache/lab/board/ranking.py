"""Boards: policies next to built-in ones, rebuilt systems and bounds, on the cells of a split.

A cell is one trace. Each system replays it at several sizes, in one arena and perhaps in two pools,
and may serve its sessions in closed loop. A split is a TOML file: cells, sizes, seeds and machine.
Two are packaged: ``evaluation`` for all built-in policies, and the frozen ``benchmark``, whose data
have published hashes. Own policies run in other processes (``entry``), and the board counts their
hits.

>>> split = Split("tiny", "qwen3-next", (0, 1, 2), (Cell("short?head=20", (1.0,)),))
>>> [row.name for row in board(split=split, built_in=("lru", "fifo")).rows()]
['(plan)', '(upper bound)', 'lru', 'fifo']
"""

from __future__ import annotations

import hashlib
import json
import secrets
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from hybridcache.command.extras import version
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.geometry.units import GIB, counted
from hybridcache.lab.board.entry import (
    CONFINING,
    UNCONFINED,
    RelayedLoop,
    entered,
    landlock_version,
)
from hybridcache.lab.results.result import ClosedLoopRun, Plain, RunResult, StoredResult, text_table
from hybridcache.lab.rivals.evictions import ALL_NAMES
from hybridcache.lab.rivals.systems import BASELINES, COMPARABLE
from hybridcache.lab.runs.closed_loop import figures_of, sessions_of, simulate_closed_loop
from hybridcache.lab.runs.grid import identity_of, run_grid
from hybridcache.lab.runs.simulate import optimum, run_cell
from hybridcache.lab.scenario import Scenario, named_policies, sources_of, written_policy
from hybridcache.lab.traces import open_trace, seeded
from hybridcache.lab.traces.arrivals import interleave, parse_starts
from hybridcache.lab.traces.frame import written
from hybridcache.lab.traces.intervals import FEWEST_UNITS, Interval, interval, paired
from hybridcache.lab.traces.progress import Progress
from hybridcache.lab.traces.trace import Held, Tabular, Trace, TraceRequest, by_session
from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT, EvictionSpec
from hybridcache.radix.tokens import Tokens

BUILT_IN = tuple(sorted(ALL_NAMES))
"""Eviction policies of a split that names none, each with the default placement."""
PACKAGED = {"evaluation": "evaluation.toml", "benchmark": "benchmark_v4.toml"}
PLAN, LIMIT, BEST_REBUILT = "(plan)", "(upper bound)", "(best rebuilt of each cell)"
"""Rows of a plan that knows the future, of the bound, and of the best rebuilt systems."""
LOST = 0.1
"""Points below the reference from which on a cell counts as lost."""
ROUNDING = 1e-9
NEAR = 8
"""Sessions among which one changes its place, so that phases of a trace stay."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One trace of a split."""

    name: str
    sizes: str | tuple[float, ...]
    """Sizes of the replays, as in ``Scenario.gib``."""
    trace: str = ""
    """Its specification; the name if empty."""
    loops: tuple[tuple[float | str, float], ...] = ()
    """Closed loops: (size, sessions per second)."""
    sha256: tuple[str, ...] = ()
    """First 16 digits of ``data_hash``: one per seed of a generator, or one of a file; none if the
    data may change."""
    starts: str = ""
    """Arrivals of sessions that each seed draws; the file's own times if empty."""
    source: str = ""
    """Origin of a file that is not part of the package."""

    @property
    def spec(self) -> str:
        """Specification of the trace."""
        return self.trace or self.name

    @property
    def arrivals(self) -> str:
        """Origin of the times of requests."""
        if self.starts:
            return f"drawn: sessions {self.starts}, times within sessions as in the file"
        generated = len(self.sha256) > 1
        return "drawn by the generator" if generated else "as in the file, or drawn by its reader"


@dataclass(frozen=True, slots=True)
class Split:
    """Cells, seeds and machine on which policies are compared."""

    name: str
    """Version of a frozen split."""
    model: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    policies: tuple[str, ...] = BUILT_IN
    """Policies next to which an entry is ranked."""
    rebuilt: tuple[str, ...] = ()
    reference: str = ""
    """Policy to which the others are compared; the default eviction, or the first, if empty."""
    ranked_by: str = "closed loop"
    """``closed loop``, or ``replay``: hits that decide the order. Replays, if there are no
    loops."""
    quick: tuple[str, ...] = ()
    """Cells of the quick subset."""
    kv_share: float = 0.0
    """Share of the KV in two pools; 0: replays in one arena alone."""
    ttft_limit_s: float = 2.0
    max_running: int = 16
    disguises: bool = False
    """True if each size has other ids, and its sessions another order (``disguised``)."""
    machine: Mapping[str, float] = field(default_factory=dict)
    """Arguments of ``Roofline``; the default machine if empty."""

    def __post_init__(self) -> None:
        """Raise ValueError for values that a scenario refuses, and for settings of no use."""
        if not isinstance(self.seeds, tuple):
            raise ValueError(f"seeds must be a list (got {self.seeds!r})")
        if not self.cells or not self.seeds:
            raise ValueError("there are no seeds, or no cells")
        if self.ranked_by not in ("closed loop", "replay"):
            raise ValueError(f"ranked_by must be closed loop or replay (got {self.ranked_by!r})")
        for cell in self.cells:
            Scenario(cell.spec, model=self.model, gib=cell.sizes, seeds=self.seeds)
            for size, rate in cell.loops:
                Scenario(cell.spec, gib=size, rate=rate)

    @classmethod
    def load(cls, path: str | Path = "evaluation") -> Split:
        """Read a packaged split by its name, or a TOML file of its form. ValueError if a field is
        missing, unknown or wrong."""
        packaged = PACKAGED.get(str(path))
        source = resources.files(__package__) / packaged if packaged else Path(path)
        try:
            read = tomllib.loads(source.read_text(encoding="utf-8"))
            hashes = read.pop("sha256", {})
            usual = {"sizes": read.pop("sizes")} if "sizes" in read else {}
            read["cells"] = [
                {"name": name, "sha256": hashes.get(name, [])} | usual | one
                for name, one in read.pop("cells").items()
            ]
            return cls.of({"name": str(path)} | read)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            fault = str(error).removeprefix(f"{cls.__name__}.__init__() ")
            fault += " is missing" if isinstance(error, KeyError) else ""
            raise ValueError(f"{path}: {fault}") from None

    @classmethod
    def of(cls, record: Plain) -> Split:
        """Return the split of an ``asdict`` after a trip through JSON."""
        values = _tuples(record)
        cells = list[Cell]()
        for one in values["cells"]:
            sizes = one["sizes"] if isinstance(one["sizes"], str) else (*one["sizes"],)
            cells.append(Cell(**one | {"sizes": sizes}))
        return cls(**values | {"cells": tuple(cells)})

    def subset(self, is_quick: bool = False, num_seeds: int | None = None) -> Split:
        """Return the quick subset, or the first seeds. ValueError for a wrong number of seeds."""
        if num_seeds is not None and not 1 <= num_seeds <= len(self.seeds):
            raise ValueError(
                f"seeds must be from 1 to {len(self.seeds)}, the seeds of the split (got "
                f"{num_seeds})."
            )
        found = replace(self, seeds=self.seeds[: 1 if is_quick else num_seeds])
        cells = tuple(cell for cell in self.cells if cell.name in self.quick)
        return replace(found, cells=cells) if is_quick and self.quick else found

    def times(self) -> Roofline | None:
        """Return the times of the machine, or None for those of a scenario."""
        if not self.machine:
            return None
        return Roofline(ModelGeometry.load(self.model), **self.machine)  # type: ignore[arg-type]


def _tuples(value: Any) -> Any:
    """Return a value of JSON with tuples in place of lists."""
    if isinstance(value, dict):
        return {name: _tuples(one) for name, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# --- Data -----------------------------------------------------------------------------------------


def data_hash(requests: Iterable[TraceRequest]) -> str:
    """Return the SHA-256 of all ids, sessions, boundaries and times (in milliseconds), in
    hexadecimal digits. O(tokens).

    >>> data_hash([])[:16]
    'e3b0c44298fc1c14'
    """
    digest = hashlib.sha256()
    for one in requests:
        head = (f"{one.timestamp_s:.3f}", str(one.session), str(one.namespace), one.boundaries)
        tail = (one.answer_survives, one.stop_reason, len(one.tokens), len(one.output))
        digest.update(repr((*head, *tail)).encode())
        for ids in (one.tokens, one.output):
            digest.update(np.ascontiguousarray(ids, "<i4").tobytes())
    return digest.hexdigest()


def _found(spec: str, folder: Path | None) -> str | None:
    """Return the specification of a file in ``folder``, also with the ending ``.gz``, or None."""
    name, mark, options = spec.partition("?")
    paths = [] if folder is None else [folder / name, folder / f"{name}.gz"]
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else f"{path}{mark}{options}"


@lru_cache(maxsize=1)
def drawn(cell: Cell, place: int, seed: int, folder: Path | None) -> Trace:
    """Return the trace of a cell with the seed at ``place``. ValueError if its data are not those
    of the split; FileNotFoundError if the file is missing."""
    spec: str | None = cell.spec
    if cell.source:
        spec = _found(cell.spec, folder)
        if spec is None:
            raise FileNotFoundError(f"{cell.name}: {_missing(cell, folder)}")
    trace = open_trace(seeded(str(spec), seed)).kept()
    if cell.sha256:
        is_generated = len(cell.sha256) > 1
        found, wanted = data_hash(trace)[:16], cell.sha256[place if is_generated else 0]
        if found != wanted:
            cause = f"numpy {np.__version__} draws other numbers"
            raise ValueError(
                f"{cell.name}, seed {seed}: its data have the hash {found}, and those of the "
                f"benchmark {wanted}: {cause if is_generated else 'another file'}; see the page on "
                "the benchmark"
            )
    if not cell.starts:
        return replace(trace, name=cell.name)
    source = partial(_restarted, trace, cell.starts, seed)
    return replace(trace, name=cell.name, source=source).kept()


def disguised(trace: Trace, seed: int, place: int) -> Trace:
    """Return ``trace`` with other ids, each for the same former one, and with its sessions in
    another order: each begins when another one of the ``NEAR`` around it did.

    So an entry that kept the requests of one size, or draws the trace again, finds none of its ids.
    The ids are drawn anew in each call, and change no hit. O(tokens).
    """
    rng, held = np.random.default_rng((seed, place)), by_session(trace.in_order())
    factor, added = 2 * secrets.randbelow(1 << 30) + 1, secrets.randbelow(1 << 31)

    def renamed(ids: Tokens) -> Tokens:
        return ((ids.astype(np.int64) * factor + added) % (1 << 31)).astype(np.int32)

    found = list[TraceRequest]()
    order = np.argsort(np.arange(len(held)) + rng.uniform(0, NEAR, len(held)), kind="stable")
    for at, number in enumerate(order.tolist()):
        later_s = held[at][0].timestamp_s - held[number][0].timestamp_s
        for one in held[number]:
            ids = {"tokens": renamed(one.tokens), "output": renamed(one.output)}
            found.append(one._replace(timestamp_s=one.timestamp_s + later_s, **ids))
    found.sort(key=lambda one: one.timestamp_s)
    return replace(trace, source=Held(tuple(found)))


def _missing(cell: Cell, folder: Path | None) -> str:
    name = cell.spec.partition("?")[0]
    return f"no file {name} in {folder or 'the folder of --data'}; source: {cell.source}"


def _restarted(trace: Trace, starts: str, seed: int) -> Iterator[TraceRequest]:
    """Yield the requests of a trace whose sessions begin at times drawn with ``seed``."""
    return interleave(by_session(trace), parse_starts(starts), unit=trace.unit, seed=seed)


# --- Runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured(StoredResult):
    """Figures of one system on one cell with one seed. Lists have a number per size, or per closed
    loop; rates are from 0 to 1, times in seconds."""

    cell: str
    seed: int
    system: str
    gib: list[float]
    states: list[float]
    """Sizes in states: bytes of the memory by those of one state."""
    replay: list[float]
    """Token hit rates of the replay in one arena, or in the memory of a rebuilt system."""
    replay_ttft_s: dict[str, list[float]] = field(default_factory=dict)
    """Percentiles of the time to first token, one server."""
    pools: list[float] = field(default_factory=list)
    """Token hit rates in two pools; empty for rebuilt systems, which divide memory themselves."""
    bound: list[float] = field(default_factory=list)
    """Upper bound of the replay, of the plan alone."""
    is_rebuilt: bool = False
    """True for a rebuilt system of another engine, False for a policy."""
    loops: list[dict[str, float]] = field(default_factory=list)
    """Closed loops: token hit rate, times to first token, ``in_time`` (share of the requests with a
    first token within the limit), and ``goodput``: those per second."""


@dataclass(frozen=True, slots=True)
class Job:
    """One system on one cell with one seed."""

    split: Split
    cell: Cell
    place: int
    system: str
    folder: Path | None
    is_rebuilt: bool = False
    """True if ``system`` names a rebuilt system, False if it names a policy."""

    @property
    def seed(self) -> int:
        """Seed of texts and arrivals."""
        return self.split.seeds[self.place]

    @property
    def title(self) -> str:
        """Name of the job in errors."""
        return f"{self.system} on {self.cell.name}, seed {self.seed}"

    def key(self, _trace_identity: bytes) -> str:
        """Return an identity of the job, the version, the data, and the sources of own policies."""
        none = replace(self.split, cells=(self.cell,), seeds=(self.seed,), quick=(), policies=())
        geometry = ModelGeometry.load(self.split.model)
        facts = (replace(none, rebuilt=()), self.system, self.is_rebuilt, version(), geometry)
        own = "" if self.is_rebuilt else sources_of(self.system.split("@"))
        data = b""
        if not self.cell.sha256 and not self.cell.source:
            data = identity_of(open_trace(self.cell.spec))
        return hashlib.sha256(repr((facts, own)).encode() + data).hexdigest()[:16]


def run_job(_trace: Trace, job: Job) -> Measured:
    """Replay and serve one cell with one system. O(requests * sizes)."""
    split, cell = job.split, job.cell
    trace = drawn(cell, job.place, job.seed, job.folder)
    base = Scenario(trace, model=split.model, gib=cell.sizes)
    geometry = base.geometry()

    def measured(gib: Sequence[float], rates: Sequence[float]) -> Measured:
        states = [round(size * GIB / max(1, geometry.state_bytes), 1) for size in gib]
        named = cell.name, job.seed, job.system
        return Measured(*named, [*gib], states, [*rates], is_rebuilt=job.is_rebuilt)

    if job.system == PLAN:
        plans = [
            plan
            for place, one in enumerate(_cells_of(base, trace))
            for plan in optimum(replace(one, trace=_shown(job, trace, place)), progress=False)
        ]
        found = measured([plan.gib for plan in plans], [plan.reached for plan in plans])
        return replace(found, bound=[plan.bound for plan in plans])
    if job.is_rebuilt:
        base = replace(base, policy=(), baseline=job.system)
    else:
        eviction, _, placement = job.system.partition("@")
        base = replace(base, policy=eviction, checkpoints=placement or DEFAULT_PLACEMENT)
    base = replace(base, times=split.times())
    runs = _replayed(base, trace, job)
    pools: Sequence[RunResult] = ()
    if split.kv_share and not job.is_rebuilt:
        pools = _replayed(replace(base, memory="pools", kv_share=split.kv_share), trace, job)
    served = replace(
        base,
        ttft_limit_s=split.ttft_limit_s,
        max_running=split.max_running,
        admission="arrival" if job.is_rebuilt else "sessions",
        seeds=(job.seed,),
    )
    found = measured([run.gib for run in runs], [run.token_hit_rate for run in runs])
    return replace(
        found,
        replay_ttft_s={f"p{rank}": [run.ttft_s[rank] for run in runs] for rank in (50, 95, 99)},
        pools=[run.token_hit_rate for run in pools],
        loops=[
            _loop_figures(run)
            for size, rate in cell.loops
            for run in _served(replace(served, gib=size, rate=rate), trace)
        ],
    )


def _cells_of(scenario: Scenario, trace: Trace) -> list[Scenario]:
    """Return a scenario per size, with the system's name in place of a list of policies."""
    points, _ = scenario.points(trace, max(scenario.page_size, trace.unit))
    geometry = scenario.geometry()
    one = replace(scenario, trace=trace.full_name, model=geometry, state_dtype=None)
    return [replace(one, gib=size, baseline=scenario.baseline or ()) for size in points]


def _shown(job: Job, trace: Trace, place: int) -> Trace:
    """Return the trace as it is replayed at the size at ``place``."""
    return disguised(trace, job.seed, place) if job.split.disguises else trace


def _replayed(scenario: Scenario, trace: Trace, job: Job) -> list[RunResult]:
    """Replay the trace at every size."""
    found = []
    for place, cell in enumerate(_cells_of(scenario, trace)):
        with entered(_shown(job, trace, place), cell) as (requests, own, _):
            found.append(run_cell(requests, own))
    return found


def _served(scenario: Scenario, trace: Trace) -> Iterator[ClosedLoopRun]:
    """Serve the sessions of the trace."""
    for cell in _cells_of(scenario, trace):
        sessions = sessions_of(trace)
        with entered(trace, cell, len(sessions)) as (_, own, entry):
            if entry is None:
                served = simulate_closed_loop(trace, own)
            else:
                served = RelayedLoop(own, sessions)
                served.entry = entry
                served.run()
        yield figures_of(served, trace, cell)


def _loop_figures(run: ClosedLoopRun) -> dict[str, float]:
    asked = run.num_requests + run.num_refused
    own = "gib", "rate", "token_hit_rate", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "goodput"
    found: dict[str, float] = {name: getattr(run, name) for name in own}
    in_time = run.goodput * run.makespan_s / asked
    return found | {"in_time": in_time, "refused": run.num_refused}


def board(
    policies: EvictionSpec | Sequence[EvictionSpec] = (),
    split: Split | str | Path = "evaluation",
    *,
    built_in: Sequence[str] | None = None,
    quick: bool = False,
    seeds: int | None = None,
    data: str | Path | None = None,
    processes: int = 1,
    resume_from: str | Path | None = None,
    progress: Progress = None,
) -> Board:
    """Run ``policies``, and those of a split, on its cells.

    Args:
        policies: ``eviction`` or ``eviction@placement``; own ones as classes or ``module:Class``.
        split: a split, the name of a packaged one (``evaluation``, ``benchmark``), or a TOML file.
        built_in: policies in place of those of the split.
        quick: only the quick cells of the split, with one seed.
        seeds: number of the first seeds to use; None for all.
        data: folder of the files that are not part of the package. Cells of missing ones are left
            out, and named in the result.
        processes, resume_from, progress: as in ``simulate``, for jobs in place of runs.

    Raises ValueError if data differ from those of the split, if a policy or a trace is unknown, if
    a policy fails or has no name, if there is none, and if a rate is above the bound.
    """
    asked = split if isinstance(split, Split) else Split.load(split)
    asked = asked.subset(quick, seeds)
    folder = None if data is None else Path(data)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"data: there is no folder {folder}")
    for cell in asked.cells:
        is_free = not (cell.source or cell.sha256 or cell.starts)
        if is_free and len(asked.seeds) > 1 and seeded(cell.spec, 0) == cell.spec:
            raise ValueError(
                f"{cell.spec} is a single draw: give one seed, and compare by sessions"
            )
    left_out = {
        cell.name: _missing(cell, folder)
        for cell in asked.cells
        if cell.source and _found(cell.spec, folder) is None
    }
    own = asked.policies if built_in is None else built_in
    known = {one.removesuffix(f"@{DEFAULT_PLACEMENT}"): one for one in asked.policies}
    named = (one for given in (policies, own) for one in named_policies(given, split=True))
    written = (known.get(one, one) for one in map(written_policy, named))
    # A rebuilt system may have the name of a policy, and each row its own name.
    names = tuple(
        dict.fromkeys(f"{one}@{DEFAULT_PLACEMENT}" if one in BASELINES else one for one in written)
    )
    if not names:
        raise ValueError("nothing to compare: name a policy, or keep the built-in ones")
    reference = asked.reference if asked.reference in names else ""
    first = DEFAULT_EVICTION if DEFAULT_EVICTION in names else names[0]
    asked = replace(asked, policies=names, reference=reference or first)
    systems = [(name, False) for name in (PLAN, *names)] + [(name, True) for name in asked.rebuilt]
    jobs = [
        Job(asked, cell, place, system, folder, is_rebuilt)
        for place, cell in product(range(len(asked.seeds)), asked.cells)
        if cell.name not in left_out
        for system, is_rebuilt in systems
    ]
    drawn.cache_clear()  # Files may have changed.
    runs, failures = run_grid(
        Trace("board", 1, tuple),
        jobs,
        run_job,
        processes=processes,
        resume_from=resume_from,
        kind=Measured,
        progress=progress,
    )
    if failures:
        raise ValueError(failures[0])
    notes = [UNCONFINED] if landlock_version() < CONFINING else []
    notes += [
        f"{cell.spec}: {note}"
        for cell in asked.cells
        if not cell.source
        for note in open_trace(cell.spec).notes
    ]
    found = Board(asked, runs, left_out, tuple(notes), is_quick=quick)
    found.check()
    return found


# --- Ranking --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One system on the board; figures are in percent or points, if they are no ratio. None where
    a system, or the split, has none."""

    name: str
    hit_rate: Interval
    """Token hit rate of the replays: mean over cells and sizes."""
    difference: Interval
    """To the reference, paired by seed."""
    worst: tuple[float, str] | None
    """Smallest difference of a cell and size to the reference, in one of both memories."""
    lost: tuple[int, int] | None
    """Number of cells and sizes that are more than ``LOST`` points below the reference, and of
    all."""
    of_plan: Interval | None
    """Mean share of the plan."""
    of_bound: Interval | None
    pools: Interval | None = None
    served: Interval | None = None
    """Token hit rate in closed loop."""
    served_difference: Interval | None = None
    ttft_ratio: Interval | None = None
    """Mean time to first token in closed loop, relative to the reference: geometric mean over
    loops."""
    ttft_p99_s: float | None = None
    in_time: Interval | None = None

    def cells(self) -> list[str]:
        """Return the columns of the table; ``-`` for an absent figure."""
        shown: list[tuple[object, str]] = [(self.hit_rate, ".1f"), (self.difference, ".1f")]
        worst = None if self.worst is None else f"{self.worst[0]:.1f} ({self.worst[1]})"
        lost = None if self.lost is None else "{} of {}".format(*self.lost)
        shown += [(worst, ""), (lost, ""), (self.of_plan, ".1f"), (self.of_bound, ".1f")]
        shown += [(self.pools, ".1f"), (self.served, ".1f"), (self.served_difference, ".1f")]
        shown += [(self.ttft_ratio, ".2f"), (self.ttft_p99_s, ".3g"), (self.in_time, ".1f")]
        return [self.name, *("-" if one is None else format(one, spec) for one, spec in shown)]


Read = Callable[[Measured], list[float]]


@dataclass(frozen=True, slots=True)
class Board(Tabular):
    """Figures of several systems on the same cells and seeds."""

    split: Split
    """The cells and seeds that were asked for, and the policies that ran."""
    runs: tuple[Measured, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Reasons of the cells that were not run."""
    notes: tuple[str, ...] = ()
    """Tokenizers and drawn arrivals of the traces."""
    is_quick: bool = False

    def check(self) -> None:
        """Raise ValueError if a system hits more than the bound, which no cache exceeds."""
        limits = {
            (run.cell, run.seed): dict(zip(run.gib, run.bound, strict=True))
            for run in self.runs
            if run.bound
        }
        for run in self.runs:
            if run.is_rebuilt and run.system not in COMPARABLE:
                continue  # LightLLM's host memory is not counted.
            bound = limits.get((run.cell, run.seed), {})
            for memory, rates in (("replay", run.replay), ("pools", run.pools)):
                for size, rate in zip(run.gib, rates, strict=False):
                    if not 0 <= rate <= bound.get(size, 1.0) + ROUNDING:
                        raise ValueError(
                            f"{run.system} on {run.cell}, seed {run.seed}, {size:.3g} GiB "
                            f"({memory}): a token hit rate of {100 * rate:.2f} % is above the "
                            f"bound of {100 * bound.get(size, 1.0):.2f} %, which no cache exceeds: "
                            "the figure was not measured"
                        )

    # --- Files ------------------------------------------------------------------------------------

    def write(self, path: str | Path) -> None:
        """Write one JSON file."""
        facts = asdict(self.split) | {"hybridcache": version(), "numpy": np.__version__}
        for cell, record in zip(self.split.cells, facts["cells"], strict=True):
            record["arrivals"] = cell.arrivals
        scores = {
            row.name: dict(zip(HEADS[1:], row.cells()[1:], strict=True)) for row in self.rows()
        }
        record = {
            **{"benchmark": self.split.name, "quick": self.is_quick, "facts": facts},
            **{"left_out": self.left_out, "notes": self.notes},
            **{"scores": scores, "runs": [run.as_record() for run in self.runs]},
        }
        with written(Path(path)) as file:
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, *paths: str | Path) -> Board:
        """Read files of ``write``; systems that only later files have are added. If an own
        policy has other figures in a later file, as two named ``mine:Policy`` do, the file's name
        is added to its name. ValueError if a file has another form, other cells or seeds than the
        first, or a rate above the bound."""
        found: list[Board] = []
        names = {one.name for one in fields(Split)}
        for path in paths:
            try:
                record = json.loads(Path(path).read_text(encoding="utf-8"))
                facts = {name: one for name, one in record["facts"].items() if name in names}
                for cell in facts["cells"]:
                    del cell["arrivals"]
                runs = tuple(map(Measured.from_record, record["runs"]))
                own = cls(Split.of(facts), runs, record["left_out"], tuple(record["notes"]),
                          record["quick"])  # fmt: skip
                own.check()
                found.append(own)
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{path}: not a result of hybridcache benchmark: {error}"
                ) from None
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            if found[-1]._place() != found[0]._place():
                raise ValueError(f"{path}: its cells, seeds or data are not those of {paths[0]}")
        by_system: dict[str, list[Measured]] = {}
        for path, one in zip(paths, found, strict=True):
            for system in one.systems:
                of = [run for run in one.runs if run.system == system]
                if by_system.setdefault(system, of) != of and ":" in system:
                    name = f"{system} ({path})"
                    by_system[name] = [replace(run, system=name) for run in of]
        runs = tuple(run for of in by_system.values() for run in of)
        entries = [system for system in by_system if ":" in system]
        read = f"read from files, not run here: {', '.join(entries)}"
        return replace(found[0], runs=runs, notes=(*found[0].notes, *[read] * bool(entries)))

    def _place(self) -> tuple[object, ...]:
        split = replace(self.split, policies=(), rebuilt=(), reference="")
        return split, sorted(self.left_out)

    # --- Figures ----------------------------------------------------------------------------------

    @property
    def systems(self) -> list[str]:
        """Names of all systems, in the order of the runs."""
        return list(dict.fromkeys(run.system for run in self.runs))

    @property
    def rebuilt(self) -> set[str]:
        """Names of the rebuilt systems."""
        return {run.system for run in self.runs if run.is_rebuilt}

    def matrix(self, system: str, read: Read) -> np.ndarray | None:
        """Return numbers [seeds, cells], or None if a run of the system has none."""
        rows: dict[int, list[float]] = {}
        for run in self.runs:
            if run.system == system:
                rows.setdefault(run.seed, []).extend(read(run))
        found = [*rows.values()]
        return np.array(found) if found and all(found) else None

    def replays(self, system: str) -> np.ndarray:
        """Return token hit rates of the replays, %: [seeds, cells and sizes]."""
        found = self.matrix(system, lambda run: run.replay)
        assert found is not None
        return 100 * found

    def loops(self, system: str, figure: str) -> np.ndarray | None:
        """Return a figure of each closed loop: [seeds, loops], or None."""
        return self.matrix(system, lambda run: [one[figure] for one in run.loops if figure in one])

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows())

    def to_dicts(self) -> list[Plain]:
        """Return a flat dictionary per row, with the limits of intervals as ``_low``, ``_high``."""
        found = list[Plain]()
        for row in self:
            found.append(flat := {})
            for one in fields(row):
                flat[one.name] = value = getattr(row, one.name)
                if isinstance(value, Interval):
                    ends = {f"{one.name}_low": value.low, f"{one.name}_high": value.high}
                    flat |= {one.name: value.mean} | ends
        return found

    def rows(self) -> list[Row]:
        """Return a row per system, the most hits first, with the best rebuilt system of each cell,
        the plan and the bound."""
        names = [name for name in self.systems if name != PLAN]
        rows = [self._row(name, self.replays(name)) for name in names]
        comparable = self.rebuilt.intersection(COMPARABLE)
        if rebuilt := [self.replays(name) for name in names if name in comparable]:
            rows.append(self._row(BEST_REBUILT, np.max(rebuilt, axis=0)))
        for name, read in ((PLAN, lambda run: run.replay), (LIMIT, lambda run: run.bound)):
            if (found := self.matrix(PLAN, read)) is not None:
                rows.append(self._row(name, 100 * found))
        is_loop = self.split.ranked_by == "closed loop" and any(row.served for row in rows)

        def rank(row: Row) -> float:
            if not is_loop:
                return -row.hit_rate.mean
            return -row.served.mean if row.served else 1.0

        return sorted(rows, key=rank)

    def _row(self, name: str, rates: np.ndarray) -> Row:
        reference = self.split.reference
        difference, worst, lost = self._compared(name, rates)
        of_plan, of_bound = (
            None if limits is None else interval((100 * _shares(rates, 100 * limits)).tolist())
            for limits in (
                self.matrix(PLAN, lambda run: run.replay),
                self.matrix(PLAN, lambda run: run.bound),
            )
        )
        pools = self.matrix(name, lambda run: run.pools)
        row = Row(name, _over_seeds(rates), difference, worst, lost, of_plan, of_bound)
        if pools is not None:
            row = replace(row, pools=_over_seeds(100 * pools))
        served, first = (self.loops(one, "token_hit_rate") for one in (name, reference))
        if served is None or first is None:
            return row
        means = [(100 * one.mean(axis=1)).tolist() for one in (served, first)]
        row = replace(row, served=interval(means[0]), served_difference=paired(*means))
        ttft_s, ttft_of_first = (self.loops(one, "ttft_mean_s") for one in (name, reference))
        p99_s, in_time = (self.loops(name, figure) for figure in ("ttft_p99_s", "in_time"))
        if ttft_s is not None and ttft_of_first is not None:
            ratios = np.exp(np.log(ttft_s / ttft_of_first).mean(axis=1))
            row = replace(row, ttft_ratio=interval(ratios.tolist()))
        if p99_s is not None and in_time is not None:
            mean = float(np.exp(np.log(np.maximum(p99_s, 1e-6)).mean()))
            row = replace(row, ttft_p99_s=mean, in_time=_over_seeds(100 * in_time))
        return row

    def _compared(
        self, name: str, rates: np.ndarray
    ) -> tuple[Interval, tuple[float, str] | None, tuple[int, int] | None]:
        """Return the difference of a system to the reference, its worst cell, and lost cells."""
        reference = self.split.reference
        others = self.replays(reference)
        less = paired(*(one.mean(axis=1).tolist() for one in (rates, others)))
        if name in (reference, PLAN, LIMIT):
            return less, None, None
        first = self.split.seeds[0]
        places = [
            (run.cell, size)
            for run in self.runs
            if run.system == reference and run.seed == first
            for size in run.gib
        ]
        labels = [f"{cell}, {size:.3g} GiB" for cell, size in places]
        gains = (rates - others).mean(axis=0)
        both = (self.matrix(one, lambda run: run.pools) for one in (name, reference))
        pools, of_first = both
        if pools is not None and of_first is not None:
            gains = np.concatenate((gains, 100 * (pools - of_first).mean(axis=0)))
            labels += [f"{label}, pools" for label in labels]
        at = int(np.argmin(gains))
        return less, (float(gains[at]), labels[at]), (int((gains < -LOST).sum()), len(gains))

    # --- Text -------------------------------------------------------------------------------------

    def table(self) -> str:
        """Return the board as text: a table of the replays and one of the closed loops. Columns
        without figures are left out, and so are intervals of shares and pools."""
        split, num_seeds = self.split, len(self.split.seeds)
        ran = [run for run in self.runs if run.system == split.reference]
        of_first = [run for run in ran if run.seed == split.seeds[0]]
        num_loops = sum(len(run.loops) for run in of_first)
        loops = f"{counted(num_loops, 'closed loop')} and " if num_loops else ""
        cells = counted(sum(len(run.gib) for run in of_first), "replayed cell")
        explained = "Mean over cells [95 % interval over seeds]."
        if num_seeds < FEWEST_UNITS:
            explained = (
                f"Mean over cells. No intervals: they need at least {FEWEST_UNITS} seeds (got "
                f"{num_seeds}), so differences can be chance."
            )
        subset = ", quick subset" if self.is_quick else ""
        title = (
            f"{split.name}{subset}: {loops}{cells} of {counted(len(of_first), 'trace')}, "
            f"{counted(num_seeds, 'seed')} each, {split.model}.\n{explained}\n"
        )
        rows = [row.cells() for row in self.rows()]
        for row in rows:
            row[0] = f"{row[0]} (rebuilt)" if row[0] in self.rebuilt else row[0]
        tables = []
        for name in sorted(SHOWN, key=lambda name: name != split.ranked_by):
            known = {
                i: head for i, head in SHOWN[name].items() if any(row[i] != "-" for row in rows)
            }
            own = [[row[0], *(_short(row[i], i) for i in known)] for row in rows
                   if any(row[i] != "-" for i in known)]  # fmt: skip
            tables += [text_table([name, *known.values()], own)] if own else []
        notes = [
            f"less: points less {split.reference}, paired by seed",
            f"lost: more than {LOST} points below {split.reference}, of all sizes in one memory or "
            "two pools",
        ]
        if num_loops:
            notes.append(
                "closed loop: TTFT is relative to that of the reference; it and p99 are geometric "
                f"means; in time: a first token within {split.ttft_limit_s:g} s"
            )
        notes += [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join([title, "\n\n".join(tables), *notes, *self.notes])


HEADS = [
    *("system", "replay: hits, %", "less reference, points", "worst cell, points", "lost"),
    *("% of plan", "% of bound", "two pools: hits, %", "closed loop: hits, %"),
    *("loop: less reference, points", "mean TTFT, ratio", "TTFT p99, s", "in time, %"),
]


SHOWN = {
    "replay": {1: "hits, %", 2: "less", 5: "% of plan", 6: "% of bound", 7: "pools, %", 4: "lost"}
    | {3: "worst cell"},
    "closed loop": {8: "hits, %", 9: "less", 10: "TTFT, ratio", 11: "p99, s", 12: "in time, %"},
}
"""Places of the columns of both tables in ``HEADS``, and their short heads."""


def _short(cell: str, place: int) -> str:
    """Return a cell of a table, without the interval of a share or of two pools."""
    return cell.partition(" [")[0] if place in (5, 6, 7, 12) else cell


def _over_seeds(rates: np.ndarray) -> Interval:
    return interval(rates.mean(axis=1).tolist())


def _shares(rates: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return the mean share of each seed over the cells where the limit is above 0; else NaN."""
    known = limits > 0
    shares = np.divide(rates, limits, out=np.zeros(rates.shape), where=known)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN.
        means: np.ndarray = shares.sum(axis=1) / known.sum(axis=1)
    return means
