"""Build the two published wheels: the cache with its laboratory, and the engine.

python -m experiments.wheels [--out dist]

Wheels of earlier builds are removed from the folder.

The cache's wheel (``hybrid-radix-cache``) contains neither ``engine`` nor ``kernels``. SGLang
depends on a Hugging Face distribution with a package that is also called ``kernels``, and ``pip
install 'hybrid-radix-cache[sglang]'`` must not replace it. The engine's wheel
(``hybrid-radix-engine``) contains both. The extra ``hybrid-radix-cache[engine]`` depends on it. A
clone installs everything at once (``pip install -e .``).

On x86-64 Linux a second wheel of the engine is built. It has the native kernels for the levels of
``kernels.library``, and pip prefers it on such machines. Needs g++ 12 or newer.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from experiments.provenance import ROOT
from hybridcache.command.extras import CACHE_DISTRIBUTION, ENGINE_DISTRIBUTION
from kernels.library import LEVELS_FOLDER, compile_levels

PACKAGES = {
    CACHE_DISTRIBUTION: ("hybridcache",),
    ENGINE_DISTRIBUTION: ("engine", "kernels"),
}

SYMBOL = re.compile(rb"GLIBC_2\.(\d+)")
OLDEST_LIBC = 28
"""Least C library of the wheel with native kernels, glibc 2.28: that of torch's wheels."""


def platform_of(levels: Path) -> str:
    """Return the systems on which the libraries in ``levels`` can be loaded.

    A library that was built on a newer system may need a newer C library than ``OLDEST_LIBC``.
    """
    names = [name for file in levels.iterdir() for name in SYMBOL.findall(file.read_bytes())]
    return f"manylinux_2_{max(OLDEST_LIBC, *map(int, names))}_x86_64"


def described(name: str) -> dict[str, Any]:
    """Return the ``[project]`` table of one distribution, derived from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, version = project["optional-dependencies"], project["version"]
    command = PACKAGES[name][0]
    project["scripts"] = {command: project["scripts"][command]}
    if name == ENGINE_DISTRIBUTION:
        project |= {
            "name": name,
            "description": "The engine that serves hybrid LLMs with hybridcache",
            "dependencies": [f"{CACHE_DISTRIBUTION}=={version}", *extras["engine"]],
        }
        del project["optional-dependencies"], project["entry-points"]
    else:
        extras["engine"] = [f"{ENGINE_DISTRIBUTION}=={version}"]
    return dict(project)


def build(name: str, out: Path, levels: Path | None = None) -> Path:
    """Build the wheel of ``name`` into ``out``, without a network.

    ``levels``: folder of native kernels, for a wheel of ``platform_of(levels)``. Raises
    RuntimeError with the output of setuptools.
    """
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tables = {
        "build-system": whole["build-system"],
        "project": described(name),
        "tool.setuptools.packages.find": {"include": [f"{pkg}*" for pkg in PACKAGES[name]]},
        "tool.setuptools.package-data": whole["tool"]["setuptools"]["package-data"],
    }
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        for package in PACKAGES[name]:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, source / package, ignore=ignored)
        for file in ("README.md", "LICENSE"):
            shutil.copy(ROOT / file, source)
        (source / "pyproject.toml").write_text("\n".join(_lines(tables)))
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)]
        if levels is not None:
            shutil.copytree(levels, source / "kernels" / LEVELS_FOLDER.name)
            command.append(f"--config-setting=--build-option=--plat-name={platform_of(levels)}")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        [wheel] = (source / "dist").glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out))


def _lines(tables: dict[str, dict[str, Any]]) -> list[str]:
    """Return the TOML lines of tables with texts, lists of texts, or such tables as values."""
    lines, subtables = [], {}
    for name, table in tables.items():
        lines.append(f"[{name}]")
        for key, value in table.items():
            if isinstance(value, dict):
                subtables[f"{name}.{json.dumps(key)}"] = value
            else:
                lines.append(f"{json.dumps(key)} = {json.dumps(value)}")
    return lines + _lines(subtables) if subtables else lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder for the wheels")
    options = parser.parse_args()
    for name in PACKAGES:
        for earlier in options.out.glob(f"{name.replace('-', '_')}-*.whl"):
            earlier.unlink()
        print(build(name, options.out))
    with tempfile.TemporaryDirectory() as folder:
        if compile_levels(Path(folder)):
            print(build(ENGINE_DISTRIBUTION, options.out, Path(folder)))


if __name__ == "__main__":
    main()
