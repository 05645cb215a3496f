"""Published agent frameworks, if installed (``make clients``), in one loop with a tool call."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from .conftest import Live, ServeAnswer
from .test_tools import HERMES_CALL, QWEN_XML, XML_CALL

FORMS = [
    (None, f"<think>Hm.</think>{HERMES_CALL}", "Dry."),
    (QWEN_XML, f"Hm.</think>{XML_CALL}", "So.</think>Dry."),
]


def weather(city: str, days: int) -> str:
    """Return the weather."""
    return f"dry in {city} for {days}"


@pytest.fixture(params=FORMS, ids=["hermes", "xml"])
def live(serve_answer: ServeAnswer, request: pytest.FixtureRequest) -> Live:
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
