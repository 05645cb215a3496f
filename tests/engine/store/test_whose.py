"""Whose a folder is: what a refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.store.store import StoreError
from engine.store.whose import NAME, claim

WORDS = {"weights": "a" * 32, "checkpoint grid": "64", "exact": "False"}


def test_a_refusal_has_the_values_where_they_say_something(tmp_path: Path) -> None:
    claim(tmp_path, WORDS)
    theirs = r"another checkpoint grid \(64 there, 16 here: --grid\): start"
    with pytest.raises(StoreError, match=theirs):
        claim(tmp_path, WORDS | {"checkpoint grid": "16"})
    with pytest.raises(StoreError, match=r"weights, exact \(False there, True here\): st"):
        claim(tmp_path, WORDS | {"weights": "b" * 32, "exact": "True"})
    with pytest.raises(StoreError, match="another exact: start"):
        claim(tmp_path, {name: WORDS[name] for name in ("weights", "checkpoint grid")})


def test_a_damaged_one_says_to_delete_the_folder(tmp_path: Path) -> None:
    claim(tmp_path, WORDS)
    (tmp_path / NAME).write_text("{")
    with pytest.raises(StoreError) as refused:
        claim(tmp_path, WORDS)
    assert f"or delete {tmp_path} with all that is in it." in str(refused.value)
