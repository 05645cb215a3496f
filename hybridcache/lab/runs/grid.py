"""A grid of runs over one trace, in one process or several, or on a Ray cluster; resumable, with
the same results in the same order."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hybridcache.command.extras import version
from hybridcache.geometry.units import counted
from hybridcache.lab.results.result import StoredResult
from hybridcache.lab.traces.frame import make_folder, warn, written
from hybridcache.lab.traces.progress import Progress, shown_progress
from hybridcache.lab.traces.trace import Trace
from hybridcache.radix.protocol import PolicyError
from hybridcache.radix.tokens import require_index

KEEP_BYTES = 256 << 20
"""Bytes of ids up to which a trace is kept in memory between runs."""


class GridJob(Protocol):
    """Settings of one run."""

    def key(self, trace_identity: bytes) -> str:
        """Return the identity of the run's result in a file."""


Job = TypeVar("Job", bound=GridJob)
Result = TypeVar("Result", bound=StoredResult)
Run = Callable[[Trace, Job], Result]


def run_grid(
    trace: Trace,
    jobs: Sequence[Job],
    run: Run[Job, Result],
    *,
    processes: int = 1,
    ray: str | None = None,
    resume_from: str | Path | None = None,
    kind: type[Result] | None = None,
    progress: Progress = False,
) -> tuple[tuple[Result, ...], tuple[str, ...]]:
    """Return ``run(trace, job)`` for each of ``jobs``, in their order, and failures.

    A run with a PolicyError or RunFailed is left out, with a sentence in failures; the error is
    raised if all fail. Runs that are in the file ``resume_from`` under ``job.key(identity of the
    trace)`` are read from it, and new ones are appended as they finish, one JSON line each.
    ``kind`` is their class. ``ray`` is the address of a cluster.

    ``run`` is a function at the top level of a module. ValueError if a trace or a job cannot be
    pickled, if ``resume_from`` is not a file of results, or if no cluster answers;
    ChildProcessError if a process ends.
    """
    require_index(processes, "processes", 1)
    if ray is not None and (processes > 1 or not isinstance(ray, str)):
        raise ValueError(f"ray must be a cluster's address, without processes (got {ray!r}).")
    path = Path(resume_from) if resume_from else None
    results: dict[int, Result] = {}
    keys: list[str] = []
    if path:
        assert kind is not None, "runs in a file have a kind"
        _check_results_file(path, kind)
        with written(path), path.open("a+b") as file:  # Its last line may have been cut.
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        identity = identity_of(trace)
        keys = [job.key(identity) for job in jobs]
        known = _read(path, kind, set(keys))
        results = {number: known[key] for number, key in enumerate(keys) if key in known}
    due = [(number, job) for number, job in enumerate(jobs) if number not in results]
    failures: dict[int, str] = {}
    with shown_progress(progress, "runs", trace.name) as show:
        for number, result in _results(trace, due, run, processes, ray):
            if isinstance(result, PolicyError | RunFailed):
                if len(failures) + 1 == len(jobs):
                    raise result
                failures[number] = str(result)
            else:
                results[number] = result
                if path:
                    kept = {"key": keys[number], "kind": type(result).__name__}
                    record = kept | {"version": version()} | result.as_record()
                    with written(path), path.open("ab") as file:
                        file.write(json.dumps(record).encode() + b"\n")
            show(len(results) + len(failures), len(jobs))
    said = (f"{_title(jobs[number])} failed: {failures[number]}" for number in sorted(failures))
    return tuple(results[number] for number in sorted(results)), tuple(dict.fromkeys(said))


def _title(job: object) -> str:
    return str(getattr(job, "title", job))


class RunFailed(ValueError):
    """A run that its settings made impossible."""


def identity_of(trace: Trace) -> bytes:
    """Return bytes that identify a trace: its recipe, and the content of its file."""
    name = repr((trace.name, trace.unit)).encode()
    identity = name + pickled(f"trace {trace.name!r}", trace.source)
    if trace.path is None:
        return identity
    with open(trace.path, "rb") as file:
        return identity + hashlib.file_digest(file, "sha256").digest()


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
"""Start of a line that ``run_grid`` writes. It may have been cut later on."""


def _check_results_file(path: Path, kind: type[StoredResult]) -> None:
    """Make the folder of the file. Raises ValueError if its first line is not a result of this
    kind: results are appended, and would damage others."""
    if not make_folder(path).exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        found = _RESULT.match(file.read(4096))
    if not found or found[1].decode() != kind.__name__:
        raise ValueError(
            f"{path} has content that is not a result of this command, and is left as it is: name "
            "a new file for the results"
        )


def _read(path: Path, kind: type[Result], wanted: set[str]) -> dict[str, Result]:
    """Return the results of the ``wanted`` keys. Warns of lines that are damaged, impossible, or
    cut by the end of a process, and of results of another version of this package."""
    found, versions = dict[str, Result](), dict[str, object]()
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            if (key := record["key"]) in wanted:
                found[key], versions[key] = kind.from_record(record), record.get("version")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            warn(f"{path}, line {number}: damaged or cut, and not read ({error!s:.80})")
    for other, number in Counter(versions.values()).items():
        if other != version():
            warn(f"{path}: {counted(number, 'run')} of version {other} reused; this is {version()}")
    return found


def _results(
    trace: Trace,
    due: Sequence[tuple[int, Job]],
    run: Run[Job, Result],
    processes: int,
    ray: str | None,
) -> Iterator[tuple[int, Result | PolicyError | RunFailed]]:
    """Yield the number and the result of each job that is due, in the order of their ends."""
    if not due:
        return
    if ray is None and min(processes, len(due)) == 1:
        trace = trace.kept(KEEP_BYTES)
        for number, job in due:
            yield number, _tried(run, trace, job)
        return
    task = pickled(f"trace {trace.name!r}", (trace, run))
    for _, job in due:
        is_of_main = b"__main__" in pickled(_title(job), job) + task
        if is_of_main and not hasattr(sys.modules["__main__"], "__file__"):
            raise ValueError(
                f"{_title(job)} is defined in this notebook, which other processes cannot import: "
                "write the class to a file, as in 'mine:Policy', or use one process"
            )
    far = _in_processes(task, due, processes) if ray is None else _on_ray(task, due, ray)
    for number, result, caught in far:
        for message in caught:  # of the process that computed it
            warnings.warn(message, stacklevel=2)
        yield number, result


CONNECT_S = 20.0
"""Longest wait for the machine of a Ray cluster."""
RERUN_STATUS = 75
"""Exit status of a process that runs the script of its parent again."""
RERUN = """each process runs your script again: put its calls below "if __name__ == '__main__':\""""


def leave_if_rerun() -> None:
    """End a process that runs the script of its parent again, and is about to start others."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(RERUN_STATUS)  # A server of forks hides the status of SystemExit.


def _in_processes(task: bytes, due: Sequence[tuple[int, GridJob]], processes: int) -> Iterator[Far]:
    leave_if_rerun()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(due)), context, initializer=prepare_worker) as pool:
        others = multiprocessing.active_children()
        try:
            # Ctrl-C goes to all of a terminal's processes: it waits until these were started, and
            # they inherit that it does. The parent ends them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = [pool.submit(_run_far, task, *numbered) for numbered in due]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in as_completed(futures):
                yield future.result()
        except KeyboardInterrupt:  # do not wait for running jobs
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            raise
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process ended before its run was done: for lack of memory (use fewer "
                f"processes), or because {RERUN}, and define a trace's functions in a file"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _on_ray(task: bytes, due: Sequence[tuple[int, GridJob]], address: str) -> Iterator[Far]:
    """Run the jobs as Ray tasks. Ray restarts a task if its machine fails."""
    import ray

    is_ours = not ray.is_initialized()
    try:
        if is_ours and (place := re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address)):
            # Ray itself would wait for minutes.
            socket.create_connection((place[1], int(place[2])), CONNECT_S).close()
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except OSError as error:
        said = f"no cluster answers there ({error}): start one with `ray start --head`, or name "
        said += "another address"
        if re.search("token|auth", str(error), re.I):
            said = f"the cluster refuses the token ({error}): set the RAY_AUTH_MODE and the token "
            said += "with which it was started"
        raise ValueError(f"ray {address}: {said}") from error
    try:
        here, remote = ray.put(task), ray.remote(num_cpus=1)(_run_far)
        running = [remote.remote(here, *numbered) for numbered in due]
        while running:
            done, running = ray.wait(running)
            yield from ray.get(done)
    finally:
        if is_ours:
            ray.shutdown()


Far = tuple[int, Any, list[Warning | str]]
"""Number and result of a job in another process, and the warnings of its run."""


@lru_cache(1)
def _task(pickled_task: bytes) -> tuple[Trace, Run[GridJob, StoredResult]]:
    """Return the trace and the function of this process. The first job reads the trace."""
    trace, run = pickle.loads(pickled_task)
    return trace.kept(KEEP_BYTES), run


def _run_far(task: bytes, number: int, job: GridJob) -> Far:
    with warnings.catch_warnings(record=True) as caught:
        trace, run = _task(task)
        return number, _tried(run, trace, job), [one.message for one in caught]


def _tried(run: Run[Job, Result], trace: Trace, job: Job) -> Result | PolicyError | RunFailed:
    """Return the result of a run, or the error that ends this run only."""
    try:
        return run(trace, job)
    except (PolicyError, RunFailed) as error:
        return error


def collect_seldom() -> None:
    """Run the garbage collector after 20,000 new objects instead of 700, and ignore present ones:
    the default collections take 8 % of a sweep and find almost nothing."""
    gc.set_threshold(20_000, 20, 20)
    gc.freeze()


def prepare_worker() -> None:
    """Prepare a process of a pool, which only simulates, and let it end with its parent."""
    # A killed parent cannot end its workers: this thread does.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    collect_seldom()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is a process of its own"
    parent.join()
    os._exit(1)
