"""Check the installed packages for known vulnerabilities, with the advisories of PyPI, or list
their licences.

Passes with a note if the advisories cannot be reached.

python -m experiments.audit [--licences]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hybridcache.command.extras import CACHE_DISTRIBUTION, ENGINE_DISTRIBUTION

COMMAND = "pip_audit --local --skip-editable --progress-spinner off --format json --timeout 10"
UNANSWERED = "The advisories cannot be reached, so the installed packages were not audited."


def main() -> int:
    if sys.argv[1:] == ["--licences"]:
        print("\n".join(licences()))
        return 0
    done = subprocess.run([sys.executable, "-m", *COMMAND.split()], capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError:  # No connection, or pip-audit is not installed.
        report = {}
    code, sentence = verdict(report)
    print(sentence)
    return code


def licences() -> list[str]:
    """Return a line for each installed package: name, version, licence. Packages that the cache
    needs come first, then those that the engine adds, then those of extras and tools."""
    installed = {canonicalize_name(one.name): one for one in metadata.distributions()}
    ours, listed, lines = {CACHE_DISTRIBUTION, ENGINE_DISTRIBUTION}, set[str](), list[str]()
    for title, names in (
        ("needed by the cache", _needed(CACHE_DISTRIBUTION, installed)),
        ("added by the engine", _needed(ENGINE_DISTRIBUTION, installed)),
        ("extras and tools", set(installed)),
    ):
        lines.append(f"# {title}")
        for name in sorted(names - ours - listed):
            lines.append(f"{name} {installed[name].version}: {licence(installed[name].metadata)}")
        listed |= names
    return lines


def _needed(name: str, installed: Mapping[str, metadata.Distribution]) -> set[str]:
    """Return the installed packages that ``name`` requires without extras, itself included."""
    found, waiting = set[str](), [name]
    while waiting:
        name = waiting.pop()
        if name in found or name not in installed:
            continue
        found.add(name)
        for requirement in map(Requirement, installed[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return found


def licence(fields: Any) -> str:
    """Return the licence that a package's metadata names, shortened if it is a whole text."""
    classified = [
        line.rpartition(" :: ")[2]
        for line in fields.get_all("Classifier", ())
        if line.startswith("License ::")
    ]
    stated = (fields.get("License") or "").strip().partition("\n")[0]
    return fields.get("License-Expression") or ", ".join(classified) or stated or "not stated"


def verdict(report: Mapping[str, Any]) -> tuple[int, str]:
    """Return (exit code, message) for a report of pip-audit.

    At least half of the packages must be in the advisories, because an index that is a mirror has
    none.
    """
    packages = report.get("dependencies", [])
    audited = [package for package in packages if "vulns" in package]
    if 2 * len(audited) < max(len(packages), 1):
        return 0, UNANSWERED
    faults = [
        f"{package['name']} {package['version']}: {fault['id']}, fixed in "
        + (" or ".join(fault["fix_versions"]) or "no version yet")
        for package in audited
        for fault in package["vulns"]
    ]
    if faults:
        return 1, "\n".join(faults)
    return 0, f"No known fault in {len(audited)} of {len(packages)} installed packages."


if __name__ == "__main__":
    sys.exit(main())
