"""Has anything that is installed here a known fault? Asks the advisories of PyPI; where nobody
answers it says so and passes.

python -m experiments.system.audit
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

COMMAND = [
    "pip_audit",
    "--local",
    "--skip-editable",
    "--progress-spinner",
    "off",
    "--format",
    "json",
]
UNANSWERED = "The advisories can not be asked here: what is installed was not audited."


def main() -> int:
    done = subprocess.run(
        [sys.executable, "-m", *COMMAND, "--timeout", "10"], capture_output=True, text=True
    )
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError:  # no connection, or pip-audit is not installed
        report = {}
    code, sentence = verdict(report)
    print(sentence)
    return code


def verdict(report: Mapping[str, Any]) -> tuple[int, str]:
    """(exit code, what to say) of a report of pip-audit's. Half of the packages must have been
    known to who was asked: an index that is a copy knows none."""
    packages = report.get("dependencies", [])
    audited = [package for package in packages if "vulns" in package]
    if 2 * len(audited) < max(len(packages), 1):
        return 0, UNANSWERED
    faults = [
        f"{package['name']} {package['version']}: {fault['id']}, mended in "
        + (" or ".join(fault["fix_versions"]) or "no version yet")
        for package in audited
        for fault in package["vulns"]
    ]
    if faults:
        return 1, "\n".join(faults)
    return 0, f"No known fault in {len(audited)} of {len(packages)} packages that are installed."


if __name__ == "__main__":
    sys.exit(main())
