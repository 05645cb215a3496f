"""Replay of decisions and bits: proof that a change leaves both as they were.

    python -m tests.replay                  compare with the hashes in tests/replay.json
    python -m tests.replay --base HEAD~1    compare with another commit, line by line
    python -m tests.replay --update         store today's hashes

The log of a run has a line in words for each step, checkpoint, eviction and request, or for each
token with the bits of its log-probability. Decisions do not depend on the processor. Bits do, so
their hashes are stored by ``machine``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine import Engine, EngineConfig, SamplingParams
from engine.config import BUILTIN_DIR
from engine.plugins.speculation.drafters import drafters_of
from engine.runner.backends import digest_of, machine_words, override_all
from engine.schedule.drafting import Drafting
from engine.weights.model_config import read_config
from hybridcache.allocators.moves import Copy
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.lab.runs.closed_loop import LoopRun, sessions_of
from hybridcache.lab.runs.fleet import Fleet, FleetConfig, Replica
from hybridcache.lab.runs.target import LeasedRequest, LeaseTarget
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces import open_trace
from hybridcache.lab.traces.sizes import working_set_bytes
from hybridcache.lab.traces.trace import Trace
from hybridcache.radix.api import Listener
from tests.lab.runs import test_closed_loop as virtual
from tests.lab.runs.test_simulate import SMALL
from tests.oracle import OracleSampler, engine_with
from tests.selection import ROOT

STORE = ROOT / "tests" / "replay.json"
CHUNK = 32
"""Lines per stored hash. Each hash covers all lines from the first one."""
Log = list[str]
Run = Callable[[], Log]


class Recorder(Listener):
    """Log of the decisions of one run: a listener of its cache, and the step times of its loop."""

    def __init__(self) -> None:
        self.log: Log = []
        self.loop: LoopRun | None = None
        self._num_ended, self._num_decodes = 0, -1

    def add_request(self, name: str, request: Any) -> None:
        lost = ", ".join(f"{cause} {n}" for cause, n in request.losses._asdict().items() if n)
        self.log.append(f"request {name}: {request.cached_len} cached; lost: {lost or 'none'}")
        if num_preemptions := getattr(request, "num_preemptions", 0):
            self.log[-1] += f"; preempted {num_preemptions} times"

    def add_ended(self) -> None:
        """Add the requests of the loop that have ended since the last call."""
        ended = self.loop.answered[self._num_ended :] if self.loop else ()
        for one in ended:
            self.add_request(f"{one.turn} of session {one.place}", one)
        self._num_ended += len(ended)

    def step_seconds(
        self, prefills: Sequence[tuple[int, int]], num_decodes: int, context: int
    ) -> float:
        """See ``StepTimes``. A step that only decodes has no line if it goes on with the last."""
        self.add_ended()
        goes_on = num_decodes == self._num_decodes and self.log[-1].startswith("step")
        if prefills or not goes_on:
            spans = " ".join(f"{start}-{end}" for start, end in prefills) or "nothing"
            self.log.append(f"step: prefill {spans}; {num_decodes} decodes of {context} tokens")
        self._num_decodes = num_decodes
        return virtual.TIMES.step_seconds(prefills, num_decodes, context)

    def kv_removed(self, node: Any) -> None:
        self.log.append(f"evict: KV of {node.start}-{node.end}, last token {node.tokens[-1]}")

    def checkpoint_removed(self, node: Any) -> None:
        self.log.append(f"evict: state at {node.end}, last token {node.tokens[-1]}")

    def checkpoint_stored(self, node: Any) -> None:
        self.log.append(f"save: state at {node.end}, last token {node.tokens[-1]}")


# --- Decisions of the simulator -------------------------------------------------------------------

SAMPLES = ROOT / "tests" / "lab" / "traces" / "samples"
TRACES = {
    "chat?head=50": 0.25,
    "few-shot?head=40": 0.25,
    "agent?head=24": 0.6,
    "branch?head=24": 0.4,
    "short?head=100": 0.2,
    "conversations?live=8&num_conversations=16&turns=3": 0.3,
    "append-only-chat?sessions=6&turns=8&added=300": 0.4,
    "diffuse-cut-points?requests=50&documents=2&length=2048": 0.4,
    "agent-tree?tasks=3&depth=3&root=1000": 0.4,
    "tree-of-thoughts?problems=2&depth=2&beam=2&proposals=3&samples=2": 0.25,
    "tree-search?tasks=5&steps=8&root=800": 0.25,
    "sharegpt-like?requests=40&sessions=10": 0.3,
    "coding_agent.jsonl.gz?head=16": 0.25,
    "mooncake.jsonl.gz?head=16": 0.4,
}
"""Traces, and the share of all their KV and states that fits in the memory."""
TIERED = ("chat?head=50", "few-shot?head=40", "short?head=100", "mooncake.jsonl.gz?head=16")
FIXED = "branch,boundary,backoff,every:256,end"
OTHERS = ("marconi", "gdsf", "sieve", "lhd", "fifo")
ADMISSIONS = ("sessions", "oldest", "sessions", "longest-match", "sessions", "live:3")


def cells(specs: Iterable[str] = TRACES) -> Iterator[tuple[str, Trace, Scenario]]:
    """Yield each trace with each pair of policies and each memory: (name, trace, scenario)."""
    for spec in specs:
        number = list(TRACES).index(spec)
        trace = open_trace(SAMPLES / spec if ".gz" in spec else spec).kept()
        unit = trace.unit
        longest = max(one.num_tokens(unit) + one.num_answer_tokens(unit) for one in trace)
        least = SMALL.kv_bytes_per_token * (longest + 640)
        gib = max(TRACES[spec] * working_set_bytes(trace, SMALL), least) / GIB
        arena = Scenario(trace, SMALL, gib, rate=2.0, seeds=(0,), max_running=6, token_budget=512)
        arena = replace(arena, admission=ADMISSIONS[number % len(ADMISSIONS)])
        pools = replace(arena, gib=1.4 * gib, memory="pools", kv_share=0.7)
        other = OTHERS[number % len(OTHERS)]
        pairs = ("lru", FIXED), ("survival", "adaptive"), (other, "branch,backoff:2")
        for policy, placement in pairs:
            for cell in (arena, pools):
                cell = replace(cell, policy=policy, checkpoints=placement)
                yield f"{spec} {cell.memory} {policy}", trace, cell


def closed_loop(trace: Trace, cell: Scenario) -> Log:
    """Serve the sessions of ``trace`` with the planner of the engine."""
    recorder = Recorder()
    recorder.loop = LoopRun(replace(cell, times=recorder), sessions_of(trace))
    recorder.loop.manager.cache.subscribe(recorder)
    recorder.loop.run()
    recorder.add_ended()
    return recorder.log


class FewAtOnce(Fleet):
    """Fleet whose replicas serve at most four requests at a time."""

    def _start(self, replica: Replica, now: float) -> None:
        if (replica.prefilling is not None) + len(replica.decoding) < 4:
            super()._start(replica, now)


def tiered(trace: Trace, cell: Scenario) -> Log:
    """Serve the requests of ``trace`` through host and disk tiers, at most four at a time."""
    recorder, size = Recorder(), cell.size_gib / 2
    cell = replace(cell, gib=size, host_gib=size, disk_gib=2 * size)
    config, geometry = FleetConfig(replicas=1, router="least_loaded"), cell.geometry()
    loop = FewAtOnce(cell, geometry, trace.unit, config, cell.prefill_times(geometry))
    [target] = (replica.target for replica in loop.replicas.values())
    assert target.cache.offload is not None
    target.cache.subscribe(recorder)
    copied = target.cache.offload.copied_rows

    def begin(target: LeaseTarget, lease: Any, request: Any) -> LeasedRequest:
        begun = LeasedRequest(target, lease, request)
        recorder.add_request(f"of session {request.session}", begun)
        rows = ", ".join(f"{source} to {other} {n}" for (source, other), n in copied.items())
        recorder.log.append(f"rows copied so far: {rows}")
        return begun

    target.request_type = begin  # type: ignore[assignment]
    loop.run(trace.in_order())
    return recorder.log


# --- Decisions of the engine ----------------------------------------------------------------------


class RecordingRunner(virtual.VirtualRunner):
    """Runner without a model that records the copies and segments of every step."""

    recorder: Recorder

    def forward(self, batch: Any, drawn: Sequence[int] = ()) -> Any:
        log, words = self.recorder.log, []
        for one in batch.moves:
            if isinstance(one, Copy):
                log.append(f"copy: {one.kind} at {one.position}, {one.src_tier} to {one.dst_tier}")
            else:
                log.append(f"{type(one).__name__.lower()}: rows")
        for one in batch.segments:
            kind = f"decode with {one.num_drafts} drafts" if one.is_decode else "prefill"
            saves = "".join(f" saves {position}" for position, _ in one.exports)
            words.append(f"{kind} of {one.request.arrival} {one.start}-{one.end}{saves}")
        log.append("step: " + ", ".join(words))
        return super().forward(batch, drawn)


def in_engine(policy: str, slots: int | None, overlap: str, drafts: bool, **settings: Any) -> Log:
    """Serve random sessions in virtual time, on memory that proves its reads: two pools, or an
    arena if ``slots`` is None."""
    geometry = ModelGeometry.from_config(read_config(BUILTIN_DIR) | {"head_dim": 128})
    runner = RecordingRunner(2500, slots, geometry=geometry)
    recorder = runner.recorder = Recorder()
    placement = "adaptive" if policy == "survival" else FIXED
    settings |= {"eviction": policy, "checkpoints": tuple(placement.split(","))}
    config = EngineConfig(max_running=6, token_budget=256, overlap=overlap, **settings)
    drafters = drafters_of({"tree": 4, "mtp": 3}, runner.guess, shares=True)
    hooks = {"drafting": Drafting(drafters, max_verified=16)} if drafts else {}
    parts = {"runner": runner, "sampler": OracleSampler(), "clock": lambda: runner.now_s}
    engine = engine_with(lambda _: hooks, config, **parts)
    engine.cache.subscribe(recorder)
    engine.on_end.append(lambda one: recorder.add_request(str(one.arrival), one))
    virtual.serve(engine, virtual.script(np.random.default_rng(3), 10), 2.0, 3)
    engine.close()
    return recorder.log


def decisions() -> Iterator[tuple[str, Run]]:
    """Yield the name and the function of each run of decisions."""
    for name, trace, cell in cells():
        yield name, partial(closed_loop, trace, cell)
        if name.startswith(TIERED):
            yield f"{name} tiers", partial(tiered, trace, cell)
    for policy in ("lru", "survival"):
        run = partial(in_engine, policy)
        yield f"engine arena {policy}", partial(run, None, "on", False)
        yield f"engine pools {policy} drafts", partial(run, 14, "on", True)
        settings = {"host_gib": 1e-3, "admission": "sessions"}
        yield f"engine arena {policy} drafts host", partial(run, None, "off", True, **settings)


# --- Bits -----------------------------------------------------------------------------------------

FAMILIES = ("granite_moe_hybrid", "jamba", "kimi_linear", "lfm2", "qwen3", "qwen3_next")
"""Families that together run every kind of layer."""


def bits(family: str, dtype: str, kernels: str = "") -> Log:
    """Log 64 tokens of a small random model, three of four after hits."""
    from transformers.utils import logging

    from tests.engine.small_models import save_oracle

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_oracle(family, Path(folder))
        settings = {"model": folder, "device": "cpu", "dtype": dtype, "kernels": kernels}
        engine = Engine(EngineConfig(**settings, cache_gib=0.02))
    rng = np.random.default_rng(3)
    first, other = (rng.integers(0, 199, 150).tolist() for _ in range(2))
    params = SamplingParams(max_tokens=16, temperature=0, logprobs=0, ignore_eos=True)
    outputs = engine.generate([first, first[:100] + other[:30]], params)
    continued = first + outputs[0].token_ids + other[:9]
    outputs += engine.generate([continued, first[:140]], params)
    engine.close()
    log = []
    for number, output in enumerate(outputs):
        log.append(f"request {number}: {output.cached_len} cached")
        log += [f"token {one.token_id}, logprob {one.logprob.hex()}" for one in output.logprobs]
    return log


def bit_runs() -> Iterator[tuple[str, Run]]:
    """Yield the name and the function of each run of bits."""
    for family, dtype in itertools.product(FAMILIES, ("float32", "bfloat16")):
        yield f"{family} {dtype}", partial(bits, family, dtype)
        yield f"{family} {dtype} reference", partial(bits, family, dtype, override_all("reference"))


PROCESSOR = r"^(?:cpu family|model|model name|stepping|cache size|flags)\s*:.*"
"""Lines of /proc/cpuinfo by which a library may choose its kernels."""


def machine() -> str:
    """Describe all that may change bits and is no part of this repository."""
    import torch
    import transformers

    file = Path("/proc/cpuinfo")
    facts = re.findall(PROCESSOR, file.read_text() if file.is_file() else "", re.M)
    limits = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
    words = machine_words(torch.device("cpu")) | {
        "transformers": transformers.__version__,
        "processor": digest_of("".join(sorted(set(facts))).encode())[:12],
        "limits": " ".join(filter(None, map(os.environ.get, limits))) or "none",
        "threads": str(torch.get_num_threads()),
    }
    return "; ".join(f"{name} {word}" for name, word in words.items())


# --- Comparison -----------------------------------------------------------------------------------


def hashes(log: Log) -> str:
    """Return a hash for each chunk, of the lines up to its end."""
    digest, found = hashlib.blake2b(digest_size=3), []
    for start in range(0, len(log), CHUNK):
        digest.update("\n".join([*log[start : start + CHUNK], ""]).encode())
        found.append(digest.hexdigest())
    return " ".join(found)


def difference(known: Log | str, log: Log) -> str | None:
    """Describe the first difference of ``log`` from another log, or from stored hashes. None if
    they are equal."""
    parts = (known.split(), hashes(log).split()) if isinstance(known, str) else (known, log)
    pairs = [*itertools.zip_longest(*parts, fillvalue="(no more lines)")]
    first = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if first is None:
        return None
    if isinstance(known, str):
        place = min(first * CHUNK, len(log))
        line = f"one of lines {place + 1} to {place + CHUNK}"
        shown = [f"now: {one}" for one in log[place : place + CHUNK]]
    else:
        place, line = first, f"line {first + 1}"
        shown = [f"both: {one}" for one in log[max(0, place - 2) : place]]
        shown += [f"base: {pairs[place][0]}", f"now:  {pairs[place][1]}"]
    steps, ends = (sum(one.startswith(word) for one in log[:place]) for word in ("step", "request"))
    at = f"{line} of {len(log)}, after {steps} lines of steps and {ends} of requests"
    return "\n    ".join([f"differs first at {at}", *shown])


def differences(known: Mapping[str, Any], logs: Mapping[str, Log]) -> list[str]:
    """Return a text for each run that differs, or that only one of both has."""
    found = [f"{name}: this run is missing" for name in known if name not in logs]
    for name, log in logs.items():
        text = difference(known[name], log) if name in known else "this run is new"
        found += [f"{name}: {text}"] if text else []
    return found


def read_store() -> dict[str, Any]:
    return json.loads(STORE.read_text())  # type: ignore[no-any-return]


def update(logs: Mapping[str, Mapping[str, Log]]) -> None:
    """Store the hashes of ``logs``. If the bits of this machine have changed, the hashes of other
    machines are out of date and are removed."""
    key, bits = machine(), read_store()["bits"]
    found = {kind: {name: hashes(log) for name, log in of.items()} for kind, of in logs.items()}
    others = bits if bits.get(key, found["bits"]) == found["bits"] else {}
    store = {"decisions": found["decisions"], "bits": others | {key: found["bits"]}}
    STORE.write_text(json.dumps(store, indent=1) + "\n")


def logs_of(commit: str) -> dict[str, dict[str, Log]]:
    """Return the logs of another commit, which replays itself in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "-C", str(ROOT), "archive", "--format=tar", commit]
        data = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(folder, filter="data")
        if not Path(folder, "tests", "replay.py").is_file():
            raise SystemExit(f"{commit} has no tests/replay.py: name a commit that has one.")
        file = Path(folder) / "logs.json"
        command = [sys.executable, "-m", "tests.replay", "--write", str(file)]
        subprocess.run(command, check=True, cwd=folder, env=os.environ | {"PYTHONPATH": folder})
        return json.loads(file.read_text())  # type: ignore[no-any-return]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.replay", description=__doc__.splitlines()[0])
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--base", metavar="COMMIT", help="compare with this commit, line by line")
    way.add_argument("--update", action="store_true", help="store today's hashes")
    way.add_argument("--write", metavar="FILE", help="write all logs; used by --base")
    options = parser.parse_args(arguments)
    runs = {"decisions": decisions(), "bits": bit_runs()}
    logs = {kind: {name: run() for name, run in of} for kind, of in runs.items()}
    if options.write:
        Path(options.write).write_text(json.dumps(logs))
        return 0
    if options.update:
        update(logs)
    known, key, base = read_store(), machine(), options.base
    bits_with = "the hashes of this machine" if key in known["bits"] else "nothing (use --base)"
    known = logs_of(base) if base else known | {"bits": known["bits"].get(key, logs["bits"])}
    found = {kind: differences(known[kind], logs[kind]) for kind in logs}
    for first, *others in filter(None, found.values()):
        print("\n".join([first, *(text.splitlines()[0] for text in others)]))
    sides = {"decisions": base or STORE.name, "bits": f"{base or bits_with}; {key}"}
    for kind, side in sides.items():
        num_runs, num_different = len(logs[kind]), len(found[kind])
        print(f"{kind}: {num_different} of {num_runs} runs differ, compared with {side}.")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
