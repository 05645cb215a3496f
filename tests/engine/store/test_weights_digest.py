"""Tests of the saved digest of weights: it is computed once, and again if a file may have
changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.plugins.tiers import weights_digest
from engine.plugins.tiers.weights_digest import NAME, load_digest, save_digest


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(name.encode() * 100)
    monkeypatch.setattr(weights_digest, "STARTED_NS", weights_digest.STARTED_NS + 10**15)
    return folder


def test_a_digest_is_valid_until_a_file_changes(tmp_path: Path, weights: Path) -> None:
    assert load_digest(tmp_path, weights) is None
    save_digest(tmp_path, weights, "digest")
    assert load_digest(tmp_path, weights) == "digest"
    assert load_digest(tmp_path, tmp_path) is None, "the digest of another folder was returned"
    first = weights / "a.safetensors"
    stat = first.stat()
    first.write_bytes(b"c" * 100)
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # The times stay the same.
    assert load_digest(tmp_path, weights) is None
    save_digest(tmp_path, weights, "another")
    assert load_digest(tmp_path, weights) == "another"
    (weights / "c.safetensors").write_bytes(b"")
    assert load_digest(tmp_path, weights) is None


def test_files_changed_while_the_process_runs_are_not_saved(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        weights_digest, "STARTED_NS", (weights / "a.safetensors").stat().st_mtime_ns
    )
    save_digest(tmp_path, weights, "digest")
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"digest": 3}', '{"files": [], "digest": 3}'])
def test_a_damaged_file_is_ignored(tmp_path: Path, weights: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    assert load_digest(tmp_path, weights) is None and load_digest(tmp_path, tmp_path) is None


def test_a_missing_folder_is_not_written(tmp_path: Path, weights: Path) -> None:
    save_digest(tmp_path / "none", weights, "digest")
    assert load_digest(tmp_path / "none", weights) is None
