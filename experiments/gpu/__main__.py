"""Test and measure kernels, engine and server on a GPU, in calls of a few minutes.

    python -m experiments.gpu [--part NAME ...] [--budget SECONDS] [--tar FILE] [--again]
    python -m experiments.gpu --dry

`make gpu` and `make gpu-dry` call it; docs/how-to/gpu.md describes a session.

Parts run one after another, each in a separate process, in this order:

- check: one call of each kernel at real shapes, compared with its reference
- repeat: fifty calls of each kernel, which must give equal bits
- parity: the engine compared with the CPU, and hits with cold runs
- big: speed of Qwen3-Next-80B-A3B's geometry, with 8-bit weights if the device has 90 GiB, and with
  4 bits if it has 56 GiB
- tune: launch parameters
- http: a server of a 2B geometry under load
- rivals: times of the kernels next to flash-linear-attention's and torch's
- serve: speed of the 2B geometry
- bench: times of the kernels
- tests: tests of the kernels on the device, without float32
- float32, tests32: `check` and the tests in float32, which compile for a long time

The limits of the parts up to ``http`` add up to 560 seconds, a first call with ``--budget 560``;
the next one has the rest. A part that reaches its limit keeps its records, and continues then.

With ``--budget``, the call ends after that many seconds: the part in progress is stopped and later
ones do not begin. The next call continues. A part that passed with the same code (a hash of its
files, without git) is skipped; others keep their finished records. A part is skipped alone if a
package that it needs is missing.

Each part writes JSON lines into out/gpu. All of them are written into one archive after every part,
and when the call is stopped. --dry runs the same script with tiny shapes in Triton's interpreter
and writes into out/gpu-dry.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch

from experiments.provenance import ROOT, code_hash, known_records, write_json_lines

Verdict = Literal["passed", "failed", "timed out", "stopped", "not begun", "skipped", "done before"]

LOOK_S = 0.05
"""Time between two looks at a process."""
GRACE_S = 5.0
"""Seconds between the request to stop and the kill of a part."""
LEAST_S = 20.0
"""Least budget with which a part begins."""
DRY_SLOWNESS = 10
"""Factor of the limits of a dry run, which may share its processor."""
COLLECTED = ROOT / ".whl"
"""Folder of `make gpu-wheels`."""

ENGINE = ("msgspec", "jinja2", "tokenizers")
SERVER = ("starlette", "uvicorn", "httpx", "prometheus_client", "zmq")
TESTS = ("pytest", "hypothesis")


class GpuPart(NamedTuple):
    """Command of a part, its time limit and the packages that it needs."""

    command: Callable[[Path, bool], list[str]]
    """Arguments: folder of the results, and True for a dry run."""
    limit_s: float
    needs: tuple[str, ...] = ()
    files: str = ""
    """Pattern of its records, relative to the folder of the results."""


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def script(name: str, *arguments: str) -> Callable[[Path, bool], list[str]]:
    """Return the command of a script that writes into the folder of the results."""

    def command(out: Path, dry: bool) -> list[str]:
        flags = ["--dry"] if dry else []
        return module(f"experiments.gpu.{name}", *arguments, "--out", str(out), *flags)

    return command


def kernels(mode: str, *flags: str) -> Callable[[Path, bool], list[str]]:
    """Return the command of a mode of `experiments.gpu.kernels`, with a process per folder. In a
    dry run only plain ``check`` has those: starting them takes longer than most of the cases."""

    def command(out: Path, dry: bool) -> list[str]:
        each = [] if dry and (mode, flags) != ("check", ()) else ["--each"]
        return script("kernels", *each, "--mode", mode, *flags)(out, dry)

    return command


def tests(selected: str, limit_s: float, records: str) -> GpuPart:
    """Return the part of the kernels' tests with names that ``selected`` matches.

    A dry run tests only two files, because the test suite interprets the others. Each file stays in
    one process, so that a kernel is not compiled in several.
    """

    def command(out: Path, dry: bool) -> list[str]:
        parallel = importlib.util.find_spec("xdist") and not dry
        processes = ["-n", str(max(1, (os.cpu_count() or 2) - 4)), "--dist", "loadfile"]
        shortest = [f"tests/kernels/test_{name}.py" for name in ("every_kernel", "pointwise")]
        files = shortest if dry else ["tests/kernels"]
        options = ["-q", "-k", selected, "--deselect", "tests/kernels/test_aot.py"]
        options += ["-p", "experiments.gpu.recorded_tests", "--records", str(out / records)]
        return module("pytest", *files, *options, *(processes if parallel else []))

    return GpuPart(command, limit_s, TESTS, records)


PARTS: dict[str, GpuPart] = {
    "check": GpuPart(kernels("check"), 90.0, files="check_kernels_*.jsonl"),
    "repeat": GpuPart(kernels("repeat"), 40.0, files="repeat_kernels_*.jsonl"),
    "parity": GpuPart(script("parity"), 60.0, ENGINE, "parity.jsonl"),
    "big": GpuPart(script("serving", "--part", "big"), 140.0, ENGINE, "big.jsonl"),
    "tune": GpuPart(script("kernels", "--mode", "tune"), 100.0, files="tune_kernels*.jsonl"),
    "http": GpuPart(script("serving", "--part", "http"), 130.0, (*ENGINE, *SERVER), "http.jsonl"),
    "rivals": GpuPart(kernels("bench"), 120.0, files="bench_kernels_*.jsonl"),
    "serve": GpuPart(script("serving", "--part", "serve"), 120.0, ENGINE, "serve.jsonl"),
    "bench": GpuPart(kernels("ours"), 120.0, files="ours_kernels_*.jsonl"),
    "tests": tests("not fp32", 200.0, "tests.jsonl"),
    "float32": GpuPart(kernels("check", "--float32"), 400.0, files="check_float32_*.jsonl"),
    "tests32": tests("fp32", 500.0, "tests32.jsonl"),
}


def run_part(part: str, out: Path, dry: bool, left_s: float = float("inf")) -> Verdict:
    """Run one part until its end, its limit or that of the call, and record its verdict."""
    plan = PARTS[part]
    missing = [name for name in plan.needs if not importlib.util.find_spec(name)]
    if missing:
        print(f"Skipped: {part} needs {', '.join(missing)}.", file=sys.stderr)
        return record(part, out, "skipped", 0.0, missing=missing)
    if left_s < LEAST_S:
        return "not begun"
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    else:
        environment["KERNELS_ON_DEVICE"] = "1"  # Tests fail instead of using the interpreter.
        environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "out" / "triton"))
    begin = time.monotonic()
    most_s = plan.limit_s * (DRY_SLOWNESS if dry else 1)
    limit_s = min(most_s, left_s)
    verdict: Verdict = "stopped"
    try:
        verdict = run_for(plan.command(out, dry), environment, limit_s)
        if verdict == "timed out" and limit_s < most_s:
            verdict = "stopped"
    finally:
        record(part, out, verdict, time.monotonic() - begin)
    return verdict


def record(part: str, out: Path, verdict: Verdict, seconds: float, **more: Any) -> Verdict:
    """Write the verdict and the duration of a part to its done file."""
    done = {"part": part, "verdict": verdict, "seconds": round(seconds, 1), "device": device()}
    write_json_lines(done_file(out, part), [done | more], {"code": code_hash()})
    return verdict


def run_for(command: list[str], environment: dict[str, str], limit_s: float) -> Verdict:
    """Run a command until its end or its limit.

    All its processes are asked to stop and then killed, because they would share the device with
    the next part.
    """
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return "failed" if _wait(process, limit_s) else "passed"
    except BaseException as error:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _wait(process, GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if isinstance(error, subprocess.TimeoutExpired):
            return "timed out"
        raise


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int:
    """Return the exit code. Raises TimeoutExpired. An error of a signal handler comes between two
    looks, because one inside ``Popen.wait`` can leave a lock that blocks the next wait for ever."""
    for _ in range(int(limit_s / LOOK_S) + 1):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            code = process.poll()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if code is not None:
            return code
        threading.Event().wait(LOOK_S)
    raise subprocess.TimeoutExpired(process.args, limit_s)


def install_wheels() -> None:
    """Install the collected wheels that are missing, without a network."""
    wheels = sorted(COLLECTED.glob("*.whl"))
    absent = [path for path in wheels if not importlib.util.find_spec(_import_name(path))]
    if absent:
        options = ["--no-index", "--no-deps", "--quiet", "--disable-pip-version-check"]
        # A failure is no end: parts that lack a package are skipped.
        subprocess.run(module("pip", "install", *options, *map(str, absent)), check=False)
        importlib.invalidate_caches()


def _import_name(wheel: Path) -> str:
    name = wheel.name.split("-")[0].lower()
    return {"pyzmq": "zmq", "pytest_xdist": "xdist"}.get(name, name)


def write_archive(path: Path, out: Path) -> None:
    """Write all results into one archive, in place of the former one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with tarfile.open(unfinished, "w:gz") as archive:
        archive.add(out, arcname=out.name)
    unfinished.replace(path)


def done_file(out: Path, part: str) -> Path:
    return out / f"{part}.done.jsonl"


def is_done(out: Path, part: str) -> bool:
    """Return True if the part passed with the same code."""
    done = known_records(done_file(out, part), {"code": code_hash()})
    return any(record["verdict"] == "passed" for record in done)


def device() -> str:
    """Return the name of the measured device."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return "cpu, interpreted"
    return str(torch.get_device_module(found).get_device_name())


def stop(number: int, frame: FrameType | None) -> None:
    """End this process after its part has ended and the archive is written."""
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--again", action="store_true", help="repeat parts that passed with this code"
    )
    parser.add_argument("--dry", action="store_true", help="tiny shapes, interpreted on the CPU")
    parser.add_argument("--budget", type=float, help="seconds after which the call ends")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--tar", type=Path, help="archive of all results (.tar.gz)")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    if not options.dry and torch.accelerator.current_accelerator(check_available=True) is None:
        print("No GPU found. Use --dry to test the script without one.", file=sys.stderr)
        return 2
    out = (options.out or ROOT / "out" / ("gpu-dry" if options.dry else "gpu")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    tar = options.tar or out.with_name(out.name + ".tar.gz")
    install_wheels()
    before = signal.signal(signal.SIGTERM, stop)
    verdicts: dict[str, Verdict] = {}
    try:
        for part in options.part:
            if not options.again and is_done(out, part):
                verdicts[part] = "done before"
                continue
            if options.again:
                for file in out.glob(PARTS[part].files):
                    file.unlink()
            left_s = float("inf")
            if options.budget is not None:
                left_s = options.budget - (time.monotonic() - begin) - GRACE_S
            print(f"-- {part}", flush=True)
            verdicts[part] = run_part(part, out, options.dry, left_s)
            write_archive(tar, out)
    finally:
        write_archive(tar, out)
        signal.signal(signal.SIGTERM, before)
    print(f"{device()}: " + ", ".join(f"{part} {verdict}" for part, verdict in verdicts.items()))
    if {"stopped", "not begun"} & {*verdicts.values()}:
        return 3
    return 1 if {"failed", "timed out"} & {*verdicts.values()} else 0


if __name__ == "__main__":
    sys.exit(main())
