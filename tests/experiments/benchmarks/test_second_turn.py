"""Prompt tokens that the engine computes a second time, in every case of the benchmark, and the
published table of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import Engine, EngineConfig
from engine.config import BUILTIN_DIR
from engine.plugins.tiers.staging import MeasuredExchange
from experiments import page, provenance
from experiments.benchmarks import second_turn
from experiments.benchmarks.second_turn import (
    CASES,
    PUBLISHED,
    RIVALS,
    Client,
    ClientRequest,
    Results,
    Sent,
    ServerMemory,
    Steps,
    Text,
)
from experiments.benchmarks.server import exchange
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
    "scarce": [6610],
    "ended": [6354],
    "tiered": [2054],
    "long run": [2064, 45, 56],
    "one folder": [15, 125],
}
"""Tokens read again in each row of a case, of all its requests."""


@contextlib.contextmanager
def served(needs: str, folder: Path, **options: object) -> Iterator[Client]:
    memory = ServerMemory.of(BUILTIN_DIR, SIZE)
    settings: dict[str, object] = {"cache_gib": 0.05, **options}
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
    drawn_as = case.drawn_as or name
    clients = [case.steps(Text(f"{drawn_as} {at}", SIZE), case.least) for at in range(case.least)]
    with contextlib.ExitStack() as stack:

        def start() -> Client:
            stack.close()
            return stack.enter_context(served(case.needs, tmp_path))

        sent = in_turn(start(), clients, start)
    found = [*second_turn.counts(sent, Client(0).ids_of)]
    assert not any(one["faults"] for one in found), found
    assert [one["read_again"] for one in found] == READ_AGAIN[name]


def folders(text: Text, is_marked: bool) -> Steps:
    """Two folders in a system text before the tools. Its equal part may be marked."""
    tools, shared = text.tools(), {"type": "text", "text": text.draw(0.4)}
    mark = {"cache_control": {"type": "ephemeral"}} if is_marked else {}
    for folder in ("alpha", "beta"):
        parts = [shared | mark, {"type": "text", "text": f" Directory: {folder}."}]
        asked = {"role": "user", "content": text.draw(0.2)}
        row = "second folder" if folder == "beta" else ""
        messages = [{"role": "system", "content": parts}, asked]
        yield ClientRequest({"messages": messages, "tools": tools}, row)


def test_rows_above_a_grid_step_are_explained_with_remedies_that_help(tmp_path: Path) -> None:
    def run(steps: Steps, **options: object) -> tuple[int, str]:
        """Return the tokens read again in the first row, and the advice of its explanation."""
        with served("", tmp_path, **options) as client:
            sent = in_turn(client, [steps], lambda: client)
            told = exchange(client.port, "GET", f"/v1/cache/explanations/{sent[1].name}")
        first, *_ = second_turn.counts(sent, client.ids_of)
        return first["read_again"], told["advice"] or ""

    text = partial(Text, "edits 0", SIZE)
    read_again, advice = run(CASES["edits"].steps(text(), 1))
    assert read_again == 251 and "--checkpoints adaptive,backoff:2" in advice
    finer, _ = run(CASES["edits"].steps(text(), 1), checkpoints=("adaptive", "backoff:2"))
    assert finer == 59
    read_again, advice = run(folders(text(), is_marked=False))
    assert read_again > 128 and "cache_control" in advice
    marked, advice = run(folders(text(), is_marked=True))
    assert marked < 64 and "cache_control" not in advice


def record(side: str, case: str, read_again: float, ttft_s: float | None) -> dict[str, Any]:
    """Return a record of the first published plan."""
    counted = {"row": f"row of {case}", "read_again_mean": read_again, "prompt": 100, "cached": 50}
    named = {"side": side, "case": case} | PUBLISHED[0].fields
    return named | counted | {"ttft_s": ttft_s, "resident_bytes": 2**20}


def test_results_replace_cases_and_the_page_has_what_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    section = page.SECTIONS["second turn"]
    assert page.render("second turn", section, {}, "") == "No results yet: `second_turn.jsonl`."
    file, (first, second, *_) = tmp_path / "second_turn.jsonl", PUBLISHED[0].cases
    for side in RIVALS:
        seconds = 0.5 if side == "engine" else 2.0
        Results(file).add([record(side, second, 32, None), record(side, first, 9, None)], {})
        Results(file).add([record(side, first, 12, seconds)], {})
    results = Results(file)
    kept = [one for of in results.cases.values() for one in of]
    assert [one["read_again_mean"] for one in kept] == [32, 12, 32, 12]
    assert [results.has("engine", PUBLISHED[0], case) for case in (first, second)] == [True, False]
    assert not results.has("engine", PUBLISHED[1], first)
    results.commit = "another"
    assert not results.has("engine", PUBLISHED[0], first)
    table = section.table()
    assert table.texts() == [
        [f"row of {first}", "12", "12", "0.5", "2", "1", "1", "0.25"],
        [f"row of {second}", "32", "32", "-", "-", "1", "1", "-"],
    ]
    assert [one.head for one in table.columns[3:5]] == ["engine: TTFT, s", "llama-server: TTFT, s"]
    finding = section.finding(table)
    assert f"up to 32 tokens of a request again (row of {second}), 22 in" in finding
    assert "0.25 to 0.25 times" in finding
    rest = ", ".join(PUBLISHED[0].cases[2:])
    assert (
        f"1 of 2 rows have no times yet. Not run yet on both servers: {rest} (530m, 2000 tokens"
        in finding
    )
    assert f"row of {first}" in page.render("second turn", section, {}, "")
    with pytest.raises(FileNotFoundError, match="no records of these plans"):
        page.SECTIONS["second turn sizes"].table()
