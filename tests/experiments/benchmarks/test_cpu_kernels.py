"""Benchmark of the CPU's kernels: every figure is measured, for small sizes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from experiments import provenance
from experiments.benchmarks import cpu_kernels


@pytest.mark.full
def test_all_layers_and_recurrences_have_figures(tmp_path, monkeypatch, capsys) -> None:
    sizes = {"OUTPUTS": 64, "INPUTS": 256, "ROWS": (1, 3), "PROMPT": 70, "HEADS": 2, "SIZE": 32}
    sizes |= {"KEY": 16, "VALUE": 16, "DECAYS": (-0.01, -100.0)}
    for name, value in sizes.items():
        monkeypatch.setattr(cpu_kernels, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(provenance, "WRITTEN", tmp_path)
    monkeypatch.setattr(sys, "argv", ["cpu_kernels", "--threads", "1", "--turns", "1"])
    cpu_kernels.main()
    first, *lines = map(json.loads, (tmp_path / "bench_cpu_kernels.jsonl").read_text().splitlines())
    assert "linear_bfloat16" in first["provenance"]["settings"]["kernels"]
    speeds, times = ([x for x in lines if key in x] for key in ("layer", "kernel"))
    assert len(speeds) == 2 * len(cpu_kernels.layers())
    assert all(x["gflop_s"] > 0 for x in speeds)
    kernels = {x["kernel"] for x in times}
    references = {
        f"{kind}_{name} reference"
        for kind in ("chunk", "decode")
        for name in cpu_kernels.RECURRENCES
    }
    assert kernels >= references
    assert len(times) == 2 * len(kernels)
    assert all(x["us_per_token"] > 0 for x in times)
    assert "chunk_gdn reference" in capsys.readouterr().out
