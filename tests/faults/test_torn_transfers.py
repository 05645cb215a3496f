"""Exceptions in transfers between two engines.

Two engines with oracles exchange prefixes over the loopback interface. After an exception on either
side both hold no memory, all answers are right, and the next transfer arrives. The places of the
exceptions are those of the part torn of the endurance tests.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
import zmq

from engine import RequestOutput
from engine.core import EngineCore
from engine.plugins.disaggregation import prefill_server, prefix_load
from engine.plugins.disaggregation.prefill_server import PrefillServer
from engine.plugins.disaggregation.wire import Connection, Data, Taken, ToDecode
from engine.runner.device import HostCopy
from hybridcache.allocators.moves import Indices
from tests.engine.schedule.test_scheduler_machine import make_engine
from tests.faults.test_torn_steps import SETTINGS, Service, abort
from tests.oracle import OracleRunner, OracleState

pytestmark = pytest.mark.usefixtures("ctrl_c", "small_pieces")

SIDES = ("send", "receive")
NAMES = ("pools", "survival", "arena", "drafts", "radix")
"""Settings of both engines."""
PATIENCE = {"transfer_timeout_s": 1.0}


class OracleBuffer:
    """Replacement of ``PrefixBuffer`` for the memory of an oracle. The slot of a state stands for
    its rows."""

    row_bytes, state_bytes = 32, 24
    _namespaces: ClassVar[list[Hashable]] = [None, "salt"]

    def __init__(self, runner: OracleRunner) -> None:
        self._runner = runner

    def slot_rows(self, slot: int) -> Indices:
        return np.array([-1 - slot], np.int32)

    def read_rows(self, rows: Indices) -> HostCopy:
        runner = self._runner
        if rows[0] < 0:
            state = runner._states[-1 - int(rows[0])]
            assert state is not None, "a state is sent that was never written"
            values = [[*state[:2], self._namespaces.index(state.namespace)]]
        else:
            writers = runner._writers[rows]
            assert (writers >= 0).all(), "a KV row is sent that was never written"
            spaces = [self._namespaces.index(runner._namespaces[one]) for one in writers]
            values = np.column_stack([runner._fingerprints[rows], runner._tokens[rows], spaces])
        return HostCopy(torch.from_numpy(np.array(values, np.int64)))

    def write_rows(self, rows: Indices, data: torch.Tensor) -> None:
        runner, values = self._runner, data.view(torch.int64).numpy()
        if rows[0] < 0:
            position, fingerprint, space = values.tolist()
            state = OracleState(position, fingerprint, self._namespaces[space])
            return runner._write_state(-1 - int(rows[0]), state)
        values = values.reshape(len(rows), 4)
        runner._fingerprints[rows], runner._tokens[rows] = values[:, 0], values[:, 1:3]
        runner._writers[rows] = [runner._writer(self._namespaces[one]) for one in values[:, 3]]
        runner._forget_states(rows)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small_pieces(monkeypatch)


def make_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every prefix several messages, some of which wait for room, and all waits short."""
    for module in prefill_server, prefix_load:
        monkeypatch.setattr(module, "PrefixBuffer", OracleBuffer)
        monkeypatch.setattr(module, "IDLE_S", 0.002)
    monkeypatch.setattr(prefill_server, "PIECE_BYTES", 20 * OracleBuffer.row_bytes)
    monkeypatch.setattr(prefill_server, "MAX_QUEUED_BYTES", 30 * OracleBuffer.row_bytes)
    monkeypatch.setattr(prefill_server, "ALIVE_S", 0.05)
    monkeypatch.setattr(prefix_load, "REST_S", 0.0)


class Pair(Service):
    """Decode engine, which answers the requests, and its prefill engine."""

    sides = SIDES

    def __init__(self, name: str) -> None:
        own = {name: value for name, value in SETTINGS[name].items() if name != "drafts"}
        own |= {"kv_tokens": own["kv_tokens"] + 100}
        self.prefill = make_engine(role="prefill", transfer_at="127.0.0.1:0", **own, **PATIENCE)
        host, port = self.server.address
        self.is_connected = True
        """False once an engine accepts no more prefixes."""
        super().__init__(
            name, role="decode", prefill=(f"{host}:{port}",), fetch_above=48, **PATIENCE
        )

    @property
    def server(self) -> PrefillServer:
        server = self.prefill.plugins["disaggregation"]
        assert isinstance(server, PrefillServer)
        return server

    @property
    def num_received(self) -> int:
        return self.engine.plugins["disaggregation"].counts.prefixes

    def has_work(self) -> bool:
        return self.engine.has_work() or self.prefill.has_work()

    def step(self, side: str) -> list[RequestOutput]:
        if side == "receive":
            return super().step(side)
        if self.prefill.has_work():
            self.prefill.step()
        else:
            self.prefill.run_idle_tasks()
        return []

    def check(self) -> None:
        """Check the memory of both engines once nothing runs."""
        for engine in self.engine, self.prefill:
            engine.check()
            report = engine.report()
            assert report.kv.held == report.slots.held == 0
            assert not engine.cache.protected().num_tokens, "a prefix is locked for ever"

    def finish(self) -> None:
        super().finish()
        self.check()

    def close(self) -> None:
        """Transfer one more prefix, unless an engine has been disconnected, and close both."""
        before = self.num_received
        for _ in range(5 * self.is_connected):  # On a busy machine a transfer may take too long.
            if self.num_received == before:
                self.engine.reset_prefix_cache()
                self.submit(0, 150, 5, 9)
                self.finish()
        assert self.num_received > before or not self.is_connected, "no further prefix arrives"
        self.prefill.close()
        assert not self.prefill.has_work() and self.server._router.closed
        super().close()


def take_outputs(service: Service) -> None:
    """Take the outputs of both engines. Further exceptions may cut the first two repairs."""
    for _ in range(3):
        with contextlib.suppress(MemoryError):
            service.take(service.engine.take_outputs())
            if isinstance(service, Pair):
                service.prefill.take_outputs()


def test_a_last_message_that_is_lost_ends_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further signs of life must not keep the decode engine waiting."""
    pair, real, lost = Pair("arena"), PrefillServer._send, list[bytes]()

    def failing(self: PrefillServer, peer: bytes, message: ToDecode, *copied: HostCopy) -> None:
        is_last = peer not in dict(self.unsent) and self._sessions[peer].has_ended
        if isinstance(message, Data) and is_last and not lost:
            lost.append(peer)
            raise MemoryError
        real(self, peer, message, *copied)

    monkeypatch.setattr(PrefillServer, "_send", failing)
    pair.submit_some()
    while not lost:
        for side in SIDES:
            with contextlib.suppress(MemoryError):
                pair.turn(side)
    pair.finish()
    pair.close()


def test_a_connection_that_is_not_closed_stops_no_other() -> None:
    pair, limits = Pair("arena"), {"timeout_s": 1.0, "max_bytes": 1 << 20}
    router, open_one = pair.server._router, partial(Connection, zmq.Context.instance())
    for number in range(20):
        open_one(pair.server.address, **limits)
        with contextlib.closing(open_one(pair.server.address, **limits)) as other:
            other.send(Taken(number))
            assert router.poll(10_000), "no message arrives any more"
            router.recv_multipart()
    pair.close()


def test_the_collection_of_an_engine_that_was_not_closed_ends() -> None:
    prefill = weakref.ref(Pair("arena").prefill)
    gc.collect()
    assert prefill() is None


# --- Other calls, and exceptions in the repair ---------------------------------------------------


def abort_sent(pair: Pair) -> None:
    for request in tuple(pair.prefill.requests):
        pair.prefill.abort(request.request_id)


def close_receiver(pair: Pair) -> None:
    """Close the decode engine, which ends its requests without an answer."""
    pair.is_connected = False
    pair.engine.close()
    pair.expected.clear()
    pair.outputs.clear()


def disconnect(engine: EngineCore, pair: Pair, at_once: bool) -> None:
    pair.is_connected = False
    engine.disconnect(at_once=at_once)


PAIR_CALLS: dict[str, Callable[[Pair], object]] = {
    "receive abort": abort,
    "receive close": close_receiver,
    "receive disconnect": lambda pair: disconnect(pair.engine, pair, at_once=True),
    "receive reset": lambda pair: pair.engine.reset_prefix_cache(),
    "send abort": abort_sent,
    "send close": lambda pair: disconnect(pair.prefill, pair, at_once=True) or pair.prefill.close(),
    "send disconnect": lambda pair: disconnect(pair.prefill, pair, at_once=False),
    "send reset": lambda pair: pair.prefill.reset_prefix_cache(),
}
"""Public calls of either engine in the middle of transfers."""
