"""Several tokens a step on the built-in model: what each drafter gains, and where it loses.

    python -m experiments.benchmarks.speculation               # about 15 minutes on two cores
    python -m experiments.benchmarks.speculation --model DIR --repeats 1 --threads 2
    python -m experiments.benchmarks.speculation --draw           # the figure, of recorded results

Every workload is a fixed list of prompts, the same for every drafter; each drafter's engine serves
it from an empty cache, in turns with the others, greedily (``noise``: sampled so hot that nothing
can be guessed). Tokens a second count from the first token of a group of requests to its last; the
medians of the turns are compared with those of no drafts. Answers and hits must be those without
drafts, token for token: the line says so.

Workloads: ``agent`` (a chat with tool calls, each prompt sent twice, as a retry is), ``edit`` (code
that stood in the prompt, again), ``chat``, ``few_shot`` (word problems), ``fresh`` (code of modules
that were held out), ``noise``.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine import Engine, RequestOutput, SamplingParams, engine_config
from engine.runner.model_runner import ModelRunner
from engine.runner.sampler import Sampler
from engine.text.tokenizer import ByteTokenizer
from experiments.provenance import RESULTS, read_json_lines, write_json_lines
from experiments.studies.common import figure_path
from experiments.training import corpus, tasks
from hybridcache.geometry.units import counted
from hybridcache.lab.figures import COLOURS, panels, save

DRAFTS = ("none", "tree", "mtp", "tree,mtp")
Thread = list[str]
"""Prompts that are sent one after the other."""


def agent(rng: random.Random) -> Thread:
    """Every prompt of a chat with tool calls, twice."""
    messages = tasks.tool_chat(rng)
    asked = [rank for rank, said in enumerate(messages) if said["role"] == "assistant"]
    return [prompt for rank in asked for prompt in [_rendered(messages[:rank], tasks.TOOLS)] * 2]


def edit(rng: random.Random) -> Thread:
    """Lines of code, and the first of them again."""
    piece = _code(rng, 500)
    return [f"{piece}\n\n\n# The same again:\n{piece[:80]}"]


def chat(rng: random.Random) -> Thread:
    """A small chat, turn by turn."""
    messages = tasks.chat(rng)
    asked = [rank for rank, said in enumerate(messages) if said["role"] == "assistant"]
    return [_rendered(messages[:rank]) for rank in asked]


def few_shot(rng: random.Random) -> Thread:
    """Word problems behind four solved ones."""
    return [tasks.few_shot(rng, 4)[0]]


def fresh(rng: random.Random) -> Thread:
    """The beginning of a piece of code that nobody trained on."""
    return [_code(rng, 400)]


def noise(rng: random.Random) -> Thread:
    """Letters without sense."""
    return ["".join(chr(rng.randint(33, 126)) for _ in range(200))]


WORKLOADS: dict[str, Callable[[random.Random], Thread]] = {
    made.__name__: made for made in (agent, edit, chat, few_shot, fresh, noise)
}


def _rendered(messages: Sequence[dict[str, object]], tools: object = None) -> str:
    template = ByteTokenizer().chat_template
    assert template is not None
    return template.render(messages, tools=tools, add_generation_prompt=True)  # type: ignore[arg-type]


def _code(rng: random.Random, num_bytes: int) -> str:
    """From the beginning of a line of a held-out module."""
    text = rng.choice([source for source in corpus.sources(held_out=True) if len(source) > 4000])
    start = text.index("\n", rng.randrange(len(text) - 2 * num_bytes - 500)) + 1
    return text[start : start + num_bytes]


@dataclass(frozen=True, slots=True)
class Turn:
    """One pass of a workload through one engine."""

    outputs: list[RequestOutput]
    seconds: float
    """From the first token of each group of requests to its last."""

    @property
    def tokens_per_s(self) -> float:
        return sum(len(output.output) - 1 for output in self.outputs) / self.seconds


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table."""

    workload: str
    draft: str
    streams: int
    acceptance_len: float | None
    """Mean tokens of a verification; None: nothing was drafted."""
    tokens_per_step: float
    """Decoded tokens for each step of a request that decodes."""
    tokens_per_s: float
    ratio: float
    """To no drafts."""
    spread: float
    """Interquartile range of the ratios of single turns."""
    cached_tokens: int
    same_hits: bool
    same_answers: bool


def serve(engine: Engine, threads: Sequence[Thread], streams: int, params: SamplingParams) -> Turn:
    """All prompts, ``streams`` threads side by side."""
    tokenizer, outputs, seconds = ByteTokenizer(), [], 0.0
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
    return Turn(outputs, seconds)


def summarise(
    workload: str, draft: str, streams: int, turns: Sequence[Turn], plain: Sequence[Turn]
) -> Result:
    drafts = [output.drafts for output in turns[0].outputs if output.drafts is not None]
    verified = sum(counts.num_verified for counts in drafts)
    accepted = sum(counts.accepted.total() for counts in drafts)
    decoded = sum(len(output.output) - 1 for output in turns[0].outputs)
    ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(turns, plain, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [0.0, 0.0, 0.0]
    pairs = list(zip(turns[0].outputs, plain[0].outputs, strict=True))
    return Result(
        workload=workload,
        draft=draft,
        streams=streams,
        acceptance_len=round(1 + accepted / verified, 3) if verified else None,
        tokens_per_step=round(decoded / max(1, decoded - accepted), 3),
        tokens_per_s=round(statistics.median(turn.tokens_per_s for turn in turns), 1),
        ratio=round(statistics.median(ratios), 3),
        spread=round(quartiles[2] - quartiles[0], 3),
        cached_tokens=sum(output.cached_len for output in turns[0].outputs),
        same_hits=all(one.cached_len == other.cached_len for one, other in pairs),
        same_answers=all(one.token_ids == other.token_ids for one, other in pairs),
    )


def make_engine(model: str | None, draft: str) -> Engine:
    config = engine_config(model=model, device="cpu", cache_gib=0.25, max_running=8, draft=draft)
    runner = ModelRunner(config)
    sampler = Sampler(runner.vocab_size)
    return Engine(config, runner=runner, sampler=sampler, tokenizer=ByteTokenizer())


def draw(results: Sequence[Mapping[str, Any]], words: Sequence[str]) -> None:
    """A panel each for one stream and more: tokens a second beside none, and in each bar the
    tokens that a verification gave."""
    streams = sorted({result["streams"] for result in results})
    workloads = list(dict.fromkeys(result["workload"] for result in results))
    figure, axes = panels(len(streams), width=5.6, columns=2)
    width = 0.8 / len(words)
    for axis, count in zip(axes, streams, strict=True):
        for rank, (word, colour) in enumerate(zip(words, COLOURS, strict=False)):
            own = {
                result["workload"]: result
                for result in results
                if (result["draft"], result["streams"]) == (word, count)
            }
            places = [at + (rank - (len(words) - 1) / 2) * width for at in range(len(workloads))]
            ratios = [own[workload]["ratio"] for workload in workloads]
            axis.bar(places, ratios, width * 0.9, color=colour, label=f"--draft {word}")
            for at, workload in zip(places, workloads, strict=True):
                length = own[workload]["acceptance_len"]
                text = "" if length is None else f"{length:.1f}"
                axis.text(at, 0.03, text, color="white", ha="center", fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(workloads)), workloads)
        axis.set_ylabel("tokens a second beside none")
        axis.set_title(counted(count, "stream"), fontsize=9)
    caption = (
        "The built-in model on one core. In a bar: tokens that a verification gave, the one that "
        "is never a guess among them (acceptance length)."
    )
    save(figure, axes, figure_path("speculation"), caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="model directory; none: the built-in model")
    parser.add_argument("--out", type=Path, default=RESULTS / "speculation.jsonl")
    parser.add_argument("--repeats", type=int, default=5, help="turns of every drafter")
    parser.add_argument("--threads", type=int, default=2, help="of the processor")
    parser.add_argument("--prompts", type=int, default=8, help="of every workload, or chats")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer")
    parser.add_argument(
        "--drafts", nargs="+", default=list(DRAFTS), help="the first: compared with"
    )
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--draw", action="store_true", help="only draw the results in --out")
    args = parser.parse_args()
    if not args.draw:
        measure(args)
    _, recorded = read_json_lines(args.out)
    words = dict.fromkeys(result["draft"] for result in recorded)
    draw(recorded, [word for word in words if word != "none"])


def measure(args: argparse.Namespace) -> None:
    """Run every cell and write the results."""
    torch.set_num_threads(args.threads)
    engines = {draft: make_engine(args.model, draft) for draft in args.drafts}
    results: list[Result] = []
    cells = [(workload, streams) for workload in args.workloads for streams in args.streams]
    for workload, streams in tqdm(cells, desc="workloads"):
        rng = random.Random(workload)
        threads = [WORKLOADS[workload](rng) for _ in range(args.prompts)]
        heat = {"temperature": 5.0, "seed": 7} if workload == "noise" else {"temperature": 0.0}
        params = SamplingParams(max_tokens=args.max_tokens, **heat)
        turns: dict[str, list[Turn]] = {draft: [] for draft in engines}
        for _ in range(args.repeats):
            for draft, engine in engines.items():
                turns[draft].append(serve(engine, threads, streams, params))
        for draft, own in turns.items():
            results.append(summarise(workload, draft, streams, own, turns[args.drafts[0]]))
            tqdm.write(str(asdict(results[-1])))
    write_json_lines(args.out, map(asdict, results), vars(args) | {"out": args.out.name})
    wrong = [result for result in results if not (result.same_answers and result.same_hits)]
    print(f"{len(results)} cells to {args.out.name}; other answers or hits in {len(wrong)}")


if __name__ == "__main__":
    main()
