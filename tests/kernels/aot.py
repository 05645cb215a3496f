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
                code = kernel.asm.get("ptx") or kernel.asm.get("amdgcn")
                yield {
                    "launch": word,
                    "kernel": kernel.metadata.name,
                    "target": target,
                    "shared_bytes": kernel.metadata.shared,
                    "num_warps": kernel.metadata.num_warps,
                    "wgmma": code.count("wgmma.mma_async"),
                    "mma": code.count("mma.sync") + code.count("v_mfma"),
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
