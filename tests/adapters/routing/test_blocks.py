"""Known answers of the translator of block events."""

from msgspec.msgpack import encode

from hybridcache.adapters.routing.blocks import BlockEvents


def rows(*names, **more):
    """Return the event of stored rows. Block n has the tokens n and n."""
    event = {"type": "BlockStored", "block_hashes": names, "block_size": 2, "group_idx": 0}
    return event | {"token_ids": [name for name in names for _ in range(2)]} | more


def state(group, kind="BlockStored"):
    return rows(2, type=kind, group_idx=group, kv_cache_spec_kind="mamba")


def told(event):
    if not hasattr(event, "tokens"):
        return f"{type(event).__name__} {event.id}"
    return f"{event.tokens[0]} {event.id}<{event.parent}@{event.start} {event.namespace}"


BATCHES = (
    ([rows(2, parent_block_hash=1), rows(1, block_size=1), state(1)], []),
    ([rows(1, 2), rows(1)], ["1 0<None@0 None", "2 1<0@2 None"]),
    ([rows(3, 4, parent_block_hash=2)], ["3 2<1@4 None", "4 3<2@6 None"]),
    ([rows(5, 6, lora_name=0, cache_salt=1)], ["5 4<None@0 (0, 1)", "6 5<4@2 (0, 1)"]),
    ([rows(7, 8, extra_keys=["s", [["image"]]], lora_name="a")], ["7 6<None@0 ('s',)"]),
    ([state(1), state(1), state(2), state(2)], ["CheckpointStored 1"]),
    ([state(1, "BlockRemoved"), state(1, "BlockRemoved")], ["CheckpointRemoved 1"]),
    ([rows(3, type="BlockRemoved")], ["KVRemoved 3", "KVRemoved 2"]),
    ([{"type": "AllBlocksCleared"}], [f"KVRemoved {id}" for id in (1, 0, 5, 4, 6)]),
)


def test_block_events_have_known_answers():
    blocks = BlockEvents(unit=2, num_state_groups=2)
    for number, (events, found) in enumerate(BATCHES):
        assert [told(one) for one in blocks.read(number, encode([7.5, events]))] == found
    assert blocks.num_unknown_parents == 1 and blocks.last_time == 7.5
