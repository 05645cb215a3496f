"""Many runs over one trace, in several processes or on a cluster, with the same results in the same
order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridcache.lab.simulation.grid import Place, collect_seldom, pickled, run_grid
from hybridcache.lab.simulation.own_code import source_of
from hybridcache.lab.simulation.result import RunResult, summarise
from hybridcache.lab.simulation.serving import Serving, serve
from hybridcache.lab.simulation.target import RunConfig, build_target
from hybridcache.lab.trace import Trace
from hybridcache.policies.registry import split_specs

__all__ = ["Job", "collect_seldom", "identity_of", "key_of", "run_sweep"]


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep."""

    config: RunConfig
    serving: Serving

    def key(self, trace_identity: bytes) -> str:
        """Return the key of this run in a results file, which covers all inputs except this
        project's own code.

        An edited policy of the user makes another run, and so does another trace file (see
        ``identity_of``). ValueError if a policy or a placement is an object, which has no name in a
        file.
        """
        return key_of(
            self.config.label,
            (self.config.policy, self.config.checkpoints),
            (self.config, self.serving),
            trace_identity,
        )


def key_of(
    label: str, policies: Sequence[object], settings: tuple[object, ...], trace_identity: bytes
) -> str:
    """Return the key of a run with these policies and settings in a results file; see ``Job.key``.
    ``label`` names the run in the error."""
    own = ""
    for policy in policies:
        if not isinstance(policy, str):
            raise ValueError(
                f"{label}: its runs cannot be identified in a file of runs: name the policy as in "
                "'mine:Policy(weight=2)', or keep no runs"
            )
        own += "".join(map(source_of, split_specs(policy)))
    text = repr(settings).encode() + own.encode() + trace_identity
    return hashlib.sha256(text).hexdigest()[:16]


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


def run_sweep(
    trace: Trace,
    jobs: Sequence[Job],
    *,
    processes: int = 1,
    ray: str | None = None,
    resume_from: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[RunResult]:
    """Return the results in the order of ``jobs``. With ``resume_from``, runs that file has are
    read from it and new ones are appended as they are done, a JSON line each; ``progress`` is
    called with (done, all). ``ray``: address of a cluster to run them on.

    ValueError for less than one process, and for a trace without a request."""
    place = Place(processes, ray)
    keys: list[str] = []
    if resume_from:
        identity = identity_of(trace)
        keys = [job.key(identity) for job in jobs]
    return run_grid(
        trace,
        jobs,
        _run,
        keys=keys,
        read=RunResult.from_record,
        write=RunResult.as_record,
        place=place,
        resume_from=resume_from,
        progress=progress,
    )


def _run(trace: Trace, job: Job) -> RunResult:
    target = build_target(job.config, trace.unit, job.serving.times)
    log = serve(target, trace.in_order(), trace.unit, job.serving)
    result = summarise(job.config, job.serving, log, target, trace.full_name)
    if not result.requests:
        raise ValueError(f"{trace.name}: {trace.is_empty_because}")
    return result
