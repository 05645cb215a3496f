"""Tests of roles at shutdown: an engine ends when it should, independent of other engines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
import zmq

from engine import AsyncEngine, Engine, RequestSpec, SamplingParams
from engine.errors import EngineStopped
from engine.plugins.disaggregation import prefill_server as serve
from engine.plugins.disaggregation import prefix_fetch as fetch
from engine.plugins.disaggregation.prefix_buffer import PrefixBuffer, identity
from engine.plugins.disaggregation.wire import (
    Alive,
    Ask,
    Connection,
    Done,
    End,
    Failed,
    Piece,
    Taken,
    TransferError,
)
from engine.server.serve import Server
from engine.server.settings import ServerConfig
from tests.engine.transfer.pair import decode_engine, plain_engine, prefill_config, prefix

ONE = SamplingParams(max_tokens=1, temperature=0)
FEW = SamplingParams(max_tokens=4, temperature=0)


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(97, 122, length).tolist()


def wait_until(is_true: Callable[[], object], what: str) -> None:
    for _ in range(6000):
        if is_true():
            return
        time.sleep(0.01)
    raise AssertionError(f"{what} did not happen")


class GatedEngine:
    """Prefill engine in a thread, which computes one step per permit until it is opened."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, starts: bool = True, **settings: object
    ) -> None:
        # On a busy machine, a live decode engine may be silent for seconds.
        settings = {"transfer_timeout_s": 60.0} | settings
        self.engine = Engine(prefill_config(token_budget=64, **settings))
        self.permits, self.is_open = threading.Semaphore(0), False
        forward = self.engine.runner.forward

        def gated(*arguments: object) -> object:
            if not self.is_open:
                self.permits.acquire()
            return forward(*arguments)

        monkeypatch.setattr(self.engine.runner, "forward", gated)
        self.clients: list[DecodeClient] = []
        self.running = AsyncEngine(self.engine)
        if starts:
            self.running.start()
        self.address: tuple[str, int] = self.engine.plugins["disaggregation"].server.address

    def open(self) -> None:
        self.is_open = True
        self.permits.release()

    def close(self) -> None:
        self.open()
        self.running.stop()
        for client in self.clients:
            client.close()

    def begin_end(self, how: str) -> threading.Thread:
        """Begin to ``stop`` or ``drain`` the engine. Return the thread that waits for the end."""
        end = self.running.stop if how == "stop" else lambda: asyncio.run(self.running.drain())
        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        wait_until(lambda: not self.running._is_open, "the end of the engine")
        return thread

    def accepts(self) -> bool:
        """Return whether it would compute the prefix of one more decode engine."""
        client = DecodeClient(self)
        try:
            client.ask(text(999, 193))
            return not isinstance(client.receive(), Failed)
        except TransferError:
            return False
        finally:
            client.close()

    def expect_end(self, thread: threading.Thread) -> None:
        """Check that the engine has ended and holds no memory."""
        thread.join(60)
        assert not thread.is_alive() and not self.running.is_alive
        with pytest.raises(OSError):
            socket.create_connection(self.address, 5)
        self.engine.check()
        report = self.engine.report()
        assert report.kv.held == report.slots.held == report.num_running == report.num_waiting == 0
        self.engine.reset_prefix_cache()
        assert self.engine.report().kv.cached == 0, "some entries are locked"


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[GatedEngine]:
    engine = GatedEngine(monkeypatch)
    yield engine
    engine.close()


class DecodeClient:
    """Decode side of one connection, controlled step by step."""

    def __init__(self, engine: GatedEngine, timeout_s: float = 20.0) -> None:
        self.identity = identity(engine.engine.config, engine.engine.runner)
        self.buffer = PrefixBuffer.of(engine.engine.runner)
        self.context, self.poller, self.num_bytes = zmq.Context(), zmq.Poller(), 0
        self.connection = Connection(
            self.context, self.poller, engine.address, timeout_s=timeout_s, max_bytes=1 << 24
        )
        engine.clients.append(self)

    def ask(self, tokens: list[int]) -> None:
        data = np.asarray(tokens, np.int32).tobytes()
        self.connection.send(Ask(self.identity, 0, prefix(data)))

    def receive(self) -> object:
        """Return the next message, and confirm a piece."""
        while (received := self.connection.receive()) is None:
            self.poller.poll(20)
        message, data = received
        match message:
            case Piece(part, start, end):
                buffer = self.buffer
                size = (
                    buffer.state_bytes if part is None else (end - start) * buffer.part_bytes[part]
                )
                assert len(data) == size
                self.num_bytes += size
                self.connection.send(Taken(self.num_bytes))
            case Failed(error):
                assert error.message
        return message

    def receive_piece(self) -> None:
        while not isinstance(self.receive(), Piece):
            pass

    def finish(self, tokens: list[int] | None = None) -> str:
        """Receive the rest: return ``done``, ``failed``, or ``gone`` if the connection was closed.

        With ``tokens``, request them first.
        """
        with contextlib.suppress(TransferError):
            if tokens is not None:
                self.ask(tokens)
            while not isinstance(end := self.receive(), Done | Failed):
                pass
            self.connection.send(End())
            self.num_bytes = 0
            return "done" if isinstance(end, Done) else "failed"
        return "gone"

    def close(self) -> None:
        if not self.context.closed:
            with contextlib.suppress(TransferError):
                self.connection.send(End())
            self.connection.close()
            self.context.term()


def test_a_drain_finishes_prefixes_in_progress_and_refuses_new_ones(
    gated: GatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the last byte is sent before the end."""
    monkeypatch.setattr(serve, "CLOSE_S", 0.0)
    again, first, idle = DecodeClient(gated), DecodeClient(gated), DecodeClient(gated)
    again.ask(text(0, 193))  # three steps
    gated.permits.release()
    again.receive_piece()
    first.ask(text(2, 193))
    assert isinstance(first.receive(), Alive), "it was accepted"
    ending = gated.begin_end("drain")
    gated.permits.release()
    wait_until(lambda: not gated.accepts(), "a refusal by the draining engine")
    assert idle.finish(text(1, 193)) in ("failed", "gone")
    gated.permits.release(2)
    assert again.finish() == "done"
    assert again.finish(text(3, 193)) == "failed", "the next prefix of the same connection"
    assert ending.is_alive()
    gated.open()
    wait_until(lambda: not gated.engine.requests, "the end of the computation")
    time.sleep(0.3)  # Its last bytes are read late.
    assert first.finish() == "done"
    gated.expect_end(ending)
    assert gated.engine.plugins["disaggregation"].counts.prefixes == 2


@pytest.mark.full("stop")
@pytest.mark.parametrize("how", ["drain", "stop"])
def test_decode_engines_that_keep_asking_do_not_delay_the_end(gated: GatedEngine, how: str) -> None:
    """Check engines that always request the next prefix before the last one is complete."""
    gated.open()
    enough = threading.Event()
    answered: list[str] = []

    def keep_asking(number: int) -> None:
        client = DecodeClient(gated)
        for turn in range(200):
            answered.append(client.finish(text(1000 * number + turn, 257)))
            if enough.is_set() or answered[-1] == "gone":
                return

    clients = [threading.Thread(target=keep_asking, args=(n,), daemon=True) for n in range(4)]
    for client in clients:
        client.start()
    wait_until(lambda: len(answered) >= 4, "the transfer of four prefixes")
    before = len(answered)
    ending = gated.begin_end(how)
    gated.expect_end(ending)
    enough.set()
    for client in clients:
        client.join(60)
    # Prefixes in progress at the call were finished, and those that came before the end of the
    # step.
    served = [result for result in answered[before:] if result == "done"]
    assert len(served) <= 3 * len(clients)


@pytest.mark.full("dies-drain")
@pytest.mark.parametrize("how", ["drain", "stop"])
@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_decode_engine_that_dies_or_hangs_does_not_delay_the_end(
    monkeypatch: pytest.MonkeyPatch, how: str, fault: str
) -> None:
    """Check that a hung engine is given up after ``transfer_timeout_s``, or at once by ``stop``."""
    monkeypatch.setattr(serve, "ALIVE_S", 0.05)
    gated = GatedEngine(monkeypatch, transfer_timeout_s=2.0 if fault == "hangs" else 60.0)
    bad, good = DecodeClient(gated), DecodeClient(gated)
    bad.ask(text(2, 193))
    gated.permits.release()
    bad.receive_piece()
    good.ask(text(3, 257))
    assert isinstance(good.receive(), Alive), "it was accepted"
    if fault == "dies":
        bad.connection.close()
        bad.context.destroy(0)
    ending = gated.begin_end(how)
    gated.open()
    assert good.finish() in (["done"] if how == "drain" else ["failed", "gone"])
    gated.expect_end(ending)
    gated.close()


def test_stop_ends_a_drain_that_takes_too_long(
    gated: GatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the server's action at its deadline, with a decode engine that never reads on."""
    monkeypatch.setattr(serve, "CLOSE_S", 0.1)
    monkeypatch.setattr(serve, "MAX_QUEUED_BYTES", 1)
    hangs = DecodeClient(gated)
    hangs.ask(text(4, 193))
    gated.permits.release()
    hangs.receive_piece()
    draining = gated.begin_end("drain")
    gated.open()
    wait_until(
        lambda: not gated.engine.num_waiting + len(gated.engine.requests),
        "the end of the computation",
    )
    assert draining.is_alive()
    gated.running.stop()
    gated.expect_end(draining)


def test_a_server_that_ends_refuses_other_engines_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check it while the server's own clients are still served."""
    gated = GatedEngine(monkeypatch, starts=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(gated.running, ServerConfig(drain_s=300))
        serving = threading.Thread(target=server.run, args=([listener],), daemon=True)
        serving.start()
        body = {"model": "builtin", "prompt": "a" * 100, "max_tokens": 300, "ignore_eos": True}
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        answers: list[httpx.Response] = []
        client = threading.Thread(
            target=lambda: answers.append(httpx.post(url, json=body, timeout=300)), daemon=True
        )
        client.start()
        wait_until(lambda: gated.engine.requests, "the start of the client's request")
        server.should_exit = True

        def refuses_after_a_step() -> bool:
            gated.permits.release()
            return not gated.accepts()

        wait_until(refuses_after_a_step, "the refusal of other engines")
        assert not answers and gated.running.is_alive
        gated.open()
        client.join(300)
        serving.join(300)
        assert answers[0].json()["usage"]["completion_tokens"] == 300
    assert not serving.is_alive() and not gated.running.is_alive


@pytest.mark.full
def test_close_of_an_engine_without_a_thread_ends_its_transfers() -> None:
    engine = GatedEngine.__new__(GatedEngine)
    engine.engine, engine.clients = Engine(prefill_config(token_budget=64)), []
    engine.address = engine.engine.plugins["disaggregation"].server.address
    client, idle = DecodeClient(engine), DecodeClient(engine)
    client.ask(text(12, 193))
    wait_until(engine.engine.has_work, "the arrival of the prefix")
    engine.engine.step()
    engine.engine.submit(text(13, 90), FEW)
    late = DecodeClient(engine)
    late.ask(text(15, 193))
    wait_until(
        lambda: engine.engine.plugins["disaggregation"].server._asked.qsize(),
        "the arrival of the second prefix",
    )
    engine.engine.close()
    assert not engine.engine.has_work() and not engine.accepts()
    assert late.finish() == "failed" and client.finish() in ("failed", "gone")
    assert idle.finish(text(14, 193)) == "gone"
    engine.engine.check()
    assert engine.engine.report().kv.held == 0
    for one in engine.clients:
        one.close()


def test_an_engine_that_never_started_releases_its_address() -> None:
    engine = Engine(prefill_config())
    address = engine.plugins["disaggregation"].server.address
    AsyncEngine(engine).stop()
    with pytest.raises(OSError):
        socket.create_connection(address, 5)


def test_too_many_prefixes_are_refused(gated: GatedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MAX_PREFIXES", 3)
    clients = [DecodeClient(gated) for _ in range(3)]
    for number, client in enumerate(clients):
        client.ask(text(number, 193))
        client.receive()
    more = DecodeClient(gated)
    more.ask(text(5, 193))
    failed = more.receive()
    assert isinstance(failed, Failed) and "too many prefixes" in failed.error.message
    gated.open()
    assert clients[0].finish() == "done"
    wait_until(lambda: more.finish(text(5, 193)) == "done", "the acceptance of another prefix")
    assert clients[1].finish() == clients[2].finish() == "done"


def test_prefixes_leave_no_thread_and_no_descriptor(gated: GatedEngine) -> None:
    gated.open()

    def resources() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    def serve_one(number: int) -> None:
        client = DecodeClient(gated)
        assert client.finish(text(6 + number, 193)) == "done"
        client.close()

    serve_one(0)
    before = resources()
    for number in range(1, 6):
        serve_one(number)
    wait_until(lambda: resources() <= before, "the release of threads and descriptors")


def listeners() -> set[str]:
    """Return the local addresses of listening TCP sockets, in hexadecimal."""
    found = set()
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), open(name) as lines:
            found |= {line.split()[1] for line in lines if line.split()[3] == "0A"}
    return found


def test_only_the_given_address_is_listened_on() -> None:
    before = listeners()
    engine = Engine(prefill_config())
    new = {address.split(":")[0] for address in listeners() - before}
    AsyncEngine(engine).stop()
    assert all(not set(address) <= {"0"} for address in new), "it listens on every interface"


class SilentServer:
    """Server that accepts connections and never sends anything."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.connections.append(self.listener.accept()[0])

    def close(self) -> None:
        self.listener.close()
        for connection in self.connections:
            connection.close()


@pytest.mark.full("drain")
@pytest.mark.parametrize("how", ["drain", "stop"])
def test_a_decode_engine_ends_although_its_prefill_engine_is_silent(how: str) -> None:
    """Submit more prompts than may load at once, and one without a load, which is answered
    meanwhile."""
    silent = SilentServer()
    engine = decode_engine(silent.port, transfer_timeout_s=1000.0 if how == "stop" else 0.5)
    running = AsyncEngine(engine)

    async def main() -> None:
        running.start()
        long = [
            running.submit(RequestSpec(text(k, 300), ONE)) for k in range(fetch.MAX_FETCHES + 4)
        ]
        short = running.submit(RequestSpec(text(99, 30), FEW))
        assert [output async for output in short][-1].finish_reason == "length"
        ending = asyncio.create_task(
            running.drain() if how == "drain" else asyncio.to_thread(running.stop)
        )
        for stream in long:
            if how == "drain":
                assert [output async for output in stream][-1].finish_reason == "length"
            else:
                with pytest.raises(EngineStopped):
                    await anext(stream)
        await ending

    asyncio.run(asyncio.wait_for(main(), 100))
    silent.close()
    engine.check()
    report = engine.report()
    assert report.kv.held == report.slots.held == report.num_running == report.num_waiting == 0


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_two_roles_end_in_any_order_under_load(seed: int) -> None:
    """Check that every request gets the answer of one engine, or the error that its engine stopped.

    No engine holds memory afterwards.
    """
    choose = random.Random(seed)
    plain = plain_engine()
    prefill = Engine(prefill_config())
    decode = decode_engine(
        prefill.plugins["disaggregation"].server.address[1], transfer_timeout_s=3.0
    )
    engines = {"prefill": AsyncEngine(prefill), "decode": AsyncEngine(decode)}
    prompts = [text(100 * seed + k, choose.choice([30, 300, 700])) for k in range(14)]
    expected = {k: output.token_ids for k, output in enumerate(plain.generate(prompts, FEW))}
    order = choose.sample(["prefill", "decode"], 2)
    ends = {name: choose.choice(["drain", "stop"]) for name in order}

    async def main() -> None:
        for running in engines.values():
            running.start()
        streams = {
            k: engines["prefill" if k % 5 == 4 else "decode"].submit(RequestSpec(prompt, FEW))
            for k, prompt in enumerate(prompts)
        }

        async def read(k: int) -> None:
            name = "prefill" if k % 5 == 4 else "decode"
            try:
                outputs = [output async for output in streams[k]]
            except EngineStopped:
                assert ends[name] == "stop"
                return
            assert outputs[-1].token_ids == expected[k]

        readers = [asyncio.create_task(read(k)) for k in streams]
        for name in order:
            await asyncio.sleep(choose.choice([0, 0.02, 0.2]))
            running = engines[name]
            if ends[name] == "drain":
                await running.drain()
            else:
                await asyncio.to_thread(running.stop)
        await asyncio.gather(*readers)

    asyncio.run(asyncio.wait_for(main(), 100))
    for engine in (prefill, decode):
        engine.check()
        report = engine.report()
        assert report.kv.held == report.slots.held == report.num_running == 0
