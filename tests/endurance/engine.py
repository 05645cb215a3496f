"""Random clients of the engine.

They read whole answers, disconnect, abort, cancel tasks, make failing calls and reset the cache,
while steps fail. The runner verifies every row and state that is read. A whole answer must be the
one that follows from its prompt. At the end nothing is held or waits.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from engine import AsyncEngine, Engine, QueueFull, SamplingParams, engine_config
from engine.errors import EngineStopped, StepFailed
from tests.oracle import OracleRunner, OracleSampler, fingerprint

WAYS = ("whole", "whole", "leave", "abort", "drop", "cancel", "call", "reset")


def answer(prompt: Sequence[int], length: int) -> list[int]:
    """Return the only correct answer, independent of chunks, batches and the cache."""
    before, tokens, sampler = 0, list(prompt), OracleSampler()
    for token in prompt:
        before = fingerprint(before, token)
    for _ in range(length):
        tokens.append(sampler.choose(before).token_id)
        before = fingerprint(before, tokens[-1])
    return tokens[len(prompt) :]


class FailingRunner(OracleRunner):
    """Runner with randomly failing steps."""

    failure_share = 0.0
    draw = random.Random(0)

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.wrong_reads: list[str] = []
        """Reads of another prefix. The engine reports them as failed steps and continues."""

    def forward(self, batch: Any, drawn: Any = ()) -> Any:
        if self.draw.random() < self.failure_share:
            raise MemoryError("no memory for this step")
        try:
            return super().forward(batch, drawn)
        except AssertionError as error:
            self.wrong_reads.append(str(error))
            raise


def make_engine(seed: int) -> Engine:
    draw = random.Random(seed)
    settings: dict[str, Any] = {
        "max_running": draw.choice((1, 3, 8)),
        "token_budget": draw.choice((64, 128, 1024)),
        "max_queue": draw.choice((4, 512)),
        "overlap": draw.choice(("on", "off")),
        "eviction": draw.choice(("lru", "survival", "gdsf")),
        "checkpoints": (draw.choice(("none", "branch,boundary,backoff,end", "every:64,end")),),
    }
    settings["checkpoints"] = tuple(settings["checkpoints"][0].split(","))
    runner = FailingRunner(
        draw.choice((512, 2048, 8192)), draw.choice((4, 8, 24)), max_model_len=400
    )
    if draw.random() < 0.3:
        runner.failure_share, runner.draw = 0.05, random.Random(seed)
    return Engine(engine_config(**settings), runner=runner, sampler=OracleSampler())


def prompt_of(draw: random.Random) -> list[int]:
    return [draw.randrange(3)] * draw.choice((5, 64, 130)) + [draw.randrange(9)] * draw.randrange(
        99
    )


async def caller(engine: AsyncEngine, draw: random.Random, seen: Counter[str]) -> None:
    """Run one client, which ends in a random way."""
    way = draw.choice(WAYS)
    try:
        if way == "call":
            await engine.call(lambda _: 1 // 0)
        elif way == "reset":
            await engine.reset_prefix_cache()
        else:
            await ask(engine, way, draw)
    except ZeroDivisionError:
        way = "call that raised"
    except (QueueFull, StepFailed, EngineStopped) as error:
        way = type(error).__name__
    seen[way] += 1


async def ask(engine: AsyncEngine, way: str, draw: random.Random) -> None:
    prompt, length = prompt_of(draw), draw.randrange(1, 40)
    stream = engine.submit(
        prompt, SamplingParams(max_tokens=length), namespace=draw.choice((None, "a"))
    )
    if way == "drop":
        return
    if way == "cancel":
        task = asyncio.create_task(_drain(stream))
        await asyncio.sleep(draw.random() * 0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        stream.abort()
        return
    tokens: list[int] = []
    async for output in stream:
        tokens += output.new_token_ids
        if way in ("leave", "abort") and draw.random() < 0.3:
            stream.abort()
            if way == "leave":
                return
    if way == "whole":
        assert tokens == answer(prompt, length), "an answer that does not follow from its prompt"


async def _drain(stream: Any) -> None:
    async for _ in stream:
        pass


def run(seed: int, num_engines: int) -> dict[str, int]:
    """Test engines of random settings with a hundred clients each. Returns the ends of clients."""
    seen: Counter[str] = Counter()
    for number in range(seed, seed + num_engines):
        engine: Any = make_engine(number)
        try:
            is_alive = asyncio.run(_run(engine, number, seen))
            assert engine.runner.wrong_reads == [], engine.runner.wrong_reads[0]
            if is_alive:
                engine.check()
                report = engine.report()
                held = report.kv.held, report.slots.held, report.num_running, report.num_waiting
                assert held == (0, 0, 0, 0), f"held {held}"
            else:  # Two steps in a row failed, and the engine ended with all it held.
                seen["engine ended"] += 1
        except Exception as error:
            raise AssertionError(f"seed {number}: {error!r}") from error
    return dict(sorted(seen.items()))


async def _run(engine: Engine, seed: int, seen: Counter[str]) -> bool:
    """Run a hundred clients. Returns True if the engine did not end."""
    serving = AsyncEngine(engine)
    serving.start()
    callers = (caller(serving, random.Random(seed * 1000 + n), seen) for n in range(100))
    try:
        await asyncio.wait_for(asyncio.gather(*callers), 120)
    finally:
        await serving.drain()
    return serving.failure is None
