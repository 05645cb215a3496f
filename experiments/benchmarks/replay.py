"""Replay of one trace through several caches, in the engine with times or only in the cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from hybridcache import ModelGeometry, TraceRequest
from hybridcache.api import Losses
from hybridcache.geometry.units import GIB
from hybridcache.lab.simulation.target import RunConfig, build_target

CAUSES = Losses._fields
DEFAULT_CHECKPOINTS = ",".join(EngineConfig().checkpoints)
DEFAULT_EVICTION = EngineConfig().eviction


@dataclass(frozen=True, slots=True)
class Setting:
    """One cache configuration."""

    cache: Literal["none", "radix", "hybrid"]
    cache_gib: float
    checkpoints: str = ""
    """Placement policies joined by commas, or empty if the cache stores no states."""
    eviction: str = DEFAULT_EVICTION

    @property
    def label(self) -> str:
        """Name of the setting without the size. A figure has one line per label."""
        parts: list[str] = [self.cache]
        if self.checkpoints not in ("", DEFAULT_CHECKPOINTS):
            parts.append(self.checkpoints.replace(",", ", "))
        if self.eviction != DEFAULT_EVICTION:
            parts.append(self.eviction)
        return " · ".join(parts)


@dataclass(frozen=True, slots=True)
class Turn:
    """Outcome of one request."""

    prompt_len: int
    cached_len: int
    losses: Losses
    ttft_s: float | None
    """None without a model."""


@dataclass(frozen=True, slots=True)
class Result:
    """Turns of one setting."""

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
        """Lost tokens by cause."""
        sums = np.sum([turn.losses for turn in self.turns], axis=0)
        return dict(zip(CAUSES, sums.tolist(), strict=True))

    @property
    def ttft_s(self) -> list[float]:
        return [turn.ttft_s for turn in self.turns if turn.ttft_s is not None]

    def record(self) -> dict[str, Any]:
        """Return all values that tables and figures use."""
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
    """Replay ``trace`` through the cache without a model, with whole answers.

    The leases are those of the engine, and KV and states share one arena, as in the engine's
    default. ``radix`` stands for an attention-only model with the same KV.
    """
    if setting.cache == "none":
        return Result(setting, tuple(_uncached_turn(request) for request in trace))
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
            turns.append(_uncached_turn(request, refused=True))
            continue
        assert served.losses is not None, "this cache reports the causes of losses"
        turns.append(Turn(len(request.tokens), served.cached_len, served.losses, None))
        served.prefilled()
        served.finish()
    return Result(setting, tuple(turns))


def _uncached_turn(request: TraceRequest, refused: bool = False) -> Turn:
    num_tokens = len(request.tokens)
    lost = {"refused" if refused else "never_seen": num_tokens}
    return Turn(num_tokens, 0, Losses(**(dict.fromkeys(CAUSES, 0) | lost)), None)


def replay(
    trace: Sequence[TraceRequest],
    setting: Setting,
    config: EngineConfig,
    *,
    max_new_tokens: int,
    concurrency: int = 1,
    computes_answers: bool = True,
) -> Result:
    """Replay ``trace`` through the engine in order of arrival, with ``concurrency`` requests at
    once.

    Turns of one conversation run one after the other. With ``computes_answers`` the data's answer
    is computed after each turn, untimed, so the cache contains it as after real generation.
    """
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
    # The first forward pass of a process includes one-time initialisation.
    engine.generate([[0] * 200], sampling)
    engine.reset_prefix_cache()
    answer_sampling = SamplingParams(max_tokens=1, temperature=0) if computes_answers else None
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
                    if answer_sampling is not None and setting.cache != "none":
                        running[_compute_answer(engine, trace[place], answer_sampling)] = place
    engine.check()
    return Result(setting, tuple(turns[place] for place in range(len(trace))))


def _compute_answer(engine: Engine, request: TraceRequest, sampling: SamplingParams) -> str:
    """Submit the data's answer as part of a prompt, up to the context length."""
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
