"""Measure the live page in Chromium: frames, first paint, delay of requests, cost for the engine.

Frames are measured with ten thousand nodes.

python -m experiments.benchmarks.page [--nodes 10000] [--requests 20]

Needs playwright and Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from engine import Engine, EngineConfig, SamplingParams
from engine.plugins.observe.cache_watch import Watch
from engine.plugins.observe.feed import EVERY_S
from experiments.provenance import RESULTS, write_json_lines
from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.watch.page import Recording, recorded_page
from hybridcache.watch.recorder import Recorder
from tests.oracle import OracleRunner, OracleSampler

RESULTS_FILE = RESULTS / "bench_page.jsonl"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PORT = 8797
FRAMES = """(seconds) => new Promise((done) => {
    const [view] = hybridcache.views, gaps = [];
    const began = performance.now();
    let before = null, at = 0;
    view.tree.drawMs.length = 0;
    const turn = (now) => {
        if (before !== null) gaps.push(now - before);
        before = now;
        at += 1;
        view.tree.zoomBy(Math.sin(at / 20) > 0 ? 1.03 : 1 / 1.03);
        view.tree.draw();
        if (now - began < 1000 * seconds) requestAnimationFrame(turn);
        else done({gaps, draws: view.tree.drawMs.slice()});
    };
    requestAnimationFrame(turn);
})"""
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


def large_recording(num_nodes: int) -> Recording:
    """Return a recording of a tree with at least ``num_nodes`` nodes: conversations with shared
    prefixes."""
    config = CacheConfig(num_kv_tokens=1 << 23, num_slots=num_nodes, eviction="lru")
    cache = build_prefix_cache(config)
    recorder, random = Recorder(), np.random.default_rng(0)
    cache.subscribe(recorder)
    seen = [np.empty(0, np.int32)]
    while len(recorder.nodes) < num_nodes:
        before = seen[random.integers(max(0, len(seen) - 400), len(seen))]
        new = random.integers(0, 1 << 17, random.integers(100, 900), np.int32)
        tokens = np.concatenate([before[: len(before) // 64 * 64], new])[:12_000]
        rows, position = cache.allocate_kv(len(tokens)), len(tokens) // 64 * 64
        assert rows is not None
        slot = cache.allocate_slot()
        result = cache.insert(tokens, rows, [(position, slot)] if slot is not None else [])
        cache.free_kv(result.duplicates)
        seen.append(tokens)
    meta = {"title": f"{len(recorder.nodes):,} nodes", "kv_bytes": 24576, "state_bytes": 77_266_944}
    return Recording(meta, [["time", 0.0, 0], *recorder.take()])


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a headless Chromium."""
    from playwright.sync_api import sync_playwright

    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def measure_frames(browser: Any, num_nodes: int, seconds: float) -> dict[str, Any]:
    """Measure the time between frames while zooming, and the drawing time in it."""
    recording = large_recording(num_nodes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.html"
        file.write_text(recorded_page([recording]), encoding="utf-8")
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.goto(file.as_uri())
        time.sleep(1)
        found = page.evaluate(FRAMES, seconds)
        page.close()
    gaps, draws = found["gaps"], found["draws"]
    return {
        "case": "frames",
        "nodes": num_nodes,
        "frames_s": 1000 / statistics.median(gaps),
        "gap_ms": _spread(gaps),
        "draw_ms": _spread(draws),
    }


def measure_live(browser: Any, num_requests: int) -> list[dict[str, Any]]:
    """Serve the built-in model. Measures the first paint of a new page, and the delay from an
    answer to its drawing."""
    url = f"http://127.0.0.1:{PORT}"
    command = [sys.executable, "-m", "engine", "serve", "--port", str(PORT), "--cache-gib", "0.06"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            _wait(client)
            paints = []
            for _ in range(5):
                page = browser.new_page(viewport={"width": 1600, "height": 1000})
                page.goto(url)
                page.wait_for_selector("#link[data-state=live]")
                paints.append(_until(page, PAINT))
                page.close()
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.goto(url)
            page.wait_for_selector("#link[data-state=live]")
            delays = [_delay(page, client, number) for number in range(num_requests)]
    finally:
        server.terminate()
        server.wait()
    return [
        {"case": "first paint", "pages": len(paints), "paint_ms": _spread(paints)},
        {"case": "update", "requests": len(delays), "delay_ms": _spread(delays)},
    ]


def _delay(page: Any, client: httpx.Client, number: int) -> float:
    """Return the milliseconds from the end of a request until the page shows its bar."""
    page.evaluate(
        """() => {
            const bars = () => document.querySelectorAll('.bar:not(.running)').length;
            const before = bars();
            window.shown = null;
            const look = () => {
                if (bars() > before) window.shown = Date.now();
                else requestAnimationFrame(look);
            };
            look();
        }"""
    )
    prompt = f"conversation {number} begins like this. " * 6
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0.0}
    client.post("/v1/completions", json=body).raise_for_status()
    ended_ms = 1000 * time.time()
    return _until(page, "window.shown") - ended_ms


def measure_cost(num_rounds: int) -> dict[str, Any]:
    """Return microseconds per request of an engine without model arithmetic.

    Cases: without the queue of finished requests, with it, and with a connected page.
    """
    engine = Engine(
        EngineConfig(), runner=OracleRunner(16_384, 64, max_model_len=4096), sampler=OracleSampler()
    )
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 200, 600).tolist() for _ in range(40)]
    add, sampling = engine.recent.add, SamplingParams(max_tokens=16, ignore_eos=True)
    spent: dict[str, list[float]] = {"bare": [], "unwatched": [], "watched": []}
    for _ in range(num_rounds):
        for case, times in spent.items():
            engine.recent.add = (lambda *_: None) if case == "bare" else add  # type: ignore
            watch = Watch(engine) if case == "watched" else None
            began = taken = time.perf_counter()
            for prompt in prompts:
                engine.generate([prompt], sampling)
                if watch is not None and time.perf_counter() - taken > EVERY_S:
                    json.dumps(watch.take())
                    taken = time.perf_counter()
            times.append(1e6 * (time.perf_counter() - began) / len(prompts))
            if watch is not None:
                watch.close()
    bare = statistics.median(spent["bare"])
    return {
        "case": "cost",
        "requests": num_rounds * len(prompts),
        "request_us": {case: round(statistics.median(times), 1) for case, times in spent.items()},
        "ratio": {case: round(statistics.median(times) / bare, 4) for case, times in spent.items()},
    }


def _until(page: Any, expression: str) -> float:
    """Return the number that ``expression`` becomes.

    Polls from outside, because the page's content policy blocks playwright's own waiting.
    """
    for _ in range(1000):
        if (value := page.evaluate(expression)) is not None:
            return float(value)
        time.sleep(0.01)
    raise TimeoutError(f"{expression!r} is still null after ten seconds")


def _wait(client: httpx.Client) -> None:
    for _ in range(600):
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError("the server did not start within a minute")


def _spread(values: list[float]) -> dict[str, float]:
    ordered = np.percentile(values, (5, 50, 95)).round(2).tolist()
    return dict(zip(("p5", "p50", "p95"), ordered, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    with chromium() as browser:
        records = [measure_frames(browser, options.nodes, options.seconds)]
        records += measure_live(browser, options.requests)
    records.append(measure_cost(options.rounds))
    write_json_lines(RESULTS_FILE, records, vars(options))
    for record in records:
        print(record)


if __name__ == "__main__":
    main()
