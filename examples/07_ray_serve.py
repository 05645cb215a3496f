"""Route requests in Ray Serve to the replica with the state of their session.

    pip install 'ray[serve]>=2.60' && python examples/07_ray_serve.py

Two stub replicas stand for vLLM: they send its KV events over its sockets, lose every third live
batch, and compute nothing. Then one is killed, and Ray starts another. Verifies itself.
"""

from __future__ import annotations

import itertools
import threading
import time

import msgspec
import numpy as np
import ray
import zmq
from ray import serve
from ray.serve.config import RequestRouterConfig

UNIT = 8


class Publisher:
    """Sockets of vLLM's ZmqEventPublisher: live batches, and replays of stored ones."""

    def __init__(self, loses):
        context = zmq.Context()
        self.live, self.replay = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        ports = [one.bind_to_random_port("tcp://127.0.0.1") for one in (self.live, self.replay)]
        names = (f"tcp://127.0.0.1:{port}" for port in ports)
        self.sockets = dict(zip(("endpoint", "replay_endpoint"), names, strict=True))
        self.sent, self.loses, self.lock = [], loses, threading.Lock()
        threading.Thread(target=self.serve, daemon=True).start()

    def publish(self, events):
        with self.lock:
            number = len(self.sent).to_bytes(8, "big")
            self.sent.append((number, msgspec.msgpack.encode([time.time(), events])))
            if len(self.sent) % self.loses:
                self.live.send_multipart([b"", *self.sent[-1]])

    def serve(self):
        while True:
            client, _, first = self.replay.recv_multipart()
            with self.lock:
                for batch in self.sent[int.from_bytes(first, "big") :]:
                    self.replay.send_multipart([client, b"", b"", *batch])
            self.replay.send_multipart([client, b"", b"", b"\xff" * 8, b""])


@serve.deployment(num_replicas=2, max_ongoing_requests=4)
class Stub:
    """Replica that caches every prompt, with a state at its last unit. Each third live batch is
    lost."""

    def __init__(self):
        self.publisher, self.known = Publisher(loses=3), {}
        self.name = serve.get_replica_context().replica_id.unique_id

    def record_routing_stats(self):
        return {"kv_event_metadata": self.publisher.sockets}

    def __call__(self, request_token_ids):
        tokens, parent, hit, events = request_token_ids, None, 0, []
        for end in range(UNIT, len(tokens) + 1, UNIT):
            key, part = str(tokens[:end]), tokens[end - UNIT : end]
            if key not in self.known:
                self.known[key] = False
                named = {"block_hashes": [key], "parent_block_hash": parent, "block_size": UNIT}
                events.append(named | {"type": "BlockStored", "token_ids": part, "group_idx": 0})
            hit, parent = end if self.known[key] else hit, key
        if parent is not None and not self.known[parent]:
            self.known[parent] = True
            state = {"block_hashes": [parent], "parent_block_hash": None, "block_size": UNIT}
            state |= {"kv_cache_spec_kind": "mamba", "token_ids": part, "group_idx": 1}
            events.append(state | {"type": "BlockStored"})
        self.publisher.publish(events)
        return self.name, hit


def tokens_of(session, length):
    return np.random.default_rng(session).integers(1, 9999, length).tolist()


def main():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    kwargs = {"unit": UNIT, "num_state_groups": 1, "tokens_per_s": 100.0}
    config = RequestRouterConfig(
        request_router_class="hybridcache.adapters.routing.ray_serve:RayRouter",
        request_router_kwargs=kwargs,
        request_routing_stats_period_s=0.2,
    )
    try:
        stub = Stub.options(request_router_config=config)
        handle = serve.run(stub.bind())

        def ask(session, length):
            for _ in range(30):
                try:
                    ids = tokens_of(session, length)
                    return handle.remote(request_token_ids=ids).result(timeout_s=60)
                except ray.exceptions.RayActorError:
                    time.sleep(1.0)
            raise AssertionError("no replica answers")

        def settle(names):
            """Ask until the router follows ``names`` replicas."""
            seen, sessions = set(), itertools.count(1000)
            end = time.monotonic() + 60
            while len(seen) < names and time.monotonic() < end:
                seen.add(ask(next(sessions), 100)[0])
            time.sleep(1.0)
            return seen

        assert len(settle(2)) == 2
        places = {session: ask(session, 40)[0] for session in range(8)}
        assert len(set(places.values())) == 2, "sessions are spread over both"
        time.sleep(0.5)
        for session, place in places.items():
            assert ask(session, 60) == (place, 40), "the next turn finds its state"
        killed = places[0]
        [actor] = [
            one
            for one in ray.util.list_named_actors(all_namespaces=True)
            if one["name"].endswith(killed)
        ]
        ray.kill(ray.get_actor(**actor))
        for session, place in places.items():
            found = ask(session, 80)
            assert found[0] != killed
            assert place == killed or found == (place, 56)
        assert killed not in settle(2), "another replica takes its place, with an empty cache"
        time.sleep(0.5)
        for session in places:
            place, _ = ask(session, 100)
            time.sleep(0.1)
            assert ask(session, 110) == (place, 96)
    finally:
        serve.shutdown()
        ray.shutdown()
    print("every turn found the state of its session; a killed replica was replaced")


if __name__ == "__main__":
    main()
