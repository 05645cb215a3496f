"""Roles and shutdown: whatever other engines do meanwhile, an engine that is told to end does."""

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
from tests.engine.transfer.pair import decode_engine, plain_engine, prefill_config

ONE = SamplingParams(max_tokens=1, temperature=0)
FEW = SamplingParams(max_tokens=4, temperature=0)


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(97, 122, length).tolist()


def until(is_true: Callable[[], object], what: str) -> None:
    for _ in range(6000):
        if is_true():
            return
        time.sleep(0.01)
    raise AssertionError(f"never: {what}")


class GatedEngine:
    """A prefill engine in a thread, which computes one step for each permit until it is opened."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, starts: bool = True, **settings: object
    ) -> None:
        # On a busy machine an asker that lives is silent for seconds.
        settings = {"transfer_timeout_s": 60.0} | settings
        self.engine = Engine(prefill_config(token_budget=64, **settings))
        self.permits, self.is_open = threading.Semaphore(0), False
        forward = self.engine.runner.forward

        def gated(*arguments: object) -> object:
            if not self.is_open:
                self.permits.acquire()
            return forward(*arguments)

        monkeypatch.setattr(self.engine.runner, "forward", gated)
        self.askers: list[Asker] = []
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
        for asker in self.askers:
            asker.close()

    def told(self, how: str) -> threading.Thread:
        """Tell the engine to ``stop`` or ``drain``; returns the thread that waits for it."""
        end = self.running.stop if how == "stop" else lambda: asyncio.run(self.running.drain())
        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        until(lambda: not self.running._is_open, "the engine heard of it")
        return thread

    def accepts(self) -> bool:
        """Whether it would compute the prefix of one more decode engine."""
        asker = Asker(self)
        try:
            asker.ask(text(999, 193))
            return not isinstance(asker.hear(), Failed)
        except TransferError:
            return False
        finally:
            asker.close()

    def has_ended(self, thread: threading.Thread) -> None:
        """The engine has ended, and what it had lent is back."""
        thread.join(60)
        assert not thread.is_alive() and not self.running.is_alive
        with pytest.raises(OSError):
            socket.create_connection(self.address, 5)
        self.engine.check()
        report = self.engine.report()
        assert report.kv.held == report.slots.held == report.num_running == report.num_waiting == 0
        self.engine.reset_prefix_cache()
        assert self.engine.report().kv.cached == 0, "something is locked"


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[GatedEngine]:
    far = GatedEngine(monkeypatch)
    yield far
    far.close()


class Asker:
    """A decode engine's side of one connection, step by step."""

    def __init__(self, far: GatedEngine, timeout_s: float = 20.0) -> None:
        self.own = identity(far.engine.config, far.engine.runner)
        self.unit = PrefixBuffer.of(far.engine.runner)
        self.context, self.poller, self.num_bytes = zmq.Context(), zmq.Poller(), 0
        self.connection = Connection(
            self.context, self.poller, far.address, timeout_s=timeout_s, max_bytes=1 << 24
        )
        far.askers.append(self)

    def ask(self, tokens: list[int]) -> None:
        data = np.asarray(tokens, np.int32).tobytes()
        self.connection.send(Ask(self.own, data, 0, None, ()))

    def hear(self) -> object:
        """The next message; a piece is confirmed."""
        while (received := self.connection.receive()) is None:
            self.poller.poll(20)
        message, data = received
        match message:
            case Piece(part, start, end):
                unit = self.unit
                size = unit.state_bytes if part is None else (end - start) * unit.part_bytes[part]
                assert len(data) == size
                self.num_bytes += size
                self.connection.send(Taken(self.num_bytes))
            case Failed(error):
                assert error.message
        return message

    def hear_piece(self) -> None:
        while not isinstance(self.hear(), Piece):
            pass

    def hear_all(self, tokens: list[int] | None = None) -> str:
        """How it ends: ``done``, ``failed``, or ``gone`` where the connection was closed.
        ``tokens`` are asked for first."""
        with contextlib.suppress(TransferError):
            if tokens is not None:
                self.ask(tokens)
            while not isinstance(end := self.hear(), Done | Failed):
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


def test_a_drain_finishes_the_prefixes_in_progress_and_takes_no_more(
    gated: GatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to their last byte: nothing is left to the end itself."""
    monkeypatch.setattr(serve, "CLOSE_S", 0.0)
    again, first, idle = Asker(gated), Asker(gated), Asker(gated)
    again.ask(text(0, 193))  # three steps
    gated.permits.release()
    again.hear_piece()
    first.ask(text(2, 193))
    assert isinstance(first.hear(), Alive), "it was accepted"
    ending = gated.told("drain")
    gated.permits.release()
    until(lambda: not gated.accepts(), "an engine that drains accepts no more")
    assert idle.hear_all(text(1, 193)) in ("failed", "gone")
    gated.permits.release(2)
    assert again.hear_all() == "done"
    assert again.hear_all(text(3, 193)) == "failed", "the next prefix of the same connection"
    assert ending.is_alive()
    gated.open()
    until(lambda: not gated.engine.requests, "it is computed")
    time.sleep(0.3)  # Its last bytes are read late.
    assert first.hear_all() == "done"
    gated.has_ended(ending)
    assert gated.engine.plugins["disaggregation"].counts.prefixes == 2


@pytest.mark.full("stop")
@pytest.mark.parametrize("how", ["drain", "stop"])
def test_decode_engines_that_keep_asking_hold_no_end_up(gated: GatedEngine, how: str) -> None:
    """The next prefix is always asked for before the last one has come."""
    gated.open()
    enough = threading.Event()
    answered: list[str] = []

    def keep_asking(number: int) -> None:
        asker = Asker(gated)
        for turn in range(200):
            answered.append(asker.hear_all(text(1000 * number + turn, 257)))
            if enough.is_set() or answered[-1] == "gone":
                return

    askers = [threading.Thread(target=keep_asking, args=(n,), daemon=True) for n in range(4)]
    for asker in askers:
        asker.start()
    until(lambda: len(answered) >= 4, "four prefixes were sent")
    before = len(answered)
    ending = gated.told(how)
    gated.has_ended(ending)
    enough.set()
    for asker in askers:
        asker.join(60)
    # Those in progress when it was told, and those that came before the step then computed ended.
    served = [how_ended for how_ended in answered[before:] if how_ended == "done"]
    assert len(served) <= 3 * len(askers)


@pytest.mark.full("dies-drain")
@pytest.mark.parametrize("how", ["drain", "stop"])
@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_decode_engine_that_dies_or_hangs_holds_no_end_up(
    monkeypatch: pytest.MonkeyPatch, how: str, fault: str
) -> None:
    """One that hangs is given up after the time of silence that was configured, or at once by
    ``stop``."""
    monkeypatch.setattr(serve, "ALIVE_S", 0.05)
    gated = GatedEngine(monkeypatch, transfer_timeout_s=2.0 if fault == "hangs" else 60.0)
    bad, good = Asker(gated), Asker(gated)
    bad.ask(text(2, 193))
    gated.permits.release()
    bad.hear_piece()
    good.ask(text(3, 257))
    assert isinstance(good.hear(), Alive), "it was accepted"
    if fault == "dies":
        bad.connection.close()
        bad.context.destroy(0)
    ending = gated.told(how)
    gated.open()
    assert good.hear_all() in (["done"] if how == "drain" else ["failed", "gone"])
    gated.has_ended(ending)
    gated.close()


def test_a_drain_that_takes_too_long_is_cut_short_by_stop(
    gated: GatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the server does at its deadline: here the decode engine never reads on."""
    monkeypatch.setattr(serve, "CLOSE_S", 0.1)
    monkeypatch.setattr(serve, "MAX_QUEUED_BYTES", 1)
    hangs = Asker(gated)
    hangs.ask(text(4, 193))
    gated.permits.release()
    hangs.hear_piece()
    draining = gated.told("drain")
    gated.open()
    until(lambda: not gated.engine.num_waiting + len(gated.engine.requests), "it is computed")
    assert draining.is_alive()
    gated.running.stop()
    gated.has_ended(draining)


def test_a_server_that_is_told_to_end_stops_serving_other_engines_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While its own clients are still being answered."""
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
        until(lambda: gated.engine.requests, "the client is served")
        server.should_exit = True

        def refuses_after_a_step() -> bool:
            gated.permits.release()
            return not gated.accepts()

        until(refuses_after_a_step, "it serves no other engine")
        assert not answers and gated.running.is_alive
        gated.open()
        client.join(300)
        serving.join(300)
        assert answers[0].json()["usage"]["completion_tokens"] == 300
    assert not serving.is_alive() and not gated.running.is_alive


@pytest.mark.full
def test_close_of_an_engine_without_a_thread_ends_what_it_does_for_others() -> None:
    far = GatedEngine.__new__(GatedEngine)
    far.engine, far.askers = Engine(prefill_config(token_budget=64)), []
    far.address = far.engine.plugins["disaggregation"].server.address
    asker, idle = Asker(far), Asker(far)
    asker.ask(text(12, 193))
    until(far.engine.has_work, "it was asked")
    far.engine.step()
    far.engine.submit(text(13, 90), FEW)
    late = Asker(far)
    late.ask(text(15, 193))
    until(lambda: far.engine.plugins["disaggregation"].server._asked.qsize(), "it was asked again")
    far.engine.close()
    assert not far.engine.has_work() and not far.accepts()
    assert late.hear_all() == "failed" and asker.hear_all() in ("failed", "gone")
    assert idle.hear_all(text(14, 193)) == "gone"
    far.engine.check()
    assert far.engine.report().kv.held == 0
    for one in far.askers:
        one.close()


def test_an_engine_that_never_started_lets_go_of_its_address() -> None:
    engine = Engine(prefill_config())
    address = engine.plugins["disaggregation"].server.address
    AsyncEngine(engine).stop()
    with pytest.raises(OSError):
        socket.create_connection(address, 5)


def test_more_prefixes_than_may_be_are_told_so(
    gated: GatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "MAX_PREFIXES", 3)
    askers = [Asker(gated) for _ in range(3)]
    for number, asker in enumerate(askers):
        asker.ask(text(number, 193))
        asker.hear()
    more = Asker(gated)
    more.ask(text(5, 193))
    failed = more.hear()
    assert isinstance(failed, Failed) and "too many prefixes" in failed.error.message
    gated.open()
    assert askers[0].hear_all() == "done"
    until(lambda: more.hear_all(text(5, 193)) == "done", "there is room again")
    assert askers[1].hear_all() == askers[2].hear_all() == "done"


def test_prefixes_leave_no_thread_and_no_descriptor(gated: GatedEngine) -> None:
    gated.open()

    def held() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    def serve_one(number: int) -> None:
        asker = Asker(gated)
        assert asker.hear_all(text(6 + number, 193)) == "done"
        asker.close()

    serve_one(0)
    before = held()
    for number in range(1, 6):
        serve_one(number)
    until(lambda: held() <= before, "threads and descriptors of closed connections are released")


def listeners() -> set[str]:
    """Local addresses of this machine's listening TCP sockets, in hexadecimal."""
    found = set()
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), open(name) as lines:
            found |= {line.split()[1] for line in lines if line.split()[3] == "0A"}
    return found


def test_nothing_listens_beyond_the_address_that_was_named() -> None:
    before = listeners()
    engine = Engine(prefill_config())
    new = {address.split(":")[0] for address in listeners() - before}
    AsyncEngine(engine).stop()
    assert all(not set(address) <= {"0"} for address in new), "it listens on every interface"


class Silent:
    """What accepts connections and never says a word."""

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
def test_a_decode_engine_whose_prefill_engine_is_silent_ends(how: str) -> None:
    """More prompts than may be fetched at once, and one that fetches nothing: it is answered
    meanwhile."""
    far = Silent()
    engine = decode_engine(far.port, transfer_timeout_s=1000.0 if how == "stop" else 0.5)
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
    far.close()
    engine.check()
    report = engine.report()
    assert report.kv.held == report.slots.held == report.num_running == report.num_waiting == 0


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_two_roles_end_in_any_order_under_load(seed: int) -> None:
    """Every request gets its answer, the same as of one engine, or is told that its engine
    stopped; nothing is held anywhere after."""
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
    hows = {name: choose.choice(["drain", "stop"]) for name in order}

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
                assert hows[name] == "stop"
                return
            assert outputs[-1].token_ids == expected[k]

        readers = [asyncio.create_task(read(k)) for k in streams]
        for name in order:
            await asyncio.sleep(choose.choice([0, 0.02, 0.2]))
            running = engines[name]
            if hows[name] == "drain":
                await running.drain()
            else:
                await asyncio.to_thread(running.stop)
        await asyncio.gather(*readers)

    asyncio.run(asyncio.wait_for(main(), 100))
    for engine in (prefill, decode):
        engine.check()
        report = engine.report()
        assert report.kv.held == report.slots.held == report.num_running == 0
