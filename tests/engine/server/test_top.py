"""``engine top`` against a live server."""

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


def test_one_screen_of_a_live_server(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        prompt = "what top shows, " * 20 + str(number)
        live.post("/v1/completions", {"prompt": prompt, "max_tokens": 4})
    assert main(["top", "--url", live.url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "prompt tokens reused" in shown and "checkpoints" in shown
    assert "never seen" in shown and "length" in shown


def test_an_id_on_the_screen_leads_to_the_explanation(
    live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = {"messages": [{"role": "user", "content": "from top to the reason"}], "max_tokens": 4}
    answer_id = live.post("/v1/chat/completions", chat).json()["id"]
    assert main(["top", "--url", live.url, "--once"]) == 0
    [shown] = re.findall(rf"^{answer_id[:12]}\w*", capsys.readouterr().out, re.MULTILINE)
    assert live.get(f"/v1/cache/explanations/{shown}").json()["id"] == answer_id


def test_it_follows_what_goes_on(live: Live) -> None:
    watched = top.Watched()
    threading.Thread(target=top.follow, args=(watched, live.url, None), daemon=True).start()
    _until(lambda: watched.num_events > 0)
    body = {"prompt": "one more for top " * 9, "max_tokens": 4}
    answer_id = live.post("/v1/completions", body).json()["id"]
    _until(lambda: any(one["id"].startswith(answer_id) for one in watched.ended()))
    for width in (80, 100):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(top.screen(watched, 30, width))
        shown = console.export_text()
        assert "length" in shown and "KV evicted" in shown
        assert "…" not in shown, "a word is cut"
        assert not any(cause in shown for cause in Losses._fields if "_" in cause), "raw names"


def _until(condition: Any) -> None:
    import time

    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_with_a_key_asks_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    config = ServerConfig(admin_key_file=str(tmp_path / "key"))
    with serving(oracle_engine(), config) as live:
        assert main(["top", "--url", live.url]) == 2
        assert "--key-file FILE" in capsys.readouterr().err
        # The output is no terminal, so there is one screen without --once too.
        assert main(["top", "--url", live.url, "--key-file", str(tmp_path / "key")]) == 0
        assert "prompt tokens reused" in capsys.readouterr().out


def test_no_server_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--url", "http://127.0.0.1:9", "--once"]) == 2
    assert "does not answer" in capsys.readouterr().err
