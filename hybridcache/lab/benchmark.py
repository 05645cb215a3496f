"""Frozen benchmark: named cells with hashed data, and the ranking of policies and rebuilt systems.

A cell is one trace. Each system replays it at four sizes, shares of its working set, in one arena
and in two pools, and serves its sessions in closed loop. Seeds draw texts and arrivals. Results are
one JSON file; the ranking is made from one or several of them.

>>> Benchmark.load().version
'v2'
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from importlib import resources
from itertools import product
from pathlib import Path

import numpy as np

from hybridcache.command.extras import version
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.geometry.units import GIB, counted
from hybridcache.lab.arrivals import interleave, parse_starts
from hybridcache.lab.baselines import BASELINES, COMPARABLE
from hybridcache.lab.intervals import FEWEST_UNITS, Interval, interval, paired
from hybridcache.lab.progress import Progress
from hybridcache.lab.report import text_table
from hybridcache.lab.scenario import Scenario, named_policies, sources_of, written_policy
from hybridcache.lab.simulation.closed_loop import closed_loop
from hybridcache.lab.simulation.grid import Plain, RunFailed, Stored, run_grid
from hybridcache.lab.simulation.result import ClosedLoopRun, RunResult
from hybridcache.lab.simulation.simulate import optimum, simulate
from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.lab.traces import open_trace, seeded
from hybridcache.lab.traces.frame import make_folder
from hybridcache.policies.registry import DEFAULT_PLACEMENT, EvictionSpec

HINDSIGHT = "(plan)"
"""Name of the system that knows the future; its records have the upper bound too."""
RANKED_BY = "lru@adaptive"
"""System to which the others are compared."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One trace of the benchmark."""

    name: str
    trace: str
    rate: float
    """Sessions per second of the closed loop."""
    sha256: tuple[str, ...]
    """First 16 digits of ``data_hash``: one per seed of a generator, or one of a file."""
    starts: str = ""
    """Arrivals of sessions that each seed draws; the file's own times if empty."""
    source: str = ""
    """Origin of a file that is not part of the package."""

    @property
    def arrivals(self) -> str:
        """Origin of the times of requests."""
        if self.starts:
            return f"drawn: sessions {self.starts}, times within sessions as in the file"
        generated = len(self.sha256) > 1
        return "drawn by the generator" if generated else "as in the file, or drawn by its reader"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Cells, sizes, seeds and machine of one version."""

    version: str
    model: str
    seeds: tuple[int, ...]
    sizes: str
    """Shares of the working set, as in ``Scenario.gib``."""
    loop_size: str
    kv_share: float
    ttft_limit_s: float
    max_running: int
    policies: tuple[str, ...]
    rebuilt: tuple[str, ...]
    quick: tuple[str, ...]
    machine: Mapping[str, float]
    cells: tuple[Cell, ...]

    @classmethod
    def load(cls) -> Benchmark:
        """Read the packaged version."""
        text = (resources.files(__package__) / "benchmark_v2.toml").read_text(encoding="utf-8")
        read = tomllib.loads(text)
        for name in ("seeds", "policies", "rebuilt", "quick"):
            read[name] = tuple(read[name])
        hashes = read.pop("sha256")
        cells = (
            Cell(name, sha256=tuple(hashes[name]), **one) for name, one in read["cells"].items()
        )
        return cls(**read | {"cells": tuple(cells)})

    def subset(self, is_quick: bool, num_seeds: int | None) -> Benchmark:
        """Return the quick subset, or the first seeds. ValueError for a wrong number of seeds."""
        if num_seeds is not None and not 1 <= num_seeds <= len(self.seeds):
            raise ValueError(f"seeds must be from 1 to {len(self.seeds)} (got {num_seeds}).")
        found = replace(self, seeds=self.seeds[: 1 if is_quick else num_seeds])
        cells = tuple(cell for cell in self.cells if cell.name in self.quick)
        return replace(found, cells=cells) if is_quick else found

    def times(self) -> Roofline:
        """Return the times of the machine."""
        return Roofline(ModelGeometry.load(self.model), **self.machine)  # type: ignore[arg-type]


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
    of the benchmark; FileNotFoundError if the file is missing."""
    spec: str | None = cell.trace
    if cell.source:
        spec = _found(cell.trace, folder)
        if spec is None:
            raise FileNotFoundError(f"{cell.name}: {_missing(cell, folder)}")
    is_generated = len(cell.sha256) > 1
    trace = open_trace(seeded(str(spec), seed)).kept()
    found, wanted = data_hash(trace)[:16], cell.sha256[place if is_generated else 0]
    if found != wanted:
        cause = f"numpy {np.__version__} draws other numbers" if is_generated else "another file"
        raise ValueError(
            f"{cell.name}, seed {seed}: its data have the hash {found}, and those of the benchmark "
            f"{wanted}: {cause}; see the page on the benchmark"
        )
    if not cell.starts:
        return replace(trace, name=cell.name)
    source = partial(_restarted, trace, cell.starts, seed)
    return replace(trace, name=cell.name, source=source).kept()


def _missing(cell: Cell, folder: Path | None) -> str:
    name = cell.trace.partition("?")[0]
    return f"no file {name} in {folder or 'the folder of --data'}; source: {cell.source}"


def _restarted(trace: Trace, starts: str, seed: int) -> Iterator[TraceRequest]:
    """Yield the requests of a trace whose sessions begin at times drawn with ``seed``."""
    sessions: dict[Hashable, list[TraceRequest]] = {}
    for request in trace:
        sessions.setdefault(request.session, []).append(request)
    return interleave(sessions.values(), parse_starts(starts), unit=trace.unit, seed=seed)


# --- Runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured(Stored):
    """Figures of one system on one cell with one seed. Lists have a number per size; rates are from
    0 to 1, times in seconds."""

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
    loop: dict[str, float] = field(default_factory=dict)
    """Closed loop: token hit rate, times to first token, ``in_time`` (share of the requests with a
    first token within the limit), and ``goodput``: those per second."""


@dataclass(frozen=True, slots=True)
class Job:
    """One system on one cell with one seed."""

    benchmark: Benchmark
    cell: Cell
    place: int
    system: str
    folder: Path | None

    @property
    def seed(self) -> int:
        """Seed of texts and arrivals."""
        return self.benchmark.seeds[self.place]

    @property
    def title(self) -> str:
        """Name of the job in errors."""
        return f"{self.system} on {self.cell.name}, seed {self.seed}"

    def key(self, _trace_identity: bytes) -> str:
        """Return an identity of the job, the version and the source of an own policy."""
        seeds = (self.seed,)
        one = replace(self.benchmark, seeds=seeds, cells=(), quick=(), policies=(), rebuilt=())
        facts = (one, self.cell, self.system, version())
        own = "" if self.system in BASELINES else sources_of(self.system.split("@"))
        return hashlib.sha256(repr((facts, own)).encode()).hexdigest()[:16]


def run_job(_trace: Trace, job: Job) -> Measured:
    """Replay and serve one cell with one system. O(requests * sizes)."""
    asked, cell = job.benchmark, job.cell
    trace = drawn(cell, job.place, job.seed, job.folder)
    base = Scenario(trace, model=asked.model, gib=asked.sizes)
    if job.system == HINDSIGHT:
        plans = optimum(base, progress=False)
        facts = _sizes(asked, [plan.gib for plan in plans])
        reached, bound = ([getattr(plan, name) for plan in plans] for name in ("reached", "bound"))
        return Measured(cell.name, job.seed, job.system, *facts, reached, bound=bound)
    if job.system in BASELINES:
        base = replace(base, policy=(), baseline=job.system)
    else:
        eviction, _, placement = job.system.partition("@")
        base = replace(base, policy=eviction, checkpoints=[placement or DEFAULT_PLACEMENT])
    base = replace(base, times=asked.times())
    runs = _replayed(base)
    pools: Sequence[RunResult] = ()
    if job.system not in BASELINES:
        pools = _replayed(replace(base, memory="pools", kv_share=asked.kv_share))
    served = closed_loop(
        base,
        gib=asked.loop_size,
        rate=cell.rate,
        seeds=(job.seed,),
        max_running=asked.max_running,
        ttft_limit_s=asked.ttft_limit_s,
        admission="sessions",
        progress=False,
    )
    if served.failures:
        raise RunFailed(served.failures[0])
    return Measured(
        cell.name,
        job.seed,
        job.system,
        *_sizes(asked, [run.gib for run in runs]),
        [run.token_hit_rate for run in runs],
        {f"p{rank}": [run.ttft_s[rank] for run in runs] for rank in (50, 95, 99)},
        [run.token_hit_rate for run in pools],
        loop=_loop_figures(served.runs[0]),
    )


def _sizes(asked: Benchmark, gib: list[float]) -> tuple[list[float], list[float]]:
    state_bytes = ModelGeometry.load(asked.model).state_bytes
    return gib, [round(size * GIB / state_bytes, 1) for size in gib]


def _replayed(scenario: Scenario) -> Sequence[RunResult]:
    result = simulate(scenario, bound=False, progress=False)
    if result.failures:
        raise RunFailed(result.failures[0])
    return result.runs


def _loop_figures(run: ClosedLoopRun) -> dict[str, float]:
    asked = run.num_requests + run.num_refused
    return {
        "gib": run.gib,
        "token_hit_rate": run.token_hit_rate,
        "ttft_p50_s": run.ttft_p50_s,
        "ttft_p99_s": run.ttft_p99_s,
        "in_time": run.goodput * run.makespan_s / asked,
        "goodput": run.goodput,
        "refused": run.num_refused,
    }


def benchmark(
    policies: EvictionSpec | Sequence[EvictionSpec] = (),
    *,
    quick: bool = False,
    seeds: int | None = None,
    data: str | Path | None = None,
    processes: int = 1,
    resume_from: str | Path | None = None,
    progress: Progress = None,
) -> Ranking:
    """Run the packaged benchmark.

    Args:
        policies: ``eviction`` or ``eviction@placement``; own ones as classes or ``module:Class``.
        quick: only three cells with one seed; under two minutes.
        seeds: number of the first seeds to use; None for all.
        data: folder of the files that are not part of the package. Cells of missing ones are left
            out, and named in the result.
        processes, resume_from, progress: as in ``simulate``, for jobs in place of runs.

    Raises ValueError if data differ from the benchmark's, and if a policy is unknown or fails.
    """
    asked = Benchmark.load().subset(quick, seeds)
    folder = None if data is None else Path(data)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"data: there is no folder {folder}")
    left_out = {
        cell.name: _missing(cell, folder)
        for cell in asked.cells
        if cell.source and _found(cell.trace, folder) is None
    }
    known = {one.removesuffix(f"@{DEFAULT_PLACEMENT}"): one for one in asked.policies}
    entries = [known.get(one, one) for one in map(written_policy, named_policies(policies))]
    systems = (HINDSIGHT, *dict.fromkeys((*entries, *asked.policies, *asked.rebuilt)))
    jobs = [
        Job(asked, cell, place, system, folder)
        for place, cell in product(range(len(asked.seeds)), asked.cells)
        if cell.name not in left_out
        for system in systems
    ]
    runs, failures = run_grid(
        Trace("benchmark", 1, tuple),
        jobs,
        run_job,
        processes=processes,
        resume_from=resume_from,
        kind=Measured,
        progress=progress,
    )
    if failures:
        raise ValueError(failures[0])
    facts = asdict(asked) | {"hybridcache": version(), "numpy": np.__version__, "quick": quick}
    for cell, record in zip(asked.cells, facts["cells"], strict=True):
        record["arrivals"] = cell.arrivals
    return Ranking(facts, left_out, runs)


# --- Ranking --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ranking:
    """Figures of several systems on the same cells and seeds."""

    facts: Plain
    """The benchmark, and the versions of the packages."""
    left_out: dict[str, str]
    """Reasons of the cells that were not run."""
    runs: tuple[Measured, ...]

    def write(self, path: str | Path) -> None:
        """Write one JSON file."""
        scores = {name: dict(zip(self.heads()[1:], row, strict=True)) for name, *row in self.rows()}
        record = {
            **{"benchmark": self.facts["version"], "facts": self.facts, "left_out": self.left_out},
            **{"scores": scores, "runs": [run.as_record() for run in self.runs]},
        }
        make_folder(Path(path)).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, *paths: str | Path) -> Ranking:
        """Read files of ``write``; systems that only later files have are added. If an own
        policy has other figures in a later file, as two named ``mine:Policy`` do, the file's name
        is added to its name. ValueError if a file has another form, or other cells or seeds than
        the first."""
        found: list[Ranking] = []
        for path in paths:
            try:
                record = json.loads(Path(path).read_text(encoding="utf-8"))
                runs = tuple(map(Measured.from_record, record["runs"]))
                found.append(cls(record["facts"], record["left_out"], runs))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: not a result of hybridcache benchmark: {error}"
                ) from None
            if found[-1]._place() != found[0]._place():
                raise ValueError(f"{path}: its cells, seeds or data are not those of {paths[0]}")
        by_system: dict[str, list[Measured]] = {}
        for path, ranking in zip(paths, found, strict=True):
            for system in ranking.systems:
                of = [*ranking._of(system)]
                if by_system.setdefault(system, of) != of and ":" in system:
                    name = f"{system} ({path})"
                    by_system[name] = [replace(run, system=name) for run in of]
        return replace(found[0], runs=tuple(run for of in by_system.values() for run in of))

    def _place(self) -> tuple[object, ...]:
        hashes = [(cell["name"], list(cell["sha256"])) for cell in self.facts["cells"]]
        return self.facts["version"], list(self.facts["seeds"]), hashes, sorted(self.left_out)

    def _of(self, system: str) -> Iterator[Measured]:
        return (run for run in self.runs if run.system == system)

    @property
    def systems(self) -> list[str]:
        """Names of all systems, in the order of the runs."""
        return list(dict.fromkeys(run.system for run in self.runs))

    def _matrix(
        self, system: str, read: Callable[..., list[float] | float | None]
    ) -> np.ndarray | None:
        """Return a number per seed and cell, or None if the system has none."""
        seeds: dict[int, list[float]] = {}
        for run in self._of(system):
            values = read(run)
            if values is None or (isinstance(values, list) and not values):
                return None
            row = seeds.setdefault(run.seed, [])
            row.extend(values if isinstance(values, list) else [values])
        return np.array([*seeds.values()]) if seeds else None

    def hits(self, system: str) -> np.ndarray:
        """Return token hit rates of the replay, %: [seeds, cells and sizes]."""
        found = self._matrix(system, lambda run: run.replay)
        assert found is not None
        return 100 * found

    def heads(self) -> list[str]:
        """Return the heads of the table's columns."""
        return [
            *("system", "replay: hits, %", f"less {RANKED_BY}, points", "% of bound"),
            *("two pools: hits, %", "closed loop: hits, %", "TTFT p50, s", "p99, s"),
            "in time, %",
        ]

    def rows(self) -> list[list[str]]:
        """Return a row per system, the most hits in replays first, with the best rebuilt system of
        each cell and the upper bound."""
        names = [name for name in self.systems if name != HINDSIGHT]
        limit = self._matrix(HINDSIGHT, lambda run: run.bound)
        rebuilt = [self.hits(name) for name in names if name in COMPARABLE]
        hits = {name: self.hits(name) for name in (*names, HINDSIGHT)}
        if rebuilt:
            hits["(best rebuilt of each cell)"] = np.max(rebuilt, axis=0)
        hits["(upper bound)"] = 100 * limit if limit is not None else hits[HINDSIGHT]
        reference = hits.get(RANKED_BY, hits[names[0]])
        ranked = sorted(hits, key=lambda name: -hits[name].mean())
        return [
            [
                f"{name} (rebuilt)" if name in BASELINES else name,
                *_compared(hits[name], reference),
                f"{100 * hits[name].mean() / hits['(upper bound)'].mean():.1f}",
                *self._served(name),
            ]
            for name in ranked
        ]

    def _served(self, name: str) -> Iterator[str]:
        """Yield the cells of pools and closed loop."""
        pools = self._matrix(name, lambda run: run.pools)
        yield "-" if pools is None else f"{_over_seeds(100 * pools)}"
        for figure in ("token_hit_rate", "ttft_p50_s", "ttft_p99_s", "in_time"):
            found = self._matrix(name, lambda run, figure=figure: run.loop.get(figure))
            if found is None:
                yield "-"
            elif figure.startswith("ttft"):
                yield f"{np.exp(np.log(np.maximum(found, 1e-6)).mean()):.3g}"
            else:
                yield f"{_over_seeds(100 * found)}"

    def table(self) -> str:
        """Return the ranking as text."""
        facts = self.facts
        num_cells = len(facts["cells"]) - len(self.left_out)
        subset = ", quick subset" if facts["quick"] else ""
        notes = [
            f"closed loop: at {facts['loop_size']} of the working set; TTFT: geometric mean over "
            f"cells; in time: within {facts['ttft_limit_s']:g} s",
            "seeds draw texts and arrivals; of files without seeds, only the starts of sessions",
        ]
        if len(facts["seeds"]) < FEWEST_UNITS:
            notes.append(f"no intervals: they need at least {FEWEST_UNITS} seeds")
        notes += [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        title = (
            f"benchmark {facts['version']}{subset}: {counted(num_cells, 'trace')}, sizes "
            f"{facts['sizes']} of the working set, {counted(len(facts['seeds']), 'seed')}, "
            f"{facts['model']}. Mean over cells [95 % interval over seeds]."
        )
        return "\n".join([title, "", text_table(self.heads(), self.rows()), *notes])


def _over_seeds(rates: np.ndarray) -> Interval:
    return interval(rates.mean(axis=1).tolist())


def _compared(rates: np.ndarray, others: np.ndarray) -> tuple[str, str]:
    first, second = (of.mean(axis=1).tolist() for of in (rates, others))
    return str(interval(first)), str(paired(first, second))
