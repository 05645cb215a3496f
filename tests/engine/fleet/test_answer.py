"""Test of the output that a replica sends for each step, and of the answer assembled from it."""

from __future__ import annotations

import pickle

import numpy as np
from msgspec import structs

from engine import Engine, EngineConfig, RequestSpec, SamplingParams
from engine.plugins.replicas.replica_output import Progress
from engine.text.outputs import Answer
from engine.text.tokenizer import ByteTokenizer
from tests.oracle import OracleRunner, OracleSampler


def test_answers_are_assembled_from_the_new_tokens_of_each_step() -> None:
    engine = Engine(
        EngineConfig(check=True),
        runner=OracleRunner(4096, 16),
        sampler=OracleSampler(),
        tokenizer=ByteTokenizer(),
    )
    sampling = SamplingParams(max_tokens=400, ignore_eos=True, logprobs=0)
    sent, outputs = [], []
    for output in engine.stream(RequestSpec([*range(300)], sampling)):
        sent.append(pickle.dumps(structs.replace(output, answer=None)))
        outputs.append(output)
    progress = Progress("mine")
    answer = Answer(outputs[0].prompt_token_ids)
    arrived = [answer.add(progress.add(pickle.loads(one))) for one in sent]
    for ours, theirs in zip(arrived, outputs, strict=True):
        assert (ours.text, ours.logprobs) == (theirs.text, theirs.logprobs)
        assert ours.token_ids == theirs.token_ids and ours.request_id == "mine"
        assert np.array_equal(ours.prompt_token_ids, theirs.prompt_token_ids)
    assert len(arrived[-1].text) > 100
    assert max(map(len, sent[1:])) < len(sent[0]) + 64
