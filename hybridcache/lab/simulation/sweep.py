"""Many runs over one trace: in as many processes as wanted, resumable, the same results in the same
order whatever their number."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridcache.lab.simulation.result import RunResult, summarise
from hybridcache.lab.simulation.serving import Serving, serve
from hybridcache.lab.simulation.target import RunConfig, build_target
from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.policies.user import source_of
from hybridcache.policies.words import split_words

_KEEP_BYTES = 256 << 20
"""A trace whose ids fit in this is held in memory between runs."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep."""

    config: RunConfig
    serving: Serving

    def key(self, trace_identity: bytes) -> str:
        """What tells whether a results file has this run already: all that its figures depend on
        but this project's own code. A policy of the user's own that was edited makes another run,
        and so does a trace file (see ``identity_of``)."""
        policy, checkpoints = self.config.policy, self.config.checkpoints
        if not isinstance(policy, str) or not isinstance(checkpoints, str):
            raise ValueError(
                f"{self.config.label}: a run of it can not be distinguished from another when "
                "it is kept: name the policy "
                "module:Class, or keep no runs"
            )
        own = "".join(map(source_of, (policy, *split_words(checkpoints)))).encode()
        text = repr((self.config, self.serving)).encode() + own + trace_identity
        return hashlib.sha256(text).hexdigest()[:16]


def identity_of(trace: Trace) -> bytes:
    """What tells one trace from another: its recipe and, where it is read from a file, that file's
    content. O(bytes of the file)."""
    name = repr((trace.name, trace.unit)).encode()
    identity = name + _pickled(f"trace {trace.name!r}", trace.source)
    reader: Any = trace.source
    while hasattr(reader, "source"):  # the head of another
        reader = reader.source
    path = getattr(reader, "path", None)
    if path is None:
        return identity
    with open(path, "rb") as file:
        return identity + hashlib.file_digest(file, "sha256").digest()


def run_sweep(
    trace: Trace,
    jobs: Sequence[Job],
    *,
    processes: int = 1,
    resume_from: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[RunResult]:
    """Results in the order of ``jobs``. With ``resume_from``, runs that file has are read from it
    and new ones are appended as they are done, a JSON line each; ``progress`` is called with (done,
    all).

    ValueError for less than one process, and for a trace without a request."""
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if processes > 1:
        _refuse_what_stays_here(trace, jobs)
    results: dict[int, RunResult] = {}
    keys = [""] * len(jobs)
    known: dict[str, RunResult] = {}
    if resume_from:
        identity = identity_of(trace)
        keys = [job.key(identity) for job in jobs]
        known = dict(_read_results(resume_from, set(keys)))
    for number, key in enumerate(keys):
        if key in known:
            results[number] = known[key]
    todo = [(number, job) for number, job in enumerate(jobs) if number not in results]
    if resume_from:
        _end_last_line(resume_from)
    with resume_from.open("a", encoding="utf-8") if resume_from else nullcontext() as file:
        for number, result in _run(trace, todo, processes):
            if not result.requests:
                raise ValueError(f"{trace.name}: there is no request in it")
            results[number] = result
            if file is not None:
                record = {"key": keys[number]} | result.as_record()
                file.write(json.dumps(record) + "\n")
                file.flush()
            if progress:
                progress(len(results), len(jobs))
    return [results[number] for number in range(len(jobs))]


def _refuse_what_stays_here(trace: Trace, jobs: Sequence[Job]) -> None:
    """ValueError for a trace or a policy that can not be sent to another process."""
    _pickled(f"trace {trace.name!r}", trace)
    for job in jobs:
        _pickled(job.config.label, job)


def _pickled(name: str, value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{name} can not be sent to another process, nor distinguished from another when "
            f"runs are kept ({error}): define what makes it at the top of "
            "a module, or use one process and keep no runs"
        ) from error


def _read_results(path: Path, wanted: set[str]) -> Iterator[tuple[str, RunResult]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # half a line, left by a process that was killed
            if record.get("key") in wanted:
                yield record["key"], RunResult.from_record(record)


def _end_last_line(path: Path) -> None:
    """So that what is appended to a file that was cut begins a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


def _run(
    trace: Trace, todo: Sequence[tuple[int, Job]], processes: int
) -> Iterator[tuple[int, RunResult]]:
    if processes <= 1 or len(todo) <= 1:
        worker = _Worker(trace)
        for number, job in todo:
            yield number, worker.run(job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(processes, len(todo)), context, initializer=_start_worker, initargs=(trace,)
    ) as pool:
        others = multiprocessing.active_children()
        futures = [pool.submit(_run_job, numbered) for numbered in todo]
        try:
            for future in futures:
                yield future.result()
        except KeyboardInterrupt:  # do not wait for what runs
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            raise
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def collect_seldom() -> None:
    """For a process that does nothing but simulate, never for the caller's: let the garbage
    collector look after 20,000 new objects rather than 700, and not at what is there already.
    Nearly all that a run makes is part of a tree and stays for long, so that looking takes 8 % of a
    sweep and finds next to nothing."""
    gc.set_threshold(20_000, 20, 20)
    gc.freeze()


class _Worker:
    """Runs jobs over one trace, which it holds in memory if it is small."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._kept: tuple[TraceRequest, ...] | None = None
        self._too_large = False

    def run(self, job: Job) -> RunResult:
        target = build_target(job.config, self._trace.unit)
        log = serve(target, self._requests(), self._trace.unit, job.serving)
        return summarise(job.config, job.serving, log, target, self._trace.full_name)

    def _requests(self) -> Iterable[TraceRequest]:
        if self._kept is None and not self._too_large:
            kept, num_bytes = [], 0
            for request in self._trace:
                kept.append(request)
                num_bytes += request.tokens.nbytes + request.output.nbytes
                if num_bytes > _KEEP_BYTES:
                    self._too_large = True
                    break
            else:
                self._kept = tuple(kept)
        return self._trace if self._kept is None else self._kept


_worker: _Worker | None = None
"""Of this process, where it is one of a pool."""


def _start_worker(trace: Trace) -> None:
    global _worker
    # Ctrl-C goes to all of a terminal's processes: the parent ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    collect_seldom()
    _worker = _Worker(trace)


def _run_job(numbered: tuple[int, Job]) -> tuple[int, RunResult]:
    assert _worker is not None
    number, job = numbered
    return number, _worker.run(job)
