"""LiteLLM, instructor and OpenAI's JavaScript client, if installed (``make clients``)."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from engine.front.server.settings import ServerConfig
from tests import documents

from .conftest import Serve
from .dialects import BONN, CHAT
from .test_tools import HERMES_CALL, TOOLS

NODE_MODULES = Path(__file__).parents[4] / "out" / "clients" / "node_modules"
RUN_TOOLS = """
const OpenAI = require("openai");
const client = new OpenAI({ baseURL: process.argv[1], apiKey: "none", maxRetries: 0 });
const calls = [];
const weather = (call) => { calls.push(call); return "dry"; };
const parameters = JSON.parse(process.argv[2]);
const tool = { name: "weather", function: weather, parse: JSON.parse, parameters };
(async () => {
  const runner = client.chat.completions.runTools({
    model: "builtin", stream: process.argv[3] === "true",
    messages: [{ role: "user", content: "Rain in Bonn?" }],
    tools: [{ type: "function", function: tool }],
  });
  console.log(JSON.stringify({ calls, answer: await runner.finalContent() }));
})();
"""


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_litellm_runs_a_tool_loop(
    serve_answer: Serve, dialect: str, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # Otherwise it fetches prices.
    litellm = pytest.importorskip("litellm")
    live = serve_answer(f"<think>Hm.</think>{HERMES_CALL}", then="Dry.")
    options: dict[str, Any] = {"model": f"{dialect}/builtin", "api_key": "none", "tools": TOOLS}
    options["api_base"] = f"{live.url}/v1" if dialect == "openai" else live.url

    def ask(chat: list[Any]) -> Any:
        answer = litellm.completion(messages=chat, stream=streams, max_tokens=500, **options)
        if streams:
            answer = litellm.stream_chunk_builder(list(answer))
        return answer.choices[0].message

    message = ask(CHAT)
    [call] = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", BONN)
    result = {"role": "tool", "tool_call_id": call.id, "content": "dry"}
    assert ask([*CHAT, message.model_dump(exclude_none=True), result]).content == "Dry."


@pytest.mark.timeout(180)
def test_litellm_routes_to_two_models_behind_one_address(
    tmp_path: Path, serve_oracle: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """As the page says, with the program of ``pip install 'litellm[proxy]'`` on the PATH. Headers
    tell people apart."""
    program = shutil.which("litellm") or pytest.skip("litellm[proxy] is not on the PATH")
    page = NODE_MODULES.parents[2] / "docs/how-to/deploy.md"
    [text] = [one.text for one in documents.blocks(page) if one.note == "file: models.yaml"]
    logs = ServerConfig(log_requests=True)
    lives, file = [serve_oracle(logs), serve_oracle(logs)], tmp_path / "models.yaml"
    for number, live in enumerate(lives):
        text = text.replace(f":800{2 * number}/", f":{live.port}/")
    file.write_text(re.sub("hosted_vllm/(small|large)", "hosted_vllm/builtin", text))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = f"{free.getsockname()[1]}"
    keys = {"LITELLM_MASTER_KEY": "sk-1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [program, "--config", file, "--host", "127.0.0.1", "--port", port]
    with subprocess.Popen(command, env={"PATH": os.environ["PATH"]} | keys) as proxy:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}", api_key="sk-1", max_retries=60)
        for name in ("small", "large", "large"):
            client.chat.completions.create(model=name, messages=CHAT, max_tokens=3)
        cached = []
        for person in ("ada", "bob", "bob"):
            options: Any = {"messages": [{"role": "user", "content": "Rain in Bonn? " * 20}]}
            options["extra_headers"] = {"x-cache-salt": person, "X-Request-Id": f"of-{person}"}
            answer = client.chat.completions.create(model="large", max_tokens=3, **options)
            cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        proxy.terminate()
    assert [live.report()["usage"]["requests"] for live in lives] == [1, 5]
    assert cached[:2] == [0, 0] and cached[2] > 0
    named = [one.facts["request_id"] for one in caplog.records if hasattr(one, "facts")]
    assert "of-ada" in named and named.count("of-bob") == 2


class Pick(BaseModel):
    """Pick one."""

    kind: Literal["a", "b"]


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA"])
def test_instructor_gets_its_model(serve_answer: Serve, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    pytest.importorskip("llguidance")
    answer_text = '{"kind": "a"}'
    if mode.startswith("TOOLS"):
        answer_text = f'<tool_call>\n{{"name": "Pick", "arguments": {answer_text}}}\n</tool_call>'
    live = serve_answer(answer_text)
    client = instructor.from_openai(live.client, mode=getattr(instructor.Mode, mode))
    answer = client.chat.completions.create(
        model="builtin",
        messages=[{"role": "user", "content": f"Pick in mode {mode}."}],
        response_model=Pick,
        max_tokens=600,
        max_retries=0,
    )
    assert answer.kind == "a"


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_javascript_client_runs_a_tool_loop(serve_answer: Serve, streams: bool) -> None:
    node = shutil.which("node")
    if node is None or not (NODE_MODULES / "openai").is_dir():
        pytest.skip("node, or openai for it, is not installed")
    live = serve_answer(f"<think>Hm.</think>{HERMES_CALL}", then="Dry.")
    schema = json.dumps(TOOLS[0]["function"]["parameters"])
    process = subprocess.run(
        [node, "-e", RUN_TOOLS, f"{live.url}/v1", schema, json.dumps(streams)],
        env=os.environ | {"NODE_PATH": str(NODE_MODULES)},
        capture_output=True,
        timeout=120,
    )
    assert json.loads(process.stdout or b"null") == {"calls": [BONN], "answer": "Dry."}, (
        process.stderr
    )
