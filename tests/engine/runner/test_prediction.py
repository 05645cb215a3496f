"""The multi-token prediction head: same drafts as a reference of transformers' modules, and equal
bits however a text was computed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.plugins.disaggregation.wire import PrefixBuffer
from engine.runner.predictor import Newest, Predictor
from engine.schedule.scheduler import Batch, Segment
from engine.weights.parameters import Source
from tests.engine.small_models import Driver, load, random_tokens

MODELS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
SCRATCH = 32


class Reference:
    """Chained drafts for one sequence, without a cache."""

    def __init__(self, model):
        self.model, hidden = model, model.config.hidden_size
        torch.manual_seed(11)
        rank = model.config.layer_types.index("full_attention")
        norm = type(model.model.norm)
        self.parts = torch.nn.ModuleDict(
            {
                "fc": torch.nn.Linear(2 * hidden, hidden, bias=False),
                "pre_fc_norm_embedding": norm(hidden),
                "pre_fc_norm_hidden": norm(hidden),
                "layers": torch.nn.ModuleList([type(model.model.layers[rank])(model.config, rank)]),
                "norm": norm(hidden),
            }
        ).eval()
        with torch.no_grad():
            for name, parameter in self.parts.named_parameters():
                size = 0.2 if "norm" in name else 0.15
                parameter.copy_(torch.randn_like(parameter) * size)

    @torch.inference_mode()
    def draft(self, tokens, count):
        """Return the logits [count, vocab] of the ``count`` tokens after ``tokens``.

        The last of ``tokens`` is not yet computed by the model.
        """
        ids, body = torch.tensor([tokens]), self.model.model
        before, logits = body(ids[:, :-1], use_cache=False).last_hidden_state, []
        for _ in range(count):
            parts = (
                self.parts["pre_fc_norm_embedding"](body.embed_tokens(ids[:, 1:])),
                self.parts["pre_fc_norm_hidden"](before),
            )
            x = self.parts["fc"](torch.cat(parts, dim=-1))
            turns = body.rotary_emb(x, torch.arange(1, ids.shape[1])[None])
            x = self.parts["layers"][0](x, position_embeddings=turns)
            hidden = self.parts["norm"](x if isinstance(x, torch.Tensor) else x[0])[:, -1:]
            logits.append(self.model.lm_head(hidden)[0, 0])
            ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], dim=1)
            before = torch.cat([before, hidden], dim=1)
        return torch.stack(logits)


class Head:
    """Prediction head of a driver's model, with separate pools that start as NaN."""

    def __init__(self, driver, reference, monkeypatch):
        self.runner = runner = driver.runner
        model = runner.model
        monkeypatch.setattr(model, "stacked_experts", True)
        self.head = model.prediction_head()
        tensors = {f"mtp.{name}": tensor for name, tensor in reference.parts.state_dict().items()}
        for name, parameter in self.head.parameters():
            parameter.fill(Source.of(tensors.pop(name)))
        assert not tensors
        self.head.seal()
        memory = runner.memory
        counts = {
            True: memory.num_kv_tokens + SCRATCH,
            False: memory.num_slots + 1 + runner.loaded.settings.num_step_states,
        }
        self.pools = tuple(
            torch.full((counts[spec.kind == "kv"], *spec.shape), torch.nan)
            for spec in self.head.keeps
        )
        forward = model.forward

        def follow(token_ids, inputs, pools):
            hidden = forward(token_ids, inputs, pools)
            self.head.follow(model.embedding(token_ids), hidden, inputs, self.pools)
            return hidden

        monkeypatch.setattr(model, "forward", follow)
        memory = SimpleNamespace(pools=[self.pools], padding_row=memory.num_kv_tokens - 1)
        inputs = replace(runner.step_inputs, memory=memory)
        self.predictor = Predictor(self.head, model, inputs)
        compute, self.logits = model.head, []

        def keep_logits(hidden):
            self.logits.append(compute(hidden))
            return self.logits[-1]

        monkeypatch.setattr(model, "head", keep_logits)

    @torch.inference_mode()
    def draft(self, sequences, newest, count):
        """Return the logits [count, B, vocab] of drafts after the ``newest`` tokens."""
        pairs = zip(sequences, newest, strict=True)
        places = [Newest(s.row, s.slot, token, s.computed_len) for s, token in pairs]
        self.logits.clear()
        tokens = self.predictor.guess(places, [count] * len(places))
        logits = torch.stack(self.logits)[:, : len(places)]
        assert np.array_equal(logits.argmax(-1).T, tokens)
        return logits

    def rows_of(self, sequence, end):
        """Return the head's keys and values of positions in [1, ``end``)."""
        rows = self.runner.table.host[sequence.row, 1:end]
        return torch.cat([pool[rows] for pool in self.pools[:2]])


@pytest.fixture
def make_head(drivers, oracles, monkeypatch):
    def make(name, draft="none"):
        oracle = oracles(name)
        driver, reference = drivers(name), Reference(oracle.model)
        if draft != "none":
            driver = Driver(load(oracle.path, draft=draft, cache_gib=0.04))
        return driver, Head(driver, reference, monkeypatch), reference

    return make


@pytest.mark.parametrize("name", MODELS)
def test_drafts_equal_the_reference(name, make_head) -> None:
    """Four tokens of two sequences in one batch, after prefills and after decodes."""
    driver, head, reference = make_head(name)
    texts = random_tokens(90, 1), random_tokens(7, 2)
    sequences, _ = driver.start([text[:-3] for text in texts])
    for place in (-3, -2, -1):
        newest = [text[place] for text in texts]
        found = head.draft(sequences, newest, 4)
        for b, text in enumerate(texts):
            expected = reference.draft(text[: len(text) + place + 1], 4)
            torch.testing.assert_close(found[:, b], expected, rtol=2e-3, atol=2e-3)
            assert found[:, b].argmax(-1).tolist() == expected.argmax(-1).tolist()
        driver.decode(sequences, newest)


@pytest.mark.parametrize("name", MODELS[:2])
def test_drafts_after_a_hit_equal_a_cold_run(name, make_head) -> None:
    """At each grid position and in chunks; another request, with another next token, wrote the
    rows."""
    driver, head, _ = make_head(name)
    text = random_tokens(200, 3)
    (cold,), _ = driver.start([text])
    expected, rows = head.draft([cold], [5], 3), head.rows_of(cold, 200)
    assert not rows.isnan().any()
    for position in (64, 128, 192):
        other = [*text[:position], (text[position] + 1) % 199, 3]
        writer, write = driver.begin(other)
        slot = driver.slot()
        segment = driver.prefill_segment(writer, 1000, exports=((position, slot),))
        driver.runner.forward(Batch((segment,), (), (write,)))
        shared = driver.runner.table.host[writer.row, :position].copy()
        hit, write = driver.begin(text, shared)
        head.pools[2][hit.slot] = head.pools[2][slot]
        restores, writes = ((slot, hit.slot),), (write,)
        while hit.computed_len < len(text):
            segment = driver.prefill_segment(hit, 64)
            driver.runner.forward(Batch((segment,), restores, writes))
            restores = writes = ()
        assert torch.equal(head.rows_of(hit, 200), rows)
        assert torch.equal(head.draft([hit], [5], 3), expected)
        assert hit.slot != cold.slot


def test_head_after_verification_equals_single_steps(make_head) -> None:
    """Rows of rejected tokens are overwritten, and the hidden state is that of the last accepted
    token."""
    driver, head, _ = make_head("qwen3_next", "tree:4")
    runner = driver.runner
    text, answer = random_tokens(30, 4), random_tokens(5, 5)
    (single, verified), _ = driver.start([text, text])
    for token in answer:
        driver.decode([single], [token])
    for start, tokens, num_accepted in ((30, [*answer[:3], 7, 8], 3), (33, [*answer[3:], 9], 2)):
        segment = Segment(
            verified.row,
            verified.slot,
            np.array(tokens, np.int32),
            start,
            True,
            num_logits=len(tokens),
            num_drafts=len(tokens) - 1,
        )
        batch = Batch((segment,))
        runner.forward(batch)
        runner.commit(batch, (num_accepted,))
        head.pools[2][verified.slot] = head.pools[2][runner.drafts.running.at(verified.slot)]
        PrefixBuffer(runner).read_rows(np.zeros(1, np.int32))
    verified.computed_len = 35
    assert torch.equal(head.rows_of(verified, 35), head.rows_of(single, 35))
    assert torch.equal(head.draft([verified], [1], 3), head.draft([single], [1], 3))
