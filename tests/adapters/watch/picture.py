"""Pictures of the watch page: three agents on the built-in model, drawn by Chromium.

    python -m tests.adapters.watch.picture

writes ``experiments/figures/page_light.png`` and ``page_dark.png``.

Each file has the version and a hash of its sources in its metadata. ``test_page.py`` compares them,
so a change of the page needs new pictures.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from typing import Any

import httpx

from engine import Engine, EngineConfig
from experiments.provenance import FIGURES, ROOT
from hybridcache.command.extras import version
from tests import served

from .browser import NAMES

PICTURES = {scheme: FIGURES / f"page_{scheme}.png" for scheme in ("light", "dark")}
SOURCES = (
    "hybridcache/adapters/watch/page",
    "engine/front/cache_watch.py",
    "engine/front/server/endpoints/explain.py",
    "tests/adapters/watch/picture.py",
)
RULES = (
    "Read a file before you change it.",
    "Run the tests after each change.",
    "Never change the interface of a public function without a question.",
    "Answer with a short summary of the changes.",
    "List the sources of each statement.",
    "Convert all amounts to the currency of the customer.",
    "Ask for the number of the order if it is not known.",
    "Write dates as day, month and year.",
)
CODE = "You are a coding agent. " + " ".join(RULES[:5])
SHOP = " ".join(("You answer customers of a shop.", *RULES[3:], "The time is {time}.", *RULES))
SUMS = "You solve short problems with sums, step by step."
PEOPLE = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida")
THINGS = ("apples", "books", "coins", "pens")


def sources() -> str:
    """Return a hash of the files that decide how the page looks."""
    digest = hashlib.sha256()
    for name in SOURCES:
        place = ROOT / name
        for path in [place] if place.is_file() else sorted(place.iterdir()):
            digest.update(f"{path.name} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def question(rng: random.Random) -> str:
    """Return a problem of one sum."""
    name, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    first, second = rng.randrange(2, 30), rng.randrange(2, 30)
    return f"{name} has {first} {thing}. {name} buys {second} more. How many {thing} are there?"


def send_requests(url: str) -> None:
    """Send 28 conversations that take turns; the last one has another time in its system
    message."""
    rng = random.Random(5)
    systems = [CODE, SHOP.format(time="10:41"), SUMS]
    talks = [[{"role": "system", "content": systems[i % 3]}] for i in range(27)]
    turns = [i for i in range(len(talks)) for _ in range(rng.randrange(1, 6))]
    rng.shuffle(turns)
    talks.append([{"role": "system", "content": SHOP.format(time="11:05")}])
    with httpx.Client(base_url=url, timeout=120) as client:
        for i in (*turns, len(talks) - 1):
            talks[i].append({"role": "user", "content": question(rng)})
            body: dict[str, Any] = {"messages": talks[i], "temperature": 0, "max_tokens": 60}
            done = client.post("/v1/chat/completions", json=body | {"model": "builtin"})
            talks[i].append(done.raise_for_status().json()["choices"][0]["message"])


def draw(url: str) -> None:
    """Write the pictures of the page at ``url``, with its newest request selected."""
    from PIL import Image, PngImagePlugin
    from playwright.sync_api import sync_playwright

    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    facts = PngImagePlugin.PngInfo()
    facts.add_text("version", version())
    facts.add_text("sources", sources())
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for scheme, file in PICTURES.items():
            view = {"width": 1440, "height": 900}
            tab: Any = browser.new_page(viewport=view, color_scheme=scheme)  # type: ignore[arg-type]
            tab.goto(url)
            tab.wait_for_selector("#link[data-state=live]")
            newest = "[...hybridcache.view.model.requests.keys()].at(-1)"
            tab.evaluate(f"hybridcache.view.selectRequest({newest})")
            tab.locator(".details ins").wait_for()
            tab.screenshot(path=file)
            with Image.open(file) as image:
                image.load()
                image.save(file, pnginfo=facts, optimize=True)
        browser.close()


def main() -> None:
    with served.serving(Engine(EngineConfig(cache_gib=0.02))) as (_, port):
        url = f"http://127.0.0.1:{port}"
        send_requests(url)
        draw(url)


if __name__ == "__main__":
    main()
