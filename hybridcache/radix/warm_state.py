"""Warm state: tokens seen, evicted checkpoints, clock and learned policy state, saved for restart.

A file is ``MAGIC``, then JSON compressed by zlib, which detects damage by its checksum. Arrays are
``{"array": dtype, "shape": [...], "data": base64}``, little-endian. It is a ``WarmStateBody``.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.protocol import EvictionPolicy, PlacementPolicy
from hybridcache.radix.tokens import Tokens, read_namespace
from hybridcache.radix.tree import GHOST_NODE_BYTES, Checkpoint, RadixNode, is_superseded_in_tiers

MAGIC = b"HCMEMRY9"
MAX_BYTES = 1 << 30
"""Maximum size of a body, which a small file may unpack to."""
NOTHING = (-1, 0, 0, 0, 0, 0, 0)


class Learned(TypedDict):
    """Learned state of one policy."""

    policy: str
    """Its name."""
    state: dict[str, Any]


class WarmStateBody(TypedDict):
    """Contents of a file."""

    page_size: int
    grid: int
    now: int
    num_items: int
    namespaces: list[str]
    """Encoded namespaces."""
    nodes: npt.NDArray[np.int64]
    """One row of nine numbers per node, parents first:

    1. row of the parent, or -1 - n for the root of namespace n;
    2. end position;
    3. serial of its checkpoint, evicted or not, or -1 if there is none;
    4. creation time of the checkpoint;
    5. last use of the checkpoint;
    6. uses of the checkpoint;
    7. earlier uses of a checkpoint there;
    8. 1 if the checkpoint was superseded on the device, else 0;
    9. distance of the checkpoint (``Item.distance``).
    """
    labels: list[str]
    """Label of each node's checkpoint, or empty."""
    stop_reasons: list[str]
    """Its stop reason, or empty."""
    tokens: Tokens
    """Tokens of all nodes, concatenated."""
    eviction: Learned | None
    """State of the eviction policy, or None if it keeps none."""
    memos: list[object]
    """Its data of each node's checkpoint."""
    placement: list[Learned]
    """States of the placement rules that keep one."""


def write_memory(cache: HybridRadixCache, placement: Sequence[PlacementPolicy] = ()) -> bytes:
    """Serialize the remembered state of ``cache`` and of the ``placement`` rules. O(tree).

    The most recently used nodes are written, within the cache's limit for ghosts.
    """
    nodes, policy = _latest(cache), cache.policy
    eviction = _learned(policy)
    numbers = {node: number for number, node in enumerate(nodes)}
    namespaces: dict[str, int] = {}
    rows, labels, reasons, memos, tokens = [], [], [], [], [np.empty(0, np.int32)]
    for node in nodes:
        item, own = _items_at(node)
        parent = node.parent
        assert parent is not None
        above = numbers.get(parent)
        if above is None:
            assert parent.parent is None, "a child is written without its parent"
            above = -1 - namespaces.setdefault(repr(parent.key), len(namespaces))
        facts = NOTHING
        if item is not None:
            known = own or item  # A state in a tier does not count prompts that passed it.
            earlier = known.earlier_uses + known.uses - item.uses
            uses = item.uses, earlier, known.superseded
            facts = item.serial, item.created, item.last_used, *uses, item.distance
        rows.append((above, node.end, *facts))
        labels.append("" if item is None else item.label)
        reasons.append("" if item is None else item.stop_reason)
        memos.append(None if item is None or eviction is None else policy.memo_state(item))
        tokens.append(node.tokens)
    body: WarmStateBody = {
        "page_size": cache.page_size,
        "grid": cache.grid,
        "now": cache.now,
        "num_items": cache.num_items,
        "namespaces": list(namespaces),
        "nodes": np.array(rows, np.int64).reshape(-1, 9),
        "labels": labels,
        "stop_reasons": reasons,
        "tokens": np.concatenate(tokens),
        "eviction": eviction,
        "memos": memos,
        "placement": [*filter(None, map(_learned, placement))],
    }
    return json.dumps(body, separators=(",", ":"), default=array_as_json).encode()


def _learned(policy: EvictionPolicy | PlacementPolicy) -> Learned | None:
    state = policy.state_dict()
    return None if state is None else {"policy": str(policy), "state": state}


def array_as_json(array: object) -> dict[str, object]:
    """Return the JSON form of an array. Raises TypeError for other objects."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{type(array).__name__} cannot be saved.")
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    data = base64.b64encode(little.tobytes()).decode()
    return {"array": little.dtype.str, "shape": list(array.shape), "data": data}


def _read(plain: dict[str, Any]) -> Any:
    """Return the array of a JSON object, or the object if it is none."""
    if "array" not in plain:
        return plain
    data = base64.b64decode(plain["data"], validate=True)
    little = np.frombuffer(data, np.dtype(plain["array"])).reshape(plain["shape"])
    return little.astype(little.dtype.newbyteorder("="))


def pack(body: bytes) -> bytes:
    """Compress the result of ``write_memory`` into the bytes of a file. O(bytes)."""
    return MAGIC + zlib.compress(body, 1)


def unpack(data: bytes) -> WarmState:
    """Read the bytes of a file. Raises ValueError if they are damaged or of another version.

    What passes the checksum is trusted: ``write_memory`` of this version wrote it.
    """
    if not data.startswith(MAGIC):
        raise ValueError("the warm state is damaged, or was written by another version")
    reader = zlib.decompressobj()
    try:
        body = reader.decompress(data[len(MAGIC) :], MAX_BYTES)
    except zlib.error as error:
        raise ValueError("the warm state is damaged") from error
    if not reader.eof:
        raise ValueError("the warm state is damaged, or larger than any")
    return WarmState(json.loads(body, object_hook=_read))


class WarmState:
    """Contents of one file, to be restored into an empty cache with or without tiers.

    Call ``recall_tree``, then adopt the contents of lower tiers, then call ``recall_policies``.
    KV and states are not in the file: entries of the device count as evicted.

    One process saves it:

    >>> import numpy as np
    >>> from hybridcache import CacheConfig, Lease, LeaseRequest, build_prefix_cache
    >>> from hybridcache import parse_placement
    >>> from hybridcache.radix.warm_state import pack, unpack, write_memory
    >>> config = CacheConfig(num_kv_tokens=400, num_slots=8, grid=8)
    >>> cache, placement = build_prefix_cache(config), parse_placement("adaptive")
    >>> prompt = np.arange(100, dtype=np.int32)
    >>> lease = Lease.begin(cache, placement, LeaseRequest(prompt))
    >>> assert lease.extend(100) and lease.take_checkpoint_slots(0, 100)
    >>> cache.take_step().done()  # no tensors here; else carry_out(memory)
    >>> lease.finish(prompt, 100)
    >>> body = pack(write_memory(cache, placement.rules))

    Another one loads it, into an empty cache with the same page size and grid:

    >>> cache, placement = build_prefix_cache(config), parse_placement("adaptive")
    >>> memory = unpack(body)  # ValueError if the file is damaged
    >>> memory.recall_tree(cache)
    >>> memory.recall_policies(cache, placement.rules)  # names of parts that do not fit
    []
    >>> losses = cache.match(prompt).losses
    >>> losses.never_seen, losses.kv_evicted
    (0, 100)
    """

    def __init__(self, plain: WarmStateBody) -> None:
        self._plain = plain
        self._items: list[tuple[Checkpoint, object]] = []
        """Checkpoints of the file, and the data that the policy had of each."""

    def recall_tree(self, cache: HybridRadixCache) -> None:
        """Restore the tokens as ghosts, and the clock. O(nodes).

        No ghost is discarded before ``recall_policies``.

        Raises:
            ValueError: the page size or the grid differs, or the cache is not empty. The cache is
                unchanged.
        """
        plain = self._plain
        if cache.num_nodes:
            raise ValueError("the cache must be empty. Build a new one for recall_tree.")
        for name, given in (("page_size", cache.page_size), ("grid", cache.grid)):
            saved = dict(plain)[name]
            if saved != given:
                raise ValueError(f"the warm state needs {name}={saved}; the cache has {given}")
        tree, nodes = cache.ghosts.tree, list[RadixNode]()
        roots = [tree.root(read_namespace(text)) for text in dict.fromkeys(plain["namespaces"])]
        rows, tokens = plain["nodes"].tolist(), plain["tokens"]
        item_bytes, at = cache.item_bytes, 0
        columns = zip(rows, plain["labels"], plain["stop_reasons"], plain["memos"], strict=True)
        try:
            for row, label, stop_reason, memo in columns:
                above, end, serial, created, last_used, uses, earlier, superseded, distance = row
                parent = nodes[above] if above >= 0 else roots[-1 - above]
                start, at = at, at + end - parent.end
                if not start < at <= len(tokens):
                    raise ValueError("the warm state has odd lengths")
                node = tree.grow(parent, tokens[start:at].tobytes())
                tree.fade(node)
                nodes.append(node)
                if serial >= 0:
                    item = Checkpoint(node, -1, created, serial, item_bytes)
                    item.label, item.distance = label, distance
                    item.last_used, item.uses, item.earlier_uses = last_used, uses, earlier
                    item.superseded, item.stop_reason = bool(superseded), stop_reason
                    node.lost_checkpoint = item
                    self._items.append((item, memo))
        finally:  # Also the part before an odd one.
            for node in reversed(nodes):
                cache.ghosts.add(node)
        cache.now += plain["now"]
        cache.num_items += plain["num_items"]

    def recall_policies(
        self, cache: HybridRadixCache, placement: Sequence[PlacementPolicy] = ()
    ) -> list[str]:
        """Restore the state of the cache's eviction policies and of the ``placement`` rules, before
        the first request.

        Returns ``eviction`` or ``placement`` for each part that was learned by other policies.
        O(memory).
        """
        unfit, learned, policy = list[str](), self._plain["eviction"], cache.policy
        if learned is not None and learned["policy"] == str(policy):
            policy.load_state_dict(learned["state"])
            for item, memo in self._items:
                policy.load_memo(item, memo)
            for node in cache.iter_nodes():
                state = node.offloaded.state if node.offloaded else None
                if state is not None and cache.offload is not None:
                    # ``adopt`` has added it without a history.
                    tier, lost = cache.offload.tiers[state.tier], node.lost_checkpoint
                    tier.policy.discard(state, evicted=False)
                    state.memo = None if lost is None else lost.memo
                    state.superseded = is_superseded_in_tiers(state)
                    tier.policy.add(state)
        elif learned is not None:
            unfit.append("eviction")
        rules = {str(rule): rule for rule in placement if rule.state_dict() is not None}
        written = {saved["policy"]: saved["state"] for saved in self._plain["placement"]}
        if rules.keys() == written.keys():
            for name, rule in rules.items():
                rule.load_state_dict(written[name])
        else:
            unfit.append("placement")
        cache.ghosts.trim()
        return unfit


def _latest(cache: HybridRadixCache) -> list[RadixNode]:
    """Return the most recently used nodes, parents before children, within the ghost limit. O(n log
    n)."""
    used = dict.fromkeys(cache.iter_nodes(), 0)
    for node in reversed(used):
        for item in (_items_at(node)[0], node.kv):
            used[node] = max(used[node], 0 if item is None else item.last_used)
        if node.parent in used:
            used[node.parent] = max(used[node.parent], used[node])
    forgotten = list(cache.ghosts.oldest_first())
    listed = set(forgotten)
    held = [node for node in used if node not in listed]
    held.sort(key=lambda node: (used[node], -node.end))
    room, found = cache.ghosts.limit_bytes, []
    for node in reversed(forgotten + held):
        room -= len(node.edge) + GHOST_NODE_BYTES
        if room < 0:
            break
        found.append(node)
    return found


def _items_at(node: RadixNode) -> tuple[Checkpoint | None, Checkpoint | None]:
    """Return the item at the end of ``node`` in any tier, or its evicted one, and the present or
    last item of the device."""
    state = node.offloaded.state if node.offloaded else None
    own = node.checkpoint or node.lost_checkpoint
    return state or own, own
