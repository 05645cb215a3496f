"""Fingerprint of a folder: what a refusal says. Damage is tested with the records."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.plugins.tiers.fingerprint import FORMAT, NAME, StoreError, check_fingerprint, digest_of

FIELDS = {"weights": "a" * 32, "checkpoint grid": "64", "exact": "False"}


def check(folder: Path, fields: dict[str, str]) -> bytes:
    return check_fingerprint(folder, fields, lambda: (), may_write=True)


def test_a_refusal_names_the_values_that_a_reader_understands(tmp_path: Path) -> None:
    assert check(tmp_path, FIELDS) == check(tmp_path, FIELDS)
    named = r"differs in checkpoint grid \(64 there, 16 here: --grid\): use"
    with pytest.raises(StoreError, match=named):
        check(tmp_path, FIELDS | {"checkpoint grid": "16"})
    with pytest.raises(StoreError, match=r"weights, exact \(False there, True here\): us"):
        check(tmp_path, FIELDS | {"weights": "b" * 32, "exact": "True"})
    with pytest.raises(StoreError, match="differs in exact: use"):
        check(tmp_path, {name: FIELDS[name] for name in ("weights", "checkpoint grid")})


def test_another_format_is_named_as_such(tmp_path: Path) -> None:
    fields = {"format": "engine state 99", **FIELDS}
    content = {"digest": digest_of(fields).hex(), "fields": fields}
    (tmp_path / NAME).write_text(json.dumps(content))
    with pytest.raises(StoreError, match=f"version .*'engine state 99', .*'{FORMAT}'.*: use anot"):
        check(tmp_path, FIELDS)


def test_it_survives_a_power_loss_before_anything_relies_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is synced before it gets its name, and the folder after."""
    calls: list[str] = []

    def noted(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args: object, **options: object) -> object:
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)  # type: ignore[arg-type]
            calls.append(f"{name} folder" if is_folder else name)
            return real(*args, **options)

        return call

    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, noted(name))
    check(tmp_path, FIELDS)
    assert calls == ["fsync", "rename", "fsync folder"]


@pytest.mark.parametrize("call", ["open", "fsync", "rename"])
def test_one_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = getattr(os, call)

    def refuse(path: object, *args: object, **options: object) -> object:
        if call == "open" and not str(path).endswith(".part"):
            return real(path, *args, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError, match="No space left"):
            check(tmp_path, FIELDS)
    assert not list(tmp_path.iterdir())
    check(tmp_path, FIELDS)
