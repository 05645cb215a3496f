"""Test and measure kernels, engine and server on a GPU, in one command.

    python -m experiments.gpu [--part kernels bench parity serve http big] [--again] [--tar FILE]
    python -m experiments.gpu --dry

`make gpu` and `make gpu-dry` call it.

Parts run one after another, each in a separate process and in less than eight minutes:

- kernels: tests of the kernels on the device
- bench: benchmarks of the kernels
- parity: the engine compared with the CPU, and hits with cold runs
- serve: speed of a 2B geometry
- http: a server of that geometry under load
- big: speed of Qwen3-Next-80B-A3B's geometry with 8-bit weights

Each part writes JSON lines into experiments/results/gpu/. A part that passed with the same code (a
hash of its files, without git) is skipped. A part that failed or ran out of time is repeated;
`serve` and `big` then keep their finished records. --dry runs the same script with tiny shapes in
Triton's interpreter and writes into out/gpu-dry/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from experiments.provenance import RESULTS, ROOT, code_hash, read_json_lines, write_json_lines

Verdict = Literal["passed", "failed", "timed out", "done before"]

LIMITS_S = {
    "kernels": 310.0,
    "bench": 290.0,
    "parity": 170.0,
    "serve": 170.0,
    "http": 210.0,
    "big": 350.0,
}
"""Time limit of each part, 25 minutes in total. A part over its limit keeps its records and is
repeated by the next call."""


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def kernels(out: Path, dry: bool) -> list[str]:
    """Return the command for the kernels' tests.

    A dry run tests only one file, because the test suite interprets the others. With pytest-xdist,
    four processes compile at the same time.
    """
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    tests = ["tests/kernels/test_pointwise.py"] if dry else ["tests/kernels", *parallel]
    skipped = ["--deselect", "tests/kernels/test_aot.py"]
    report = [
        "-o",
        "junit_family=xunit1",
        f"--junitxml={out / 'kernels.xml'}",
    ]  # The other family omits the properties of a test.
    return module("pytest", "-q", *tests, *skipped, *report)


def bench(out: Path, dry: bool) -> list[str]:
    return module("experiments.gpu.kernels", "--out", str(out), *_dry(dry))


def parity(out: Path, dry: bool) -> list[str]:
    return module("experiments.gpu.parity", "--out", str(out), *_dry(dry))


def serve(out: Path, dry: bool) -> list[str]:
    return module("experiments.gpu.serving", "--part", "serve", "--out", str(out), *_dry(dry))


def http(out: Path, dry: bool) -> list[str]:
    return module("experiments.gpu.serving", "--part", "http", "--out", str(out), *_dry(dry))


def big(out: Path, dry: bool) -> list[str]:
    return module("experiments.gpu.serving", "--part", "big", "--out", str(out), *_dry(dry))


PARTS: dict[str, Callable[[Path, bool], list[str]]] = {
    part.__name__: part for part in (kernels, bench, parity, serve, http, big)
}


def _dry(dry: bool) -> list[str]:
    return ["--dry"] if dry else []


def run_part(part: str, out: Path, dry: bool) -> Verdict:
    """Run one part until its end or its limit, and write its verdict and duration to
    ``<part>.done``."""
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    else:
        environment["KERNELS_ON_DEVICE"] = "1"  # Tests fail instead of using the interpreter.
    begin = time.monotonic()
    verdict = run_for(PARTS[part](out, dry), environment, LIMITS_S[part])
    seconds = time.monotonic() - begin
    report = out / "kernels.xml"
    if part == "kernels" and report.exists():
        write_json_lines(out / "kernels.jsonl", test_records(report))
        report.unlink()
    record = {"part": part, "verdict": verdict, "seconds": round(seconds, 1), "device": device()}
    write_json_lines(done_file(out, part), [record], {"code": code_hash()})
    return verdict


def run_for(command: list[str], environment: dict[str, str], limit_s: float) -> Verdict:
    """Run a command until its end or its limit. All its processes are killed at the limit, because
    they would share the device with the next part."""
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            return "failed" if process.wait(limit_s) else "passed"
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return "timed out"
            raise


def test_records(report: Path) -> list[dict[str, object]]:
    """Return the number of passed tests, the devices and the names of failed tests, per file."""
    files: dict[str, dict[str, list[str]]] = {}
    devices: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = {child.tag for child in case}
        outcome = next((tag for tag in ("failure", "error", "skipped") if tag in found), "passed")
        file = case.get("classname", "")
        outcomes = files.setdefault(file, {})
        devices.setdefault(file, set()).update(
            note.get("value", "") for note in case.iter("property") if note.get("name") == "device"
        )
        outcomes.setdefault(outcome, []).append(case.get("name", ""))
    return [
        {"file": file, "devices": sorted(devices[file])}
        | {outcome: len(names) for outcome, names in outcomes.items()}
        | {"wrong": outcomes.get("failure", []) + outcomes.get("error", [])}
        for file, outcomes in sorted(files.items())
    ]


def done_file(out: Path, part: str) -> Path:
    return out / f"{part}.done.jsonl"


def is_done(out: Path, part: str) -> bool:
    """Return True if the part passed with the same code."""
    try:
        before, [record] = read_json_lines(done_file(out, part))
    except (OSError, ValueError, KeyError, json.JSONDecodeError):
        return False
    return record["verdict"] == "passed" and before["settings"]["code"] == code_hash()


def device() -> str:
    """Return the name of the measured device."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return "cpu, interpreted"
    return str(torch.get_device_module(found).get_device_name())


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
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--tar", type=Path, help="write all results into this .tar.gz")
    options = parser.parse_args(arguments)
    if not options.dry and torch.accelerator.current_accelerator(check_available=True) is None:
        print("No GPU found. Use --dry to test the script without one.", file=sys.stderr)
        return 2
    out = options.out or (ROOT / "out" / "gpu-dry" if options.dry else RESULTS / "gpu")
    out = out.resolve()  # Parts run in another directory.
    out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in ("pytest", "hypothesis") if not importlib.util.find_spec(name)]
    if "kernels" in options.part and missing:
        print(f"Missing for the tests: pip install {' '.join(missing)}.", file=sys.stderr)
        return 2
    verdicts: dict[str, Verdict] = {}
    for part in options.part:
        if not options.again and is_done(out, part):
            verdicts[part] = "done before"
            continue
        if options.again:
            (out / f"{part}.jsonl").unlink(missing_ok=True)
        print(f"-- {part}", flush=True)
        verdicts[part] = run_part(part, out, options.dry)
    if options.tar:
        options.tar.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(options.tar, "w:gz") as archive:
            archive.add(out, arcname=out.name)
    print(f"{device()}: " + ", ".join(f"{part} {verdict}" for part, verdict in verdicts.items()))
    return int(any(verdict in ("failed", "timed out") for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
