"""Tests of training: the model matches Qwen3-Next, tasks have correct answers, and a stopped run
resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import Engine, SamplingParams, engine_config
from engine.plugins.speculation.suffix import HeadDrafter
from experiments.training import train_builtin
from experiments.training.model import Model

TINY = train_builtin.CONFIG | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def test_logits_match_those_of_qwen3_next(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(TINY)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(weight, 0.1, 0.1)
    train_builtin.export(model, tmp_path, {}, TINY | {"dtype": "float32"})
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    token_ids = torch.randint(0, 261, (2, 77))
    model.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    with torch.inference_mode():
        found, expected = model(token_ids)[0], oracle(token_ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.full
def test_resumed_training_is_bit_identical(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(train_builtin, "CONFIG", TINY)
    data = train_builtin.Data(2, 64, seed=0)

    def run(path: Path, stops: bool) -> torch.Tensor:
        training = train_builtin.Training(data, path, seed=0)
        for step in range(4):
            training.one_step(0.5)
            if stops and step == 1:
                training.save()
                training = train_builtin.Training(data, path, seed=0)
        assert training.step == 4
        return training.model.lm_head.weight.detach().clone()

    assert torch.equal(run(tmp_path / "a.pt", False), run(tmp_path / "b.pt", True))


def test_engine_drafts_match_the_training_model(tmp_path: Path) -> None:
    """Each draft of three tokens has the most likely tokens of the trained depths, if the text
    continues with the draft. This holds after a prompt, after decode steps and after a hit."""
    torch.manual_seed(4)
    model = Model(TINY)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(weight, 0.1, 0.1)
        elif weight.ndim == 2:
            weight.data.mul_(4)
    model.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    train_builtin.export(model, tmp_path, {}, TINY | {"dtype": "float32"})
    config = engine_config(model=str(tmp_path), device="cpu", cache_gib=0.02, draft="mtp:3")
    engine = Engine(config)
    proposals: list[tuple[list[int], list[int]]] = []
    propose = HeadDrafter.propose

    def spy(self: HeadDrafter, wanted: Any) -> Any:
        found = propose(self, [(request, 3) for request, _ in wanted])
        for (request, _), tokens in zip(wanted, found, strict=True):
            proposals.append((request.tokens.tolist(), tokens.tolist()))
        return [tokens[:most] for tokens, (_, most) in zip(found, wanted, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadDrafter, "propose", spy)
        patch.setattr("engine.plugins.speculation.draft_manager.MIN_ACCEPTANCE", 0.0)
        prompts = [torch.randint(0, 250, (length,)).tolist() for length in (5, 70, 70)]
        prompts[2][:66] = prompts[1][:66]
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        outputs = [engine.generate([prompt], params)[0] for prompt in prompts]
    assert [output.cached_len for output in outputs] == [0, 0, 64]
    assert len(proposals) > 9
    for tokens, draft in proposals:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens + draft]), 3)
        expected = [int(logits[d][0, len(tokens) - 2].argmax()) for d in (1, 2, 3)]
        assert draft == expected
