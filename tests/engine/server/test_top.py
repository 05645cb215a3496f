"""``engine top`` with a live server."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="rich is not installed")

from rich.console import Console

from engine.command.cli import main
from engine.plugins.observe import top
from engine.server.settings import ServerConfig
from hybridcache.api import Losses

from .conftest import Live, oracle_engine, serving


def test_once_prints_one_screen(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        prompt = "what top shows, " * 20 + str(number)
        live.post("/v1/completions", {"prompt": prompt, "max_tokens": 4})
    assert main(["top", "--url", live.url, "--once"]) == 0
    screen = capsys.readouterr().out
    assert "prompt tokens reused" in screen and "checkpoints" in screen
    assert "never seen" in screen and "length" in screen


def test_id_on_the_screen_finds_the_explanation(
    live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = {"messages": [{"role": "user", "content": "from top to the reason"}], "max_tokens": 4}
    answer_id = live.post("/v1/chat/completions", chat).json()["id"]
    assert main(["top", "--url", live.url, "--once"]) == 0
    [short_id] = re.findall(rf"^{answer_id[:12]}\w*", capsys.readouterr().out, re.MULTILINE)
    assert live.get(f"/v1/cache/explanations/{short_id}").json()["id"] == answer_id


def test_screen_follows_new_requests(live: Live) -> None:
    watched = top.Watched()
    threading.Thread(target=top.follow, args=(watched, live.url, None), daemon=True).start()
    _wait_until(lambda: watched.num_events > 0)
    body = {"prompt": "one more for top " * 9, "max_tokens": 4}
    answer_id = live.post("/v1/completions", body).json()["id"]
    _wait_until(lambda: any(request["id"].startswith(answer_id) for request in watched.ended()))
    for width in (80, 100):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(top.screen(watched, 30, width))
        text = console.export_text()
        assert "length" in text and "KV evicted" in text
        assert "…" not in text, "a word was truncated"
        assert not any(cause in text for cause in Losses._fields if "_" in cause), "raw names"


def _wait_until(condition: Any) -> None:
    import time

    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_missing_key_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    config = ServerConfig(admin_key_file=str(tmp_path / "key"))
    with serving(oracle_engine(), config) as live:
        assert main(["top", "--url", live.url]) == 2
        assert "--key-file FILE" in capsys.readouterr().err
        # The output is not a terminal, so one screen is printed without --once, too.
        assert main(["top", "--url", live.url, "--key-file", str(tmp_path / "key")]) == 0
        assert "prompt tokens reused" in capsys.readouterr().out


def test_address_may_be_that_of_the_api(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    """The start screen of the server prints the address with ``/v1``."""
    assert main(["top", "--url", f"{live.url}/v1", "--once"]) == 0
    assert main(["top", "--url", "localhost:8000"]) == 2
    assert "'localhost:8000' is not an address" in capsys.readouterr().err


def test_missing_server_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--url", "http://127.0.0.1:9", "--once"]) == 2
    assert "does not answer" in capsys.readouterr().err
