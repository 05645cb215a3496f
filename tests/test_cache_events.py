"""Events: a subscriber that hears everything knows everything."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcache.block_events import BlockEvents, chain_hash, namespace_hash
from hybridcache.events import EventStream, Mirror, decode, encode, segments_of
from tests.cache_serving import hybrid, ids, serve, traffic


def play(cache, num_requests, seed=0, step=1):
    for number, tokens in enumerate(traffic(seed, num_requests)):
        n = len(tokens)
        positions = {n // step * step, n // 2 // step * step} - {0}
        serve(cache, tokens, sorted(positions), namespace=(None, "tenant", ("a", 1))[number % 3])
        if number % 50 == 49:
            cache.evict(num_tokens=100, num_slots=2)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("form", ["json", "msgpack"])
def test_a_mirror_equals_the_tree_and_answers_like_it(page_size, form):
    if form == "msgpack":
        pytest.importorskip("msgpack")
    cache = hybrid(num_kv_tokens=960, page_size=page_size)
    mirror = Mirror(page_size)
    sent = []
    stream = EventStream(sent.append)
    cache.subscribe(stream)
    for seed in range(4):
        play(cache, 60, seed, page_size)
        wire = encode(seed, sent, form)
        sequence, events = decode(wire, form)
        assert sequence == seed and events == sent
        for event in events:
            mirror.apply(event)
        sent.clear()
        assert mirror.segments() == segments_of(cache._tree.nodes())
        for tokens in traffic(seed, 60):
            for namespace in (None, "tenant", ("a", 1)):
                match = cache.match(tokens, namespace)
                assert mirror.match(tokens, namespace) == (match.cached_len, match.kv_len)
    cache.reset()
    for event in sent:
        mirror.apply(event)
    assert mirror.segments() == set()


def test_a_late_subscriber_is_told_of_what_is_there():
    cache = hybrid()
    play(cache, 30)
    mirror = Mirror(page_size=1)
    cache.subscribe(EventStream(mirror.apply))
    assert mirror.segments() == segments_of(cache._tree.nodes())
    play(cache, 30, seed=1)
    assert mirror.segments() == segments_of(cache._tree.nodes())


def test_a_lost_event_is_noticed():
    cache, sent = hybrid(), []
    cache.subscribe(EventStream(sent.append))
    serve(cache, ids("shared", "one"), [9])
    serve(cache, ids("shared", "two"), [9])
    mirror = Mirror(page_size=1)
    with pytest.raises(KeyError):
        for event in sent[1:]:
            mirror.apply(event)


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="json or msgpack"):
        encode(0, [], "xml")
    with pytest.raises(ValueError, match="json or msgpack"):
        decode(b"", "xml")


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_blocks_are_exactly_the_resident_prefixes_at_multiples_of_the_block(block_size):
    cache, stored, states = hybrid(), {}, set()

    def follow(event):
        if event["type"] == "BlockStored":
            size = event["block_size"]
            assert len(event["token_ids"]) == size * len(event["block_hashes"])
            parent = event["parent_block_hash"]
            for number, block in enumerate(event["block_hashes"]):
                tokens = tuple(event["token_ids"][number * size : (number + 1) * size])
                assert block == chain_hash(parent, tokens)
                assert block not in stored
                stored[block] = parent
                parent = block
        elif event["type"] == "BlockRemoved":
            for block in event["block_hashes"]:
                del stored[block]
        elif event["type"] == "CheckpointStored":
            states.add((event["position"], event["prefix_hash"]))
        else:
            states.remove((event["position"], event["prefix_hash"]))

    cache.subscribe(EventStream(BlockEvents(block_size, follow)))
    play(cache, 150)
    blocks, checkpoints = set(), set()
    for node in cache._tree.nodes():
        if node.kv is None:
            continue
        parts, above = [], node
        while above.parent is not None:
            parts.append(above.tokens)
            above = above.parent
        namespace = above.key if above.key is None or above.key == "tenant" else repr(above.key)
        path = np.concatenate(parts[::-1]).tolist()
        parent = namespace_hash(namespace)
        whole = len(path) - len(path) % block_size
        for first in range(0, whole, block_size):
            parent = chain_hash(parent, tuple(path[first : first + block_size]))
            blocks.add(parent)
        if node.checkpoint is not None:
            rest = tuple(path[whole:])
            checkpoints.add((node.end, chain_hash(parent, rest) if rest else parent))
    assert set(stored) == blocks
    assert states == checkpoints
