"""Tests of the Chrome trace of steps and requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine import Engine, EngineConfig, SamplingParams
from engine.plugins.observe.step_trace import Trace, start_trace
from engine.text.tokenizer import ByteTokenizer
from tests.oracle import OracleRunner, OracleSampler


def make_engine() -> Engine:
    return Engine(
        EngineConfig(),
        runner=OracleRunner(4096, 16, max_model_len=2048),
        sampler=OracleSampler(),
        tokenizer=ByteTokenizer(),
    )


def test_a_trace_has_every_step_and_request(tmp_path: Path) -> None:
    engine = make_engine()
    trace = start_trace(engine, str(tmp_path / "trace.json"))
    prompts = ["the same beginning " * 20 + end for end in ("one", "two", "three")]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    trace.close()
    events: list[dict[str, Any]] = json.loads((tmp_path / "trace.json").read_text())
    assert all({"name", "ph", "pid", "tid"} <= event.keys() for event in events)
    steps = [event for event in events if event["name"] == "step"]
    computed = sum(len(out.prompt_token_ids) - out.cached_len for out in outputs)
    assert sum(step["args"]["prefill"] for step in steps) == computed
    # The last token of an answer is never computed.
    assert sum(step["args"]["decode"] for step in steps) == 3 * 4
    for step in steps:
        inside = [
            event
            for event in events
            if event["ph"] == "X"
            and event is not step
            and step["ts"] <= event["ts"] <= step["ts"] + step["dur"]
            and event["name"] != "step"
        ]
        assert {event["name"] for event in inside} >= {"schedule", "forward", "sample"}
    begun = {event["id"]: event for event in events if event["ph"] == "b" and "args" in event}
    for output in outputs:
        arguments = begun[output.request_id]["args"]
        assert arguments["cached tokens"] == output.cached_len and arguments["ended by"] == "length"
        names = [e["name"] for e in events if e["ph"] == "b" and e["id"] == output.request_id]
        assert names == [output.request_id, "queue", "prefill", "decode"]
    assert sum(event["ph"] == "b" for event in events) == sum(e["ph"] == "e" for e in events)


def test_a_trace_ends_at_its_limit_and_stays_valid(tmp_path: Path) -> None:
    engine, file = make_engine(), tmp_path / "trace.json"
    trace = Trace(file, engine.clock, max_bytes=3000)
    engine.observe(trace.step)
    engine.generate(["a" * 300], SamplingParams(max_tokens=200, ignore_eos=True))
    trace.close()
    assert file.stat().st_size < 6000 and json.loads(file.read_text())[-1]["ph"] == "i"
