"""Whose records a folder has: everything that their bits depend on, in words.

The folder's ``whose.json`` is written once, before the first record. Who differs in one word is
refused, and nothing is touched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from engine.store.segment import SUFFIX
from engine.store.store import StoreError
from engine.store.whole_file import write_whole

NAME = "whose.json"
FORM = "engine state 1"
MAX_SHOWN = 20
"""Characters of a value that a refusal repeats; digests have more."""
FLAGS = {"checkpoint grid": "--grid", "page size": "--page-size", "dtype": "--dtype"}
"""What sets a word where somebody may have set it otherwise."""


def claim(folder: Path, words: Mapping[str, str]) -> bytes:
    """Give ``folder`` to whoever ``words`` describe, or see that it is theirs; a digest of them, 32
    bytes. StoreError, in one sentence: it is another's, or can not be used."""
    ours = {"form": FORM, **words}
    path = folder / NAME
    try:
        if folder.is_file():
            raise StoreError(f"{folder} is a file: give a folder, or the name of a new one.")
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            theirs = _read(path)
            differing = [name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name)]
            if differing:
                named = ", ".join(_difference(n, theirs, ours) for n in dict.fromkeys(differing))
                raise StoreError(
                    f"{folder} holds the state of an engine with another {named}: start with the "
                    "same, or give another folder."
                )
        elif any(folder.glob(f"*{SUFFIX}")):
            raise StoreError(f"{folder} has segments, but no {NAME}: give another folder.")
        else:
            write_whole(path, json.dumps(ours, indent=1, sort_keys=True).encode())
    except OSError as error:
        raise StoreError(f"{folder} can not be used: {error.strerror}.") from error
    return hashlib.blake2b(json.dumps(ours, sort_keys=True).encode(), digest_size=32).digest()


def _difference(name: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """``name``, and its values where both are short: a digest says nothing to anybody."""
    values = [theirs.get(name), ours.get(name)]
    if any(not isinstance(value, str) or len(value) > MAX_SHOWN for value in values):
        return name
    flag = f": {FLAGS[name]}" if name in FLAGS else ""
    return f"{name} ({values[0]} there, {values[1]} here{flag})"


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise StoreError(
            f"{path} is damaged: give another folder, or delete {path.parent} with all that is in "
            "it."
        )
    return found
