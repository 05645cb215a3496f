"""More published clients: LiteLLM, instructor, openai's for JavaScript. Those that are installed;
``make clients`` installs all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from .conftest import Live
from .test_tools import BONN, CHAT, HERMES_CALL, TOOLS

Say = Callable[..., Live]

NODE_MODULES = Path(__file__).parents[3] / "out" / "clients" / "node_modules"
RUN_TOOLS = """
const OpenAI = require("openai");
const client = new OpenAI({ baseURL: process.argv[1], apiKey: "none", maxRetries: 0 });
const seen = [];
const weather = (asked) => { seen.push(asked); return "dry"; };
const parameters = JSON.parse(process.argv[2]);
const tool = { name: "weather", function: weather, parse: JSON.parse, parameters };
(async () => {
  const runner = client.chat.completions.runTools({
    model: "builtin", stream: process.argv[3] === "true",
    messages: [{ role: "user", content: "Rain in Bonn?" }],
    tools: [{ type: "function", function: tool }],
  });
  console.log(JSON.stringify({ seen, said: await runner.finalContent() }));
})();
"""


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_litellm(say: Say, dialect: str, streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the internet for prices
    litellm = pytest.importorskip("litellm")
    live = say(f"<think>Hm.</think>{HERMES_CALL}", then="Dry.")
    options: dict[str, Any] = {"model": f"{dialect}/builtin", "api_key": "none", "tools": TOOLS}
    options["api_base"] = f"{live.url}/v1" if dialect == "openai" else live.url

    def ask(chat: list[Any]) -> Any:
        answer = litellm.completion(messages=chat, stream=streams, max_tokens=500, **options)
        if streams:
            answer = litellm.stream_chunk_builder(list(answer))
        return answer.choices[0].message

    said = ask(CHAT)
    [call] = said.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", BONN)
    result = {"role": "tool", "tool_call_id": call.id, "content": "dry"}
    assert ask([*CHAT, said.model_dump(exclude_none=True), result]).content == "Dry."


class Pick(BaseModel):
    """Pick one."""

    kind: Literal["a", "b"]


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA"])
def test_instructor(say: Say, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    pytest.importorskip("llguidance")
    picked = '{"kind": "a"}'
    if mode.startswith("TOOLS"):
        picked = f'<tool_call>\n{{"name": "Pick", "arguments": {picked}}}\n</tool_call>'
    live = say(picked)
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
def test_openai_for_javascript(say: Say, streams: bool) -> None:
    node = shutil.which("node")
    if node is None or not (NODE_MODULES / "openai").is_dir():
        pytest.skip("node, or openai for it, is not installed")
    live = say(f"<think>Hm.</think>{HERMES_CALL}", then="Dry.")
    schema = json.dumps(TOOLS[0]["function"]["parameters"])
    ran = subprocess.run(
        [node, "-e", RUN_TOOLS, f"{live.url}/v1", schema, json.dumps(streams)],
        env=os.environ | {"NODE_PATH": str(NODE_MODULES)},
        capture_output=True,
        timeout=60,
    )
    assert json.loads(ran.stdout or b"null") == {"seen": [BONN], "said": "Dry."}, ran.stderr
