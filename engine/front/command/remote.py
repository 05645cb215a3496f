"""Commands for a running server: ``engine agent`` prints the settings of a coding agent,
``engine bench`` measures the server, and ``engine grafana`` prints a dashboard."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from engine.config import BUILTIN_NAME
from engine.front.server.settings import API_KEY_VARIABLE
from hybridcache.geometry.units import format_seconds

if TYPE_CHECKING:
    import httpx

AGENT = ("AGENT [--url URL] [--write]", "print a coding agent's settings for a running server")
BENCH = ("URL [options]", "measure a running server with conversations of several agents")
PATIENCE_S = 1800
"""Longest wait for an answer, also of an agent: a prompt on a CPU takes minutes."""


def grafana(arguments: argparse.Namespace) -> int:
    """Print the dashboard and return the exit code."""
    print((files("engine.front.server") / "grafana.json").read_text("utf-8"), end="")
    return 0


def base_of(url: str) -> str:
    """Return the address of a server, with a scheme and without ``/v1``."""
    return (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")


def no_answer(base: str, error: Exception, remedy: str) -> str:
    """Return the sentence for a server that cannot be reached."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        said, remedy = "The certificate of", "use its name, and SSL_CERT_FILE for a CA of your own"
        return f"{said} {base} is not trusted ({error}): {remedy}."
    return f"No server answers at {base} ({error}): {remedy}."


def connect(url: str) -> tuple[httpx.AsyncClient, str, int]:
    """Return a client of the server at ``url``, its model's name, and the most tokens of a prompt
    and its answer. Raises ValueError."""
    import httpx  # Here: the parser of the command line needs no server's packages.

    base, key = base_of(url), os.environ.get(API_KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{base}/v1/models", headers=headers, timeout=PATIENCE_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(no_answer(base, error, "give http://HOST:PORT")) from None
    if answer.status_code == 401:
        said = "refused the key in {}: correct it" if key else "requires a key: export yours as {}"
        raise ValueError(f"{base} {said.format(API_KEY_VARIABLE)}.")
    with suppress(ValueError, LookupError, TypeError):
        model, limits = answer.json()["data"][0], httpx.Limits(max_connections=None)
        client = httpx.AsyncClient(
            base_url=base, headers=headers, timeout=PATIENCE_S, limits=limits
        )
        return client, model["id"], model.get("max_model_len") or 32768
    said = f"{base} answered {answer.status_code} to /v1/models: {answer.text[:300]!r}"
    raise ValueError(said + ": give the address of a server, http://HOST:PORT.")


# --- Settings of agents ---------------------------------------------------------------------------

PLACES = {
    "claude": ".claude/settings.json",
    "codex": ".codex/config.toml",
    "opencode": ".config/opencode/opencode.json",
    "qwen": ".qwen/settings.json",
}
"""Agent -> its file in the home folder. ``agents/`` has the contents."""
LEAST = {"claude": 65536, "codex": 32768, "opencode": 32768, "qwen": 32768}
LEAST_OF_BUILTIN = 131072
"""Agent -> recommended context, tokens, and that of the built-in model, whose tokens are bytes."""
FIRST = {"claude": 85031, "codex": 38585, "opencode": 37731, "qwen": 65986}
"""Agent -> bytes of its longest first prompt."""
KEYS = {"opencode": f"{{env:{API_KEY_VARIABLE}}}", "qwen": f"${API_KEY_VARIABLE}"}
"""How a file names the variable with the key. Claude Code's has the key itself."""


def settings(agent: str, url: str, name: str, context: int, key: str | None) -> str:
    """Return the contents of the file of ``agent`` for a server at ``url``, without ``/v1``."""
    source = files("engine.front.command") / "agents" / (agent + Path(PLACES[agent]).suffix)
    text = source.read_text("utf-8")
    if not key:  # Codex refuses to start if the variable is not set.
        text = text.replace(f'env_key = "{API_KEY_VARIABLE}"\n', "")
    key = KEYS.get(agent, key) if key else "none"
    shown = {"http://127.0.0.1:8000": url, "131072": str(context), '"KEY"': json.dumps(key)}
    shown |= {"8192": str(min(8192, context // 4)), "NAME": json.dumps(name)[1:-1]}
    for before, after in shown.items():
        text = text.replace(before, after)
    return text


def add_agent(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``engine agent``."""
    said, kind = "claude, codex, opencode or qwen", lambda name: name.removesuffix("-code")
    parser.add_argument("agent", choices=PLACES, type=kind, help=said)
    url = "http://127.0.0.1:8000"
    parser.add_argument("--url", default=url, help="address of the server (default: %(default)s)")
    said = "write the file in the home folder, unless there is one; else the settings are printed"
    parser.add_argument("--write", action="store_true", help=said)


def agent(arguments: argparse.Namespace) -> int:
    """Print or write the settings of an agent, and return the exit code. Raises ValueError."""
    client, name, context = connect(arguments.url)
    base, file = str(client.base_url).rstrip("/"), Path.home() / PLACES[arguments.agent]
    text = settings(arguments.agent, base, name, context, os.environ.get(API_KEY_VARIABLE))
    least = LEAST[arguments.agent] if name != BUILTIN_NAME else LEAST_OF_BUILTIN
    if context < least:
        first = FIRST[arguments.agent] // (1 if name == BUILTIN_NAME else 4)
        said = f"the settings are for a context of {context:,} tokens, short for {arguments.agent}"
        said += f", whose first prompt has about {first:,}"
        print(f"engine agent: {said}: --max-model-len {least} of the server.", file=sys.stderr)
    if not arguments.write:
        print(text, end="")
        return 0
    if file.exists():
        raise ValueError(f"{file} exists: add what the command prints without --write to it.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(text, "utf-8")
    except OSError as error:
        if file.exists():
            file.unlink()
        why = f"{file} cannot be written ({error.strerror}): use the command without --write."
        raise ValueError(why) from None
    print(f"Written: {file}")
    return 0


# --- Benchmark ------------------------------------------------------------------------------------

WORDS = "the cache keeps a state after each prefix and a prompt resumes from the deepest of them"
FLAGS = {
    "agents": (4, "conversations at the same time"),
    "turns": (5, "requests of each"),
    "words": (500, "words of the system message, which all share"),
    "answer": (64, "tokens of an answer"),
}


Turn = tuple[float, float, int, int, int]
"""One measured request: seconds to the first piece of the answer, and from it to the last; tokens
of the prompt, of these cached ones, and tokens of the answer."""


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``engine bench``."""
    parser.add_argument("url", metavar="URL", help="address of the server")
    for name, (default, said) in FLAGS.items():
        shown = f"{said} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=shown)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def bench(arguments: argparse.Namespace) -> int:
    """Measure a server, print the figures and return the exit code. Raises ValueError."""
    for name in FLAGS:
        if (number := getattr(arguments, name)) < 1:
            raise ValueError(f"--{name} must be an integer of 1 or more (got {number}).")
    import httpx

    client, model, _ = connect(arguments.url)
    started, num_turns = time.time_ns(), arguments.turns

    def text(name: object, number: int) -> str:
        draw = random.Random(f"{started} {name}")  # New words, which no cache has.
        return f"{draw.getrandbits(64):x} " + " ".join(draw.choices(WORDS.split(), k=number))

    async def conversation(number: int) -> list[Turn]:
        messages, turns = [{"role": "system", "content": text("system", arguments.words)}], []
        for turn in range(num_turns):
            messages.append({"role": "user", "content": text((number, turn), 40)})
            said, measured = await _ask(client, model, messages, arguments.answer)
            messages.append({"role": "assistant", "content": said})
            turns.append(measured)
            bar.update()
        return turns

    async def conversations() -> list[list[Turn]]:
        return await asyncio.gather(*map(conversation, range(arguments.agents)))

    total = arguments.agents * num_turns
    try:
        with tqdm(total=total, unit="request", leave=False, disable=None) as bar:
            found = asyncio.run(conversations())
    except httpx.HTTPError as error:
        raise ValueError(f"The server broke off: {error or type(error).__name__}.") from None
    seconds, turns = (time.time_ns() - started) / 1e9, [one for each in found for one in each]
    later = [one for turns in found for one in turns[1:]]
    groups = {"first turns": [turns[0] for turns in found], "later turns": later, "all": turns}
    rows = {name: _figures(group) for name, group in groups.items() if group}
    rows["all"]["tokens_per_s"] = sum(one[-1] for one in turns) / seconds
    if arguments.json:
        print(json.dumps({"model": model, "seconds": seconds, **rows}))
        return 0
    print(f"{'':12}{'requests':>9}{'TTFT':>10}{'hit rate':>10}{'tokens/s':>10}")
    for name, row in rows.items():
        ttft, rate = format_seconds(row["ttft_s"]), f"{row['hit_rate']:.1%}"
        print(f"{name:12}{row['requests']:9}{ttft:>10}{rate:>10}{row['tokens_per_s']:10.0f}")
    print("Medians of TTFT; tokens/s of one request, and in the last row of all requests together.")
    return 0


def _figures(turns: Sequence[Turn]) -> dict[str, float]:
    """Return the figures of ``turns``."""
    ttfts, decodes, prompts, cached, answers = zip(*turns, strict=True)
    # Not the median of rates: pieces of a short answer arrive together, while the client is busy.
    speed = sum(n - 1 for n in answers) / (sum(decodes) or 1.0)
    rate, first = sum(cached) / sum(prompts), {"requests": len(turns), "ttft_s": median(ttfts)}
    return first | {"hit_rate": rate, "tokens_per_s": speed}


async def _ask(
    client: httpx.AsyncClient, model: str, messages: object, length: int
) -> tuple[str, Turn]:
    """Send a chat. Returns the text of the answer and its figures. Raises ValueError."""
    body = {"model": model, "messages": messages, "max_tokens": length, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    began_s, times, said, usage = time.perf_counter(), list[float](), "", dict[str, Any]()
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            raise ValueError(f"The server answered {answer.status_code}: {answer.text}")
        async for line in answer.aiter_lines():
            piece = json.loads(line[6:]) if line.startswith("data: {") else {}
            if "error" in piece:
                raise ValueError(f"The server broke off: {piece['error']}")
            usage = piece.get("usage") or usage
            for choice in piece.get("choices", ()):
                times.append(time.perf_counter())
                said += choice["delta"].get("content") or ""
    if not usage or not times:
        raise ValueError("The server must send an answer, and usage with the numbers of tokens.")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    counts = usage["prompt_tokens"], cached, usage["completion_tokens"]
    return said, (times[0] - began_s, times[-1] - times[0], *counts)
