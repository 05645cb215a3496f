"""Tests of transfers between two engines in this process, and of their failures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from engine import AsyncEngine, Engine, SamplingParams
from engine.errors import WireError
from engine.messages import plain as bytes_of
from engine.plugins.disaggregation import prefill_server
from engine.plugins.disaggregation.wire import (
    Alive,
    Connection,
    Data,
    Failed,
    PrefixBuffer,
    ToDecode,
    identity,
)
from tests.engine.plugins.disaggregation.pair import (
    GREEDY,
    assert_same,
    decode_engine,
    plain_engine,
    prefill_config,
    prefill_thread,
    prefix,
    text,
)
from tests.engine.test_hits_change_nothing import ATTENTION_ONLY, HYBRID, SIDE_BY_SIDE
from tests.stub_device import StubDevice
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def prefill() -> Iterator[Engine]:
    with prefill_thread() as engine:
        yield engine


@pytest.fixture(scope="module")
def plain() -> Engine:
    return plain_engine()


def port_of(engine: Engine) -> int:
    return engine.plugins["disaggregation"].address[1]


def counts_of(engine: Engine) -> dict[str, int]:
    return asdict(engine.plugins["disaggregation"].counts)


def wait_until_idle(engine: Engine) -> None:
    """Wait until a prefill engine has no work left."""
    wait_until(lambda: not (engine.has_work() or engine.plugins["disaggregation"].has_work))


FORMS = {
    "int8-checkpoints": (HYBRID, {"checkpoint_dtype": "int8", "checkpoints": ("every:128",)}),
    "bfloat16": (SIDE_BY_SIDE, {"dtype": "bfloat16"}),
    "attention-only": (ATTENTION_ONLY, {"page_size": 16}),
    "short-tiles": (HYBRID, {"grid": 16}),
}


@pytest.mark.full("int8-checkpoints", "bfloat16", "attention-only")
@pytest.mark.parametrize("form", FORMS)
def test_every_memory_format_can_be_transferred(form: str, tmp_path: Path) -> None:
    """Check narrow checkpoints too: a request resumes from the same rounded state as in one
    engine."""
    model, settings = FORMS[form]
    (tmp_path / "config.json").write_text(json.dumps(model))
    settings = {"model": str(tmp_path), "load_format": "dummy", "grid": 128} | settings
    settings["cache_gib"] = 0.02
    prompts = [text(0, 400), text(0, 140) + text(1, 200), text(2, 30)]
    with prefill_thread(**settings) as prefill:
        engine = decode_engine(port_of(prefill), **settings)
        plain = plain_engine(**settings)
        if "checkpoint_dtype" in settings:
            del prompts[1]
            plain.generate([prompts[0][:384]], SamplingParams(max_tokens=1))
        assert_same(plain, engine, prompts)
        counts = counts_of(engine)
        assert (counts["prefixes"], counts["failed"]) == (len(prompts) - 1, 0)
        engine.check()


def test_a_thread_that_reads_a_prefix_before_its_first_step_selects_the_device(
    plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event of a copy is recorded on the current device, so it must be that of the copy."""
    device = StubDevice()
    monkeypatch.setattr(plain.runner, "device", device)
    PrefixBuffer(plain.runner).read_rows(np.arange(3, dtype=np.int32))
    assert device.threads == {threading.get_ident()}


def test_an_abort_during_a_transfer_frees_both_engines(
    prefill: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = decode_engine(port_of(prefill))
    receive, remaining = Connection.receive, [2]

    def receive_two(self: Connection) -> object:
        remaining[0] -= 1
        return receive(self) if remaining[0] >= 0 else None

    monkeypatch.setattr(Connection, "receive", receive_two)
    name = engine.submit(text(40, 900), GREEDY)
    near = engine.submit(text(41, 20), SamplingParams(max_tokens=4))
    finished = []
    while near not in finished:
        finished += [output.request_id for output in engine.step() if output.is_finished]
    assert name not in finished, "other requests must not wait for a transfer"
    engine.abort(name)
    assert not engine.has_work()
    engine.check()
    wait_until_idle(prefill)


def test_a_drain_finishes_the_prefix_in_progress_and_refuses_new_ones(
    plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed rows are sent before the prefix is complete, and signs of life meanwhile."""
    monkeypatch.setattr(prefill_server, "ALIVE_S", 0.02)
    engine = Engine(prefill_config(token_budget=64))
    forward, permits = engine.runner.forward, threading.Semaphore(1)

    def gated(*arguments: object) -> object:
        permits.acquire()
        return forward(*arguments)

    monkeypatch.setattr(engine.runner, "forward", gated)
    prefilling = AsyncEngine(engine)
    prefilling.channel.start()
    first, late = (decode_engine(port_of(engine)) for _ in range(2))
    prompts = [text(90, 300)], [text(91, 300)]
    expected = [plain.generate(one, GREEDY)[0].output.tolist() for one in prompts]
    with ThreadPoolExecutor() as pool:
        answering = pool.submit(first.generate, prompts[0], GREEDY)
        wait_until(lambda: engine.requests)
        draining = pool.submit(asyncio.run, prefilling.drain())
        plugin = engine.plugins["disaggregation"]
        # The step in progress waits for a permit, and the drain for the step.
        wait_until(lambda: not prefilling.channel.host._is_open)
        permits.release()
        wait_until(lambda: not plugin._is_accepting)
        [outgoing] = plugin._sessions.values()
        refused = pool.submit(late.generate, prompts[1], GREEDY)
        wait_until(lambda: outgoing.num_queued_bytes)  # Rows are sent before the end.
        assert not draining.done()
        permits.release(1000)
        [own] = refused.result()
        assert counts_of(late)["failed"] == 1
        [answer] = answering.result()
        draining.result()
    assert [one.output.tolist() for one in (answer, own)] == expected
    assert (counts_of(first)["prefixes"], counts_of(first)["failed"]) == (1, 0)
    assert not prefilling.is_alive and engine.report().kv.held == 0
    engine.check()


def test_failures_of_the_prefill_engine_are_logged_and_computed_here(
    prefill: Engine,
    plain: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Check a failed step, and a prompt that is too long for the prefill engine."""
    forward = prefill.runner.forward

    def fail_once(*arguments: object) -> object:
        monkeypatch.setattr(prefill.runner, "forward", forward)
        raise RuntimeError("the device is gone")

    engine = decode_engine(port_of(prefill))
    monkeypatch.setattr(prefill.runner, "forward", fail_once)
    with caplog.at_level(logging.WARNING):
        assert_same(plain, engine, [text(50, 300)])
    assert "a step of the prefill engine failed" in caplog.text
    engine = decode_engine(port_of(prefill))
    monkeypatch.setattr(prefill._intake, "max_model_len", 200)
    with caplog.at_level(logging.WARNING):
        assert_same(plain, engine, [text(51, 300)])
    assert "maximum context length is 200 tokens" in caplog.text
    wait_until_idle(prefill)


@contextlib.contextmanager
def stranger(port: int) -> Iterator[zmq.Socket[bytes]]:
    """Connect a ZeroMQ socket to the port."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as made:
        made.linger, made.rcvtimeo = 0, 120_000
        made.connect(f"tcp://127.0.0.1:{port}")
        yield made


def asking(identity: object, start: object = 0, **changes: object) -> bytes:
    """Return the message that asks for a prefix."""
    spec = prefix(b"\1\0\0\0" * 100)
    fields = {name: getattr(spec, name) for name in spec.__struct_fields__} | changes
    return msgspec.msgpack.encode(
        ["PrefixRequest", identity, start, ["RequestSpec", *fields.values()]], enc_hook=bytes_of
    )


def test_a_decode_engine_that_confirms_nothing_holds_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill_server, "MAX_QUEUED_BYTES", 1)
    with prefill_thread(transfer_timeout_s=2.0) as engine:
        with stranger(port_of(engine)) as socket_of:
            socket_of.send(asking(identity(engine.runner), prompt=b"\1\0\0\0" * 129))
            for _ in range(20):
                socket_of.send(msgspec.msgpack.encode(["Taken", 0]))
                if b"takes nothing" in socket_of.recv_multipart()[0]:
                    break
            else:
                pytest.fail("it was not dropped")
            wait_until_idle(engine)
        assert engine.cache.protected().num_tokens == 0


def test_garbage_on_the_port_closes_only_its_own_connection(prefill: Engine, plain: Engine) -> None:
    port, rng = port_of(prefill), np.random.default_rng(81)
    raw = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 9,
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"\x00\x00\x00\x10\xff\xff\xff\xff",  # version 2 of the protocol
        b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(48),  # a greeting, then nothing
        *(rng.bytes(int(n)) for n in rng.integers(1, 3000, 20)),
    ]
    silent = []
    for data in raw:
        silent.append(socket.create_connection(("127.0.0.1", port), 5))
        silent[-1].sendall(data)
    ask = partial(asking, identity(prefill.runner))
    for data in (
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        rng.bytes(5000),
        msgspec.msgpack.encode(["Quit", 1]),
        msgspec.msgpack.encode(["PrefixRequest", {}]),
        asking(3),
        asking({}),
        ask(prompt=b"abc"),
        ask(prompt=b""),
        ask(prompt=[1, 2]),
        ask(prompt="text"),
        *(ask(start=start) for start in (-1, 100, 1 << 40)),
        ask(namespace=[3]),
        ask(boundaries=["x"]),
        ask(boundaries="all"),
    ):
        with stranger(port) as socket_of:
            socket_of.send(data)
            assert isinstance(msgspec.msgpack.decode(socket_of.recv(), type=ToDecode), Failed)
    with stranger(port) as socket_of:
        # For a prefix that was not requested.
        for data in (["Taken", 1 << 60], ["Taken", -5]):
            socket_of.send(msgspec.msgpack.encode(data))
        socket_of.send_multipart([b"a", b"", b"b"])
        assert isinstance(msgspec.msgpack.decode(socket_of.recv(), type=ToDecode), Failed)
    engine = decode_engine(port)
    assert_same(plain, engine, [text(82, 300)])
    assert counts_of(engine)["prefixes"] == 1
    for connection in silent:
        connection.close()
    wait_until(lambda: not prefill.plugins["disaggregation"]._sessions)
    wait_until_idle(prefill)


@contextlib.contextmanager
def impostor(answers: Sequence[Sequence[bytes] | None]) -> Iterator[int]:
    """Open a port where each request for a prefix gets ``answers``. None ends the connection."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        is_over = threading.Event()

        def run() -> None:
            endpoint = router.last_endpoint
            while not is_over.is_set():
                if not router.poll(20):
                    continue
                peer, data = router.recv_multipart()
                if b"PrefixRequest" not in data[:16]:
                    continue
                for answer in answers:
                    if answer is None:
                        router.unbind(endpoint)
                    else:
                        router.send_multipart([peer, *answer])

        thread = threading.Thread(target=run)
        thread.start()
        yield port
        is_over.set()
        thread.join()


def message(reply: ToDecode, data: bytes | None = None) -> list[bytes]:
    return [msgspec.msgpack.encode(reply), *([] if data is None else [data])]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([[b"\xc1"]], "unclear"),
        ([message(Data(), b"short")], "were not requested"),
        ([message(Data())], "were not requested"),
        ([message(Data(), bytes(1 << 22))], "were not requested"),
        ([message(Failed(WireError("of another version", "it is tired.")))], "it is tired"),
        ([message(Alive()), None], "has gone"),
        ([], "was silent for 0.3 seconds"),
    ],
)
def test_wrong_answers_of_a_prefill_engine_lose_no_token(
    plain: Engine, caplog: pytest.LogCaptureFixture, answers: list[list[bytes] | None], reason: str
) -> None:
    with impostor(answers) as port, caplog.at_level(logging.WARNING):
        engine = decode_engine(port, **({} if answers else {"transfer_timeout_s": 0.3}))
        assert_same(plain, engine, [text(85, 200)])
        assert counts_of(engine)["failed"] == 1 and counts_of(engine)["prefixes"] == 0
        engine.check()
        engine.close()
    assert reason in caplog.text
