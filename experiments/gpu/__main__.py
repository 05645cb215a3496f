"""Test and measure kernels, engine and server on a GPU.

    python -m experiments.gpu [--part NAME ...] [--only gdn] [--again]
    python -m experiments.gpu --dry

`make gpu` and `make gpu-dry` call it; docs/how-to/gpu.md describes a session.

Parts are runs of pytest, one after another, in this order:

- check: one call of each kernel at real shapes, compared with its reference, and fifty calls, which
  must give equal bits
- parity: the engine compared with the CPU, and hits with cold runs
- big: speed of Qwen3-Next-80B-A3B's geometry, with 8-bit weights if the device has 90 GiB, and with
  4 bits if it has 56 GiB
- tune: launch parameters
- http: a server of a 2B geometry under load
- bench: times of the kernels next to flash-linear-attention's and torch's
- serve: speed of the 2B geometry
- tests: tests of the kernels on the device, without float32
- float32: `check` and the tests in float32, which compile for a long time

Each part writes out/gpu/PART.jsonl, a line per test as soon as it ends. A call may be stopped at
any time: the next one skips the tests that passed with the same code (a hash of its files, without
git). A kernel that fails, hangs or ends its process costs only its own test. --dry runs the same
tests with tiny shapes in Triton's interpreter and writes into out/gpu-dry.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.provenance import ROOT

HERE = "experiments/gpu"
LONGEST_S = 600
"""Most seconds of a test on a device."""
PARALLEL = ("check", "tests", "float32")
"""Parts without times, which run in several processes."""
KERNELS, SERVING = f"{HERE}/kernels.py", f"{HERE}/serving.py"
TESTED = ("tests/kernels", "--deselect", "tests/kernels/test_aot.py")
PARTS: dict[str, tuple[tuple[str, ...], str]] = {
    "check": ((f"{KERNELS}::test_right", f"{KERNELS}::test_repeats"), ""),
    "parity": ((f"{HERE}/parity.py",), ""),
    "big": ((SERVING,), "big"),
    "tune": ((f"{KERNELS}::test_tuning",), ""),
    "http": ((SERVING,), "http"),
    "bench": ((f"{KERNELS}::test_times",), ""),
    "serve": ((SERVING,), "serve or drafts"),
    "tests": (TESTED, "not fp32"),
    "float32": ((f"{KERNELS}::test_right_in_float32", *TESTED), "fp32 or in_float32"),
}
"""Tests of each part, and the expression that selects them."""


def run_part(part: str, out: Path, dry: bool, again: bool, only: str = "") -> bool:
    """Run the tests of one part whose names match ``only``. Returns True if none failed."""
    options = ["-p", "experiments.gpu.report", "--report", str(out / f"{part}.jsonl")]
    options += ["--again"] * again + ["-s"]
    (tests, selected), environment = PARTS[part], dict(os.environ)
    names = [f"({one})" for one in (selected, only) if one]
    environment.pop("TRITON_INTERPRET", None)
    processes = max(2, (os.cpu_count() or 2) // 2) if part in PARALLEL and not dry else 1
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        if TESTED[0] in tests:  # The suite interprets the others.
            files = [f"tests/kernels/test_{name}.py" for name in ("every_kernel", "pointwise")]
            tests = (*tests[: -len(TESTED)], *files)
    else:
        environment["KERNELS_ON_DEVICE"] = "1"  # Tests fail instead of using the interpreter.
        environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "out" / "triton"))
        options += ["--timeout", str(LONGEST_S), "--timeout-method", "thread"]
    options += ["-n", str(processes), "--dist", "load", "-k", " and ".join(names)]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    # Status 5: no test is left.
    return subprocess.run(command, cwd=ROOT, env=environment).returncode in (0, 5)


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--again", action="store_true", help="repeat tests that passed")
    parser.add_argument("--only", default="", help="words in the names of tests: 'gdn and decode'")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, interpreted on the CPU")
    parser.add_argument("--out", type=Path, help="folder of the reports")
    options = parser.parse_args(arguments)
    if not options.dry and torch.accelerator.current_accelerator(check_available=True) is None:
        print("No GPU found. Use --dry to test the script without one.", file=sys.stderr)
        return 2
    out = (options.out or ROOT / "out" / ("gpu-dry" if options.dry else "gpu")).resolve()
    verdicts = {}
    for part in options.part:
        print(f"-- {part}", flush=True)
        verdicts[part] = run_part(part, out, options.dry, options.again, options.only)
    said = (f"{part} {'passed' if passed else 'failed'}" for part, passed in verdicts.items())
    print(", ".join(said))
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
