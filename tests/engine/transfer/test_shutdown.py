"""Tests of roles at shutdown: an engine ends when it should, independent of other engines."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import zmq

from engine import AsyncEngine, Engine
from engine.plugins.disaggregation import prefill_server as serve
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
from tests.engine.transfer.pair import prefill_config, prefix


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
        self.address: tuple[str, int] = self.engine.plugins["disaggregation"].address

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
