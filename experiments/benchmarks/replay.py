"""One trace through one cache after the other: in the engine, with times, or in the cache alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from hybridcache import Losses, ModelGeometry, TraceRequest
from hybridcache.geometry.units import GIB
from hybridcache.lab.simulation.target import RunConfig, build_target

CAUSES = Losses._fields
DEFAULT_CHECKPOINTS = ",".join(EngineConfig().checkpoints)
DEFAULT_EVICTION = EngineConfig().eviction


@dataclass(frozen=True, slots=True)
class Setting:
    """One cache to try."""

    cache: Literal["none", "radix", "hybrid"]
    cache_gib: float
    checkpoints: str = ""
    """Placement words joined by commas; empty where the cache keeps no states."""
    eviction: str = DEFAULT_EVICTION

    @property
    def label(self) -> str:
        """Without the size: what a figure has one line of."""
        words: list[str] = [self.cache]
        if self.checkpoints not in ("", DEFAULT_CHECKPOINTS):
            words.append(self.checkpoints.replace(",", ", "))
        if self.eviction != DEFAULT_EVICTION:
            words.append(self.eviction)
        return " · ".join(words)


@dataclass(frozen=True, slots=True)
class Turn:
    """Outcome of one request."""

    prompt_len: int
    cached_len: int
    losses: Losses
    ttft_s: float | None
    """None if nothing was computed."""


@dataclass(frozen=True, slots=True)
class Result:
    """One setting's turns."""

    setting: Setting
    turns: tuple[Turn, ...]

    @property
    def token_hit_rate(self) -> float:
        return sum(turn.cached_len for turn in self.turns) / self.num_tokens

    @property
    def num_tokens(self) -> int:
        return sum(turn.prompt_len for turn in self.turns)

    @property
    def lost(self) -> dict[str, int]:
        """Tokens by cause."""
        sums = np.sum([turn.losses for turn in self.turns], axis=0)
        return dict(zip(CAUSES, sums.tolist(), strict=True))

    @property
    def ttft_s(self) -> list[float]:
        return [turn.ttft_s for turn in self.turns if turn.ttft_s is not None]

    def record(self) -> dict[str, Any]:
        """All that tables and figures need."""
        return {
            **asdict(self.setting),
            "label": self.setting.label,
            "requests": len(self.turns),
            "prompt_tokens": self.num_tokens,
            "token_hit_rate": self.token_hit_rate,
            "lost_tokens": self.lost,
            "ttft_s": [round(time_s, 6) for time_s in self.ttft_s],
        }


def replay_dry(trace: Sequence[TraceRequest], setting: Setting, geometry: ModelGeometry) -> Result:
    """Replay ``trace`` through the cache alone, with whole answers.

    The leases are those of the engine, and KV and states share one arena, as they do there by
    default. Radix stands for an attention-only model with the same KV.
    """
    if setting.cache == "none":
        return Result(setting, tuple(_computed_whole(request) for request in trace))
    if setting.cache == "radix":
        geometry = replace(geometry, num_linear_layers=0, recurrent_elements=0, conv_bytes=0)
    config = RunConfig(
        geometry,
        budget_bytes=int(setting.cache_gib * GIB),
        policy=setting.eviction,
        checkpoints=setting.checkpoints or "none",
    )
    target = build_target(config, unit=1)
    turns = []
    for request in _progress(trace, setting):
        served = target.begin(request)
        if served is None:
            turns.append(_computed_whole(request, refused=True))
            continue
        assert served.losses is not None, "our own cache always says why"
        turns.append(Turn(len(request.tokens), served.cached_len, served.losses, None))
        served.prefilled()
        served.finish()
    return Result(setting, tuple(turns))


def _computed_whole(request: TraceRequest, refused: bool = False) -> Turn:
    num_tokens = len(request.tokens)
    blamed = {"refused" if refused else "never_seen": num_tokens}
    return Turn(num_tokens, 0, Losses(**(dict.fromkeys(CAUSES, 0) | blamed)), None)


def replay(
    trace: Sequence[TraceRequest],
    setting: Setting,
    config: EngineConfig,
    *,
    max_new_tokens: int,
    concurrency: int = 1,
    says_answers: bool = True,
) -> Result:
    """Through the real engine, in the order of arrival: as many at once as ``concurrency`` says, a
    conversation's turns one after the other. With ``says_answers`` the data's answer is computed
    after each turn, outside of its time, so that the cache holds what an engine that had generated
    it would hold."""
    engine = Engine(
        replace(
            config,
            prefix_cache=setting.cache,
            cache_gib=setting.cache_gib,
            checkpoints=tuple(setting.checkpoints.split(","))
            if setting.checkpoints
            else config.checkpoints,
            eviction=setting.eviction,
            max_running=concurrency,
        )
    )
    sampling = SamplingParams(max_tokens=max_new_tokens, temperature=0, ignore_eos=True)
    # The first forward pass of a process pays for what later ones find ready.
    engine.generate([[0] * 200], sampling)
    engine.reset_prefix_cache()
    said = SamplingParams(max_tokens=1, temperature=0) if says_answers else None
    turns: dict[int, Turn] = {}
    waiting = deque(enumerate(trace))
    running: dict[str, int] = {}
    with _progress(trace, setting) as bar:
        while waiting or running:
            busy = {trace[place].session for place in running.values()}
            while waiting and len(running) < concurrency and waiting[0][1].session not in busy:
                place, request = waiting.popleft()
                request_id = engine.submit(
                    request.tokens,
                    sampling,
                    boundaries=request.boundaries,
                    answer_survives=request.answer_survives,
                )
                running[request_id] = place
                busy.add(request.session)
            for output in engine.step():
                if not output.is_finished:
                    continue
                place = running.pop(output.request_id)
                if place not in turns:
                    turns[place] = _turn(output)
                    bar.update()
                    if said is not None and setting.cache != "none":
                        running[_say(engine, trace[place], said)] = place
    engine.check()
    return Result(setting, tuple(turns[place] for place in range(len(trace))))


def _say(engine: Engine, request: TraceRequest, sampling: SamplingParams) -> str:
    """Compute the answer of the data as part of a prompt, up to the context length."""
    whole = np.concatenate((request.tokens, request.output))[: engine.max_model_len - 1]
    return engine.submit(
        whole,
        sampling,
        boundaries=request.boundaries,
        answer_survives=request.answer_survives,
    )


def _turn(output: RequestOutput) -> Turn:
    assert output.losses is not None, "a finished request was scheduled"
    return Turn(
        len(output.prompt_token_ids), output.cached_len, output.losses, output.timings.ttft_s
    )


def _progress(trace: Sequence[TraceRequest], setting: Setting) -> tqdm[TraceRequest]:
    name = f"{setting.label}, {setting.cache_gib:g} GiB"
    return tqdm(trace, name, unit=" requests", leave=False)
