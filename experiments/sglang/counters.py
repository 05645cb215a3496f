"""Compare the rebuilt SGLang with the counters of SGLang's own scheduler and tree, per request.

python -m experiments.sglang.counters [--requests 100] [--states 24 8]

Needs SGLang (`make sglang`). Its unchanged scheduler serves the requests of generated traces
in turn, with its own radix cache, over a model that answers as the trace says
(`tests/sglang/scheduler.py`). The rebuilt cache serves the same requests with the same
numbers of KV rows and states. ``cached_tokens`` of both are compared. Token ids are taken modulo
the vocabulary, in both, but for images: SGLang has its own placeholders for these. Then its
scheduler serves the requests with this project's cache. With ``sessions``, clients of both name
their sessions and end them (``--enable-session-radix-cache``). Writes sglang_counters.jsonl.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from experiments.studies.common import QWEN3_NEXT, keep, plain_table, rounded
from hybridcache import open_trace
from hybridcache.lab.rivals.protocol import BaselineConfig, replay
from hybridcache.lab.rivals.sglang import SglangCache
from hybridcache.lab.traces.generators import IMAGES
from hybridcache.radix.tokens import Tokens
from hybridcache.radix.tree import SESSION_END
from hybridcache.sglang import NAME
from tests.sglang import cpu

TRACES = ("chat", "few-shot", "short", "branch", "resend", "agent-tree", "image-chat")
KV_PER_STATE = 3400
"""KV rows per state, by SGLang's split of the memory and the sizes of Qwen3-Next."""
CONTEXT_LEN, VOCAB = 65_536, 1000


def compare(
    num_states: int,
    num_requests: int,
    sessions: bool = False,
    traces: Sequence[str] = TRACES,
    backend: str | None = None,
) -> list[dict[str, Any]]:
    """Return the token hit rates of both in percent, and the number of requests with other hits, by
    trace. ``backend`` is None for SGLang's own cache."""
    os.environ["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    cpu.stand_in()
    from tests.sglang import scheduler as own

    num_rows, records = num_states * KV_PER_STATE, []
    own._POWERS = np.cumprod(np.full(CONTEXT_LEN, 6364136223846793005, np.uint64)).view(np.int64)
    config = BaselineConfig(1, QWEN3_NEXT.kv_bytes_per_token, QWEN3_NEXT.state_bytes)
    with tempfile.TemporaryDirectory() as folder:
        scheduler = own.new_scheduler(
            Path(folder), num_rows, num_states, max_requests=1, backend=backend,
            context_len=CONTEXT_LEN, chunked_prefill_size=config.prefill_chunk,
            enable_session_radix_cache=sessions,
        )  # fmt: skip
        tree = scheduler.tree_cache
        for name in traces:
            rebuilt = SglangCache(config, "extra_buffer", None, num_rows, num_states, sessions)
            hits, prompts = [], 0
            requests = [*open_trace(name).head(num_requests)]
            last = {request.session: number for number, request in enumerate(requests)}
            for number, request in enumerate(requests):
                prompt, answer = request.tokens, request.output % VOCAB
                prompt = np.where(prompt < IMAGES, prompt % VOCAB, prompt)
                scheduler.tp_worker.answer = answer
                sent = scheduler.submit(f"{name}{number}", with_images(prompt), len(answer))
                key, ends = f"{name} {request.session}", last[request.session] == number
                if sessions:
                    sent.session_id = key
                    sent.session_generation = tree.ensure_session_generation(key)
                while scheduler.step():
                    pass
                assert list(sent.output_ids) == answer.tolist()
                if sessions and ends:
                    tree.release_radix_session(key)
                prompts += len(prompt)
                facts = {"session": key, "stop_reason": SESSION_END * ends}
                hits.append((sent.cached_tokens, replay(rebuilt, prompt, answer, **facts)))
            assert scheduler.flush_cache()
            engine, ours = np.array(hits).T
            record = {"trace": name, "states": num_states, "kv": num_rows, "requests": len(hits)}
            rates = {key: 100 * float(of.sum()) / prompts for key, of in
                     ((backend or "sglang", engine), ("rebuilt", ours))}  # fmt: skip
            records.append(rounded(record | rates | {"other_hits": int((engine != ours).sum())}))
            print(records[-1], flush=True)
    return records


def with_images(prompt: Tokens) -> list[int]:
    """Return the ids of a prompt with SGLang's placeholders in place of each image's id."""
    from tests.sglang.random_load import placeholders

    ids = prompt.tolist()
    for one, part in groupby(range(len(ids)), ids.__getitem__):
        places = [*part]
        if one >= IMAGES:
            ids[places[0] : places[-1] + 1] = placeholders(one, len(places))
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100, help="of each trace")
    parser.add_argument("--states", type=int, nargs="+", default=[24, 8], help="sizes to compare")
    options = parser.parse_args()
    runs = [(states, options.requests, False, TRACES, backend)
            for states in options.states for backend in (None, NAME)]  # fmt: skip
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # settings are global
        parts = pool.starmap(compare, runs, 1)
    records = [
        own | {NAME: ours[NAME]}
        for both in zip(parts[::2], parts[1::2], strict=True)
        for own, ours in zip(*both, strict=True)
    ]
    keep("sglang_counters", records, {"sglang": cpu.version()}, plain_table)


if __name__ == "__main__":
    main()
