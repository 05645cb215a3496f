"""Tests of the record store: complete records are found, and damaged ones are not read."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine import Engine, EngineConfig
from engine.plugins.tiers.records import (
    LOCK_NAME,
    MEMORY_NAME,
    NAME,
    RecordStore,
    StoreError,
    record_name,
)
from engine.weights.model_config import ModelError
from tests.refused import refused

OURS, THEIRS = {"weights": "ours"}, {"weights": "theirs"}


def payload_of(number: int, size: int) -> bytes:
    return bytes((number * 31 + 7 * i) % 251 for i in range(size))


def read(store: RecordStore, record_id: int, size: int) -> bytes | None:
    out = bytearray(size)
    return bytes(out) if store.read(record_id, memoryview(out)) else None


def reopen(folder: Path) -> tuple[RecordStore, list[int]]:
    store = RecordStore(folder).open(OURS)
    return store, [record.id for record in store.scan()]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.record"))


@dataclass
class ReferenceStore:
    """Records by id, in memory."""

    written: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """Meta and payload of every record that was ever written."""
    living: set[int] = field(default_factory=set)

    def write(self, record_id: int, meta: bytes, payload: bytes) -> None:
        assert record_id not in self.written, "an id was used twice"
        self.written[record_id] = meta, payload
        self.living.add(record_id)

    def remove(self, record_id: int) -> None:
        self.living.discard(record_id)

    def restart(self, found: set[int], damaged: set[int]) -> None:
        """Compare with the ids ``found`` by a start, after damage to some files."""
        assert found <= self.living, "a removed or unknown record was found"
        assert self.living - damaged <= found, "a complete record was lost"
        self.living = set(found)


class StoreMachine(RuleBasedStateMachine):
    """State machine of writes, removals and restarts, with files cut or changed between two
    runs."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model = ReferenceStore()
        self.store, _ = reopen(self.folder)
        self.next_id = self.store.next_id

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(size=st.integers(0, 9000), meta=st.binary(max_size=90))
    def write(self, size: int, meta: bytes) -> None:
        payload, self.next_id = payload_of(size, size), self.next_id + 1
        self.store.write(self.next_id, meta, payload)
        self.model.write(self.next_id, meta, payload)

    @precondition(lambda self: self.model.living)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        record_id = data.draw(st.sampled_from(sorted(self.model.living)))
        self.store.remove_file(record_name(record_id))
        self.model.remove(record_id)

    @precondition(lambda self: self.model.living)
    @rule(data=st.data())
    def read_one(self, data: st.DataObject) -> None:
        record_id = data.draw(st.sampled_from(sorted(self.model.living)))
        payload = self.model.written[record_id][1]
        found = read(self.store, record_id, len(payload))
        assert found == payload, (
            "wrong bits" if found is not None else "an intact payload was refused"
        )

    @rule(data=st.data())
    def add_an_unfinished_file(self, data: st.DataObject) -> None:
        name = f"{self.next_id + 1:016x}.record.part"
        (self.folder / name).write_bytes(data.draw(st.binary(max_size=99)))
        self.restart()
        assert not list(self.folder.glob("*.part"))

    @precondition(lambda self: self.model.living)
    @rule(data=st.data())
    def cut_a_file(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(files(self.folder)))
        raw = path.read_bytes()
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        self.restart(path)

    @precondition(lambda self: self.model.living)
    @rule(data=st.data(), change=st.integers(1, 255))
    def change_a_byte(self, data: st.DataObject, change: int) -> None:
        path = data.draw(st.sampled_from(files(self.folder)))
        raw = bytearray(path.read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= change
        path.write_bytes(raw)
        self.restart(path)

    @precondition(lambda self: len(self.model.living) > 1)
    @rule(data=st.data())
    def replace_a_file_by_another(self, data: st.DataObject) -> None:
        pair = st.lists(st.sampled_from(files(self.folder)), min_size=2, max_size=2, unique=True)
        source, target = data.draw(pair)
        shutil.copy(source, target)
        self.restart(target)

    @rule()
    def restart(self, *damaged: Path) -> None:
        is_damaged = {int(path.stem, 16) for path in damaged}
        self.store.close()
        self.store = RecordStore(self.folder).open(OURS)
        found = {record.id: record for record in self.store.scan()}
        self.next_id = max(self.next_id, self.store.next_id)
        self.model.restart(set(found), is_damaged)
        for record_id, record in found.items():
            meta, payload = self.model.written[record_id]
            assert (record.meta, record.payload_bytes) == (meta, len(payload))
            again = read(self.store, record_id, len(payload))
            assert again in (payload, None), "wrong bits"
            if again is None:
                assert record_id in is_damaged, "an intact payload was refused"
                self.store.remove_file(record_name(record_id))
                self.model.remove(record_id)

    @invariant()
    def the_folder_has_the_living_records(self) -> None:
        assert {int(path.stem, 16) for path in files(self.folder)} == self.model.living


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestStore = StoreMachine.TestCase


def test_a_folder_in_use_is_refused_and_unchanged(tmp_path: Path) -> None:
    """Check that the fingerprint is compared under the lock, so the second start cannot replace the
    first's."""
    first, _ = reopen(tmp_path)
    (tmp_path / NAME).unlink()  # As before the first engine has written it.
    with pytest.raises(StoreError, match=f"Another engine uses {tmp_path}: stop it"):
        RecordStore(tmp_path).open(THEIRS)
    assert not (tmp_path / NAME).exists()
    first.close()
    reopen(tmp_path)[0].close()


ODD: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "link": lambda file: file.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "large": lambda file: (file.touch(), os.truncate(file, 1 << 40)),
}
"""Files that another user may write into the folder."""


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", [NAME, LOCK_NAME, MEMORY_NAME, record_name(7), f"{NAME}.part"])
def test_a_file_that_no_engine_wrote_is_ignored_or_refused(
    name: str, odd: str, tmp_path: Path
) -> None:
    """Nothing waits or follows a link, and no large file is read."""
    folder, victim = tmp_path / "state", tmp_path / "victim"
    reopen(folder)[0].close()
    victim.write_bytes(b"of the user")
    (folder / f"{MEMORY_NAME}.part").symlink_to(victim)
    (folder / name).unlink(missing_ok=True)
    ODD[odd](folder / name)
    try:
        store, found = reopen(folder)
    except StoreError as error:
        assert "cannot be" in str(error) and name != MEMORY_NAME
    else:
        assert not found
        for write in (store.write_file, lambda *_: store.read_file(MEMORY_NAME)):
            with pytest.raises(OSError, match=r"regular|large|No such file"):
                write(MEMORY_NAME, b"learned")
        store.close()
    assert victim.read_bytes() == b"of the user"


def test_a_fork_does_not_keep_the_folder_of_an_engine_that_was_closed(tmp_path: Path) -> None:
    store, _ = reopen(tmp_path)
    ready, end = os.pipe(), os.pipe()
    if not (child := os.fork()):
        os.close(end[1])
        os.write(ready[1], b"x")
        os.read(end[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        store.close()
        reopen(tmp_path)[0].close()
    finally:
        os.close(end[1])
        os.waitpid(child, 0)


def test_a_folder_that_is_not_writable_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reopen(tmp_path)[0].close()
    opened = os.open

    def refuse(path: object, flags: int, *args: object, **options: object) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match=r"cannot be made or written .*: give another --state-dir"):
        reopen(tmp_path)


# --- The fingerprint of a folder -----------------------------------------------------------------

FIELDS = {"weights": "a" * 32, "checkpoint grid": "64", "exact": "False"}


def test_the_digest_of_weights_is_kept_until_their_files_change(tmp_path: Path) -> None:
    weights, found = tmp_path / "model.safetensors", list[str | None]()
    for content in (b"1", None, b"22"):
        if content is not None:
            weights.write_bytes(content)
        store = RecordStore(tmp_path / "state", tmp_path)
        found.append(store.weights_digest)
        store.open(OURS).close()
    assert found == [None, "ours", None]


def test_a_fingerprint_that_cannot_be_read_is_no_other_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``empties`` the entries would be deleted for a failure of a moment."""
    store = RecordStore(tmp_path).open(FIELDS)
    store.write(1, b"", b"kept")
    store.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "read_file", Mock(side_effect=OSError(errno.EIO, "bad")))
        store = RecordStore(tmp_path)
        assert store.weights_digest is None
        refused("bad", store.open, FIELDS, empties=True, kind=StoreError)
        store.close()
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


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
    RecordStore(tmp_path).open(FIELDS).close()
    assert calls == ["fsync", "rename", "fsync folder"]


def test_a_folder_is_locked_while_the_model_is_loaded_and_released_if_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: EngineConfig) -> None:
        for _ in range(2):
            refused("Another engine uses", Engine, config, kind=StoreError)
            (tmp_path / "lock").unlink(missing_ok=True)
        raise ModelError("there is no such model")

    monkeypatch.setattr("engine.engine.load", fail)
    with pytest.raises(ModelError):
        Engine(EngineConfig(state_dir=str(tmp_path)))
    reopen(tmp_path)[0].close()
    with pytest.raises(ModelError):
        Engine(EngineConfig(state_dir=str(tmp_path / "made" / "state")))
    assert not (tmp_path / "made").exists()
