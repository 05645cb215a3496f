"""Known answers of the translator of block events."""

from random import Random

import numpy as np
from msgspec.msgpack import encode

from hybridcache.adapters.events import Mirror
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
    ([rows(1, 2), rows(1), rows(3, 4, parent_block_hash=2)], ["1 0<None@0 None", "3 1<0@4 None"]),
    ([rows(5, 6, lora_name=0, cache_salt=1)], ["5 2<None@0 (0, 1)"]),
    ([rows(7, 8, extra_keys=["s", [["image"]]], lora_name="a")], ["7 3<None@0 ('s',)"]),
    ([rows(9, parent_block_hash=5)], ["KVSplit 2", "9 5<4@2 (0, 1)"]),
    ([state(1), state(1), state(2), state(2)], ["CheckpointStored 0"]),
    ([state(1, "BlockRemoved"), state(1, "BlockRemoved")], ["CheckpointRemoved 0"]),
    ([rows(n, type="BlockRemoved") for n in (4, 3)], ["KVSplit 1", "KVRemoved 1", "KVRemoved 6"]),
    ([{"type": "AllBlocksCleared"}], [f"KVRemoved {id}" for id in (0, 5, 2, 4, 3)]),
    ([rows(1, 1), rows(2), rows(3, 2)], ["1 7<None@0 None", "2 8<None@0 None", "3 9<None@0 None"]),
    ([rows(1, 2, 3, type="BlockRemoved")], [f"KVRemoved {id}" for id in (7, 8, 9)]),
)


def test_block_events_have_known_answers():
    blocks = BlockEvents(unit=2, num_state_groups=2)
    for number, (events, found) in enumerate(BATCHES):
        assert [told(one) for one in blocks.read(number, encode([7.5, events]))] == found
    assert blocks.num_unknown_parents == 1 and blocks.last_time == 7.5


def test_runs_have_the_contents_of_their_blocks():
    """A prefix is the name of its last block. Runs are extended, forked and cut at any block."""
    draw, blocks, mirror, plain, new = Random(0), BlockEvents(2, 1), Mirror(2), {}, 0
    for number in range(3_000):
        prompt = draw.choices("012", k=draw.randrange(2, 15, 2))
        names = ["".join(prompt[:end]) for end in range(2, len(prompt) + 1, 2)]
        is_stored, first = draw.random() < 0.5, draw.randint(0, len({*names} & plain.keys()))
        event = rows(names[-1], type="BlockStored" if is_stored else "BlockRemoved")
        if draw.random() < 0.5:
            event |= {"group_idx": 1, "kv_cache_spec_kind": "mamba"}
            plain |= {name: is_stored for name in names[-1:] if name in plain}
        elif is_stored:
            event = rows(*names[first:], token_ids=[*map(int, prompt[2 * first :])])
            event["parent_block_hash"] = names[first - 1] if first else None
            new += len({*names} - plain.keys())
            plain |= {name: plain.get(name, False) for name in names}
        else:
            plain = {one: has for one, has in plain.items() if not one.startswith(names[-1])}
        mirror.apply_batch(number, blocks.read(number, encode([0.0, [event]])))
        hit = max([0, *(len(name) for name in names[:-1] if plain.get(name))])
        assert mirror.match(np.array(prompt, np.int32)) == (hit, 2 * len({*names} & plain.keys()))
        counts = 2 * len(plain), 2 * (new - len(plain)), sum(plain.values())
        assert counts == (mirror.num_tokens, mirror.num_evicted, mirror.num_checkpoints)
