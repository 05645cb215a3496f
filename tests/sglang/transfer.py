"""Transfers between a prefill and a decode node of SGLang, each in a process of its own.

The contents of rows and states are functions of a request's tokens: the sender compares what it
sends with them, and the receiver writes what a sender would have sent. A transfer begins and ends
some polls late, and may fail.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from sglang.srt.disaggregation import decode, prefill
from sglang.srt.disaggregation.base import KVArgs, KVPoll
from sglang.srt.disaggregation.fake.conn import FakeKVManager, FakeKVReceiver, FakeKVSender
from sglang.srt.disaggregation.utils import KVClassType

from tests.sglang.scheduler import ROOMS, VOCAB, hashes

LATE, FAILED = 0.5, 0.03
"""Shares of the polls that find a transfer incomplete, and of the transfers that fail."""
draw = random.Random(0)


class Manager(FakeKVManager):
    prefill_info_table = SimpleNamespace(get=lambda address: SimpleNamespace(dp_size=1))


class Sender(FakeKVSender):
    """Sender that compares rows and state when its transfer ends."""

    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: int, **_: Any) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        self.rows: list[int] = []

    def send(self, kv_indices: Any, state_indices: Any = None, num_kv_tokens: int = 0) -> None:
        self.rows += kv_indices.tolist()
        self.has_sent, self.states = state_indices is not None, state_indices

    def poll(self) -> int:
        if self.conclude_state is None and (self.has_sent or not self.inited):
            if draw.random() < LATE:
                return KVPoll.Transferring if self.inited else KVPoll.Bootstrapping
            if self.has_sent:
                scheduler, req = ROOMS[self.bootstrap_room]
                model, chain = scheduler.tp_worker, hashes(req, req.origin_input_ids)
                [[slot]] = self.states
                assert model.rows[self.rows].tolist() == chain.tolist(), f"{req.rid}: wrong rows"
                assert int(model.states[int(slot)]) == chain[-1], f"{req.rid}: wrong state"
                if draw.random() < FAILED:
                    self.abort()
        return super().poll()


class Receiver(FakeKVReceiver):
    """Receiver that compares the rows of the cached prefix, and writes the rest."""

    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: int) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        self.room = bootstrap_room

    def send_metadata(
        self, kv_indices: Any, aux_index: int, state_indices: Any, decode_prefix_len: int
    ) -> None:
        super().send_metadata(kv_indices)
        scheduler, req = ROOMS[self.room]
        self.model, self.chain = scheduler.tp_worker, hashes(req, req.origin_input_ids)
        rows = scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :decode_prefix_len]
        same = self.model.rows[rows] == self.chain[:decode_prefix_len]
        assert same.all(), f"{req.rid}: wrong rows"
        self.model.resumed_tokens += decode_prefix_len
        self.buffers, self.targets = (
            scheduler.disagg_metadata_buffers,
            (kv_indices, aux_index, state_indices),
        )

    def poll(self) -> int:
        if self.has_sent_metadata and self.conclude_state is None:
            if draw.random() < LATE:
                return KVPoll.Transferring
            if draw.random() < FAILED:
                self.abort()
            else:
                rows, index, [[slot]] = self.targets
                self.model.rows[rows] = self.chain[len(self.chain) - len(rows) :]
                self.model.states[int(slot)] = last = int(self.chain[-1])
                self.buffers.output_ids[index, 0] = abs(last) % VOCAB
                self.buffers.bootstrap_room[index, 0] = self.room
        return super().poll()


def install() -> None:
    """Let SGLang's nodes use these transfers."""
    kinds = KVClassType.KVARGS, KVClassType.MANAGER, KVClassType.SENDER, KVClassType.RECEIVER
    classes = dict(zip(kinds, (KVArgs, Manager, Sender, Receiver), strict=True))
    for node in (prefill, decode):
        node.get_kv_class = lambda backend, kind: classes[kind]
