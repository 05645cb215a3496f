"""Check the installed packages for known vulnerabilities, with the advisories of PyPI.

Passes with a note if the advisories cannot be reached.

python -m experiments.audit
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

COMMAND = "pip_audit --local --skip-editable --progress-spinner off --format json --timeout 10"
UNANSWERED = "The advisories cannot be reached, so the installed packages were not audited."


def main() -> int:
    done = subprocess.run([sys.executable, "-m", *COMMAND.split()], capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError:  # No connection, or pip-audit is not installed.
        report = {}
    code, sentence = verdict(report)
    print(sentence)
    return code


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
