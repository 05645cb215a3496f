"""Compile ahead of time, without a GPU, what the public functions of a kernel folder would launch on one.

A launch file has ``LAUNCHES``, words to functions that call our wrappers on CPU tensors of the sizes a GPU would see. Here
every launch inside them is recorded and compiled for each target instead of run: the signature, the constants and the
alignment are those of the real call, because the real call made them.

    python tests/kernels/aot.py tests/kernels/launches/gdn.py        # one JSON line per kernel and target

Runs in a process of its own, since Triton decides at import whether it interprets or compiles.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
"""Words to Triton's (backend, architecture, warp size)."""
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""Shared memory that one program may use."""


class _AbsentDevice:
    """Stands in for Triton's driver: answers what is asked before a launch, and is never launched on."""

    def __init__(self, target: Any, number: int) -> None:
        self._target, self._number = target, number

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recording(target: str) -> Iterator[list[Any]]:
    """While it is open, kernels compile for ``target`` and do not run; yields the list of what was compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    driver.set_active(_AbsentDevice(GPUTarget(*TARGETS[target]), list(TARGETS).index(target)))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def compile_launches(
    launches: dict[str, Callable[[], object]], targets: list[str]
) -> Iterator[dict[str, object]]:
    """Compile everything in ``launches`` for every target: a record for each kernel, launch and target."""
    for word, launch in launches.items():
        for target in targets:
            with recording(target) as compiled:
                launch()
            for kernel in compiled:
                yield {
                    "launch": word,
                    "kernel": kernel.metadata.name,
                    "target": target,
                    "num_warps": kernel.metadata.num_warps,
                    "num_stages": kernel.metadata.num_stages,
                    "shared_bytes": kernel.metadata.shared,
                } | (_nvidia(kernel) if "ptx" in kernel.asm else _amd(kernel))


def _nvidia(kernel: Any) -> dict[str, int]:
    """Registers and stack of a thread, as the assembler left them, and what the PTX multiplies and copies with.

    A thread's stack is where registers spill to: our kernels have no arrays of their own.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "cp_async": ptx.count("cp.async.c"),
        "tma": ptx.count("cp.async.bulk"),
    }


def _amd(kernel: Any) -> dict[str, int]:
    """Vector registers of a lane, and of them those kept in memory."""
    code = kernel.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1]),
        "spilled_bytes": 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1]),
        "mma": code.count("v_mfma"),
    }


def load_launches(path: Path) -> dict[str, Callable[[], object]]:
    """``LAUNCHES`` of the file at ``path``."""
    spec = importlib.util.spec_from_file_location(f"launches_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LAUNCHES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("launches", type=Path, help="a file with LAUNCHES")
    parser.add_argument("--only", help="one word of LAUNCHES")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    args = parser.parse_args()
    launches = load_launches(args.launches)
    if args.only:
        launches = {args.only: launches[args.only]}
    for record in compile_launches(launches, args.targets):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main()
