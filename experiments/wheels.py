"""Build the two published wheels: the cache with its laboratory, and the engine.

python -m experiments.wheels [--out dist]

Wheels of earlier builds are removed from the folder.

The cache's wheel (``hybrid-radix-cache``) contains neither ``engine`` nor ``kernels``. SGLang
depends on a Hugging Face distribution with a package that is also called ``kernels``, which an
installation of the cache next to SGLang must not replace. The engine's wheel
(``hybrid-radix-engine``, ``engine/pyproject.toml``) contains both, and depends on the cache's.

On Linux the engine has further wheels, with native kernels for the levels of ``kernels.library``:
one for each machine (x86-64, aarch64) that a compiler is found for. pip prefers them. Needs g++ 12
or newer, and for the other machine a cross compiler (Debian's ``g++-aarch64-linux-gnu``).
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.provenance import ROOT
from hybridcache.command.extras import CACHE_DISTRIBUTION, ENGINE_DISTRIBUTION
from kernels.library import LEVELS, LEVELS_FOLDER, compile_levels, find_compiler, levels_of

FOLDERS = {CACHE_DISTRIBUTION: ".", ENGINE_DISTRIBUTION: "engine"}
"""Folder of each distribution's ``pyproject.toml``."""

SYMBOL = re.compile(rb"GLIBC_2\.(\d+)")
OLDEST_LIBC = 28
"""Least C library of the wheel with native kernels, glibc 2.28: that of torch's wheels."""


def platform_of(levels: Path) -> str:
    """Return the systems on which the libraries of one machine in ``levels`` can be loaded.

    A library that was built on a newer system may need a newer C library than ``OLDEST_LIBC``.
    """
    names = [name for file in levels.iterdir() for name in SYMBOL.findall(file.read_bytes())]
    [machine] = {level.machine for level in LEVELS if (levels / level.file_name).exists()}
    return f"manylinux_2_{max(OLDEST_LIBC, *map(int, names))}_{machine}"


def build(name: str, out: Path, levels: Path | None = None) -> Path:
    """Build the wheel of ``name`` into ``out``, without a network.

    It is built from a copy, because setuptools would add files of earlier builds. ``levels``:
    folder of native kernels, for a wheel of ``platform_of(levels)``. Raises RuntimeError with the
    output of setuptools.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        for package in ("hybridcache", "engine", "kernels"):
            ignored = shutil.ignore_patterns("__pycache__", "levels")
            shutil.copytree(ROOT / package, source / package, ignore=ignored)
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, source)
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
        command += ["--outdir", str(source / "dist"), str(source / FOLDERS[name])]
        if levels is not None:
            shutil.copytree(levels, source / "kernels" / LEVELS_FOLDER.name)
            command.append(f"--config-setting=--build-option=--plat-name={platform_of(levels)}")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        [wheel] = (source / "dist").glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder for the wheels")
    options = parser.parse_args()
    for name in FOLDERS:
        for earlier in options.out.glob(f"{name.replace('-', '_')}-*.whl"):
            earlier.unlink()
        print(build(name, options.out))
    for machine in dict.fromkeys(level.machine for level in LEVELS):
        if platform.system() != "Linux" or find_compiler(machine) is None:
            print(f"no compiler for Linux on {machine}: no wheel with kernels for it")
            continue
        with tempfile.TemporaryDirectory() as folder:
            compile_levels(Path(folder), levels_of(machine))
            print(build(ENGINE_DISTRIBUTION, options.out, Path(folder)))


if __name__ == "__main__":
    main()
