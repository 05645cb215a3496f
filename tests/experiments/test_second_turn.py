"""Prompt tokens that the engine computes a second time, in every case of the benchmark."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import Engine, EngineConfig
from engine.config import BUILTIN_DIR
from engine.plugins.tiers.staging import MeasuredExchange
from experiments.benchmarks import second_turn
from experiments.benchmarks.second_turn import CASES, Client, Memory, Sent, Side, Steps, Text
from hybridcache.geometry.units import GIB
from tests.served import serving

SIZE = 600
"""Tokens of a prompt. The built-in model has one per character."""
READ_AGAIN: dict[str, list[int]] = {
    "next turn": [32],
    "tool result": [61],
    "thoughts": [46],
    "edits": [251, 31, 10],
    "early edit": [117],
    "steer": [16],
    "subagent": [50, 66],
    "branches": [191],
    "twelve": [495],
    "restart": [13],
    "dated session": [9],
    "dated turns": [9],
    "tools behind": [245, 53],
    "scarce": [7122],
    "tiered": [2054],
    "long run": [2064, 45, 56],
    "one folder": [15, 125],
}
"""Tokens read again in each row of a case, of all its requests."""


@contextlib.contextmanager
def served(needs: str, folder: Path) -> Iterator[Client]:
    memory = Memory.of(BUILTIN_DIR, SIZE)
    settings: dict[str, object] = {"cache_gib": 0.05}
    if needs in ("scarce", "tiered"):
        settings["cache_gib"] = memory.num_bytes / GIB
    if needs == "tiered":
        settings["host_gib"] = memory.host_bytes / GIB
    if needs == "state":
        settings["state_dir"] = str(folder)
    engine = Engine(EngineConfig(device="cpu", warm_up=False, **settings))
    with serving(engine) as (_, port):
        yield Client(port, max_tokens=3, answer_id=ord("r"))


def in_turn(client: Client, clients: list[Steps], restart: Callable[[], Client]) -> list[Sent]:
    """Send the requests of all clients one after the other, so that every run is the same."""
    answers: dict[Steps, object] = dict.fromkeys(clients)
    while answers:
        for steps, answer in [*answers.items()]:
            try:
                ask = steps.send(answer)  # type: ignore[arg-type]
            except StopIteration:
                del answers[steps]
                continue
            if ask.restart:
                sent, client = client.sent, restart()
                client.sent = sent
            answers[steps] = client.chat(ask)
    return client.sent


@pytest.mark.parametrize("name", CASES)
def test_tokens_read_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(_: object, cached_len: int, position: int, *__: object) -> float:
        return position - cached_len

    monkeypatch.setattr(MeasuredExchange, "seconds_saved", saved)  # Whatever the machine's speed.
    monkeypatch.setattr(second_turn, "NUM_MANY", 8)
    monkeypatch.setattr(second_turn, "NUM_FITTING", 2)
    case = CASES[name]
    clients = [case.steps(Text(name, at, SIZE), case.least) for at in range(case.least)]
    with contextlib.ExitStack() as stack:

        def start() -> Client:
            stack.close()
            return stack.enter_context(served(case.needs, tmp_path))

        sent = in_turn(start(), clients, start)
    found = [*second_turn.counts(sent, Side("engine").ids_of)]
    assert not any(one["faults"] for one in found), found
    assert [one["read_again"] for one in found] == READ_AGAIN[name]
