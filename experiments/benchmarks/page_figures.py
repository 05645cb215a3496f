"""Take the README's pictures of the live page, with generated conversations on a live server.

python -m experiments.benchmarks.page_figures [--requests 80] [--gib 0.025]

The conversations have shortened lengths of ShareGPT's and share three system prompts. The built-in
model answers. In one conversation the system message changes, and the pictures show why that
request missed. Needs playwright and Chromium.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import subprocess
import sys
import threading
import time
from typing import Any

import httpx

from experiments.benchmarks.conversations import synthetic_conversations
from experiments.benchmarks.page import chromium
from experiments.provenance import FIGURES

PORT = 8798
SYSTEMS = (
    "You are a careful programmer. Read before you write, and say what you have not tried. " * 6,
    "You answer in one sentence. " * 5,
    "You are an agent with tools: read a file, write a file, run the tests, and then say so. " * 4
    + "The time is 10:41. "
    + "Never change a file that you have not read. " * 8,
)
MAX_CHARS = 260
"""Maximum length of one message."""
NUM_AT_ONCE = 3
NUM_UNCHANGED = 4
"""Requests of an agent before the time in its system message changes."""
CHOOSE_REQUEST = """() => {
    const [view] = hybridcache.views;
    const done = [...view.model.requests.values()].filter((one) => one.finished_s !== null);
    const lost = (one) => one.losses.never_checkpointed; // by the changed system message
    view.selectRequest(done.reduce((a, b) => (lost(b) >= lost(a) ? b : a)).id);
}"""


async def talk(client: httpx.AsyncClient, number: int, texts: list[str], turn: Any) -> None:
    """Run one conversation. Each turn sends the full history, the fifth with another time."""
    messages = [{"role": "system", "content": SYSTEMS[number % len(SYSTEMS)]}]
    for at, text in enumerate(texts):
        if at == NUM_UNCHANGED:
            messages[0]["content"] = messages[0]["content"].replace("10:41", "10:42")
        messages.append({"role": "user", "content": text})
        body = {"messages": messages, "max_tokens": 24}
        async with turn:
            answer = await client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        messages.append(answer.json()["choices"][0]["message"])
        await asyncio.sleep(0.3)


async def load(num_requests: int) -> None:
    """Run conversations in order, ``NUM_AT_ONCE`` requests at a time, until ``num_requests`` were
    sent."""
    turn, left, talks = asyncio.Semaphore(NUM_AT_ONCE), num_requests, []
    url = f"http://127.0.0.1:{PORT}"
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        for number, conversation in enumerate(synthetic_conversations(num_requests)):
            questions = [text[:MAX_CHARS] for role, text in conversation.turns if role == "user"]
            texts = list(itertools.islice(questions, min(5, left)))
            left -= len(texts)
            talks.append(talk(client, number, texts, turn))
            if not left:
                break
        await asyncio.gather(*talks)


def take(num_requests: int) -> None:
    """Take both pictures near the end of the load."""
    url = f"http://127.0.0.1:{PORT}"
    thread = threading.Thread(target=lambda: asyncio.run(load(num_requests)))
    thread.start()
    with chromium() as browser:
        pages = {}
        for scheme in ("light", "dark"):
            size = {"width": 1440, "height": 900}
            pages[scheme] = browser.new_page(viewport=size, color_scheme=scheme)
            pages[scheme].goto(url)
        while pages["light"].evaluate("hybridcache.views[0].model.time") < num_requests - 4:
            time.sleep(0.2)
        for page in pages.values():
            page.evaluate(CHOOSE_REQUEST)
        time.sleep(0.8)
        for scheme, page in pages.items():
            page.screenshot(path=FIGURES / f"page_{scheme}.png")
            print(FIGURES / f"page_{scheme}.png")
    thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--gib", type=float, default=0.025)
    options = parser.parse_args()
    command = [sys.executable, "-m", "engine", "serve", "--port", str(PORT)]
    command += ["--cache-gib", str(options.gib), "--max-model-len", "4096"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        while b"address" not in (line := server.stdout.readline()):
            if not line:
                raise RuntimeError("the server did not start")
        take(options.requests)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
