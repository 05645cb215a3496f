"""Compile the launches of kernel folders ahead of time, without a GPU.

A launch file has ``LAUNCHES``: functions by name that call public kernel functions on CPU tensors
of realistic sizes. Each launch in them is compiled for each target instead of run. Signature,
constants and alignment are those of the real call.

    # One JSON line per kernel and target:
    python tests/kernels/aot.py tests/kernels/launches/moe.py
    # All kernels, with provenance:
    python tests/kernels/aot.py --out experiments/results/kernel_code.jsonl \\
        tests/kernels/launches/*.py

It needs a separate process, because Triton chooses between interpreter and compiler at import.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Triton's (backend, architecture, warp size) by target name."""
SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
"""Shared memory available to one program, by target."""


class _AbsentDevice:
    """Stand-in for Triton's driver, which answers queries and is never launched on."""

    def __init__(self, target: Any, number: int) -> None:
        self._target, self._number = target, number
        self.utils = self

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._number

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[list(TARGETS)[device]]}

    def get_current_stream(self, device: int) -> int:
        return 0


def keep(path: Path, text: str) -> None:
    """Write a file at once: other processes may read it."""
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(text)
    new.replace(path)


class Compiled(NamedTuple):
    """Compiled kernel and the log of NVIDIA's assembler."""

    kernel: Any
    log: str


@contextmanager
def recording(target: str) -> Iterator[list[Compiled]]:
    """Compile kernels for ``target`` instead of running them, and yield the list of results."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        with redirect_stdout(io.StringIO()) as log:
            result = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        # A cached kernel has no log, so the first one is kept.
        kept = Path(os.environ["TRITON_CACHE_DIR"]) / f"{result.hash}.log"
        if log.getvalue():
            keep(kept, log.getvalue())
        compiled.append(Compiled(result, kept.read_text() if kept.exists() else ""))
        return result

    driver.set_active(_AbsentDevice(GPUTarget(*TARGETS[target]), list(TARGETS).index(target)))
    JITFunction.run = compile_only
    knobs.nvidia.dump_ptxas_log = True
    try:
        yield compiled
    finally:
        JITFunction.run = run


def compile_launches(
    launches: dict[str, Callable[[], object]], targets: list[str]
) -> Iterator[dict[str, object]]:
    """Compile ``launches`` for each target and yield a record per kernel, launch and target."""
    for name, launch in launches.items():
        for target in targets:
            with recording(target) as compiled:
                launch()
            for kernel, log in compiled:
                yield {
                    "launch": name,
                    "kernel": kernel.metadata.name,
                    "target": target,
                    "num_warps": kernel.metadata.num_warps,
                    "num_stages": kernel.metadata.num_stages,
                    "shared_bytes": kernel.metadata.shared,
                    "carried_bounds": carried_bounds(kernel.asm["ttir"]),
                } | (_nvidia(kernel, log) if "ptx" in kernel.asm else _amd(kernel))


def carried_bounds(ttir: str) -> int:
    """Return how many bounds of loops are carried by an outer loop.

    Triton up to 3.7 may replace such a bound by its first value: its pass that removes layout
    conversions drops a carried number that only bounds use.
    """
    carried: set[str] = set()
    found = 0
    loop = r"scf\.for %\w+ = (%\w+) to (%\w+) step %\w+(?: iter_args\(([^)]*)\))?"
    for lower, upper, arguments in re.findall(loop, ttir):
        found += (lower in carried) + (upper in carried)
        carried.update(re.findall(r"(%\w+) =", arguments))
    return found


def _nvidia(kernel: Any, log: str) -> dict[str, int | bool]:
    """Return registers and spilled bytes of a thread, and counts of PTX instructions."""
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", log)[1]),
        "wgmma": ptx.count("wgmma.mma_async"),
        # Each product waits for the previous one if an accumulator is used between them.
        "serialised": "wgmma.mma_async instructions are serialized" in log,
        "mma": ptx.count("mma.sync"),
        "cp_async": ptx.count("cp.async.ca") + ptx.count("cp.async.cg"),
        "tma": ptx.count("cp.async.bulk"),
    } | (_products(kernel) if kernel.metadata.target.arch == 90 else {"products_in_danger": 0})


ARITHMETIC = ("FFMA", "FMUL", "FADD", "HMMA", "HGMMA")


def _products(kernel: Any) -> dict[str, Any]:
    """Return how many asynchronous products have registers that change while they run, the loops
    with such products (instructions, products, conversions of floating-point numbers, and parts of
    divisions), and counts of instructions that round. Nothing is known without the disassembler.
    """
    from tests.kernels import machine_code

    disassembler = machine_code.find_disassembler()
    if disassembler is None:
        return {"products_in_danger": None, "loops": [], "arithmetic": None}
    kept = Path(os.environ["TRITON_CACHE_DIR"]) / f"{kernel.hash}.sass"
    if not kept.exists():
        keep(kept, machine_code.disassemble(kernel.asm["cubin"], disassembler))
    code = kept.read_text()
    loops = [
        [loop.num_instructions, loop.num_products, loop.counts["F2F"], loop.counts["MUFU"]]
        for loop in machine_code.product_loops(code)
    ]
    names = Counter(line.name.split(".")[0] for line in machine_code.parse(code))
    return {
        "products_in_danger": len(machine_code.registers_in_danger(code)),
        "loops": loops,
        "arithmetic": {name: names[name] for name in ARITHMETIC},
    }


def _amd(kernel: Any) -> dict[str, int]:
    """Return vector registers of a lane, spilled bytes, and the count of matrix instructions."""
    code = kernel.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1]),
        "spilled_bytes": 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1]),
        "mma": code.count("v_mfma"),
    }


def load_launches(path: Path) -> dict[str, Callable[[], object]]:
    """Return ``LAUNCHES`` of the file at ``path``."""
    spec = importlib.util.spec_from_file_location(f"launches_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LAUNCHES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("launches", nargs="+", help="FILE with LAUNCHES, or FILE:NAME for one")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--out", type=Path, help="JSON lines for the results, with provenance")
    parser.add_argument("--keep", metavar="FOLDER", help="folder with kernels of earlier calls")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() if args.keep is None else nullcontext(args.keep) as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        compile_files(args)


def compile_files(args: argparse.Namespace) -> None:
    from experiments.provenance import write_json_lines
    from kernels import tuning

    records = []
    for given in args.launches:
        file, _, name = given.partition(":")
        launches = load_launches(path := Path(file))
        if name:
            launches = {name: launches[name]}
        with tuning.using({}):  # The tuning table of this machine may not fit the targets.
            for record in compile_launches(launches, args.targets):
                records.append({"folder": path.stem} | record)
                print(json.dumps(records[-1]), flush=True)
    if args.out:
        write_json_lines(args.out, records)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))
    main()
