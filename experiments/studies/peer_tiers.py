"""Measure the gain of host memory for rebuilt systems, and when loading loses to computing.

The traces of `study_tiers`, the device with 4 GiB for KV and states and 16 GiB of host memory below
it, prefills that share their steps. All figures are seconds of prefill saved, copies waited for, of
those that `regret` saves with 20 GiB on the device.

- *Peers*, rebuilt with what they keep in host memory, states and all counted in the 16 GiB
  (`docs/reference/simulator.md` says which were compared with the real ones): SGLang writes all of
  it through and fetches whatever is there; vLLM stores whole blocks of prompts; LightLLM has states
  there and no KV; llama-server whole texts with their checkpoints. Ollama has none of it. -
  *Break-even*: `lru` with 16 GiB at other bandwidths, fetching whatever there is and fetching where
  it is sooner. Whatever there is loses below some bandwidth; the exchange rate predicts it: bytes
  fetched for a token saved, times tokens computed a second, attention left out: where prompts are
  long a token costs more, and fetching loses later than predicted.

    python -m experiments.studies.peer_tiers [--traces chat,agent] [--resume FOLDER]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.provenance import read_json_lines, write_json_lines
from experiments.studies.common import STATIC_PLACEMENT, WORKLOADS, figure_path, keep, rounded
from experiments.studies.tiers import (
    DEVICE_GIB,
    GOAL,
    Table,
    by_cell,
    fetch_whatever,
    run,
    servable,
)
from hybridcache.geometry.exchange import tokens_per_byte
from hybridcache.geometry.times import Roofline
from hybridcache.geometry.units import GIB
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.target import RunConfig

PEERS = ("sglang", "vllm", "lightllm", "llama-server", "ollama")
RATES = (0.5e9, 1e9, 2e9, 4e9, 8e9, 16e9, 50e9)
"""Bytes a second from host memory to one device."""
ALONE, WHOLE = f"device {DEVICE_GIB}", f"device {GOAL[1]}"


def measure(word: str, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """A record a cell."""
    workload = WORKLOADS[word]
    geometry = workload.geometry
    trace = servable(workload.open(word, False), geometry)
    times = replace(Roofline.fitting(geometry), bytes_per_s=1e30, overhead_s=0.0)
    common = RunConfig(
        geometry,
        budget_bytes=DEVICE_GIB * GIB,
        grid=max(workload.grid, trace.unit),
        host_bytes=GOAL[0] * GIB,
        policy="lru",
        checkpoints=STATIC_PLACEMENT,
    )
    ours = replace(common, policy="regret", checkpoints="regret")
    cells: dict[str, Any] = {
        WHOLE: (replace(ours, budget_bytes=GOAL[1] * GIB, host_bytes=0), None),
        ALONE: (replace(ours, host_bytes=0), None),
        "regret": (ours, None),
        "lru": (common, None),
        "lru alone": (replace(common, host_bytes=0), None),
    }
    for peer in PEERS:
        host = 0 if peer == "ollama" else common.host_bytes
        cells[peer] = replace(common, baseline=peer, host_bytes=host), None
        cells[f"{peer} alone"] = replace(common, baseline=peer, host_bytes=0), None
    for rate in RATES:
        config = replace(common, host_bytes_per_s=rate)
        cells[f"whatever {rate / 1e9:g}"] = config, fetch_whatever
        cells[f"sooner {rate / 1e9:g}"] = config, None
    records = []
    for name, (config, change) in cells.items():
        bar.set_postfix_str(name)
        result = run(trace, config, times, change)
        records.append(
            {
                "trace": word,
                "policy": "all",
                "cell": name,
                "requests": result.requests,
                "prompt_tokens": result.prompt_tokens,
                "cached_tokens": result.cached_tokens,
                "bypassed": result.bypassed,
                "seconds": result.seconds,
                "seconds_saved": result.seconds_saved,
                "copy_seconds": result.copy_seconds,
                "tier_bytes": result.tier_bytes,
                "tokens_per_s": tokens_per_byte(geometry, 1.0),
            }
        )
    return [rounded(record) for record in records]


def saved(known: dict[str, dict[str, Any]], cell: str) -> float:
    """Return the seconds saved in percent of those that 20 GiB save."""
    return 100 * known[cell]["seconds_saved"] / known[WHOLE]["seconds_saved"]


def break_even(known: dict[str, dict[str, Any]]) -> tuple[float, float] | None:
    """Bytes a second at which fetching whatever there is saves nothing: (predicted, measured).
    None: it fetches nothing that was not on the device anyway.

    Predicted from the run at the highest bandwidth: bytes a token saved, times tokens computed a
    second, on one device. Measured: where what is saved crosses what the device alone saves, a
    straight line in seconds a byte between the bandwidths tried."""
    cell = known[f"whatever {RATES[-1] / 1e9:g}"]
    tokens = cell["cached_tokens"] - known["lru alone"]["cached_tokens"]
    if tokens <= 0.01 * cell["prompt_tokens"]:
        return None
    predicted = cell["tier_bytes"]["host_to_device_bytes"] / tokens * cell["tokens_per_s"]
    gains = [
        known[f"whatever {rate / 1e9:g}"]["seconds_saved"] - known["lru alone"]["seconds_saved"]
        for rate in RATES
    ]
    slowness = float(np.interp(0.0, gains, [1 / rate for rate in RATES]))
    return predicted, 1 / slowness


def useful(table: Table) -> Table:
    """The traces where 20 GiB save anything beyond 4."""
    return {
        key: known
        for key, known in table.items()
        if known[WHOLE]["seconds_saved"] > 1e-3 * known[WHOLE]["seconds"]
    }


def text(table: Table) -> str:
    """A row a trace: what each saves, and where fetching loses."""
    columns = (ALONE, "regret", "lru", *PEERS)
    header = ["% of 20 GiB", "4 GiB", "regret", "lru", *PEERS, "predicted GB/s", "measured"]
    rows = []
    for (word, _), known in useful(table).items():
        found = break_even(known)
        ends = ["-", "-"] if found is None else [f"{rate / 1e9:.2f}" for rate in found]
        rows.append([word, *(f"{saved(known, cell):.1f}" for cell in columns), *ends])
    means = [np.mean([saved(known, cell) for known in useful(table).values()]) for cell in columns]
    return text_table(header, [*rows, ["mean", *(f"{mean:.1f}" for mean in means), "", ""]])


def draw(table: Table) -> None:
    """Draw the savings of each system, with host memory and without, and the break-even."""
    figure, axes = panels(2, 5.4, 3.8, columns=2)
    table = useful(table)
    names = ("regret", "lru", *PEERS)
    alone = {"regret": ALONE} | {name: f"{name} alone" for name in names[1:]}
    for number, name in enumerate(names):
        for offset, cells, colour in ((-0.12, alone[name], "#9aa5b1"), (0.12, name, COLOURS[0])):
            found = [saved(known, cells) for known in table.values()]
            places = [number + offset] * len(found)
            axes[0].plot(places, found, "o", color=colour, markersize=3, alpha=0.6)
            axes[0].plot(places[:1], [float(np.mean(found))], "D", color=colour, markersize=6)
    axes[0].set_xticks(range(len(names)), names, fontsize=6, rotation=20)
    axes[0].set_ylabel("prefill seconds saved, % of what\n`regret` saves with 20 GiB")
    points = {word: break_even(known) for (word, _), known in table.items()}
    known_points = sorted((ends, word) for word, ends in points.items() if ends is not None)
    for number, ((predicted, measured), word) in enumerate(known_points):
        place = predicted / 1e9, measured / 1e9
        axes[1].plot(*[[one] for one in place], "o", color=COLOURS[0], markersize=4)
        side: dict[str, Any] = {"xytext": (5, -7), "ha": "left"}
        if number % 2:
            side = {"xytext": (-5, 5), "ha": "right"}
        axes[1].annotate(word, place, fontsize=6, textcoords="offset points", **side)
    ends = [RATES[0] / 1e9, 16]
    axes[1].plot(ends, ends, color="#555555", linewidth=0.8, linestyle="--")
    axes[1].set_xscale("log")
    axes[1].set_yscale("log")
    axes[1].set_xlabel("GB/s below which fetching loses, predicted")
    axes[1].set_ylabel("measured")
    caption = (
        "Left: 4 GiB on the device alone (grey) and with 16 GiB of host memory (blue); points are "
        "traces, diamonds means; peers rebuilt (LightLLM's 512 states in host memory are in grey, "
        "too, uncounted). Right: the bandwidth from host memory to a device "
        "below which fetching whatever there is loses to computing, `lru`: by the exchange rate "
        "and in the sweep. Prefills share their steps; copies are waited for."
    )
    save(figure, axes, figure_path("study_peer_tiers"), caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", default=",".join(WORKLOADS), help="words of WORKLOADS")
    parser.add_argument("--resume", type=Path, help="folder of finished runs")
    options = parser.parse_args()
    if options.resume:
        options.resume.mkdir(parents=True, exist_ok=True)
    words = [word for word in options.traces.split(",") if WORKLOADS[word].is_here]
    records: list[dict[str, Any]] = []
    for word in (bar := tqdm(words, disable=None)):
        bar.set_description(word)
        path = options.resume and options.resume / f"{word}.jsonl"
        if path is not None and path.exists():
            records += read_json_lines(path)[1]
            continue
        found = measure(word, bar)
        if path is not None:
            write_json_lines(path, found)
        records += found
    table = by_cell(records)
    if words == list(WORKLOADS):
        keep("study_peer_tiers", records)
        draw(table)
    print(text(table))


if __name__ == "__main__":
    main()
