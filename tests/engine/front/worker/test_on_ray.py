"""Tests of replicas on a real Ray, if it is installed: ``make replicas``."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.waiting import wait_until

ray = pytest.importorskip("ray")
ROOT = Path(__file__).parents[4]
CHAT = [{"role": "system", "content": "Be brief. " * 40}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start a separate cluster with four cores, and yield its address."""
    context = ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="test"
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def url(cluster: str) -> Iterator[str]:
    command = [sys.executable, "-m", "engine", "serve", "--port", "0", "--replicas", "2"]
    command += ["--ray", cluster, "--cache-gib", "0.05", "--max-model-len", "8192"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        screen = ""
        while (found := re.search(r"http://[\d.:]+", screen)) is None:
            line = server.stdout.readline().decode()
            assert line, screen
            screen += line
        assert re.search(r"replicas +2 on Ray", screen)
        yield found[0]
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0


def replicas(url: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = httpx.get(f"{url}/v1/cache", timeout=120).json()["replicas"]
    return found


def busy(url: str) -> str | None:
    return next((name for name, each in replicas(url).items() if each["num_running"]), None)


def kill(replica: str) -> None:
    [actor] = [
        each
        for each in ray.util.list_named_actors(all_namespaces=True)
        if each["name"].endswith(replica)
    ]
    ray.kill(ray.get_actor(**actor))


def num_prompt_tokens(url: str) -> float:
    """Return the prompt tokens of all requests, from /metrics."""
    text = httpx.get(f"{url}/metrics", timeout=120).text
    found = re.search(r"^engine_prompt_tokens_total (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_server_survives_the_death_of_a_replica(url: str) -> None:
    """Cover answers, streams, hits, sums, and a client that disconnects.

    A replica is killed before and after the first token, and another one replaces it.
    """
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    wait_until(lambda: httpx.get(f"{url}/health", timeout=120).status_code == 200)
    options: dict[str, Any] = {"model": "builtin", "messages": CHAT, "max_tokens": 8}
    options |= {"temperature": 0.0, "extra_body": {"ignore_eos": True}}
    first, second = (client.chat.completions.create(**options) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 384
    pieces = [
        event.choices[0].delta.content or ""
        for event in client.chat.completions.create(stream=True, **options)
    ]
    assert "".join(pieces) == first.choices[0].message.content
    view = httpx.get(f"{url}/v1/cache", timeout=120).json()
    assert len(view["replicas"]) == 2
    for name in ("prompt_tokens", "cached_tokens", "requests"):
        assert view["usage"][name] == sum(each["usage"][name] for each in view["replicas"].values())
    assert num_prompt_tokens(url) == view["usage"]["prompt_tokens"] == 3 * first.usage.prompt_tokens

    def begin(prompt: str) -> Iterator[Any]:
        return iter(
            client.completions.create(
                model="builtin",
                prompt=prompt,
                max_tokens=4000,
                stream=True,
                extra_body={"ignore_eos": True},
            )
        )

    left = begin("x" * 300)
    next(left)
    left.close()
    wait_until(lambda: busy(url) is None)

    answer = begin("y" * 300)
    next(answer)
    kill(wait_until(lambda: busy(url)))
    *_, last = answer  # Another replica computes it again, and the stream goes on.
    assert last.choices[0].finish_reason == "length"
    before = num_prompt_tokens(url)
    assert client.chat.completions.create(**options).choices[0].message.content == (
        first.choices[0].message.content
    )
    assert before < num_prompt_tokens(url), "the counts of the dead replica are lost"
    wait_until(lambda: len(replicas(url)) == 2)

    found: list[Any] = []
    prompt = "long " * 1600
    asking = threading.Thread(
        target=lambda: found.append(
            client.completions.create(model="builtin", prompt=prompt, max_tokens=1)
        )
    )
    asking.start()
    working = wait_until(lambda: found or busy(url))
    if not found:  # A fast machine may answer before it is seen at work.
        kill(working)
    asking.join()
    assert found and found[0].usage.completion_tokens == 1
