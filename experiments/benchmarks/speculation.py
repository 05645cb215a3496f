"""Measure the gain and the losses of each drafter on the built-in model.

    python -m experiments.benchmarks.speculation               # about 15 minutes on two cores

Every workload is a fixed list of prompts, the same for every drafter. The engines of all drafters
alternate and start from an empty cache. Decoding is greedy, except ``noise``, which samples at a
high temperature so that drafts are never accepted.

Tokens per second count from the first token of a group of requests to its last. Medians are
compared with those of no drafts. Answers and hits must equal those without drafts, token for token,
and the last printed line reports differences.

Workloads: ``agent`` (a chat with tool calls, each prompt sent twice, like a retry), ``edit`` (code
from the prompt, repeated), ``chat``, ``few_shot`` (word problems), ``fresh`` (code of held-out
modules), ``noise``.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from engine.text.tokenizer_files import HFTokenizer
from experiments import texts
from experiments.benchmarks.timing import alternate, ratio_spread
from experiments.studies.common import keep, positive

DRAFTS = ("none", "tree", "mtp", "tree,mtp")
STREAMS = (1, 8)
NUM_PROMPTS, MAX_TOKENS, TURNS = 8, 128, 5
"""Prompts or chats of a workload, tokens of the longest answer, and turns of every drafter."""
Thread = list[str]
"""Prompts that are sent one after the other."""


def agent(rng: random.Random) -> Thread:
    """Return every prompt of a chat with tool calls, twice."""
    messages = texts.tool_chat(rng)
    return [
        prompt
        for rank in _answers(messages)
        for prompt in [_rendered(messages[:rank], texts.TOOLS)] * 2
    ]


def edit(rng: random.Random) -> Thread:
    """Return lines of code, followed by the first of them again."""
    piece = _code(rng, 500)
    return [f"{piece}\n\n\n# The same again:\n{piece[:80]}"]


def chat(rng: random.Random) -> Thread:
    """Return the prompts of a small chat."""
    messages = texts.chat(rng)
    return [_rendered(messages[:rank]) for rank in _answers(messages)]


def few_shot(rng: random.Random) -> Thread:
    """Return a word problem after four solved ones."""
    return [texts.few_shot(rng, 4)[0]]


def fresh(rng: random.Random) -> Thread:
    """Return the start of a piece of code that was not in the training data."""
    return [_code(rng, 400)]


def noise(rng: random.Random) -> Thread:
    """Return random characters."""
    return ["".join(chr(rng.randint(33, 126)) for _ in range(200))]


WORKLOADS: dict[str, Callable[[random.Random], Thread]] = {
    workload.__name__: workload for workload in (agent, edit, chat, few_shot, fresh, noise)
}


def _answers(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Return the positions of the assistant's messages."""
    return [rank for rank, message in enumerate(messages) if message["role"] == "assistant"]


def _rendered(messages: Sequence[dict[str, object]], tools: object = None) -> str:
    template = HFTokenizer().chat_template
    assert template is not None
    return template.render(messages, tools=tools, add_generation_prompt=True)


def _code(rng: random.Random, num_bytes: int) -> str:
    """Return ``num_bytes`` of a held-out module, from the start of a line."""
    text = rng.choice([source for source in texts.sources(held_out=True) if len(source) > 4000])
    start = text.index("\n", rng.randrange(len(text) - 2 * num_bytes - 500)) + 1
    return text[start : start + num_bytes]


def serve(
    engine: Engine, threads: Sequence[Thread], streams: int, params: SamplingParams
) -> tuple[list[RequestOutput], float]:
    """Serve all prompts, ``streams`` threads at a time. Returns the answers, and the seconds from
    the first token of a group of requests to its last, summed over groups."""
    tokenizer, outputs, seconds = HFTokenizer(), [], 0.0
    engine.reset_prefix_cache()
    for first in range(0, len(threads), streams):
        group = threads[first : first + streams]
        for rank in range(max(map(len, group))):
            prompts = [tokenizer.encode(thread[rank]) for thread in group if rank < len(thread)]
            answers = engine.generate(prompts, params)
            ends = [answer.timings.e2e_s or 0.0 for answer in answers]
            starts = [answer.timings.ttft_s or 0.0 for answer in answers]
            seconds += max(ends) - min(starts)
            outputs += answers
    return outputs, seconds


def compare(engines: dict[str, Engine], workload: str, streams: int) -> Iterator[dict[str, Any]]:
    """Serve one workload with all drafters in turn. Yields a record for each drafter.

    Acceptance length is the mean number of tokens per verification, or None without drafts. Ratio
    and spread are those of tokens per second to no drafts.
    """
    rng = random.Random(workload)
    threads = [WORKLOADS[workload](rng) for _ in range(NUM_PROMPTS)]
    noisy = {"temperature": 5.0, "seed": 7} if workload == "noise" else {"temperature": 0.0}
    params = SamplingParams(max_tokens=MAX_TOKENS, **noisy)
    outputs: dict[str, list[RequestOutput]] = {}

    def turn(draft: str) -> float:
        outputs[draft], seconds = serve(engines[draft], threads, streams, params)
        return seconds / sum(len(output.output) - 1 for output in outputs[draft])

    taken = alternate({draft: partial(turn, draft) for draft in engines}, TURNS)
    plain = statistics.median(taken["none"])
    for draft, seconds in taken.items():
        drafts = [output.drafts for output in outputs[draft] if output.drafts is not None]
        verified = sum(counts.num_verified for counts in drafts)
        accepted = sum(sum(counts.accepted.values()) for counts in drafts)
        decoded = sum(len(output.output) - 1 for output in outputs[draft])
        pairs = list(zip(outputs[draft], outputs["none"], strict=True))
        yield {
            "workload": workload,
            "draft": draft,
            "streams": streams,
            "acceptance_len": round(1 + accepted / verified, 3) if verified else None,
            "tokens_per_step": round(decoded / max(1, decoded - accepted), 3),
            "tokens_per_s": round(1 / statistics.median(seconds), 1),
            "ratio": round(plain / statistics.median(seconds), 3),
            "spread": round(ratio_spread(seconds, taken["none"]), 3),
            "cached_tokens": sum(output.cached_len for output in outputs[draft]),
            "same_hits": all(drafted.cached_len == base.cached_len for drafted, base in pairs),
            "same_answers": all(drafted.token_ids == base.token_ids for drafted, base in pairs),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=positive, default=2, help="threads of PyTorch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = EngineConfig(device="cpu", cache_gib=0.25, max_running=8)
    engines = {draft: Engine(replace(sizes, draft=draft)) for draft in DRAFTS}
    results = []
    for workload, streams in tqdm(list(product(WORKLOADS, STREAMS)), desc="workloads"):
        for record in compare(engines, workload, streams):
            results.append(record)
            tqdm.write(str(record))
    keep("speculation", results, vars(args))
    wrong = [result for result in results if not (result["same_answers"] and result["same_hits"])]
    print(f"{len(results)} cells; answers or hits differ in {len(wrong)}")


if __name__ == "__main__":
    main()
