"""An agent of three turns against a running server, and the reason for each recomputed token.

engine serve                                # in another terminal
python examples/05_serve_an_agent.py [http://127.0.0.1:8000]

If the server has keys, export yours as HYBRIDCACHE_API_KEY; the operator's, if there is one: it may
ask for reasons.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

import httpx

SYSTEM = "Be brief. " * 60
QUESTIONS = [
    "Ada has 5 apples. Ada buys 3 more. How many apples does Ada have now?",
    "Kira starts with 6 pens. Then Kira gets 3 times as many. How many pens does Kira have now?",
    "Leo has 10 eggs. Leo finds 5 eggs in a basket. How many eggs does Leo have now?",
]


def turn(client: httpx.Client, model: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    """Send one turn, append its answer to ``messages``, and return the response."""
    body = {"model": model, "messages": messages, "max_tokens": 32, "temperature": 0}
    response = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    messages.append({"role": "assistant", "content": response["choices"][0]["message"]["content"]})
    return response


def main(arguments: list[str]) -> None:
    """Run the agent twice: the second one changes the middle of its system message."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("address", nargs="?", default="http://127.0.0.1:8000", help="of the server")
    given = parser.parse_args(arguments).address.rstrip("/").removesuffix("/v1")
    address = given if "://" in given else f"http://{given}"
    key = os.environ.get("HYBRIDCACHE_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=address, headers=headers, timeout=60) as client:
        try:
            models = client.get("/v1/models").raise_for_status().json()
        except httpx.HTTPStatusError as error:
            sys.exit(f"{address} answered {error.response.status_code}: {error.response.text}")
        except httpx.HTTPError as error:
            sys.exit(f"No server answers at {address} ({error}): start one with `engine serve`.")
        model = models["data"][0]["id"]
        for system in (SYSTEM, SYSTEM.replace("brief", "short", 31).replace("short", "brief", 30)):
            messages = [{"role": "system", "content": system}]
            for question in QUESTIONS:
                messages.append({"role": "user", "content": question})
                response = turn(client, model, messages)
                usage = response["usage"]
                reused = usage["prompt_tokens_details"]["cached_tokens"]
                print(f"{messages[-1]['content']!r}: {reused} of {usage['prompt_tokens']} reused")
                if len(messages) == 3:
                    place = f"/v1/cache/explanations/{response['id']}"
                    found = client.get(place).json()
                    refusal = found.get("error", {}).get("message", "no earlier chat to compare")
                    print(found.get("text", refusal))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # As of `| head -1`.
    main(sys.argv[1:])
