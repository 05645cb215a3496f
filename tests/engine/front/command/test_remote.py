"""Commands for a running server: settings of agents, and the benchmark."""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest

from engine.front.command import cli
from engine.front.command.remote import PLACES, _figures
from engine.front.server.settings import API_KEY_VARIABLE, ServerConfig
from tests.engine.front.server.conftest import Live, oracle_engine, serving

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("s3cret team\n")
    with serving(oracle_engine(num_kv_tokens=16384), ServerConfig(api_key_file=str(keys))) as live:
        yield live


@pytest.mark.parametrize("agent", PLACES)
def test_settings_name_the_server_and_its_key(
    agent: str, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """The file is written once, readable by its owner only."""
    monkeypatch.setenv("HOME", str(tmp_path))
    command = ["agent", agent, "--url", f"{live.url}/v1"]
    for wrong, message in (("", "requires a key"), ("wrong", "refused the key in")):
        monkeypatch.setenv(API_KEY_VARIABLE, wrong)
        assert cli.main(command) == 2 and message in capsys.readouterr().err
    monkeypatch.setenv(API_KEY_VARIABLE, "s3cret")
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert cli.main(["bench", f"{live.url}/else"]) == 2
    said = capsys.readouterr().err
    assert "/else answered 404 to /v1/models: " in said and said.count("\n") == 1
    (tomllib.loads if agent == "codex" else json.loads)(printed)
    for part in (live.url, "builtin", "4096", "1800000"):
        assert part in printed
    assert ("s3cret" in printed) == (agent == "claude") != (API_KEY_VARIABLE in printed)
    assert not any(word in printed for word in ("NAME", '"KEY"', "8000/", "131072", "8192"))
    with patch.object(Path, "write_text", side_effect=OSError(28, "No space left")):
        assert cli.main([*command, "--write"]) == 2
    assert "written (No space left): use the command without" in capsys.readouterr().err
    assert cli.main([*command, "--write"]) == 0
    file = tmp_path / PLACES[agent]
    assert file.read_text() == printed and file.stat().st_mode & 0o77 == 0
    assert cli.main([*command, "--write"]) == 2 and "exists" in capsys.readouterr().err


def test_a_context_shorter_than_the_table_of_agents_is_reported(capsys: Output) -> None:
    page = (Path(cli.__file__).parents[3] / "docs/how-to/agents.md").read_text()
    row = r"^\| (\w+(?: Code)?) [\d.]+ \|([^|]*) \| ([\d,]+) \| ([\d,]+) \|$"
    rows = re.findall(row, page, re.M)
    assert len(rows) == len(PLACES)
    for agent, prompt, *sizes in rows:
        short = agent.lower().partition(" ")[0]
        for least, name in zip(sizes, ("some", "builtin"), strict=True):
            size = int(least.replace(",", ""))
            for context in (size - 1, size):
                found = httpx.AsyncClient(base_url="http://x"), name, context
                with patch("engine.front.command.remote.connect", return_value=found):
                    assert cli.main(["agent", agent.lower().replace(" ", "-")]) == 0
                said = capsys.readouterr().err
                first = int(prompt[-6:].replace(",", "")) // (1 if name == "builtin" else 4)
                words = f"of {context:,} tokens, short for {short}, whose first prompt has about "
                assert (f"{words}{first:,}: --max-model-len {size} " in said) == (context < size)


def test_benchmark_counts_what_the_server_counts(
    live: Live, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "s3cret")
    live.headers["Authorization"] = "Bearer s3cret"
    names, before = ("requests", "prompt_tokens", "cached_tokens"), live.report()["usage"]
    flags = ["--agents", "3", "--turns", "3", "--words", "60", "--answer", "5"]
    assert cli.main(["bench", live.url.removeprefix("http://"), *flags, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    after = live.report()["usage"]
    used = {name: after[name] - before[name] for name in names}
    assert used["requests"] == figures["all"]["requests"] == 9
    assert figures["all"]["hit_rate"] == used["cached_tokens"] / used["prompt_tokens"] > 0.3
    assert figures["first turns"]["hit_rate"] < figures["later turns"]["hit_rate"] < 1
    assert figures["all"]["tokens_per_s"] == pytest.approx(45 / figures["seconds"])
    assert cli.main(["bench", live.url, "--agents", "1", "--turns", "1", "--answer", "2"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["requests", "first", "all", "Medians"]


@pytest.mark.parametrize(
    ("code", "event"), {130: KeyboardInterrupt(), 2: httpx.ReadError("x")}.items()
)
def test_a_benchmark_does_not_wait_for_its_other_conversations(
    code: int, event: BaseException, live: Live, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    async def ask(*_: object) -> None:
        if event_left.pop():
            raise event
        await asyncio.sleep(600)

    event_left = [False, True, False, False]
    monkeypatch.setenv(API_KEY_VARIABLE, "s3cret")
    monkeypatch.setattr("engine.front.command.remote._ask", ask)
    assert cli.main(["bench", live.url]) == code
    assert ("broke off: x.\n" in capsys.readouterr().err) == (code == 2)


def test_pieces_that_arrive_together_make_no_high_rate() -> None:
    turns = [(0.1, 0.001, 9, 0, 5), (0.1, 0.001, 9, 0, 5), (0.1, 0.998, 9, 0, 3)]
    assert _figures(turns)["tokens_per_s"] == pytest.approx(10)


def test_wrong_commands_end_with_one_sentence(capsys: Output) -> None:
    for command, message in {
        "bench 127.0.0.1:1": "give http://HOST:PORT",
        "record --to 127.0.0.1:1 --out x": "No server answers at http://127.0.0.1:1",
        "bench http://127.0.0.1:1": "No server answers at http://127.0.0.1:1",
        "bench http://127.0.0.1:1 --turns 0": "--turns must be",
        "agent codex --url http://[oops": "No server answers",
    }.items():
        assert cli.main(command.split()) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_a_certificate_that_is_not_trusted_is_told_from_no_server(capsys: Output) -> None:
    fault = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
    with patch("httpx.get", side_effect=fault):
        for command in ("agent codex --url", "bench", "record --out x --to"):
            assert cli.main([*command.split(), "https://127.0.0.1:1"]) == 2
            said = capsys.readouterr().err
            assert "is not trusted" in said and "SSL_CERT_FILE" in said and said.count("\n") == 1


def test_grafana_prints_the_dashboard(capsys: Output) -> None:
    assert cli.main(["grafana"]) == 0
    assert json.loads(capsys.readouterr().out)["panels"]
