"""Settings of coding agents, as ``engine agent`` prints them, and published agent frameworks, if
installed (``make clients``), in one loop with a tool call."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import Engine, EngineConfig
from engine.front.server.settings import ServerConfig
from engine.text.tokenizer_files import HFTokenizer
from tests.endurance import clients
from tests.oracle import OracleRunner

from .conftest import Live, ScriptedSampler, Serve, oracle_engine, serving
from .test_tools import HERMES_CALL, QWEN_XML, XML_CALL

FORMS = [
    (None, f"<think>Hm.</think>{HERMES_CALL}", "Dry."),
    (QWEN_XML, f"Hm.</think>{XML_CALL}", "So.</think>Dry."),
]


TITLES = {"claude": "Claude Code", "codex": "Codex", "opencode": "opencode", "qwen": "Qwen Code"}


@pytest.fixture(scope="module")
def named() -> Iterator[Live]:
    """Serve with the names of the page."""
    flags = clients.flags()
    names = flags[flags.index("--served-model-name") + 1].split(",")
    with serving(oracle_engine(), ServerConfig(served_model_name=tuple(names))) as live:
        yield live


PATHS = {"claude": "/v1/messages", "codex": "/responses"}


@pytest.mark.parametrize("agent", clients.AGENTS)
def test_settings_of_agents_reach_the_server(named: Live, agent: str) -> None:
    """Its server has the context of the settings, and room for each first prompt of the table."""
    text = clients.settings_of(agent, named.port)
    [address] = set(re.findall(r'"(http:[^"]*)"', text))
    turn = "Hi" if agent == "codex" else [{"role": "user", "content": "Hi"}]
    body = {"model": "builtin", "max_output_tokens" if agent == "codex" else "max_tokens": 3}
    body |= {"input" if agent == "codex" else "messages": turn}
    path = PATHS.get(agent, "/chat/completions")
    headers = {"Authorization": "Bearer none"}
    answer = httpx.post(address + path, json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    flags = clients.flags()
    served = int(flags[flags.index("--max-model-len") + 1])
    assert re.search(rf"\b{served}\b", text)
    row = re.search(
        rf"^\| {TITLES[agent]} [\d.]+ \| (.*) \|$", clients.PAGE.read_text(), re.MULTILINE
    )
    assert row is not None
    prompt, real, builtin = row[1].replace(",", "").split(" | ")
    longest = int(prompt.split()[-1])
    assert longest < int(builtin) <= served and longest / 4 < int(real) <= int(builtin)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("agent", clients.AGENTS)
def test_coding_agents_answer_with_their_settings(agent: str, tmp_path: Path) -> None:
    """The programs, if installed, against a server with keys and a model with scripted answers."""
    pytest.importorskip("agents", reason="make clients runs it, which takes a minute")
    program = clients.find(agent)
    if program is None:
        pytest.skip(f"{agent} is not installed: make clients")
    sampler = ScriptedSampler()
    sampler.script = b"5 + 3 = 8."
    flags = clients.flags()
    length = int(flags[flags.index("--max-model-len") + 1])
    runner = OracleRunner(2 * length, 64, max_model_len=length)
    tokenizer = HFTokenizer()
    engine = Engine(EngineConfig(), runner=runner, sampler=sampler, tokenizer=tokenizer)
    names = flags[flags.index("--served-model-name") + 1].split(",")
    (tmp_path / "keys").write_text("s3cret\n")
    config = ServerConfig(served_model_name=tuple(names), api_key_file=str(tmp_path / "keys"))
    with serving(engine, config) as live:
        clients.session(agent, program, tmp_path, live.port, "s3cret")
        live.headers["Authorization"] = "Bearer s3cret"
        usage = live.report()["usage"]
        assert usage["requests"] >= 1 and usage["prompt_tokens"] > 30_000


def weather(city: str, days: int) -> str:
    """Return the weather."""
    return f"dry in {city} for {days}"


@pytest.fixture(params=FORMS, ids=["hermes", "xml"])
def live(serve_answer: Serve, request: pytest.FixtureRequest) -> Live:
    """Serve a model that calls ``weather`` and then answers."""
    template, call, answer = request.param
    return serve_answer(call, template, then=answer)


@pytest.mark.parametrize("dialect", ["responses", "chat"])
def test_openai_agents_runs_a_tool_loop(live: Live, dialect: str) -> None:
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    kind = {"responses": agents.OpenAIResponsesModel, "chat": agents.OpenAIChatCompletionsModel}[
        dialect
    ]
    agent = agents.Agent(
        name="a",
        instructions="Be brief.",
        tools=[agents.function_tool(weather)],
        model=kind(model="builtin", openai_client=live.async_client),
    )
    result = asyncio.run(agents.Runner.run(agent, "Rain in Bonn?"))
    assert result.final_output == "Dry."
    outputs = [item.output for item in result.new_items if item.type == "tool_call_output_item"]
    assert outputs == ["dry in Bonn for 2"]


@pytest.mark.parametrize("dialect", ["chat", "responses", "anthropic"])
def test_pydantic_ai_runs_a_tool_loop(live: Live, dialect: str) -> None:
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent

    model: Any
    if dialect == "anthropic":
        anthropic = pytest.importorskip("anthropic")
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        client = anthropic.AsyncAnthropic(base_url=live.url, api_key="none", max_retries=0)
        model = AnthropicModel("builtin", provider=AnthropicProvider(anthropic_client=client))
    else:
        from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
        from pydantic_ai.providers.openai import OpenAIProvider

        kind = OpenAIChatModel if dialect == "chat" else OpenAIResponsesModel
        model = kind("builtin", provider=OpenAIProvider(openai_client=live.async_client))
    agent = Agent(model, instructions="Be brief.", tools=[weather])
    assert asyncio.run(agent.run("Rain in Bonn?")).output == "Dry."


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_langchain_runs_a_tool_loop(live: Live, dialect: str, streams: bool) -> None:
    package = pytest.importorskip(f"langchain_{dialect}")
    tools = pytest.importorskip("langchain_core.tools")
    options = {"model": "builtin", "max_retries": 0, "api_key": "none"}
    if dialect == "openai":
        model = package.ChatOpenAI(base_url=f"{live.url}/v1", **options)
    else:
        model = package.ChatAnthropic(base_url=live.url, max_tokens=500, **options)
    bound = model.bind_tools([tools.tool(weather)])

    def ask(chat: list[Any]) -> Any:
        if not streams:
            return bound.invoke(chat)
        whole = None
        for chunk in bound.stream(chat):
            whole = chunk if whole is None else whole + chunk
        return whole

    chat: list[Any] = [("system", "Be brief."), ("human", "Rain in Bonn?")]
    answer = ask(chat)
    [call] = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Bonn", "days": 2})
    messages = pytest.importorskip("langchain_core.messages")
    result = messages.ToolMessage("dry", tool_call_id=call["id"])
    assert ask([*chat, answer, result]).text == "Dry."
