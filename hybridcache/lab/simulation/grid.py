"""A grid of runs over one trace, in one process or several, or on a Ray cluster; resumable, with
the same results in the same order."""

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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from hybridcache.command.extras import explain_missing, version
from hybridcache.geometry.units import counted
from hybridcache.lab.progress import Progress, shown_progress
from hybridcache.lab.trace import Trace
from hybridcache.lab.traces.frame import make_folder, warn
from hybridcache.policies.protocol import PolicyError
from hybridcache.tokens import require_index

_KEEP_BYTES = 256 << 20
"""Bytes of ids up to which a trace is kept in memory between runs."""

Job = TypeVar("Job")
Result = TypeVar("Result")
Run = Callable[[Trace, Job], Result]


def run_grid(
    trace: Trace,
    jobs: Sequence[Job],
    run: Run[Job, Result],
    *,
    processes: int = 1,
    ray: str | None = None,
    resume_from: str | Path | None = None,
    kind: Any = None,
    progress: Progress = False,
) -> tuple[list[Result], dict[int, str]]:
    """Return ``run(trace, job)`` for each of ``jobs``, in their order, and failures.

    A run with a PolicyError or RunFailed is left out; failures have its sentence under the number
    of the job. The error is raised if all runs failed.

    Runs that are in the file ``resume_from`` under a job's key (``job.key(identity of the trace)``)
    are read from it, and new ones are appended as they finish, one JSON line each. ``kind`` is
    their class, with ``as_record`` and ``from_record``. ``progress`` is called with (runs done,
    all). ``ray`` is the address of a cluster on which each run is a task of one core.

    ``run`` is a function at the top level of a module. Raises TypeError for ``processes`` that are
    no integer; ValueError if a trace or a job cannot
    be pickled for the process that computes it, if ``resume_from`` is not a file of results, or if
    no cluster answers at ``ray``; ChildProcessError if a process ends.
    """
    require_index(processes, "processes", 1)
    if ray is not None and (processes > 1 or not isinstance(ray, str)):
        raise ValueError(f"ray must be a cluster's address, without processes (got {ray!r}).")
    if not isinstance(resume_from, str | Path | None):
        raise ValueError(f"resume_from must be a path (got {resume_from!r}).")
    path = Path(resume_from) if resume_from else None
    if path:
        _check_results_file(path, kind, trace)
    if processes > 1 or ray is not None:
        pickled(f"trace {trace.name!r}", trace)
        for job in jobs:
            pickled(str(getattr(job, "label", job)), job)
    results: dict[int, Result] = {}
    keys: list[str] = []
    if path:
        identity = identity_of(trace)
        keys = [job.key(identity) for job in jobs]  # type: ignore[attr-defined]
        num_read, elsewhere = path.stat().st_size if path.exists() else 0, set[bytes]()
        known = _read(path, kind, set(keys))
        results = {number: known[key] for number, key in enumerate(keys) if key in known}
    due = [(number, job) for number, job in enumerate(jobs) if number not in results]
    if path:
        with appended(path):
            pass  # Say now that it cannot be written.
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
                    head = {"key": keys[number], "kind": kind.__name__, "version": version()}
                    record = head | result.as_record()  # type: ignore[attr-defined]
                    with appended(path) as file:
                        file.seek(num_read)
                        elsewhere.update(_KEY.findall(file.read()))
                        if keys[number].encode() not in elsewhere:
                            file.write(json.dumps(record).encode() + b"\n")
                        num_read = file.seek(0, os.SEEK_END)
            show(len(results) + len(failures), len(jobs))
    return [results[number] for number in sorted(results)], dict(sorted(failures.items()))


class RunFailed(ValueError):
    """A run that its settings made impossible."""


def identity_of(trace: Trace) -> bytes:
    """Return bytes that identify a trace: its recipe, and the content of its file if it has one.
    O(bytes of the file)."""
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


_KEY = re.compile(rb'^\{"key": "([0-9a-f]{16})"', re.MULTILINE)
"""Key of a result, at the start of its line. Another process may write to the same file."""
_RESULT = re.compile(rb'\{"key": "[0-9a-f]{16}", "kind": "(\w+)"')
"""Start of a line that ``run_grid`` writes. It may have been cut later on."""


def _check_results_file(path: Path, kind: Any, trace: Trace) -> None:
    """Make the folder of the file. Raises ValueError if its first line is not a result of this
    kind, or if it is the file of ``trace``: results are appended, and would damage others."""
    if not make_folder(path).exists() or not path.stat().st_size:
        return
    if trace.path is not None and path.samefile(trace.path):
        raise ValueError(f"{path} is the trace itself: name another file for the results")
    with path.open("rb") as file:
        found = _RESULT.match(file.read(4096))
    if not found or found[1].decode() != kind.__name__:
        raise ValueError(
            f"{path} has content that is not a result of this command, and is left as it is: name "
            "a new file for the results"
        )


def _read(path: Path, kind: Any, wanted: set[str]) -> dict[str, Any]:
    """Return the results of the ``wanted`` keys. Warns of lines that are damaged, impossible, or
    cut by the end of a process, unless another line has their key, and of results of another
    version of this package."""
    found, versions, damaged = dict[str, Any](), dict[str, Any](), dict[str, str]()
    if not path.exists():
        return found
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if (key := record["key"]) in wanted:
                    found[key], versions[key] = kind.from_record(record), record.get("version")
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                started = _KEY.match(line)
                key = started[1].decode() if started else str(number)
                damaged[key] = f"line {number}: damaged or cut, and not read ({error!s:.80})"
    for key, problem in damaged.items():
        if key not in found:
            warn(f"{path}, {problem}")
    for other, number in Counter(versions.values()).items():
        if other != version():
            warn(f"{path}: {counted(number, 'run')} of version {other} reused; this is {version()}")
    return found


@contextmanager
def appended(path: Path) -> Iterator[BinaryIO]:
    """Open a file of results at its end. A last line that was cut is removed; a whole one without
    a line feed gets one. Other processes that append to it wait."""
    with path.open("a+b") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.seek(0)
                last = file.readlines()[-1]
                try:
                    json.loads(last)
                    file.write(b"\n")
                except ValueError:
                    file.truncate(file.tell() - len(last))
        yield file


def _results(
    trace: Trace,
    due: Sequence[tuple[int, Job]],
    run: Run[Job, Result],
    processes: int,
    ray: str | None,
) -> Iterator[tuple[int, Result]]:
    if ray is not None and due:
        yield from _on_ray(trace, due, run, ray)
        return
    if processes > 1 and len(due) > 1:
        yield from _in_processes(trace, due, run, processes)
        return
    trace = trace.kept(_KEEP_BYTES) if due else trace
    for number, job in due:
        yield number, _tried(run, trace, job)


def _in_processes(
    trace: Trace, due: Sequence[tuple[int, Job]], run: Run[Job, Result], processes: int
) -> Iterator[tuple[int, Result]]:
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(1)  # a worker that runs the script of its parent
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        # The pipe of a new process would block for ever if the process ended before it read all of
        # a long trace.
        task = Path(name, "task")
        task.write_bytes(pickle.dumps((trace, run)))
        with ProcessPoolExecutor(
            min(processes, len(due)), context, initializer=_start_worker, initargs=(task,)
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
                raise ChildProcessError(
                    "a process ended before its run was done: for lack of memory (use fewer "
                    'processes), or because each runs your script again (put its calls below "if '
                    "__name__ == '__main__':\", and define a trace's functions in a file)"
                ) from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _on_ray(
    trace: Trace, due: Sequence[tuple[int, Job]], run: Run[Job, Result], address: str
) -> Iterator[tuple[int, Result]]:
    """Run the jobs as Ray tasks. Ray restarts a task if its machine fails."""
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
        running = [task.remote(here, run, numbered) for numbered in due]
        while running:
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
    """Return the number and the result of a job, and the warnings of its run."""
    number, job = numbered
    with warnings.catch_warnings(record=True) as caught:
        return (number, _tried(run, trace, job)), [one.message for one in caught]


def _warned(numbered: tuple[int, Result], caught: Warnings) -> tuple[int, Result]:
    """Return ``numbered``, and give here the warnings of the process that computed it."""
    for message in caught:
        warnings.warn(message, stacklevel=2)
    return numbered


def _tried(run: Run[Job, Result], trace: Trace, job: Job) -> Any:
    """Return the result of a run, or the error that ends this run only."""
    try:
        return run(trace, job)
    except (PolicyError, RunFailed) as error:
        return error


def collect_seldom() -> None:
    """Run the garbage collector after 20,000 new objects instead of 700, and ignore present
    ones.

    Only for processes that do nothing but simulate. Nearly all objects of a run are part of a tree
    and live long, so that the default collections take 8 % of a sweep and find almost nothing.
    """
    gc.set_threshold(20_000, 20, 20)
    gc.freeze()


_task: tuple[Trace, Run[Any, Any]] | None = None
"""Trace and function of this process, if it is one of a pool. The first job reads the trace."""


def _start_worker(task: Path) -> None:
    global _task
    prepare_worker()
    _task = pickle.loads(task.read_bytes())


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


@cache
def _trace_of_worker() -> Trace:
    assert _task is not None
    return _task[0].kept(_KEEP_BYTES)


def _run_job(numbered: tuple[int, Any]) -> tuple[tuple[int, Any], Warnings]:
    assert _task is not None
    with warnings.catch_warnings(record=True) as caught:  # of the first job, which reads the trace
        trace = _trace_of_worker()
    done, found = _run_far(trace, _task[1], numbered)
    return done, [*(one.message for one in caught), *found]
