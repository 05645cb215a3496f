"""Recording of native kernel calls, and their compilation."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch

from kernels import library, native, recording
from kernels.recording import NotRecordableError, _Watch, record
from tests.refused import refused

COMPILED = pytest.mark.skipif(native.shared_library() is None, reason="no C++ compiler")


@COMPILED
@pytest.mark.parametrize("in_runs", [True, False], ids=["in-runs", "single-calls"])
def test_replay_uses_current_inputs(in_runs, monkeypatch) -> None:
    from kernels.norm.native import gated_rms_norm, rms_norm

    if not in_runs:
        monkeypatch.setattr(recording, "has", lambda name: False)
    table, weight = torch.randn(9, 32), torch.rand(32)
    rows, out = torch.tensor([3, 4]), torch.empty(2, 32)

    def work() -> None:
        gate = rms_norm(torch.cat([table[rows[:1]], table[rows[1:]]]), weight, 1e-6)
        out.copy_(gated_rms_norm(gate, weight, gate * 2, 0.5, gate_first=True))

    replay = record(work)
    for indices in ([3, 4], [8, 0]):
        rows.copy_(torch.tensor(indices))
        out.fill_(torch.nan)
        replay()
        gate = rms_norm(table[indices], weight, 1e-6)
        assert torch.equal(out, gated_rms_norm(gate, weight, gate * 2, 0.5, gate_first=True))


@pytest.mark.parametrize(
    "operation",
    [lambda x: x.sort(), lambda x: x.clamp_(0), lambda x: x.sum(), lambda x: x.t().contiguous()],
    ids=["sort", "clamp_", "sum", "contiguous"],
)
def test_other_operations_are_refused(operation) -> None:
    x = torch.ones(2, 3)
    refused("aten", record, lambda: operation(x), kind=NotRecordableError)


class TestCompiling:
    @pytest.fixture(autouse=True)
    def own_cache(self, monkeypatch, tmp_path) -> Path:
        """Use an empty cache folder, one small source, and no level."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(library.tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(library, "LEVELS_FOLDER", tmp_path / "levels")
        monkeypatch.delenv(library.LEVEL_VARIABLE, raising=False)
        monkeypatch.setattr(library, "SOURCES", tmp_path)
        (tmp_path / "native.h").touch()
        (tmp_path / "one").mkdir()
        exported = 'extern "C" __attribute__((visibility("default")))'
        (tmp_path / "one" / "native.cpp").write_text(f"{exported} void one() {{}}")
        return tmp_path / "cache"

    def test_missing_compiler_is_one_warning_and_no_library(self, monkeypatch, caplog) -> None:
        monkeypatch.setattr(library, "COMPILERS", ("no-such-compiler",))
        assert library.load() is None
        [record] = caplog.records
        assert "No C++ compiler was found (no-such-compiler)" in record.message

    @COMPILED
    def test_failing_compiler_is_one_warning_with_its_error(self, caplog, tmp_path) -> None:
        (tmp_path / "one" / "native.cpp").write_text("no C++")
        assert library.load() is None
        begins, ends = (record.message for record in caplog.records)
        assert ", once" in begins and "cannot be compiled" in ends and "error" in ends
        assert not list(tmp_path.glob("hybridcache-*"))

    @COMPILED
    def test_first_load_reports_the_compilation_and_every_environment_uses_it(
        self, caplog, own_cache, monkeypatch
    ) -> None:
        found = library.load()
        assert found is not None and found.build == "native"
        assert hasattr(found.functions, "one") and not hasattr(found.functions, "two")
        [file] = own_cache.glob("hybridcache/native-*.so")
        begins, ends = (record.message for record in caplog.records)
        assert begins.startswith("Compiling the kernels for this processor, once")
        assert ends.startswith("Compiled the kernels in ") and ends.endswith(str(file))
        caplog.clear()
        elsewhere = own_cache / "libgomp.so.1"
        elsewhere.symlink_to(library._openmp())
        monkeypatch.setattr(library, "_openmp", lambda: str(elsewhere))
        assert library.load() is not None and not caplog.records
        assert os.stat(own_cache / "hybridcache").st_mode & 0o77 == 0

    @COMPILED
    @pytest.mark.skipif(not library.level_name(), reason="this processor has none of the levels")
    @pytest.mark.parametrize("place", [-3, 5000])
    def test_a_damaged_library_is_not_loaded_but_compiled_again(self, caplog, place) -> None:
        level = library.levels_of(platform.machine())[0]
        library.compile_levels(library.LEVELS_FOLDER, [level])
        for build, said in ((level.name, "{}: install"), ("native", "again, because {} (1 to 2")):
            made = library.load()
            assert made.build == build
            file = Path(made.functions._name)
            content = bytearray(file.read_bytes())
            content[place] ^= 1
            file.unlink()  # It is loaded: what is written into the file would reach this process.
            file.write_bytes(content)
            caplog.clear()
            library.load().functions.one()
            assert said.format(f"{file} is damaged") in caplog.text
        assert library.is_whole(file)

    @COMPILED
    @pytest.mark.parametrize("has_home", [True, False])
    def test_unwritable_cache_uses_a_temporary_folder_that_is_removed(
        self, monkeypatch, caplog, own_cache, tmp_path, has_home
    ) -> None:
        own_cache.write_text("a file where a folder should be")
        if not has_home:
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        library.load().functions.one()
        assert "for this start only" in caplog.text and "set XDG_CACHE_HOME" in caplog.text
        assert not list(tmp_path.glob("hybridcache-*"))

    @COMPILED
    @pytest.mark.skipif(not library.level_name(), reason="this processor has none of the levels")
    def test_a_selected_level_has_a_library_of_its_own(self, monkeypatch) -> None:
        level = library.levels_of(platform.machine())[0]
        monkeypatch.setenv(library.LEVEL_VARIABLE, level.name)
        exported = 'extern "C" __attribute__((visibility("default")))'
        source = f"#ifndef __AVX512F__\n{exported} void narrow() {{}}\n#endif"
        (library.SOURCES / "one" / "native.cpp").write_text(source)
        found = library.load()
        assert found is not None and found.build == library.level_name() == level.name
        assert hasattr(found.functions, "narrow")
        library.compile_levels(library.LEVELS_FOLDER, [level])
        assert library.load().functions._name == str(library.LEVELS_FOLDER / level.file_name)

    def test_a_level_that_the_processor_lacks_is_refused(self, monkeypatch) -> None:
        lowest, middle, higher, *_ = library.levels_of("x86_64")
        monkeypatch.setattr(library, "processor_instructions", lambda: middle.needs)
        for name in ("avx", higher.name):
            monkeypatch.setenv(library.LEVEL_VARIABLE, name)
            refused(f"{name}: the levels .* are sse4, avx2[.]", library.load)
        monkeypatch.setenv(library.LEVEL_VARIABLE, lowest.name)
        assert library.instructions() == lowest.needs < middle.needs


@pytest.mark.parametrize(
    ("vendor", "level", "expected"),
    [
        ("GenuineIntel", "sse4", "COMPATIBLE"),
        ("AuthenticAMD", "sse4", "COMPATIBLE"),
        ("GenuineIntel", "avx2", "AVX2,STRICT"),
        ("AuthenticAMD", "avx2", None),
        ("GenuineIntel", "avx512", None),
    ],
)
def test_products_of_mkl_are_settled_where_they_depend_on_threads(
    vendor, level, expected, monkeypatch
) -> None:
    [needs] = [one.needs for one in library.LEVELS if one.name == level]
    about = {"vendor_id": vendor, "flags": " ".join(needs)}
    monkeypatch.setattr(library, "_about_processor", lambda name, *_: about[name])
    monkeypatch.delenv(library.LEVEL_VARIABLE, raising=False)
    monkeypatch.setenv(library.MKL_VARIABLE, "")
    del os.environ[library.MKL_VARIABLE]
    library.settle_products()
    assert os.environ.get(library.MKL_VARIABLE) == expected
    monkeypatch.setenv(library.MKL_VARIABLE, "AUTO")
    library.settle_products()
    assert os.environ[library.MKL_VARIABLE] == "AUTO"


class TestLevels:
    @pytest.fixture(autouse=True)
    def built(self, monkeypatch, tmp_path) -> Path:
        """Pretend that all levels are built."""
        for level in library.LEVELS:
            (tmp_path / level.file_name).touch()
        monkeypatch.setattr(library, "LEVELS_FOLDER", tmp_path)
        (tmp_path / library.DIGEST_FILE).write_text(library._sources_digest())
        return tmp_path

    def test_each_processor_gets_its_highest_level(self, built) -> None:
        for level in library.LEVELS:
            assert library.best_level(level.needs | {"fpu"}) is level
        (built / library.LEVELS[-1].file_name).unlink()
        assert library.best_level(library.LEVELS[-1].needs) is library.LEVELS[-2]

    def test_levels_of_other_sources_are_not_loaded(self, built) -> None:
        (built / library.DIGEST_FILE).write_text("0" * 64)
        assert library.best_level(library.LEVELS[-1].needs) is None
        (built / library.DIGEST_FILE).unlink()
        assert library.best_level(library.LEVELS[-1].needs) is None


def test_recording_does_not_import_torchs_compiler() -> None:
    """torch's wrapper of a mode's method imports its compiler at the first call, which takes a
    second."""
    assert not hasattr(_Watch.__torch_dispatch__, "__wrapped__")
