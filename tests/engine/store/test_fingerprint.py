"""Tests of a folder's fingerprint and of its error messages. Damage is tested in
test_records.py."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.plugins.tiers.fingerprint import StoreError, check_fingerprint

FIELDS = {"weights": "a" * 32, "checkpoint grid": "64", "exact": "False"}


def check(folder: Path, fields: dict[str, str]) -> bytes:
    return check_fingerprint(folder, fields, has_records=False)


def test_a_refusal_names_readable_values_and_flags(tmp_path: Path) -> None:
    assert check(tmp_path, FIELDS) == check(tmp_path, FIELDS)
    named = r"differs in checkpoint grid \(64 there, 16 here: --grid\): use"
    with pytest.raises(StoreError, match=named):
        check(tmp_path, FIELDS | {"checkpoint grid": "16"})
    with pytest.raises(StoreError, match=r"weights, exact \(False there, True here\): us"):
        check(tmp_path, FIELDS | {"weights": "b" * 32, "exact": "True"})
    with pytest.raises(StoreError, match="differs in exact: use"):
        check(tmp_path, {name: FIELDS[name] for name in ("weights", "checkpoint grid")})


def test_a_new_fingerprint_is_synced_before_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the file is synced before it gets its name, and the folder afterwards."""
    calls: list[str] = []

    def recorded(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args: object, **options: object) -> object:
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)  # type: ignore[arg-type]
            calls.append(f"{name} folder" if is_folder else name)
            return real(*args, **options)

        return call

    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, recorded(name))
    check(tmp_path, FIELDS)
    assert calls == ["fsync", "rename", "fsync folder"]
