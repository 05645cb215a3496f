"""The watch page, as a file and in Chromium: it draws the cache at each time."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiments.provenance import ROOT
from hybridcache.adapters.watch.page import SCRIPTS, live_page
from hybridcache.adapters.watch.recorder import Record, Recorder
from tests.adapters.watch import picture
from tests.adapters.watch.follower import follow, truth
from tests.radix.serving import hybrid, serve, traffic

NODES = """() => Object.fromEntries([...hybridcache.view.model.nodes.values()].map((node) => [
    node.id, {parent: node.parent.isRoot ? null : node.parent.id, namespace: node.namespace,
              start: node.start, end: node.end, slot: node.saved ? node.saved.slot : null}]))"""
META = {"title": "a run", "kv_bytes": 24576, "state_bytes": 77_000_000}


def records_of(num_requests: int) -> tuple[list[Record], Any]:
    """Return the records of a cache, with a time before each request, and the cache."""
    cache, recorder = hybrid(num_kv_tokens=500), Recorder()
    cache.subscribe(recorder)
    records: list[Record] = []
    for number, tokens in enumerate(traffic(5, num_requests)):
        n = len(tokens)
        match = serve(cache, tokens, sorted({n, n // 2} - {0}), (None, "tenant")[number % 2])
        records += [["time", float(number), number + 1], *recorder.take()]
        request = {
            "id": str(number),
            "conversation": number % 7,
            "namespace": None,
            "state": "stop",
            "prompt": n,
            "computed": n,
            "answer": 5,
            "cached": match.cached_len,
            "losses": match.losses._asdict(),
            "node": None,
            "preemptions": 0,
            "arrived_s": float(number),
            "scheduled_s": float(number),
            "first_token_s": number + 0.25,
            "finished_s": number + 0.75,
        }
        records.append(["request", request])
    return records, cache


def open_page(tab: Any, tmp_path: Path, records: list[Record]) -> None:
    """Open the page with ``records`` in place of a server (``replay.js``)."""
    replay = Path(__file__).with_name("replay.js").read_text(encoding="utf-8")
    data = json.dumps({"meta": META, "records": records})
    followed = 'new Live(document.getElementById("main"))'
    page = live_page()
    assert page.count(followed) == 1
    shown = f'new Replay(document.getElementById("main"), {data})'
    file = tmp_path / "run.html"
    page = page.replace("(() => {", f"(() => {{\n{replay}", 1).replace(followed, shown)
    file.write_text(page, encoding="utf-8")
    tab.goto(file.as_uri())


def test_the_page_is_one_file_without_external_resources() -> None:
    page = live_page()
    assert "/*" + "STYLE*/" not in page and "/*" + "SCRIPT*/" not in page
    for text in ("src=", "@import", "http://127", "https://", "import("):
        assert text not in page, text
    assert len(page) < 128 * 1024
    folder = Path(__file__).parents[3] / "hybridcache" / "adapters" / "watch" / "page"
    assert {path.name for path in folder.glob("*.js")} == {f"{name}.js" for name in SCRIPTS}
    assert page == live_page()


@pytest.mark.parametrize("scheme", picture.PICTURES)
def test_pictures_show_the_present_page(scheme: str) -> None:
    """Draw them again by ``python -m tests.adapters.watch.picture``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with Image.open(picture.PICTURES[scheme]) as image:
        facts = image.info
    assert facts["version"] == project["version"] and facts["sources"] == picture.sources()


def test_the_page_shows_the_nodes_at_each_time(tab: Any, tmp_path: Path) -> None:
    """Compare the nodes in the page with the cache and, going back, with ``follow``."""
    records, cache = records_of(90)
    open_page(tab, tmp_path, records)
    shown = {int(id_): node for id_, node in tab.evaluate(NODES).items()}
    assert shown == truth(cache)
    times = [0]
    for record in records:
        times.append(record[2] if record[0] == "time" else times[-1])
    for time in range(85, -1, -17):
        nodes: dict[int, dict[str, Any]] = {}
        follow(nodes, [record for at, record in zip(times[1:], records, strict=True) if at <= time])
        tab.evaluate("(time) => hybridcache.go(time)", time)
        shown = {int(id_): node for id_, node in tab.evaluate(NODES).items()}
        assert shown == nodes, time


def test_the_keyboard_walks_tree_bars_and_table(tab: Any, tmp_path: Path) -> None:
    records, _ = records_of(40)
    open_page(tab, tmp_path, records)
    tab.locator(".tree canvas").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "+", "Enter", "0"):
        tab.keyboard.press(key)
    chosen = tab.evaluate("hybridcache.view.tree.selected.end")
    assert f"–{chosen:,}" in tab.locator("#spoken").inner_text()
    assert "evicting it frees" in tab.locator(".details").inner_text()
    tab.locator(".bar").first.focus()
    tab.keyboard.press("Enter")
    details = tab.locator(".details").inner_text()
    assert "time to first token" in details and "Where its prompt tokens came from" in details
    tab.get_by_role("button", name="table").click()
    rows = tab.locator("tbody tr")
    assert rows.count() == tab.evaluate("hybridcache.view.tree.items.length")
    rows.first.focus()
    tab.keyboard.press("ArrowDown")
    assert rows.nth(1).get_attribute("aria-selected") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_the_page_fits_its_window_in_both_themes(
    chromium: Any, tmp_path: Path, scheme: Any, width: int
) -> None:
    records, _ = records_of(30)
    page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    open_page(page, tmp_path, records)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(background.split("(")[1].split(",")[0]) > 128) == (scheme == "light")
    page.get_by_role("button", name="Switch between dark and light").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background
    page.close()


def luminance(colour: str) -> float:
    """Return the relative luminance of a CSS colour by WCAG 2.2."""
    named = {"#000": (0.0, 0.0, 0.0), "#fff": (255.0, 255.0, 255.0)}
    parts = named.get(colour) or [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [
        part / 255 / 12.92 if part <= 10.31 else ((part / 255 + 0.055) / 1.055) ** 2.4
        for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_enough_contrast(chromium: Any, tmp_path: Path, scheme: Any) -> None:
    """Check the ratios of WCAG 2.2: 4.5 for text, 3 for graphics."""
    page = chromium.new_page(color_scheme=scheme)
    open_page(page, tmp_path, records_of(9)[0])
    tree = "hybridcache.view.tree"
    ramps, inks = page.evaluate(tree + ".ramps"), page.evaluate(tree + ".inkOn")
    panel = page.evaluate(tree + ".colour.panel")
    swatches = page.evaluate(
        "[...document.querySelectorAll('.lanes ~ .legend i')]"
        ".map((swatch) => getComputedStyle(swatch).backgroundColor)"
    )
    soft = page.evaluate("getComputedStyle(document.querySelector('.soft')).color")
    page.close()
    assert len(swatches) == 8
    assert contrast(soft, panel) >= 4.5
    for colour in (*swatches, *(colour for ramp in ramps.values() for colour in ramp)):
        assert contrast(colour, panel) >= 2.99, colour
    for name, ramp in ramps.items():
        for colour, ink in zip(ramp, inks[name], strict=True):
            assert contrast(colour, ink) >= 4.5, (name, colour, ink)


def test_every_legend_label_has_an_explanation(tab: Any, tmp_path: Path) -> None:
    open_page(tab, tmp_path, records_of(30)[0])
    of_labels = "[...document.querySelectorAll('.lanes ~ .legend span')].map((label) => %s)"
    labels = tab.evaluate(of_labels % "label.textContent")
    assert "KV evicted" in labels and all(tab.evaluate(of_labels % "label.title"))
    tab.get_by_role("button", name="Meaning of the terms").press("Enter")
    terms = tab.locator("#terms dt").all_inner_texts()
    assert {*labels, "checkpoint", "ghost", "locked", "slab"} <= {*terms}
    tab.keyboard.press("Escape")
    assert tab.locator("#terms").is_hidden()
