"""Tests of loading a prediction head: weights, memory, warm-up, and errors for models without
one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine import EngineConfig
from engine.engine import load_runner
from engine.runner.loading import load_model
from engine.weights.checkpoint import Dummy
from engine.weights.tensor_files import WeightsError
from tests.engine.drafted import MODEL, MakeEngine, engine_with_head
from tests.refused import refused


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    return partial(engine_with_head, tmp_path)


def test_the_warm_up_includes_drafts(make_engine: MakeEngine) -> None:
    """Check that the warm-up drafts on padding and changes no row or state."""
    runner = make_engine("mtp:3").runner
    before = runner.tensors.rows[: runner.memory.num_kv_tokens].clone()
    assert [len(work()) for work in runner.drafts.rehearsals()] == [4, 3, 2, 1]
    assert torch.equal(runner.tensors.rows[: runner.memory.num_kv_tokens], before)
    assert not make_engine("tree").runner.drafts.rehearsals()


def test_the_head_is_loaded_from_files(tmp_path: Path, make_engine: MakeEngine) -> None:
    """Check that every ``mtp.*`` tensor is read, and that extra and missing ones are named."""
    runner = make_engine("mtp").runner
    family, build = type(runner.model), runner.model.build
    own = replace(runner.loaded.settings, load_format="dummy", seed=5)
    tensors: dict[str, torch.Tensor] = {}

    def keep(self: Dummy, layer: Any) -> None:
        for name, parameter in layer.parameters():
            self.draw(name, parameter)
            tensors[name] = parameter.target.clone()
            if parameter.cut is not None:
                tensors[name][parameter.cut.index] = parameter.target

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dummy, "fill", keep)
        seeded, _ = load_model(own, family, runner.config, build, None)
    save_file(tensors, tmp_path / "model.safetensors")
    settings = {"model": str(tmp_path), "device": "cpu", "cache_gib": 0.01, "draft": "mtp"}
    loaded = load_runner(EngineConfig(**settings))
    embedded, before = torch.randn(2, 4, MODEL["hidden_size"])
    ours, theirs = (model.prediction._enter(embedded, before) for model in (loaded.model, seeded))
    assert torch.equal(ours, theirs)
    save_file({**tensors, "mtp.odd": torch.zeros(2)}, tmp_path / "model.safetensors")
    refused(r"1 unexpected: mtp\.odd", load_runner, EngineConfig(**settings), kind=WeightsError)
    del tensors["mtp.layers.0.self_attn.k_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"1 missing: mtp\.layers\.0\.self_attn\.k_norm\.weight"):
        load_runner(EngineConfig(**settings))
    plain = load_runner(EngineConfig(**(settings | {"draft": "none"})))
    assert "; its multi-token head is read with --draft mtp only" in plain.loaded.weights_note
