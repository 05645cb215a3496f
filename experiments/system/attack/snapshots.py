"""Randomly changed snapshots.

A refused one must leave the cache unchanged, a loaded one must leave it sound. One cache is filled
with forks, tombstones, ghosts and namespaces. Its file is then changed in one or two places: a
number, an array, the header, or the bytes.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.api import PrefixCache
from hybridcache.export.snapshot import load_snapshot, save_snapshot

Arrays = dict[str, np.ndarray]
Change = Callable[[random.Random, dict[str, Any], Arrays], None]
NAMESPACES: tuple[Any, ...] = (None, "tenant", ("a", 1), 7, b"x")
ODD_NUMBERS = (0, 1, -1, -2, 7, 2**31 - 1, 2**31, 2**32, 2**32 + 1, -(2**31), 2**62, -(2**62))
ODD_VALUES: tuple[Any, ...] = (
    None,
    -1,
    10**30,
    1.5,
    True,
    "x",
    [],
    {},
    [1],
    "1e999",
    "-" * 3000 + "1",
    "(" * 300,
    "__import__('os')",
    "[1]",
    "'tenant'",
    "None",
)


def make_cache(seed: int, *, filled: bool) -> PrefixCache:
    """Return a small cache with settings of ``seed``, filled by requests that evict each other if
    ``filled``."""
    draw = random.Random(seed)
    page_size = draw.choice((1, 2, 4))
    policies = ("lru", "survival", "arc", "s3-fifo", "gdsf", "lfu", "w-tinylfu")
    cache = build_prefix_cache(
        CacheConfig(
            num_kv_tokens=draw.choice((40, 80)) * page_size,
            num_slots=draw.choice((2, 6)),
            grid=page_size * draw.choice((1, 2)),
            page_size=page_size,
            state_bytes=20,
            eviction=draw.choice(policies),
            ghost_bytes=draw.choice((0, 3000, 10**6)),
        )
    )
    if filled:
        use(cache, draw, 30)
    return cache


def use(cache: PrefixCache, draw: random.Random, num_requests: int) -> None:
    """Serve requests with shared prefixes: match, publish with states, and free the rest."""
    for _ in range(num_requests):
        family = draw.randrange(4)
        length = draw.randrange(1, 24)
        tokens = np.array([family] * 6 + [draw.randrange(3) for _ in range(length)], np.int32)
        namespace = draw.choice(NAMESPACES)
        match = cache.match(tokens, namespace)
        cache.touch(match)
        receipt = cache.lock(match.node)
        fresh = len(tokens) - match.cached_len
        rows = cache.allocate_kv(fresh)
        states = []
        for position in {len(tokens), len(tokens) // 2, 6}:
            at = position - position % (cache.grid * cache.page_size)
            if match.cached_len < at and (slot := cache.allocate_slot()) is not None:
                states.append((at, slot))
        if rows is None:
            for _, slot in states:
                cache.free_slot(slot)
        else:
            publish(cache, tokens, match, rows, states, namespace)
        cache.unlock(receipt)


def publish(
    cache: PrefixCache, tokens: Any, match: Any, rows: Any, states: Any, namespace: Any
) -> None:
    """Insert the computed tokens of a request, and free memory that the cache did not take."""
    cached = cache.gather(match.node)[: match.cached_len]
    all_rows = np.concatenate([cached, rows])[: len(tokens)]
    result = cache.insert(tokens, all_rows, states, namespace, owned_from=match.cached_len)
    if len(result.duplicates):
        cache.free_kv(result.duplicates)
    tail = np.concatenate([cached, rows])[max(result.inserted_len, match.cached_len) :]
    if len(tail):
        cache.free_kv(tail)
    for slot in result.rejected_slots:
        cache.free_slot(slot)


def _change_number(draw: random.Random, header: dict[str, Any], arrays: Arrays) -> None:
    array = arrays[draw.choice(sorted(arrays))]
    if array.size and array.dtype.kind == "i":
        at = draw.randrange(array.size)
        near = int(array.flat[at]) + draw.choice((-1, 1, 2**31, 2**32))
        value = draw.choice((*ODD_NUMBERS, near))
        info = np.iinfo(array.dtype)
        array.flat[at] = min(max(value, info.min), info.max)


def _copy_number(draw: random.Random, header: dict[str, Any], arrays: Arrays) -> None:
    array = arrays[draw.choice(sorted(arrays))]
    if array.size:
        target, source = draw.randrange(array.size), draw.randrange(array.size)
        array.flat[target] = array.flat[source]


def _change_array(draw: random.Random, header: dict[str, Any], arrays: Arrays) -> None:
    name = draw.choice(sorted(arrays))
    array = arrays[name]
    match draw.randrange(8):
        case 0:
            del arrays[name]
        case 1:
            arrays[name] = array[:-1]
        case 2:
            arrays[name] = np.concatenate([array, array])
        case 3:
            arrays[name] = array.astype(draw.choice((np.float64, np.int8, np.uint64, np.bool_)))
        case 4:
            arrays[name] = array.reshape(-1)
        case 5:
            arrays[name] = array[::-1].copy()
        case 6:
            arrays[name] = np.zeros(draw.choice((0, 1, 1 << 20)), array.dtype)
        case 7:
            arrays[name + "2"] = array


def _change_header(draw: random.Random, header: dict[str, Any], arrays: Arrays) -> None:
    name = draw.choice(sorted(header))
    value = header[name]
    match draw.randrange(3):
        case 0:
            del header[name]
        case 1 if isinstance(value, list) and value:
            value[draw.randrange(len(value))] = draw.choice(ODD_VALUES)
        case 2 if isinstance(value, list):
            value.append(draw.choice(ODD_VALUES))
        case _:
            header[name] = draw.choice(ODD_VALUES)


def _copy_slot(draw: random.Random, header: dict[str, Any], arrays: Arrays) -> None:
    lost, checkpoint = arrays.get("lost"), arrays.get("checkpoint")
    if lost is None or checkpoint is None or lost.shape != checkpoint.shape or not len(lost):
        return  # An earlier change removed or resized an array.
    at = draw.randrange(len(lost))
    lost[at] = checkpoint[at - 1]


CHANGES: tuple[Change, ...] = (
    _change_number,
    _change_number,
    _copy_number,
    _change_array,
    _change_header,
    _copy_slot,
)


def tampered(draw: random.Random, saved: Path, path: Path) -> None:
    """Write ``saved`` to ``path`` with one or two changes."""
    if draw.random() < 0.1:
        raw = bytearray(saved.read_bytes())
        for _ in range(draw.randrange(1, 5)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        path.write_bytes(raw[: draw.choice((len(raw), len(raw) // 2))])
        return
    with np.load(saved) as archive:
        arrays = {name: archive[name].copy() for name in archive.files}
    header = json.loads(str(arrays.pop("header")))
    for _ in range(draw.choice((1, 1, 2))):
        draw.choice(CHANGES)(draw, header, arrays)
    with open(path, "wb") as file:
        np.savez(file, header=np.array(json.dumps(header)), **arrays)


def _pools(cache: PrefixCache) -> tuple[int, int, int, int, str]:
    rows = np.sort(cache._pages.free_rows()).tobytes()  # type: ignore[attr-defined]
    return cache.free_tokens, cache.free_slots, cache.num_checkpoints, len(rows), cache.render()


def try_file(seed: int, path: Path, again: Path) -> str:
    """Load ``path`` into an empty cache. Returns "refused" or "loaded".

    Raises AssertionError if the cache changed or is not sound.
    """
    cache = make_cache(seed, filled=False)
    before = _pools(cache)
    try:
        load_snapshot(cache, path)  # type: ignore[arg-type]
    except ValueError as refusal:
        assert "\n" not in str(refusal) and len(str(refusal)) < 500, f"{refusal!s:.200}"
        assert _pools(cache) == before, "a refused file changed the cache"
        cache.check(held_tokens=0, held_slots=0)
        use(cache, random.Random(seed), 5)
        cache.check(held_tokens=0, held_slots=0)
        return "refused"
    cache.check(held_tokens=0, held_slots=0)
    for form in ("text", "graphviz", "svg"):
        cache.render(form)  # type: ignore[call-arg]
    save_snapshot(cache, again)  # type: ignore[arg-type]
    use(cache, random.Random(seed), 30)
    cache.check(held_tokens=0, held_slots=0)
    cache.evict(num_tokens=20, num_slots=1)
    cache.reset()
    cache.check(held_tokens=0, held_slots=0)
    return "loaded"


def attack(first_seed: int, num_caches: int, num_files: int) -> dict[str, int]:
    """Load ``num_files`` changed files of each of ``num_caches`` caches. Returns the number of each
    outcome.

    An AssertionError contains the seed.
    """
    outcomes = {"refused": 0, "loaded": 0}
    with tempfile.TemporaryDirectory() as folder:
        saved, path, again = (Path(folder) / name for name in ("saved", "path", "again"))
        for seed in range(first_seed, first_seed + num_caches):
            save_snapshot(make_cache(seed, filled=True), saved)  # type: ignore[arg-type]
            assert try_file(seed, saved, again) == "loaded"
            for number in range(num_files):
                tampered(random.Random(seed * 10_000 + number), saved, path)
                try:
                    outcomes[try_file(seed, path, again)] += 1
                except Exception as error:
                    raise AssertionError(f"seed {seed}, file {number}: {error!r}") from error
    return outcomes
