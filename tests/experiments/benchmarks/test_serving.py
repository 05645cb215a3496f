"""Tests of the load generator: summaries of given times, loads with the oracle runner over HTTP,
and the processor time of the client."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from experiments.benchmarks import overhead
from experiments.benchmarks.serving import (
    ClientAnswer,
    LoadRun,
    NextTurn,
    Targets,
    conversation_jobs,
    drive,
    measured_load,
    summary,
)
from tests.engine.front.server.conftest import oracle_engine
from tests.served import serving

TARGETS = Targets(ttft_s=1.0, tpot_s=0.1)


@contextlib.contextmanager
def oracle_server(cache: str) -> Iterator[int]:
    with serving(oracle_engine(prefix_cache=cache)) as (_, port):
        yield port


def test_summary_follows_the_definitions() -> None:
    """TPOT = (E2E - TTFT) / (n - 1). Goodput counts requests within both targets. The hit rate is
    one of tokens."""
    answers = [
        ClientAnswer(1.0, (1.5, 1.6, 1.9), num_prompt=300, num_output=3, cached_len=100),
        ClientAnswer(2.0, (4.0,), num_prompt=100, num_output=1, cached_len=0),
    ]
    sums = summary(LoadRun(answers, num_cut=1, seconds=4.0), TARGETS)
    assert answers[0].tpot_s == pytest.approx(0.2)
    assert answers[1].tpot_s is None
    assert sums["ttft_ms"] == pytest.approx({"mean": 1250, "p50": 1250, "p99": 1985})
    assert sums["itl_ms"] == pytest.approx({"mean": 200, "p50": 200, "p99": 298})
    assert sums["e2e_ms"]["mean"] == pytest.approx(1450)
    assert sums["output_tokens_per_s"] == 1.0
    assert sums["token_hit_rate"] == 0.25
    assert sums["goodput_per_s"] == 0.0
    lax = summary(LoadRun(answers, 0, 4.0), Targets(2.5, 0.3))
    assert lax["goodput_per_s"] == 0.5


def test_loads_report_hit_rates_with_and_without_cache() -> None:
    draw = np.random.default_rng(0)
    shared = draw.integers(0, 256, 140, dtype=np.int32)
    lengths = draw.integers(150, 450, 6, endpoint=True) - 140
    unique = [draw.integers(0, 256, length, dtype=np.int32) for length in lengths]
    jobs = [[NextTurn(np.concatenate((shared, tokens)), 5)] for tokens in unique]
    records = []
    for cache in ("hybrid", "none"):
        with oracle_server(cache) as port:
            records += [measured_load(port, jobs, load, TARGETS, seconds=60.0) for load in (1, 4)]
    assert [record["requests"] for record in records] == [6] * 4
    assert all(record["tpot_ms"]["p50"] >= 0 for record in records)
    assert all(record["token_hit_rate"] == 0 for record in records[2:])
    # The second prompt saves a state at the branch. Later ones hit 128 of the 140 shared tokens.
    total = sum(len(job[0].tokens) for job in jobs)
    assert records[0]["token_hit_rate"] == pytest.approx(4 * 128 / total)


def test_prompts_contain_the_real_answers_and_the_window_begins_after_the_ramp() -> None:
    """Each prompt repeats its conversation, and the ramp of two turns is not counted."""
    draw = np.random.default_rng(1)
    jobs = [[NextTurn(draw.integers(0, 256, 100, dtype=np.int32), 8)] * 4 for _ in range(3)]
    with oracle_server("hybrid") as port:
        every = drive(port, jobs, 3, seconds=60.0)
        later = drive(port, jobs, 3, seconds=60.0, ramp=2)
        cut = drive(port, jobs, 3, seconds=0.0)
        with pytest.raises(RuntimeError, match="400 Bad Request"):
            drive(port, [[NextTurn(np.full(8, 10**6, np.int32), 2)]], 1, seconds=60.0)
    # The grid of checkpoints is 64: 320 tokens contain 4 of the third answer.
    lengths = [(100, 0, 0), (208, 108, 64), (316, 216, 192), (424, 324, 320)]
    found = [(one.num_prompt, one.num_seen, one.cached_len) for one in every.answers]
    assert sorted(found) == [each for each in lengths for _ in range(3)]
    assert len(later.answers) <= 7  # Turns 3 and 4, and perhaps the last of the second turns.
    assert (every.num_cut, later.num_cut, cut.num_cut) == (0, 0, 3)


def test_a_message_takes_at_most_20_us_of_the_client() -> None:
    """256 connections, and a small message per token, as in a step of the server."""
    num_messages, listener = 50, socket.create_server(("127.0.0.1", 0), backlog=256)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    start = b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1790000000,'
    start += b'"model":"model","system_fingerprint":"0123456789abcdef","choices":['
    choice = b'{"index":0,"text":"x","logprobs":null,"finish_reason":null,"token_ids":[1]}'
    usage = b'],"usage":{"prompt_tokens_details":{"cached_tokens":0}}}\n\ndata: [DONE]\n\n'
    pieces = [start + choice + b"]}\n\n"] * num_messages + [start + usage]
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    chunks[0], chunks[-1] = head + chunks[0], chunks[-1] + b"0\r\n\r\n"

    def answer() -> None:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(listener.accept()[0]) for _ in range(256)]
            for connection in connections:
                connection.recv(1 << 16)
            for chunk in chunks:
                for connection in connections:
                    connection.sendall(chunk)

    server = threading.Thread(target=answer, daemon=True)
    server.start()
    jobs = [[NextTurn(np.zeros(4, np.int32), num_messages)]] * 256
    with listener:
        run = drive(listener.getsockname()[1], jobs, 256, seconds=60.0)
        server.join(60)
    assert [answer.num_output for answer in run.answers] == [num_messages] * 256
    assert {len(answer.piece_times_s) for answer in run.answers} == {num_messages}
    assert run.client_us <= 20, run.client_us


def test_conversations_grow_up_to_the_longest_prompt() -> None:
    jobs = conversation_jobs(4, vocab_size=300, cap=2000, num_output=50)
    assert len(jobs) == 4
    for job in jobs:
        assert sum(len(prompt.tokens) for prompt in job) <= 2000
        assert all(prompt.tokens.max() < 300 and len(prompt.tokens) for prompt in job)
        assert all(1 <= prompt.num_output <= 50 for prompt in job)


def test_steps_are_timed_with_the_sending_of_their_outputs() -> None:
    """Outputs are sent without the answers, which a message cannot contain."""
    timed = overhead.measure(3, overhead.SAMPLINGS["greedy"], num_steps=4)
    assert timed["processor_us"] > 0 and timed["total_us"] > timed["send_us"] > 0


@pytest.mark.parametrize("admission", overhead.ADMISSIONS)
def test_each_admission_policy_is_timed(admission: str) -> None:
    timed = overhead.ordering(admission, num_waiting=12, repeats=1)
    assert (timed["admission"], timed["waiting"]) == (admission, 12)
    assert min(timed["same_ms"], timed["changed_ms"]) >= 0
