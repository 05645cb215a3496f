"""Recording of native kernel calls, and their compilation."""

from __future__ import annotations

import importlib
import inspect
import subprocess

import pytest
import torch

from kernels import native, recording
from kernels.recording import NotRecordableError, _Watch, record

COMPILED = pytest.mark.skipif(native.shared_library() is None, reason="no C++ compiler")


FOLDERS = sorted(path.parent.name for path in native.SOURCES.glob("*/native.py"))


@pytest.mark.parametrize("name", FOLDERS)
def test_native_kernels_have_all_shared_functions(name) -> None:
    """Functions that reference and Triton share exist natively with the same arguments."""
    pytest.importorskip("triton")
    reference, fused, compiled = (
        importlib.import_module(f"kernels.{name}.{backend}")
        for backend in ("reference", "fused", "native")
    )
    shared = [
        function_name
        for function_name, function in vars(fused).items()
        if inspect.isfunction(function) and inspect.isfunction(vars(reference).get(function_name))
    ]
    assert shared
    for function_name in shared:
        own, plain = getattr(compiled, function_name), getattr(reference, function_name)
        assert list(inspect.signature(own).parameters) == list(inspect.signature(plain).parameters)


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
    with pytest.raises(NotRecordableError, match="aten"):
        record(lambda: operation(x))


class TestCompiling:
    def test_missing_compiler_gives_no_library(self, monkeypatch) -> None:
        monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
        assert native.shared_library.__wrapped__() is None

    @COMPILED
    def test_failing_compiler_gives_no_library(self, monkeypatch, tmp_path) -> None:
        def fails(*args, **options):
            raise subprocess.CalledProcessError(1, "c++")

        monkeypatch.setattr(native.Path, "home", lambda: tmp_path)
        monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(native, "_compile", fails)
        assert native.shared_library.__wrapped__() is None

    @COMPILED
    def test_unwritable_home_uses_the_temporary_folder(self, monkeypatch, tmp_path) -> None:
        (tmp_path / "home").write_text("a file where a folder should be")
        monkeypatch.setattr(native.Path, "home", lambda: tmp_path / "home")
        monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(native, "SOURCES", tmp_path)
        (tmp_path / "native.h").touch()
        (tmp_path / "one").mkdir()
        source = tmp_path / "one" / "native.cpp"
        source.write_text('extern "C" __attribute__((visibility("default"))) void one() {}')
        found = native.shared_library.__wrapped__()
        assert found is not None and hasattr(found, "one") and not hasattr(found, "two")
        assert list(tmp_path.glob("hybridcache-*/native-*.so"))

    @COMPILED
    def test_library_name_depends_on_the_sources(self, monkeypatch, tmp_path) -> None:
        before = native._fingerprint("c++", [])
        source = tmp_path / "native.cpp"
        source.write_text("int f() { return 1; }")
        assert native._fingerprint("c++", [source]) != before


def test_recording_does_not_import_torchs_compiler() -> None:
    """torch's wrapper of a mode's method imports its compiler at the first call, which takes a
    second."""
    assert not hasattr(_Watch.__torch_dispatch__, "__wrapped__")
