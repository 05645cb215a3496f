"""What goes from one engine to another, and what happens when it does not: both in this process."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import Engine, SamplingParams, engine_config
from engine.config import ConfigError
from engine.plugins.disaggregation import outgoing
from engine.plugins.disaggregation.link import GroupTransfer
from engine.plugins.disaggregation.prefix_buffer import PrefixBuffer
from engine.plugins.disaggregation.wire import TransferError, Wire
from engine.runner.model_runner import ModelRunner
from engine.server.metrics import Metrics
from tests.engine.test_hits_change_nothing import ATTENTION_ONLY, HYBRID, SIDE_BY_SIDE
from tests.engine.transfer.pair import (
    GREEDY,
    assert_same,
    decode_engine,
    plain_engine,
    prefill_thread,
)


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(97, 122, length).tolist()


@pytest.fixture(scope="module")
def far() -> Iterator[Engine]:
    with prefill_thread() as engine:
        yield engine


@pytest.fixture(scope="module")
def plain() -> Engine:
    return plain_engine()


def port_of(engine: Engine) -> int:
    assert engine.plugins["disaggregation"].server is not None
    return engine.plugins["disaggregation"].server.address[1]


def counts_of(engine: Engine) -> dict[str, int]:
    assert engine.plugins["disaggregation"].counts is not None
    return engine.plugins["disaggregation"].counts.as_dict()


def settled(engine: Engine) -> None:
    """Wait until a prefill engine has nothing left to do."""
    assert engine.plugins["disaggregation"].server is not None
    for _ in range(500):
        if not (engine.has_work() or engine.plugins["disaggregation"].server.has_work):
            return
        time.sleep(0.01)
    raise AssertionError("it never came to rest")


FORMS = {
    "int8-checkpoints": (HYBRID, {"checkpoint_dtype": "int8", "checkpoints": ("every:128",)}),
    "pools-bfloat16": (SIDE_BY_SIDE, {"dtype": "bfloat16", "kv_gib": 0.01, "state_gib": 0.01}),
    "attention-only": (ATTENTION_ONLY, {"page_size": 16}),
    "short-tiles": (HYBRID, {"grid": 16}),
}


@pytest.mark.full("int8-checkpoints", "pools-bfloat16", "attention-only")
@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_memory_travels(form: str, tmp_path: Path) -> None:
    """A checkpoint in fewer bits is that of one engine too, where a request resumes from it."""
    model, settings = FORMS[form]
    (tmp_path / "config.json").write_text(json.dumps(model))
    settings = {"model": str(tmp_path), "load_format": "dummy", "grid": 128} | settings
    if "kv_gib" not in settings:
        settings["cache_gib"] = 0.02
    else:
        settings["cache_gib"] = None
    prompts = [text(0, 400), text(0, 140) + text(1, 200), text(2, 30)]
    with prefill_thread(**settings) as far:
        engine = decode_engine(port_of(far), **settings)
        plain = plain_engine(**settings)
        if "checkpoint_dtype" in settings:
            del prompts[1]
            plain.generate([prompts[0][:384]], SamplingParams(max_tokens=1))
        assert_same(plain, engine, prompts)
        counts = counts_of(engine)
        assert (counts["prefixes"], counts["failed"]) == (len(prompts) - 1, 0)
        engine.check()


@pytest.mark.full
def test_a_head_that_drafts_finds_its_rows_and_its_hidden_vector(plain: Engine) -> None:
    settings = {"draft": "mtp:3"}
    prompt = list(b"for i in range(10): print(i)\n" * 14)
    with prefill_thread(**settings) as far:
        engine = decode_engine(port_of(far), **settings)
        own = plain_engine(**settings)
        assert_same(own, engine, [prompt])
        left, right = (one.generate([prompt + prompt], GREEDY)[0] for one in (own, engine))
        assert left.drafts == right.drafts and left.drafts is not None
    assert counts_of(engine)["prefixes"] == 2


def test_layers_leave_while_the_step_that_computes_them_goes_on(
    far: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []
    put, advance = outgoing.Outgoing._put, outgoing.Outgoing.advance

    def noting_put(self, piece, copied, num_bytes):
        events.append(piece[0])
        put(self, piece, copied, num_bytes)

    def noting_advance(self, unit, manager):
        events.append("step")
        advance(self, unit, manager)

    monkeypatch.setattr(outgoing.Outgoing, "_put", noting_put)
    monkeypatch.setattr(outgoing.Outgoing, "advance", noting_advance)
    assert_same(plain, decode_engine(port_of(far)), [text(20, 1500)])
    parts = list(range(len(PrefixBuffer.of(far.runner).part_bytes)))  # type: ignore[attr-defined]
    computed = [event for event in events if event != "step"]
    assert computed == [*parts, *parts, None]  # two chunks, and the state at the end
    first = events.index(0)
    assert events[first : first + len(parts)] == parts, "a layer waited for the step's end"


@pytest.mark.full("32-tile, checkpoint grid")
@pytest.mark.parametrize(
    ("grid", "differs"), [(128, "checkpoint grid"), (32, "tile, checkpoint grid")]
)
def test_another_model_is_refused_in_one_sentence(
    far: Engine, caplog: pytest.LogCaptureFixture, grid: int, differs: str
) -> None:
    engine = decode_engine(port_of(far), grid=grid)
    with caplog.at_level(logging.WARNING):
        assert_same(plain_engine(grid=grid), engine, [text(30, 300)])
    [said] = caplog.messages
    assert said.endswith(f"it differs in {differs}: configure both the same.")
    assert counts_of(engine)["failed"] == 1


def test_nobody_there_costs_a_moment_and_no_token(plain: Engine) -> None:
    engine = decode_engine(1)
    assert_same(plain, engine, [text(31, 300), text(32, 300)])
    assert counts_of(engine)["failed"] >= 1 and counts_of(engine)["prefixes"] == 0
    engine.check()


def test_who_leaves_while_its_prefix_comes_leaves_nothing_here_or_there(
    far: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = decode_engine(port_of(far))
    receive = GroupTransfer.receive

    def slowly(self: GroupTransfer, num_bytes: int) -> torch.Tensor:
        time.sleep(0.05)
        return receive(self, num_bytes)

    monkeypatch.setattr(GroupTransfer, "receive", slowly)
    name = engine.submit(text(40, 900), GREEDY)
    near = engine.submit(text(41, 20), SamplingParams(max_tokens=4))
    finished = []
    while near not in finished:
        finished += [output.request_id for output in engine.step() if output.is_finished]
    assert name not in finished, "the others wait for a prefix on its way"
    engine.abort(name)
    assert not engine.has_work()
    engine.check()
    settled(far)


def test_what_breaks_on_the_other_side_is_said_and_computed_here(
    far: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A step that breaks off; a prompt that has no room there."""
    forward = far.runner.forward

    def once(*arguments: object) -> object:
        monkeypatch.setattr(far.runner, "forward", forward)
        raise RuntimeError("the device is gone")

    engine = decode_engine(port_of(far))
    monkeypatch.setattr(far.runner, "forward", once)
    with caplog.at_level(logging.WARNING):
        assert_same(plain, engine, [text(50, 300)])
    assert "a step of the prefill engine failed" in caplog.text
    engine = decode_engine(port_of(far))
    monkeypatch.setattr(far._intake, "_max_model_len", 200)
    with caplog.at_level(logging.WARNING):
        assert_same(plain, engine, [text(51, 300)])
    assert "maximum context length is 200 tokens" in caplog.text
    settled(far)


def test_a_prompt_that_is_refused_there_says_nothing_of_the_next(
    far: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that fails is left alone for a while; one that refuses a prompt is not."""
    engine = decode_engine(port_of(far))
    monkeypatch.setattr(far._intake, "_max_model_len", 200)
    for number, length in ((52, 300), (53, 150)):
        assert_same(plain, engine, [text(number, length)])
    assert (counts_of(engine)["failed"], counts_of(engine)["prefixes"]) == (1, 1)
    settled(far)


@pytest.mark.full
def test_an_engine_that_computes_nothing_counts_as_gone(
    far: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection lives, and says so only as long as its engine steps."""
    server = far.plugins["disaggregation"].server
    assert server is not None
    engine = decode_engine(port_of(far), transfer_timeout_s=1.0)
    monkeypatch.setattr(server, "_timeout_s", 1.0)
    monkeypatch.setattr(server, "advance", lambda: time.sleep(0.05))
    with caplog.at_level(logging.WARNING):
        assert_same(plain, engine, [text(60, 300)])
    assert counts_of(engine)["failed"] == 1 and "computed here" in caplog.text
    monkeypatch.undo()
    settled(far)


def test_what_is_no_message_ends_the_connection_and_nothing_else(far: Engine) -> None:
    assert far.plugins["disaggregation"].server is not None
    for said in ({"hello": 3}, {"hello": {}}):
        wire = Wire.connect(far.plugins["disaggregation"].server.address, 5.0)
        wire.send(said)
        assert "refused" in wire.receive()[0]
        wire.close()
    wire = Wire.connect(far.plugins["disaggregation"].server.address, 5.0)
    wire._socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(TransferError):
        wire.receive()


def test_bytes_are_reported(far: Engine, plain: Engine) -> None:
    assert_same(plain, decode_engine(port_of(far)), [text(70, 300)])
    shown = Metrics().render(far.report()).decode()
    assert f"engine_transferred_prefixes_total {far.report().transfers['prefixes']}.0" in shown
    assert far.cache_report()["transfers"]["needed_bytes"] > 0


def test_settings_that_can_not_work_are_one_sentence() -> None:
    for settings, word in (
        ({"role": "prefill"}, "--transfer-at"),
        ({"role": "decode"}, "--prefill"),
        ({"prefill": ("127.0.0.1:7000",)}, "--role decode"),
        ({"role": "decode", "prefill": ("somewhere",)}, "HOST:PORT"),
        ({"role": "prefill", "transfer_at": "host:99999"}, "HOST:PORT"),
        ({"role": "both"}, "role must be one of none, prefill, decode"),
        ({"role": "prefill", "transfer_at": "h:1", "prefix_cache": "none"}, "--prefix-cache none"),
        ({"role": "prefill", "transfer_at": "h:1", "tp": 2}, "--tp does not support roles"),
        ({"role": "prefill", "transfer_at": "h:1", "host_gib": 1.0}, "--host-gib"),
        ({"fetch_above": 0}, "fetch_above"),
        ({"transfer_timeout_s": 0.0}, "transfer_timeout_s"),
    ):
        with pytest.raises(ConfigError, match=word):
            engine_config(**settings)  # type: ignore[arg-type]


def test_an_address_in_use_is_one_sentence(far: Engine) -> None:
    config = engine_config(
        role="prefill", transfer_at=f"127.0.0.1:{port_of(far)}", cache_gib=0.05, device="cpu"
    )
    with pytest.raises(ConfigError, match="--transfer-at"):
        Engine(config, runner=ModelRunner(config), sampler=far._sampler)


def test_an_address_of_another_machine_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"203\.0\.113\.7:0: this machine does not have that"):
        Engine(engine_config(role="prefill", transfer_at="203.0.113.7:0", cache_gib=0.01))
