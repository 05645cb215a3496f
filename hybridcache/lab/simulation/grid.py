"""A grid of runs over one trace: here, in several processes, or spread over a Ray cluster;
resumable, the same results in the same order wherever they ran."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from hybridcache.command.extras import explain_missing, version
from hybridcache.lab.progress import Progress, shown_progress
from hybridcache.lab.trace import BadRecords, Held, Trace, TraceRequest
from hybridcache.lab.traces.frame import warn
from hybridcache.policies.protocol import PolicyError

_KEEP_BYTES = 256 << 20
"""Bytes of ids up to which a trace is kept in memory between runs."""
_LATER = 2
"""Tasks that wait for each that runs on a cluster, so that no worker is idle for long."""

Job = TypeVar("Job")
Result = TypeVar("Result")
Run = Callable[[Trace, Job], Result]


@dataclass(frozen=True, slots=True)
class Place:
    """Place of computation of a grid of runs; it changes no result."""

    processes: int = 1
    ray: str | None = None
    """Address of a Ray cluster (``auto`` for the one on this machine), or None."""

    def __post_init__(self) -> None:
        if not isinstance(self.processes, int):
            raise ValueError(f"processes must be a whole number (got {self.processes!r}).")
        if not isinstance(self.ray, str | None):
            raise ValueError(f"ray must be the address of a cluster (got {self.ray!r}).")
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")
        if self.ray is not None and self.processes > 1:
            raise ValueError(
                "ray spreads the runs over a cluster, processes over this machine: give one of them"
            )

    @property
    def is_here(self) -> bool:
        """Whether all is computed in this process."""
        return self.processes == 1 and self.ray is None


@dataclass(frozen=True, slots=True)
class Kept:
    """File of results, which are read from it, or appended as they finish."""

    path: Path
    kind: type[Any]
    """Class of the results, with ``as_record`` and ``from_record``."""

    @classmethod
    def of(cls, resume_from: object, kind: type[Any]) -> Kept | None:
        """Return the file that the argument ``resume_from`` of a function names; None for None."""
        if not isinstance(resume_from, str | Path | None):
            raise ValueError(f"resume_from must be a path (got {resume_from!r}).")
        return cls(Path(resume_from), kind) if resume_from else None


def check_flags(**flags: object) -> None:
    """Raise ValueError for a flag that is not a truth value."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False (got {value!r}).")


def run_grid(
    trace: Trace,
    jobs: Sequence[Job],
    run: Run[Job, Result],
    *,
    place: Place,
    kept: Kept | None = None,
    progress: Callable[[int, int], None] | None = None,
    failures: dict[int, str] | None = None,
) -> list[Result]:
    """Return ``run(trace, job)`` for each of ``jobs``, in their order.

    A run with a PolicyError or RunFailed is left out, and ``failures`` gets its sentence under the
    number of the job. The error is raised if ``failures`` is None, or if all runs failed.

    Runs that are in the file ``kept`` under a job's key (``job.key(identity of the trace)``) are
    read from it, and new ones are appended as they finish, one JSON line each.
    ``progress`` is called with (requests done, requests of all runs), the second 0 while it is
    unknown; with (runs done, all) if results have no ``num_requests``.

    ``run`` is a function at the top level of a module. Raises ValueError if a trace or a job cannot
    be pickled for the process or machine that computes it, or if ``kept`` is not a file of results;
    ChildProcessError if a process ends.
    """
    if kept:
        check_results_file(kept.path, kept.kind, trace)
    if not place.is_here:
        pickled(f"trace {trace.name!r}", trace)
        for job in jobs:
            pickled(str(getattr(job, "label", job)), job)
    results: dict[int, Result] = {}
    keys = keys_of(trace, jobs) if kept else []
    known = dict(_read(kept, set(keys))) if kept else {}
    for number, key in enumerate(keys):
        if key in known:
            results[number] = known[key]
    due = [(number, job) for number, job in enumerate(jobs) if number not in results]
    if kept:
        with appended(kept.path):
            pass  # Say now that it cannot be written.
    progressed = _Progressed(progress, len(results), len(jobs))
    for number, result in _results(trace, due, run, place, progressed):
        if isinstance(result, PolicyError | RunFailed):
            if failures is None or len(failures) + 1 == len(jobs):
                raise result
            failures[number] = str(result)
            progressed.run_done(progressed.num_requests)
            continue
        results[number] = result
        if kept:
            record: Any = result
            with appended(kept.path) as file:
                file.write(json_line(line_head(keys[number], kept.kind) | record.as_record()))
        progressed.run_done(getattr(result, "num_requests", 1))
    return [results[number] for number in sorted(results)]


class RunFailed(ValueError):
    """A run that its settings made impossible."""


def run_cells(
    trace: Trace,
    cells: Sequence[Job],
    run: Run[Job, Result],
    *,
    place: Place,
    kept: Kept | None,
    progress: Progress,
) -> tuple[list[Result], dict[int, str]]:
    """Run the cells of scenarios. Returns the results of ``run_grid``, and its ``failures``."""
    failures: dict[int, str] = {}
    with shown_progress(progress, "requests", trace.name) as show:
        found = run_grid(
            trace, cells, run, place=place, kept=kept, progress=show, failures=failures
        )
    return found, dict(sorted(failures.items()))


def keys_of(trace: Trace, jobs: Sequence[Any]) -> list[str]:
    """Return the key of each job in a file of results. O(bytes of the trace's file)."""
    identity = identity_of(trace)
    return [job.key(identity) for job in jobs]


def identity_of(trace: Trace) -> bytes:
    """Return bytes that identify a trace: its recipe, and the content of its file if it has one.
    O(bytes of the file)."""
    name = repr((trace.name, trace.unit)).encode()
    identity = name + pickled(f"trace {trace.name!r}", trace.source)
    reader: Any = trace.source
    while hasattr(reader, "source"):  # the head of another
        reader = reader.source
    path = getattr(reader, "path", None)
    if path is None:
        return identity
    with open(path, "rb") as file:
        return identity + hashlib.file_digest(file, "sha256").digest()


TICK = 256
"""Requests between two calls of ``progress`` within a run."""


@dataclass(slots=True)
class _Progressed:
    """Progress of a grid in requests, as far as their number is known."""

    show: Callable[[int, int], None] | None
    num_done: int
    num_runs: int
    num_requests: int = 0
    """Requests of one run; 0 before the first is done."""

    def run_done(self, num_requests: int) -> None:
        """Count a finished run."""
        self.num_requests, self.num_done = num_requests, self.num_done + 1
        self.within(0)

    def within(self, num_requests: int) -> None:
        """Show the requests of the finished runs, and ``num_requests`` of the present one."""
        if self.show:
            done = self.num_done * self.num_requests + num_requests
            self.show(done, self.num_runs * self.num_requests)

    def watched(self, trace: Trace) -> Trace:
        """Return ``trace``, which shows the progress of each pass."""
        return trace if self.show is None else replace(trace, source=_Watched(trace, self.within))


@dataclass(frozen=True, slots=True)
class _Watched:
    """Source that tells how many requests were taken."""

    trace: Trace
    tick: Callable[[int], None]

    def __call__(self) -> Iterator[TraceRequest]:
        for number, request in enumerate(self.trace):
            if number % TICK == TICK - 1:
                self.tick(number)
            yield request


def pickled(name: str, value: object) -> bytes:
    """Pickle ``value``. Raises ValueError, which names it, if that is impossible."""
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{name} cannot be sent to another process, or be identified in a file of runs "
            f"({error}): define its functions and classes at the top of a module, name a policy "
            "with its arguments as in 'mine:Policy(weight=2)', or use one process and keep no runs"
        ) from error


_RESULT = re.compile(rb'\{"key": "[0-9a-f]{16}", "kind": "(\w+)"')
"""Start of a line that ``run_grid`` or the command ``optimum`` writes. It may have been cut later
on."""


def _kind_of(path: Path) -> str:
    """Return the class of the results in a regular file; empty if it has none."""
    with path.open("rb") as file:
        found = _RESULT.match(file.read(4096))
    return found[1].decode() if found else ""


def check_no_results(path: Path) -> None:
    """Raise ValueError if ``path`` is a file of ``run_grid``, whose runs would be lost."""
    if path.is_file() and _kind_of(path):
        raise ValueError(f"{path} has runs for resume_from: name another file")


def check_results_file(path: Path, kind: type[Any], trace: Trace | None = None) -> None:
    """Raise ValueError if ``path`` has content and its first line is not a result of ``kind``, or
    if it is the file of ``trace``. Results are appended to files, so others would be damaged."""
    if path.exists() and not path.is_file():  # A device would be replaced by a file.
        raise ValueError(f"{path} is not a regular file: name another for the results")
    if not path.exists() or not path.stat().st_size:
        return
    if trace is not None and trace.path is not None and path.samefile(trace.path):
        raise ValueError(f"{path} is the trace itself: name another file for the results")
    if _kind_of(path) == kind.__name__:
        return
    raise ValueError(
        f"{path} has content that is not a result of this command, and is left as it is: name a "
        "new file for the results"
    )


def records_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file of results. A damaged line, or one cut by the end of a process,
    is skipped with a warning. There are none in a file that does not exist."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError:  # not JSON, or not UTF-8
                warn(f"{path}, line {number}: damaged or cut, so this result is left out")
            else:
                yield record


def _read(kept: Kept, wanted: set[str]) -> Iterator[tuple[str, Any]]:
    for record in records_of(kept.path):
        if record.get("key") in wanted:
            try:
                found = kept.kind.from_record(record)
            except (KeyError, TypeError, ValueError) as error:
                words = f"the result with key {record['key']} is damaged ({error!r})"
                raise ValueError(f"{kept.path}: {words}: delete its line") from error
            yield record["key"], found


def line_head(key: str, kind: type[Any]) -> dict[str, Any]:
    """Return the first fields of a line: key and class of the result, and this version."""
    return {"key": key, "kind": kind.__name__, "version": version()}


def json_line(record: dict[str, Any]) -> bytes:
    """Return a line of a file of results."""
    return json.dumps(record).encode() + b"\n"


@contextmanager
def appended(path: Path) -> Iterator[BinaryIO]:
    """Open a file of results at its end, with a line feed if it was cut inside a line. Other
    processes that append to it or replace it wait. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a+b") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # It was replaced before the lock was free.
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")
            yield file
            return


def _results(
    trace: Trace,
    due: Sequence[tuple[int, Job]],
    run: Run[Job, Result],
    place: Place,
    progressed: _Progressed,
) -> Iterator[tuple[int, Result]]:
    if place.ray is not None and due:
        yield from _on_ray(trace, due, run, place.ray)
    elif place.processes <= 1 or len(due) <= 1:
        if due:
            trace = _in_memory(trace)
            if isinstance(trace.source, Held):
                progressed.num_requests = len(trace.source.requests)
            trace = progressed.watched(trace)
        for number, job in due:
            yield number, _tried(run, trace, job)
    else:
        yield from _in_processes(trace, due, run, place.processes)


def _in_processes(
    trace: Trace, due: Sequence[tuple[int, Job]], run: Run[Job, Result], processes: int
) -> Iterator[tuple[int, Result]]:
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(1)  # a worker that runs the script of its parent; see _why_it_ended
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        # The pipe of a new process would block for ever if the process ended before it read all of
        # a long trace.
        folder = Path(name)
        (folder / _TRACE).write_bytes(pickle.dumps((trace, run)))
        with ProcessPoolExecutor(
            min(processes, len(due)), context, initializer=_start_worker, initargs=(folder,)
        ) as pool:
            others = multiprocessing.active_children()
            try:
                # Ctrl-C goes to all of a terminal's processes: it waits until these were started,
                # and they inherit that it does. The parent ends them.
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    futures = [pool.submit(_run_job, numbered) for numbered in due]
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
                for future in as_completed(futures):
                    yield _warned(*future.result())
            except KeyboardInterrupt:  # do not wait for running jobs
                for child in multiprocessing.active_children():
                    if child not in others:
                        child.terminate()
                raise
            except BrokenProcessPool:
                raise ChildProcessError(_why_it_ended(folder)) from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


_TRACE, _STARTED = "trace", "started"
"""Files between a pool and its workers: their arguments, and a mark of the first that has them."""


def _why_it_ended(folder: Path) -> str:
    """Explain the end of a worker, in one sentence."""
    if (folder / _STARTED).exists():
        return (
            "a process ended before its run was done, perhaps for lack of memory: use fewer "
            "processes"
        )
    return (
        "no process could start: each runs your script again, so put its calls below "
        "\"if __name__ == '__main__':\", and define a trace's functions in a "
        "file, or use one process"
    )


def _on_ray(
    trace: Trace, due: Sequence[tuple[int, Job]], run: Run[Job, Result], address: str
) -> Iterator[tuple[int, Result]]:
    """Run the jobs as Ray tasks of one core each and yield results as they finish. Ray restarts a
    task if its machine fails."""
    with explain_missing():
        import ray

    is_ours = not ray.is_initialized()
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except ConnectionError as error:
        raise ValueError(
            f"ray {address}: no cluster answers there ({error}): start one with "
            "`ray start --head`, or name another address"
        ) from error
    try:
        here = ray.put(trace)
        task = ray.remote(num_cpus=1)(_run_far)
        queue = list(reversed(due))
        running: list[Any] = []
        while queue or running:
            slots = max(1, int(ray.cluster_resources().get("CPU", 1))) * _LATER
            while queue and len(running) < slots:
                running.append(task.remote(here, run, queue.pop()))
            done, running = ray.wait(running)
            for result in ray.get(done):
                yield _warned(*result)
    finally:
        if is_ours:
            ray.shutdown()


Warnings = list[Warning | str]


def _run_far(
    trace: Trace, run: Run[Job, Result], numbered: tuple[int, Job]
) -> tuple[tuple[int, Result], Warnings]:
    number, job = numbered
    with warnings.catch_warnings(record=True) as caught:
        return (number, _tried(run, trace, job)), [one.message for one in caught]


def _tried(run: Run[Job, Result], trace: Trace, job: Job) -> Any:
    """Return the result of a run, or the error that ends this run only."""
    try:
        return run(trace, job)
    except (PolicyError, RunFailed) as error:
        return error


def _warned(numbered: tuple[int, Result], caught: Warnings) -> tuple[int, Result]:
    """Return ``numbered``, and give here the warnings of the process that computed it."""
    for message in caught:
        warnings.warn(message, stacklevel=2)
    return numbered


def collect_seldom() -> None:
    """Run the garbage collector after 20,000 new objects instead of 700, and ignore present
    ones.

    Only for processes that do nothing but simulate. Nearly all objects of a run are part of a tree
    and live long, so that the default collections take 8 % of a sweep and find almost nothing.
    """
    gc.set_threshold(20_000, 20, 20)
    gc.freeze()


def _in_memory(trace: Trace) -> Trace:
    """Return ``trace`` with its requests in memory, or unchanged if they are too large."""
    kept: list[TraceRequest] = []
    num_bytes = 0
    for request in trace:
        kept.append(request)
        num_bytes += request.tokens.nbytes + request.output.nbytes
        if num_bytes > _KEEP_BYTES:
            return trace
    # The number of skipped records stays with the trace that was read.
    return replace(trace, source=Held(tuple(kept)), bad=BadRecords(skip=False))


_task: tuple[Trace, Run[Any, Any]] | None = None
"""Trace and function of this process, if it is one of a pool. The first job reads the trace."""


def _start_worker(folder: Path) -> None:
    global _task
    # A killed parent cannot end its workers: this thread does.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    collect_seldom()
    _task = pickle.loads((folder / _TRACE).read_bytes())
    (folder / _STARTED).touch()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is a process of its own"
    parent.join()
    os._exit(1)


@cache
def _trace_of_worker() -> Trace:
    assert _task is not None
    return _in_memory(_task[0])


def _run_job(numbered: tuple[int, Any]) -> tuple[tuple[int, Any], Warnings]:
    assert _task is not None
    trace, run = _task
    return _run_far(trace, lambda _, job: run(_trace_of_worker(), job), numbered)
