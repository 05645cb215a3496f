"""Live servers on 127.0.0.1 for real clients.

Most serve the oracle, a runner that checks every read; some serve the built-in model.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from engine import Engine, EngineConfig
from engine.front.server.app import Server
from engine.front.server.settings import ServerConfig
from engine.requests.logit_rules import Mask
from engine.requests.request import SamplingInput
from engine.schedule.scheduler import Batch
from engine.text.answers import SampledToken
from engine.text.tokenizer import ChatTemplate
from engine.text.tokenizer_files import HFTokenizer
from tests import served
from tests.oracle import OracleDrawn, OracleRunner, OracleSampler
from tests.waiting import wait_until


@dataclass
class Live:
    """A running server and the clients of a test."""

    port: int
    engine: Engine
    server: Server
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with every request of ``post`` and ``get``."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def http(self) -> httpx.Client:
        """Client with persistent connections: a new client takes longer than a request."""
        return httpx.Client(base_url=self.url, timeout=120, verify=False)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.http.post(path, json=body, headers=self.headers | headers)

    def post_raw(self, path: str, payload: str) -> httpx.Response:
        """Send JSON that ``json.dumps`` would write differently."""
        headers = self.headers | {"Content-Type": "application/json"}
        return self.http.post(path, content=payload, headers=headers)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.http.get(path, headers=self.headers | headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=120)

    def send(self, path: str, body: dict[str, Any], version: str = "1.1") -> socket.socket:
        """Send a request on a new socket and return it with its answer unread."""
        payload = json.dumps(body).encode()
        connection = self.connect()
        connection.sendall(
            f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n".encode()
            + payload
        )
        return connection

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = self.get("/v1/cache").json()
        return report

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until the report of /v1/cache meets ``condition``."""
        wait_until(lambda: condition(self.report()))

    def wait_until_idle(self) -> None:
        self.wait_for(lambda report: not report["num_running"] + report["num_waiting"])

    def check_conserved(self) -> None:
        """Check, when idle, that no memory is held and none was leaked."""
        self.wait_until_idle()
        report = self.report()
        for resource in ("kv", "slots"):
            counts = report[resource]
            assert counts["free"] + counts["cached"] + counts["held"] == counts["total"]
            assert counts["held"] == 0
        self.engine.check()


Serve = Callable[..., Live]
"""Type of the fixtures ``serve_oracle`` and ``serve_answer``."""


class SlowRunner(OracleRunner):
    """Oracle with a delay in each step, so that tests can act in the middle of an answer."""

    step_s = 0.0

    def forward(self, batch: Batch, drawn: Sequence[int] = ()) -> Any:
        time.sleep(self.step_s)
        return super().forward(batch, drawn)


@contextlib.contextmanager
def serving(
    engine: Engine, server_config: ServerConfig | None = None, port: int = 0
) -> Iterator[Live]:
    """Serve ``engine`` in a thread."""
    with served.serving(engine, server_config, port) as (server, port):
        live = Live(port, engine, server)
        yield live
        live.http.close()


def oracle_engine(step_s: float = 0.0, num_kv_tokens: int = 8192, **config: Any) -> Engine:
    runner = SlowRunner(num_kv_tokens, 16, max_model_len=4096)
    runner.step_s = step_s
    return Engine(
        EngineConfig(**config), runner=runner, sampler=OracleSampler(), tokenizer=HFTokenizer()
    )


class ScriptedSampler(OracleSampler):
    """Sampler that returns the bytes of ``script`` and then the end of the answer.

    If a grammar forbids a token, the first allowed one is returned in its place.
    """

    script = b""
    later: tuple[bytes, ...] = ()
    """Scripts of the following requests."""

    def launch(
        self, logits: Any, requests: Sequence[SamplingInput], rows: Sequence[int]
    ) -> OracleDrawn:
        if self.later and any(request.draw == 0 for request in requests):
            self.script, *rest = self.later
            self.later = tuple(rest)
        script = [*self.script, 258]
        tokens = [
            allowed(script[min(request.draw, len(self.script))], request.ruling.mask)
            for request in requests
        ]
        return OracleDrawn([SampledToken(token, -1.0) for token in tokens])


def allowed(token: int, mask: Mask | None) -> int:
    """Return ``token``, or the first token of ``mask`` if the mask forbids it."""
    if mask is None or mask[token >> 3] >> (token & 7) & 1:
        return token
    return int(np.unpackbits(mask, bitorder="little").argmax())


@dataclass
class Scripted:
    """Server with scripted answers."""

    live: Live
    sampler: ScriptedSampler
    template: ChatTemplate

    def set_answers(self, text: str, template: str | None = None, then: str | None = None) -> Live:
        """Set the answers and return the server.

        The first answer is ``text``, the second is ``then``. ``template`` is the source of a chat
        template; None selects the built-in one.
        """
        self.sampler.script = text.encode()
        self.sampler.later = () if then is None else (text.encode(), then.encode())
        tokenizer = self.live.engine.tokenizer
        assert tokenizer is not None
        tokenizer.chat_template = self.template if template is None else ChatTemplate(template)
        return self.live


@pytest.fixture(scope="session")
def scripted_server() -> Iterator[Scripted]:
    sampler, tokenizer = ScriptedSampler(), HFTokenizer()
    template = tokenizer.chat_template
    assert template is not None
    runner = OracleRunner(8192, 16, max_model_len=4096)
    engine = Engine(EngineConfig(), runner=runner, sampler=sampler, tokenizer=tokenizer)
    with serving(engine) as live:
        yield Scripted(live, sampler, template)


@pytest.fixture
def serve_answer(scripted_server: Scripted) -> Serve:
    """Return ``Scripted.set_answers`` of a shared server."""
    return scripted_server.set_answers


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """Start a fast server for all tests; each test must use prompts that no other test uses."""
    with serving(oracle_engine()) as server:
        yield server


@pytest.fixture
def serve_oracle() -> Iterator[Serve]:
    """Return a function that starts a server with the given settings."""
    with contextlib.ExitStack() as stack:

        def start(server_config: ServerConfig | None = None, **settings: Any) -> Live:
            return stack.enter_context(serving(oracle_engine(**settings), server_config))

        yield start


@pytest.fixture(scope="session")
def builtin() -> Iterator[Live]:
    """Serve the built-in model."""
    with serving(Engine(EngineConfig(cache_gib=0.1, max_model_len=4096))) as server:
        yield server
