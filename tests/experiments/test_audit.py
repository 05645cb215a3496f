"""The audit says what is faulty, and passes in one sentence where it can not ask."""

from __future__ import annotations

import pytest

from experiments.system.audit import UNANSWERED, verdict

SOUND = {"name": "sound", "version": "1", "vulns": []}
SKIPPED = {"name": "local", "skip_reason": "Dependency not found on PyPI"}
FAULT = {"id": "CVE-1", "fix_versions": ["1.1", "2"], "aliases": [], "description": ""}


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([], 0, UNANSWERED),
        ([SKIPPED] * 3, 0, UNANSWERED),
        ([SOUND, SKIPPED, SKIPPED], 0, UNANSWERED),
        ([SOUND, SOUND, SKIPPED], 0, "No known fault in 2 of 3 packages"),
        ([SOUND, SOUND | {"vulns": [FAULT]}], 1, "sound 1: CVE-1, mended in 1.1 or 2"),
        ([SOUND | {"vulns": [FAULT | {"fix_versions": []}]}], 1, "mended in no version yet"),
    ],
)
def test_what_the_audit_says(packages: list[dict[str, object]], code: int, words: str) -> None:
    found, sentence = verdict({"dependencies": packages})
    assert found == code and words in sentence
    assert verdict({}) == (0, UNANSWERED)
