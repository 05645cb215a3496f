"""Provenance of results: command, commit, versions and machine, stored in each result file."""

from __future__ import annotations

import ast
import datetime
import functools
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hybridcache.command.extras import CACHE_DISTRIBUTION

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
FIGURES = ROOT / "experiments" / "figures"
WRITTEN = Path(os.environ.get("HYBRIDCACHE_RESULTS", ROOT / "out")) / "results"
"""Folder of new results: ``RESULTS`` if ``reproduce`` runs the command. A command that is run
directly never overwrites a published file."""
GENERATED = (":!experiments/results", ":!experiments/figures", ":!docs/results*.md")
"""Git pathspecs that exclude files written by commands, because they are not code."""
CODE = (".py", ".cpp", ".h", ".jinja", ".json", ".toml")
"""Suffixes of files that determine results. Splits and parts are TOML files."""
PACKAGES = ("torch", "triton", "transformers", "numpy", CACHE_DISTRIBUTION)


def provenance() -> dict[str, Any]:
    """Return the current command, commit, package versions, machine and date."""
    return {
        "command": shlex.join(["python", *_command()]),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | _versions(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json_lines(
    path: Path, records: Iterable[Mapping[str, Any]], settings: Mapping[str, Any] | None = None
) -> None:
    """Write ``records`` to ``path``, one per line, after a first line with the provenance.

    ``settings`` are added to the provenance. They include defaults, which may change in later
    versions.
    """
    first = provenance() | ({} if settings is None else {"settings": settings})
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in ({"provenance": first}, *records)]
    unfinished = path.with_name(path.name + ".part")  # A process that is stopped loses no record.
    unfinished.write_text("".join(lines), encoding="utf-8")
    unfinished.replace(path)


def code_hash(
    folders: Iterable[str] = (
        *("engine", "kernels", "experiments", "tests/kernels"),
        "tests/engine/device_models.py",
    ),
) -> str:
    """Return a digest of the sources in ``folders``, or single files. It is the same with git and
    without. The defaults determine the results of an experiment on a device."""
    digest = hashlib.sha256()
    for folder in folders:
        place = ROOT / folder
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in CODE and not name.startswith("experiments/results/"):
                digest.update(f"{name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def simulation_code(module: str) -> tuple[str, ...]:
    """Return the folders and files that determine the results of a study without the engine.

    These are the package and, of this folder, the study's own module, those that it imports, and
    the splits if one of them reads them.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop().replace(".", "/") + ".py"
        if name in found or not (ROOT / name).is_file():
            continue
        found.add(name)
        text = (ROOT / name).read_text(encoding="utf-8")
        if "splits.toml" in text and ROOT / name != Path(__file__):
            found.add("experiments/splits.toml")
        waiting += imported_names(text)
    return "hybridcache", *sorted(name for name in found if name.startswith("experiments/"))


@functools.cache
def imported_names(text: str) -> list[str]:
    """Return the names of modules that a source text may import by ``from``. Studies share most of
    their modules, so each text is parsed once."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def read_json_lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (provenance, records) of a file written by ``write_json_lines``. Raises ValueError,
    which names the file, if it is not complete."""
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        raise ValueError(f"{path} is empty, or its last line is cut: run its part again.")
    first, *records = map(json.loads, text.splitlines())
    return first["provenance"], records


def known_records(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of ``path`` if they were written with the same settings, else none."""
    try:
        before, records = read_json_lines(path)
    except (OSError, ValueError, KeyError):
        return []
    return records if before.get("settings") == settings else []


def resumed(
    file: Path,
    settings: Mapping[str, Any],
    jobs: Mapping[str, Any],
    measured: Callable[[Sequence[Any]], Iterable[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Return the record of each job, by name, and write all records into ``file`` after each.

    ``measured`` yields the records of jobs in their order. Records that the file has with the same
    settings are not made again.
    """
    known = {one["name"]: one for one in known_records(file, settings)}
    new = iter(measured([job for name, job in jobs.items() if name not in known]))
    records = []
    for name in jobs:
        records.append(known.pop(name, None) or {"name": name} | next(new))
        write_json_lines(file, [*records, *known.values()], settings)
    return records


def _command() -> list[str]:
    arguments = [argument.removeprefix(f"{ROOT}{os.sep}") for argument in sys.argv[1:]]
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT) and script.suffix == ".py":
        module = ".".join(script.relative_to(ROOT).with_suffix("").parts)
        return ["-m", module, *arguments]
    return [script.name, *arguments]


def _commit() -> str | None:
    """Return the commit, or None outside a clone. A ``+`` marks changes in tracked files other than
    generated ones."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *GENERATED)
        return commit + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
