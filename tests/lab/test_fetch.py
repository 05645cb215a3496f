"""Tests of trace downloads, from a server on the loopback interface."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from hybridcache.lab.cli import main
from hybridcache.lab.traces import fetch, open_trace

NAME = "mooncake-conversation"
CONTENT = (
    b'{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [1, 2]}\n'
    b'{"timestamp": 9, "input_length": 700, "output_length": 5, "hash_ids": [1, 3]}\n'
)


class Handler(BaseHTTPRequestHandler):
    """HTTP handler that serves ``CONTENT``, half of it, or an error, depending on the path."""

    num_requests = 0

    def do_GET(self) -> None:
        Handler.num_requests += 1
        if self.path.startswith("/none"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if "half" in self.path else CONTENT)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a server. The cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Handler.num_requests = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def set_published_entry(monkeypatch: pytest.MonkeyPatch, address: str, sha256: str = "") -> None:
    entry = fetch.PUBLISHED[NAME]._replace(address=address, sha256=sha256)
    monkeypatch.setitem(fetch.PUBLISHED, NAME, entry)


def test_trace_is_fetched_once_and_opened_by_name(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_published_entry(monkeypatch, f"{address}/t.jsonl", hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(FileNotFoundError, match=f"hybridcache trace fetch {NAME}"):
        open_trace(f"published:{NAME}")
    path = fetch.fetch(NAME)
    assert path.read_bytes() == CONTENT
    assert main(["trace", "fetch", NAME]) == 0
    printed = capsys.readouterr()
    assert str(path) in printed.out and "licence Apache-2.0" in printed.out and not printed.err
    assert Handler.num_requests == 1
    first, second = open_trace(f"published:{NAME}")
    assert first.num_tokens(512) == 700 and first.tokens[0] == second.tokens[0]


@pytest.mark.parametrize(
    ("place", "sha256", "problem"),
    [
        ("none", "", "404"),
        ("http://127.0.0.1:9/t.jsonl", "", "refused"),
        ("half", hashlib.sha256(CONTENT).hexdigest(), "IncompleteRead"),
        ("t.jsonl", "0" * 64, "has the checksum"),
    ],
)
def test_failed_download_leaves_no_file(
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
    sha256: str,
    problem: str,
) -> None:
    place = place if place.startswith("http") else f"{address}/{place}"
    set_published_entry(monkeypatch, place, sha256)
    assert main(["trace", "fetch", NAME]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hybridcache: trace {NAME} was not fetched") and problem in error
    assert error.count("\n") == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
