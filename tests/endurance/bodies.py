"""Invalid request bodies.

Each must get an error of one sentence, never 5xx, and the server continues. Valid bodies are
changed at random: odd values, additional names, long lists, deep nesting, flipped bytes.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from typing import Any

import httpx

from engine import Engine, EngineConfig
from engine.text.tokenizer import ByteTokenizer
from tests.oracle import OracleRunner, OracleSampler
from tests.served import serving

CHAT = [{"role": "user", "content": "hi"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
GOOD: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "hello", "max_tokens": 2, "stop": ["x"], "n": 2}),
    ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 1, "echo": True, "logprobs": 2}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1, "stream": True}),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, "temperature": 0.5}),
    (
        "/v1/chat/completions",
        {
            "messages": [*CHAT, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "max_tokens": 1,
            "cache_salt": "a",
        },
    ),
    (
        "/v1/chat/completions",
        {"messages": CHAT, "max_tokens": 4, "structured_outputs": {"regex": "a{2}b"}},
    ),
    (
        "/v1/completions",
        {"prompt": "a", "max_tokens": 6, "structured_outputs": {"grammar": 'root ::= "a"{2}'}},
    ),
    ("/tokenize", {"messages": CHAT}),
    ("/tokenize", {"prompt": "hello"}),
    ("/detokenize", {"tokens": [65, 66]}),
)
NAMES = ("top_k", "min_p", "seed", "stop_token_ids", "logit_bias", "best_of", "model", "user", "x")


def _odd(draw: random.Random) -> Any:
    deep: Any = 1
    for _ in range(draw.choice((3, 200, 450))):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    return draw.choice(
        (
            None,
            True,
            -1,
            0,
            2**31,
            2**70,
            10**400,
            1e300,
            float("nan"),
            float("inf"),
            "",
            "\ud800",
            "<|im_end|>\n<|im_start|>system\n",
            "x" * draw.choice((10, 10**5)),
            [],
            {},
            [1] * draw.choice((3, 5000)),
            ["x"] * draw.choice((3, 5000)),
            [[] for _ in range(draw.choice((3, 5000)))],
            [{"role": "user"} for _ in range(draw.choice((3, 5000)))],
            "[" * 2000,
            "a{1000000000}",
            'root ::= [b-d] [b-d] [b-d] "a"{1000000}',
            deep,
        )
    )


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, name or index) of every entry in ``value``."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, entry in items:
        found.append((value, name))
        if isinstance(entry, dict | list):
            found += _places(entry)
    return found


def body(draw: random.Random) -> tuple[str, bytes]:
    """Return (path, bytes) of one random body."""
    path, good = draw.choice(GOOD)
    value = copy.deepcopy(good)
    for _ in range(draw.choice((1, 1, 2))):
        container, name = draw.choice(_places(value))
        if draw.random() < 0.2:
            value[draw.choice(NAMES)] = _odd(draw)
        else:
            container[name] = _odd(draw)
    raw = bytearray(json.dumps(value).encode())
    if draw.random() < 0.1:
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    return path, bytes(raw)


def run(seed: int, num_bodies: int) -> dict[str, int]:
    """Send bodies. Returns how many were answered with each status.

    Raises AssertionError for a 5xx, a long error, or memory that is still held.
    """
    engine = Engine(
        EngineConfig(max_queue=64),
        runner=OracleRunner(8192, 16, max_model_len=2048),
        sampler=OracleSampler(),
        tokenizer=ByteTokenizer(),
    )
    statuses: Counter[int] = Counter()
    with (
        serving(engine) as (_, port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):
        for number in range(seed, seed + num_bodies):
            path, raw = body(random.Random(number))
            answer = client.post(path, content=raw, headers={"Content-Type": "application/json"})
            context = f"seed {number}: {answer.status_code} {answer.text[:200]}"
            assert answer.status_code < 500 and '"code": "internal' not in answer.text, context
            if answer.status_code >= 400:
                error = answer.json()["error"]["message"]
                assert "\n" not in error and len(answer.content) < 2000, context
            statuses[answer.status_code] += 1
        report = client.get("/v1/cache").json()
        for pool in (report["kv"], report["slots"]):
            assert pool["free"] + pool["cached"] == pool["total"] and not pool["held"], report
        assert client.get("/health").status_code == 200
    engine.check()
    return {f"answered {status}": number for status, number in sorted(statuses.items())}
