"""Tests of the dependency audit: reported vulnerabilities, and a clear result without network."""

from __future__ import annotations

import pytest

from experiments.audit import UNANSWERED, verdict

SOUND = {"name": "sound", "version": "1", "vulns": []}
SKIPPED = {"name": "local", "skip_reason": "Dependency not found on PyPI"}
FAULT = {"id": "CVE-1", "fix_versions": ["1.1", "2"], "aliases": [], "description": ""}


@pytest.mark.parametrize(
    ("packages", "code", "message"),
    [
        ([], 0, UNANSWERED),
        ([SKIPPED] * 3, 0, UNANSWERED),
        ([SOUND, SKIPPED, SKIPPED], 0, UNANSWERED),
        ([SOUND, SOUND, SKIPPED], 0, "No known fault in 2 of 3 installed packages"),
        ([SOUND, SOUND | {"vulns": [FAULT]}], 1, "sound 1: CVE-1, fixed in 1.1 or 2"),
        ([SOUND | {"vulns": [FAULT | {"fix_versions": []}]}], 1, "fixed in no version yet"),
    ],
)
def test_audit_reports_vulnerabilities(
    packages: list[dict[str, object]], code: int, message: str
) -> None:
    found, text = verdict({"dependencies": packages})
    assert found == code and message in text
    assert verdict({}) == (0, UNANSWERED)
