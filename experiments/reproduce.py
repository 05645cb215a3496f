"""Regenerate every published figure at one commit: ``make reproduce``.

    python -m experiments.reproduce              # all parts; can be stopped and continued
    python -m experiments.reproduce --list       # parts, minutes, and which are done
    python -m experiments.reproduce --part default --part capacity
    python -m experiments.reproduce --page       # write docs/results.md from existing results

A part is one command with the files that it writes. Finished parts are recorded in
``results/reproduce.json`` with a hash of their code, the commit and versions. Seeds are part of the
code (``splits.toml`` and defaults). A part is done if its code is unchanged and its files are the
recorded ones: a change of the engine, or of another study, does not affect a simulation. A stopped
run continues with the first part that is not done. A dirty tree is refused, because its commit
would not contain the code of the results.

Parts are declared in ``parts.toml``.

``docs/results.md`` is generated from ``results_page.md`` and the result files.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from experiments import provenance
from experiments.provenance import GENERATED, ROOT
from hybridcache.lab.intervals import Interval, interval, paired, ratio
from hybridcache.lab.leaderboard import Board, Scores, Split

CODE = ("hybridcache", "engine", "kernels", "experiments")
"""Folders with code that determines the results of other parts than simulations."""
ADMISSION = "/policies/admission/"
RECORD = "reproduce.json"
PAGE = ROOT / "docs" / "results.md"
PARTS_FILE = ROOT / "experiments" / "parts.toml"
TEMPLATE = ROOT / "experiments" / "results_page.md"


@dataclass(frozen=True, slots=True)
class Part:
    """One command and the files that it writes."""

    name: str
    command: str
    """Module and arguments of ``python -m``."""
    outputs: tuple[str, ...]
    """Paths below ``experiments/``."""
    minutes: float
    """Estimated run time on two idle cores."""
    publishes: str
    """Subject of the results, for lists and tables."""
    needs: str = ""
    """Package, or path below the root, that may be absent. The part is then skipped."""
    how: str = ""
    """Command that installs ``needs``."""
    pythonpath: str = ""
    """Folder of packages that only this part imports."""
    simulates: bool = False
    """True if the part is a study that does not import the engine."""
    replays: bool = False
    """True if such a study replays requests in turn, so that no admission policy takes part."""

    @property
    def code(self) -> str:
        """Return the hash of the code and settings that determine the results."""
        if not self.simulates:
            return provenance.code_hash(CODE)
        package, *studies = provenance.simulation_code(self.command.split()[0])
        if not self.replays:
            return provenance.code_hash((package, *studies))
        files = sorted((ROOT / package).rglob("*.py"))
        names = (path.relative_to(ROOT).as_posix() for path in files)
        return provenance.code_hash((*(n for n in names if ADMISSION not in n), *studies))

    @property
    def missing(self) -> str:
        """Return the missing requirement and how to get it, or an empty string if the part can
        run."""
        if not self.needs:
            return ""
        if "/" in self.needs:
            is_available = (ROOT / self.needs).exists()
        else:
            is_available = importlib.util.find_spec(self.needs) is not None
        return (
            "" if is_available else f"needs {self.needs}" + (f" ({self.how})" if self.how else "")
        )


def read_parts(path: Path = PARTS_FILE) -> tuple[Part, ...]:
    """Return the declared parts in their order."""
    declared = tomllib.loads(path.read_text(encoding="utf-8"))["part"]
    return tuple(Part(**part | {"outputs": tuple(part["outputs"])}) for part in declared)


# --- State of the tree and of finished parts ----------------------------------------------------


def dirty_files() -> list[str]:
    """Return changed or untracked files outside results, figures and the generated page.

    Raises ValueError outside a clone, because results would have no commit.
    """
    try:
        command = ["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", *GENERATED]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{ROOT} is not a git clone, so results would have no commit") from error
    return [line[3:] for line in done.stdout.splitlines()]


def missing_traces() -> list[str]:
    """Return the published traces that the studies name and that no data folder has."""
    from experiments.studies import admission, common

    path = common.ROOT / "experiments" / "splits.toml"
    splits = tomllib.loads(path.read_text(encoding="utf-8"))
    named = [*splits["default-pair"]["evaluation"]["files"]]
    named += [file["trace"] for file in splits["stop-reasons"]["file"]]
    named += [workload.file for workload in admission.WORKLOADS.values() if workload.file]
    named += [workload.spec for workload in common.WORKLOADS.values() if workload.is_file]
    files = dict.fromkeys(spec.partition("?")[0] for spec in named)
    return [name for name in files if common.published(name) is None]


def read_record() -> dict[str, Any]:
    """Return the finished parts by name."""
    path = provenance.RESULTS / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def is_done(part: Part, record: dict[str, Any]) -> bool:
    """Return True if the part ran on this code and its files are unchanged since."""
    entry = record.get(part.name)
    return bool(entry) and entry["code"] == part.code and entry["files"] == digests(part)


def digests(part: Part) -> dict[str, str]:
    """Return a hash of each output, or an empty string for an absent one."""
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""
        for name, path in ((name, output_path(name)) for name in part.outputs)
    }


def output_path(name: str) -> Path:
    """Return the path of ``results/...`` or ``figures/...``."""
    folder, _, file = name.partition("/")
    return (provenance.RESULTS if folder == "results" else provenance.FIGURES) / file


# --- Running ------------------------------------------------------------------------------------


def run(parts: Sequence[Part], again: bool = False) -> int:
    """Run the parts that are not done. Returns 0 if no part failed, 1 if one failed, 2 if the tree
    is dirty."""
    dirty = dirty_files()
    if dirty:
        print(
            f"reproduce: the tree is dirty; commit or remove: {', '.join(dirty[:8])}",
            file=sys.stderr,
        )
        return 2
    failed = []
    due = [part for part in parts if again or not is_done(part, read_record())]
    started, left = time.monotonic(), sum(part.minutes for part in due if not part.missing)
    slowness = 1.0
    planned = spent = 0.0
    for number, part in enumerate(due, 1):
        if part.missing:
            print(f"[{number}/{len(due)}] {part.name}: skipped, {part.missing}", flush=True)
            continue
        print(f"[{number}/{len(due)}] {part.name}: about {part.minutes * slowness:.0f} min; "
              f"{left * slowness:.0f} min left in total", flush=True)  # fmt: skip
        began, old, code = time.monotonic(), written_at(part), part.code
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(part.command)], cwd=ROOT, env=environment(part)
        )
        seconds = time.monotonic() - began
        new = written_at(part)
        stale = [name for name in part.outputs if new[name] in (0, old[name])]
        changed = part.code != code
        if done.returncode or stale or changed:
            reason = "the code changed while it ran" if changed else f"exit code {done.returncode}"
            if not changed and not done.returncode:
                reason = f"it did not write {', '.join(stale)}; check that all its traces exist"
            print(f"reproduce: {part.name} failed: {reason}", file=sys.stderr)
            failed.append(part.name)
        else:
            write_record(part, code, seconds)
        left -= part.minutes
        planned, spent = planned + part.minutes, (time.monotonic() - started) / 60
        slowness = spent / planned if planned else 1.0
    write_page()
    if failed:
        print(f"reproduce: failed: {', '.join(failed)}; other results are kept", file=sys.stderr)
    return 1 if failed else 0


def written_at(part: Part) -> dict[str, int]:
    """Return the modification time of each output in nanoseconds, or 0 if it does not exist."""
    paths = {name: output_path(name) for name in part.outputs}
    return {name: path.stat().st_mtime_ns if path.exists() else 0 for name, path in paths.items()}


def environment(part: Part) -> dict[str, str]:
    """Return the environment of a part, with the root and its own packages on the import path."""
    paths = [str(ROOT / part.pythonpath)] if part.pythonpath else []
    paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def write_record(part: Part, code: str, seconds: float) -> None:
    """Record a finished part."""
    record = read_record()
    origin = provenance.provenance()
    origin["command"] = f"python -m {part.command}"
    record[part.name] = {"code": code, "seconds": round(seconds), "files": digests(part)} | origin
    path = provenance.RESULTS / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def listing(parts: Sequence[Part]) -> str:
    """Return one line per part: name, minutes, state and subject."""
    lines, record = [], read_record()
    for part in parts:
        state = "done" if is_done(part, record) else part.missing or "due"
        lines.append(f"{part.name:18} {part.minutes:4.0f} min  {state:10}  {part.publishes}")
    lines.append(f"{'all':18} {sum(part.minutes for part in parts):4.0f} min")
    return "\n".join(lines)


# --- The results page ---------------------------------------------------------------------------


def write_page() -> None:
    """Write ``docs/results.md``."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the template with each ``<!-- result: NAME -->`` replaced by its table."""
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        mark = f"<!-- result: {name} -->"
        if mark in text:
            try:
                text = text.replace(mark, table())
            except FileNotFoundError as error:
                missing = Path(error.filename).name
                text = text.replace(mark, f"No results yet: `{missing}` is missing.")
    return text


def records_of(name: str) -> list[dict[str, Any]]:
    """Return the records of a result file without its provenance."""
    _, records = provenance.read_json_lines(provenance.RESULTS / name)
    return records


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parts_table() -> str:
    """Return the table of all parts: subject, command, files and origin."""
    rows = []
    for part in read_parts():
        files = ", ".join(
            f"`experiments/{name}`" for name in part.outputs if output_path(name).exists()
        )
        rows.append([part.publishes, f"`{part.command}`", files, origin_of(part)])
    return markdown(["subject", "`python -m`", "files", "commit, date"], rows)


def origin_of(part: Part) -> str:
    """Return commit and date of a part's results. A ``+`` marks a dirty tree."""
    origin = read_record().get(part.name)
    if not origin or origin["files"] != digests(part):
        origin = first_line(part)
    if not origin:
        has_outputs = any(output_path(name).exists() for name in part.outputs)
        return "not recorded" if has_outputs else "not run"
    return f"{origin.get('commit') or 'no commit'}, {origin['date'][:10]}"


def first_line(part: Part) -> dict[str, Any] | None:
    """Return the provenance in the first result file, or None if no result file exists."""
    for name in part.outputs:
        path = output_path(name)
        if path.suffix == ".jsonl" and path.exists():
            return provenance.read_json_lines(path)[0]
    return None


def default_speed_table() -> str:
    """Return the comparison of the default policies with LRU, at sizes where both evict."""
    rows = [
        [
            record["trace"],
            f"{record['gib']:g}",
            f"{100 * record['default_token_hit_rate']:.1f}",
            f"{100 * record['lru_token_hit_rate']:.1f}",
            f"{record['ratio']:.2f}",
        ]
        for record in records_of("bench_simulate_default.jsonl")
    ]
    return markdown(
        ["trace", "GiB", "default, %", "LRU with fixed rules, %", "CPU time, ratio"], rows
    )


def leaderboard_table() -> str:
    """Return the leaderboard of the built-in policies."""
    records = records_of("leaderboard.jsonl")
    scores = tuple(
        Scores(**{name: record[name] for name in Scores.__slots__}) for record in records
    )
    board = Board(Split.load(), records[0]["reference"], scores)
    table = markdown(board.heads(), [row.cells() for row in board.rows()])
    return f"{table}\n\n{board.summary()}; intervals over seeds."


def default_table() -> str:
    """Return hit rates of the candidate pairs on the generated traces of the evaluation split."""
    return pairs_table("evaluation")


def service_table() -> str:
    """Return hit rates and waiting times of the candidate pairs in closed loops."""
    return pairs_table("closed loop")


def pairs_table(split: str) -> str:
    """Return one row per pair: hit rate and gain as means over cells, and mean TTFT if known."""
    from experiments.studies.default import DEFAULT

    rates: dict[str, dict[int, list[float]]] = {}
    ttfts: dict[str, dict[str, list[float]]] = {}
    for record in records_of("study_default.jsonl"):
        if record["split"] == split and record["seed"] is not None:
            by_seed = rates.setdefault(record["pair"], {})
            by_seed.setdefault(record["seed"], []).append(100 * record["token_hit_rate"])
            by_trace = ttfts.setdefault(record["pair"], {})
            by_trace.setdefault(record["trace"], []).append(record.get("ttft_mean_s", 0.0))
    if not rates:
        return f"No results yet: the study has no records of the split `{split}`."
    means = {
        pair: [fmean(values) for values in by_seed.values()] for pair, by_seed in rates.items()
    }
    reference = DEFAULT if DEFAULT in means else next(iter(means))
    header = ["eviction@placement", "token hit rate, %", f"gain over `{reference}`, points"]
    rows = [
        [f"`{pair}`", str(interval(values)), str(paired(values, means[reference]))]
        for pair, values in sorted(means.items(), key=lambda item: -fmean(item[1]))
    ]
    if split == "closed loop":
        header += ["mean TTFT, ratio", "lowest", "highest"]
        for row in rows:
            cells = [
                fmean(of) / fmean(ours)
                for of, ours in zip(
                    ttfts[row[0].strip("`")].values(), ttfts[reference].values(), strict=True
                )
            ]
            row += [f"{value:.2f}" for value in (geometric_mean(cells), min(cells), max(cells))]
    return markdown(header, rows)


def losses_table() -> str:
    """Return the loss of the default pair to the best pair of each cell, in points."""
    from experiments.studies.default import DEFAULT

    splits = tomllib.loads((ROOT / "experiments" / "splits.toml").read_text(encoding="utf-8"))
    seen = splits["default-pair"]["evaluation"]["seen"]
    by_cell: dict[tuple[str, str, float], dict[str, list[float]]] = {}
    generated: set[str] = set()
    for record in records_of("study_default.jsonl"):
        cell = by_cell.setdefault((record["split"], record["trace"], record["gib"]), {})
        cell.setdefault(record["pair"], []).append(100 * record["token_hit_rate"])
        if record["seed"] is not None:
            generated.add(record["trace"])
    found: dict[str, list[list[float]]] = {}
    for (split, trace, _), rates in by_cell.items():
        best = max(rates.values(), key=fmean)
        losses = [one - ours for one, ours in zip(best, rates[DEFAULT], strict=True)]
        groups = [split]
        if split == "evaluation":
            kind = "generated" if trace in generated else "published traces"
            groups = [f"{split}, {kind}"] + [f"{split}, {kind}, unseen"] * (trace not in seen)
        for group in groups:
            found.setdefault(group, []).append(losses)
    rows = []
    for group, cells in found.items():
        means = [fmean(losses) for losses in cells]
        over_seeds = [fmean(losses) for losses in zip(*cells, strict=True)]
        near = sum(mean <= 0.5 for mean in means)
        loss = str(interval(over_seeds))
        rows.append([group, str(len(cells)), loss, f"{max(means):.1f}", f"{near} of {len(cells)}"])
    return markdown(["cells", "number", "mean loss, points", "worst cell", "within 0.5"], rows)


def published_table() -> str:
    """Return both rates and the gain on the published traces, with intervals over sessions."""
    from experiments.studies.default import COMPARED

    runs: dict[tuple[str, float], dict[str, dict[str, Any]]] = {}
    for record in records_of("study_default.jsonl"):
        if record["seed"] is None:
            runs.setdefault((record["trace"], record["gib"]), {})[record["pair"]] = record
    rows = []
    for (trace, gib), by_pair in runs.items():
        ours, lru = (by_pair[pair] for pair in COMPARED)
        rates = [100 * record["token_hit_rate"] for record in (ours, lru)]
        num_sessions = "unknown" if "sessions" in ours else "-"
        figures = [f"{rate:.1f}" for rate in (*rates, rates[0] - rates[1])]
        # Sessions are unknown if there is one per request.
        if len(ours.get("sessions", ())) < ours.get("requests", 0):
            prompts = [prompt for _, prompt in ours["sessions"]]
            reused = [[cached for cached, _ in record["sessions"]] for record in (ours, lru)]
            saved = [one - other for one, other in zip(*reused, strict=True)]
            num_sessions = str(len(prompts))
            figures = [str(ratio(part, prompts).scaled(100)) for part in (*reused, saved)]
        name = Path(trace.partition("?")[0]).name.partition(".")[0]
        rows.append([f"`{name}`", f"{gib:g}", num_sessions, *figures])
    header = ["trace", "GiB", "sessions", "default, %", "LRU with fixed rules, %", "gain, points"]
    return markdown(header, rows)


def capacity_table() -> str:
    """Return the gain of the default pair over LRU with fixed rules, at three sizes."""
    rows = []
    for record in records_of("study_capacity.jsonl"):
        if "gain" in record:
            places = [round(part * (len(record["gib"]) - 1)) for part in (0.2, 0.4, 0.6)]
            cells = [
                f"{record['gib'][at]:.3g} GiB: {Interval(*record['gain'][at])}" for at in places
            ]
            rows.append([record["trace"], str(record["seeds"]), *cells])
    if not rows:
        return "No intervals: the study was last run with one seed."
    return markdown(["trace", "seeds", "small memory", "medium", "large"], rows)


def hints_table() -> str:
    """Return the gain from boundary hints."""
    from experiments.studies.hints import gains

    rows = [
        [pair, *map(str, figures)]
        for pair, figures in gains(records_of("study_hints.jsonl")).items()
    ]
    return markdown(["pair", "token hit rate with hints, %", "gain from hints, points"], rows)


def conditions_table() -> str:
    """Return hit rates of the default pair and of LRU, one row per condition."""
    from experiments.studies.conditions import gains

    rows = [
        [condition, value, *map(str, rates), str(gain)]
        for condition, value, rates, gain in gains(records_of("study_conditions.jsonl"))
    ]
    header = ["condition", "value", "default, %", "LRU with fixed rules, %", "gain, points"]
    return markdown(header, rows)


def admission_table() -> str:
    """Return hit rates and waiting times at each rate.

    The last columns are ratios to the best fixed number of live sessions, chosen for each."""
    from experiments.studies.admission import best_simple, cells, mean
    from hybridcache.lab.simulation.result import ClosedLoopRun

    runs = [ClosedLoopRun(**record) for record in records_of("admission.jsonl")]
    rows = []
    for trace, rate, by_policy in cells(runs):
        pair = by_policy["oldest"], by_policy["sessions"]
        oldest, sessions = ([100 * run.token_hit_rate for run in runs] for runs in pair)
        row = [trace, f"{rate:g}", f"{fmean(oldest):.1f}", f"{fmean(sessions):.1f}"]
        row.append(str(paired(sessions, oldest)))
        for field in ("ttft_mean_s", "ttft_p99_s"):
            row.append(", ".join(f"{mean(runs, field):.1f}" for runs in pair))
        for field in ("ttft_mean_s", "makespan_s"):
            best = [getattr(run, field) for run in best_simple(by_policy, field)]
            compared = ratio([getattr(run, field) for run in by_policy["sessions"]], best)
            row.append(f"{compared:.2f}")
        rows.append(row)
    header = ["workload", "sessions/s", "hits, `oldest`, %", "`sessions`, %", "gain, points"]
    header += [f"{name} TTFT, s: `oldest`, `sessions`" for name in ("mean", "p99")]
    header += ["mean TTFT to best limit", "makespan to best limit"]
    return markdown(header, rows)


def closed_loop_table() -> str:
    """Return the comparison of the engine with the simulator's forecast."""
    from experiments.studies.closed_loop import table

    return markdown(*table(records_of("closed_loop.jsonl")))


def tiers_table() -> str:
    """Return the seconds that host memory saves, for each trace."""
    from experiments.studies.tiers import over_seeds

    return markdown(*over_seeds(records_of("study_tiers.jsonl"), "survival"))


def grid_table() -> str:
    """Return the gains of finer checkpoint grids."""
    from experiments.studies.grid import table

    return markdown(*table(records_of("study_grid.jsonl")))


def arena_table() -> str:
    """Return the cost of slabs, for each trace."""
    from experiments.studies.arena import table

    return markdown(*table(records_of("study_arena.jsonl")))


TABLES: dict[str, Callable[[], str]] = {
    "default": default_table,
    "pairs in closed loop": service_table,
    "losses": losses_table,
    "published": published_table,
    "closed loop": closed_loop_table,
    "capacity": capacity_table,
    "hints": hints_table,
    "conditions": conditions_table,
    "tiers": tiers_table,
    "grid": grid_table,
    "arena": arena_table,
    "parts": parts_table,
    "default speed": default_speed_table,
    "leaderboard": leaderboard_table,
    "admission": admission_table,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce", description=(__doc__ or "").splitlines()[0]
    )
    all_parts = read_parts()
    names = [part.name for part in all_parts]
    parser.add_argument(
        "--part", action="append", choices=names, metavar="NAME", help="may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="list parts with minutes and state")
    parser.add_argument("--again", action="store_true", help="also run finished parts again")
    parser.add_argument("--page", action="store_true", help="only write docs/results.md")
    options = parser.parse_args(arguments)
    parts = [part for part in all_parts if not options.part or part.name in options.part]
    if options.list:
        print(listing(parts))
        return 0
    if options.page:
        write_page()
        return 0
    if missing := missing_traces():
        print(
            "reproduce: studies leave out the published traces that data/ does not hold: "
            f"{', '.join(missing)}",
            file=sys.stderr,
        )
    try:
        return run(parts, options.again)
    except ValueError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
