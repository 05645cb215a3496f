"""Run SGLang's scheduler on this cache for many requests, and check rows, states and answers.

python -m experiments.sglang.soak [--requests 10000] [--strategy "extra_buffer overlapped"]

Needs SGLang (`make sglang`). Its unchanged scheduler runs on a CPU, over a model that only
records its inputs (`tests/sglang/scheduler.py`). Conversations continue, fork, repeat and
are cut off, with and without images, adapters and salts, in pools so small that KV and states are
always short. Every 61st decode step retracts requests.

SGLang's own checks of its pools run after every step. All invariants of this cache's tree are
checked after every eighth step and when idle. Every resumed prefix and state is compared with its
expected content, which depends on images, adapter and salt, and every answer with the one without
a cache. Each of SGLang's strategies for states gets its share of the requests, in a separate
process. Writes soak_sglang.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from multiprocessing import get_context
from pathlib import Path

from experiments.studies.common import keep
from tests.sglang import cpu

STRATEGIES = {
    "no_buffer": 12,
    "extra_buffer": 24,
    "extra_buffer_lazy": 24,
    "extra_buffer overlapped": 24,
    "extra_buffer_lazy overlapped": 24,
    "no_buffer tiered": 24,
    "extra_buffer overlapped tiered": 24,
    "extra_buffer overlapped drafted": 24,
    "extra_buffer_lazy overlapped drafted": 24,
    "no_buffer images": 12,
    "extra_buffer overlapped images": 24,
    "no_buffer prefill": 12,
    "extra_buffer prefill": 24,
    "extra_buffer overlapped prefill": 24,
    "no_buffer decode": 24,
    "extra_buffer decode": 40,
}
"""State slots per strategy: the maximum of six running requests, or a few more. ``drafted`` is
multi-token prediction, ``tiered`` keeps evicted prefixes on the host, and with ``images`` half of
the turns begin with one. ``prefill`` and ``decode`` are the nodes of SGLang's disaggregation."""
NUM_KV_TOKENS = 1800


def confuse(what: str) -> None:
    """Let the cache confuse images, adapters or salts, as a control of the check."""
    from hybridcache.sglang import cache
    from hybridcache.sglang.translation import TokenWords, namespace_of

    if what == "images":
        TokenWords._word = lambda words, token: -2
    else:
        is_adapter = what == "adapters"
        cache.namespace_of = lambda adapter, salt: namespace_of(
            *((None, salt) if is_adapter else (adapter, None))
        )


def soak(
    strategy: str, eviction: str, num_requests: int, seed: int, in_turn: bool, shared: str | None
) -> dict[str, object]:
    """Serve ``num_requests`` in this process. Raises AssertionError with the first fault."""
    os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
    os.environ["SGLANG_CHECK_KV_PAGE_INVARIANTS"] = "1"
    os.environ["SGLANG_TEST_RETRACT"] = str(int(not in_turn))
    os.environ["SGLANG_TEST_RETRACT_INTERVAL"] = "61"
    cpu.stand_in()
    if shared:
        confuse(shared)
    from tests.sglang import transfer
    from tests.sglang.random_load import RandomLoad
    from tests.sglang.scheduler import new_scheduler

    name, *modes = strategy.split()
    node: dict[str, object] = {}
    for mode in {"prefill", "decode"}.intersection(modes):
        transfer.install()
        node = {"disaggregation_mode": mode, "disaggregation_transfer_backend": "nixl"}
        node["disaggregation_decode_enable_radix_cache"] = mode == "decode"
        node["num_reserved_decode_tokens"] = 16
    with tempfile.TemporaryDirectory() as folder:
        scheduler = new_scheduler(
            Path(folder),
            20 * NUM_KV_TOKENS if in_turn else NUM_KV_TOKENS,
            20 * STRATEGIES[strategy] if in_turn else STRATEGIES[strategy],
            strategy=name,
            overlap="overlapped" in modes,
            enable_hierarchical_cache="tiered" in modes,
            hicache_ratio=4.0,
            draft_length=2 if "drafted" in modes else 0,
            radix_eviction_policy=eviction,
            chunked_prefill_size=256,
            mamba_track_interval=64,
            **node,
        )
        share, most = 0.5 * ("images" in modes), 6 if "decode" in modes else num_requests
        load = RandomLoad(scheduler, seed, share, most)
        record: dict[str, object] = {"strategy": strategy, "eviction": eviction}
        if in_turn:
            hits = load.run_in_turn(num_requests)
            return record | {"hits": hits, "drafts": scheduler.count_drafts()}
        served = load.run(num_requests, check_every=8)
    return record | {"seed": seed} | served._asdict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="total over all strategies")
    parser.add_argument("--strategy", choices=list(STRATEGIES), help="run only this one")
    parser.add_argument("--eviction", default="plain-lru", help="SGLang's --radix-eviction-policy")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--in-turn", action="store_true", help="one request at a time, with ample memory"
    )
    parser.add_argument("--shared", help="confuse images, adapters or salts: the soak fails")
    parser.add_argument("--no-record", action="store_true", help="write no results")
    options = parser.parse_args()
    strategies = [options.strategy] if options.strategy else [*STRATEGIES]
    share = options.requests // len(strategies)
    given = options.eviction, share, options.seed, options.in_turn, options.shared
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # settings are global
        records = pool.starmap(soak, [(strategy, *given) for strategy in strategies], 1)
    if not options.no_record:
        keep("soak_sglang", records, {"sglang": cpu.version(), "kv": NUM_KV_TOKENS} | STRATEGIES)
    for record in records:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
