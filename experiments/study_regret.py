"""Has `regret` a knob after all? Every constant inside it, a quarter and four times as large, on every workload.

    python -m experiments.study_regret [--traces chat,resend]

It is called a policy without a knob; this measures how much the constants that its authors wrote into it matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from experiments.lab import WORKLOADS, arguments, figure_path, keep, slim, sweep, workloads
from hybridcache.policies import learnt, regret, survival
from hybridcache.report import COLOURS, panels, save, text_table

DERIVED = ("NUM_BINS",)
"""Follows from others."""
CONSTANTS = tuple(
    (module, name)
    for module in (regret, survival, learnt)
    for name, value in vars(module).items()
    if name[0].isalpha() and name.isupper() and name not in DERIVED
    if type(value) in (int, float)
)
FACTORS = (0.25, 4)
TRACES = ("chat", "few-shot", "agent", "branch", "resend", "short", "sharegpt-like")

Change = tuple[str, float, str, float]
"""(constant, factor, trace, change of the token hit rate in points)."""


def main() -> None:
    options = arguments(__doc__, *TRACES)
    options.resume = None  # kept runs do not know which constant was changed
    records: list[dict[str, Any]] = []
    changes: list[Change] = []
    for word in (bar := workloads(options)):
        low, high, _ = WORKLOADS[word].gib.split(":")
        middle = (float(low) * float(high)) ** 0.5

        def hit_rate(name: str, factor: float, size: float = middle, word: str = word) -> float:
            result = sweep(
                word, options, bar, gib=size, policy="regret", checkpoints="regret", bound=False
            )
            [run] = result.runs
            records.append(slim(word, run, constant=name, factor=factor))
            return 100 * run.token_hit_rate

        plain = hit_rate("none", 1)
        for module, name in CONSTANTS:
            for factor in FACTORS:
                with changed(module, name, factor):
                    there = hit_rate(f"{_short(module)}.{name}", factor)
                changes.append((f"{_short(module)}.{name}", factor, word, there - plain))
    keep("study_regret", records)
    draw(changes)
    words = list(dict.fromkeys(word for *_, word, _ in changes))
    rows = []
    for name, factor in dict.fromkeys((name, factor) for name, factor, _, _ in changes):
        line = {w: change for n, f, w, change in changes if (n, f) == (name, factor)}
        rows.append([f"{name} x {factor:g}", *(f"{line[word]:+.2f}" for word in words)])
    print(text_table(["points of token hit rate", *words], rows))


def _short(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


@contextmanager
def changed(module: ModuleType, name: str, factor: float) -> Iterator[None]:
    """``module.name`` multiplied by ``factor`` while the block runs; whole numbers stay whole."""
    before = getattr(module, name)
    after = before * factor
    # A stride of one would never leave the prompt's end, so whole numbers stay above it.
    setattr(module, name, max(2, round(after)) if isinstance(before, int) else after)
    try:
        yield
    finally:
        setattr(module, name, before)


def draw(changes: list[Change]) -> None:
    """A row a constant, a dot a trace: the change in hit rate, at a quarter and at four times its value."""
    figure, axes = panels(1, width=8.5, height=5.0)
    [axis] = axes
    words = list(dict.fromkeys(word for *_, word, _ in changes))
    names = list(dict.fromkeys(name for name, *_ in changes))
    for number, word in enumerate(words):
        for factor, marker in zip(FACTORS, ("v", "^"), strict=True):
            found = {n: change for n, f, w, change in changes if (f, w) == (factor, word)}
            axis.scatter(
                [found[name] for name in names],
                [place + (number - len(words) / 2) * 0.08 for place in range(len(names))],
                color=COLOURS[number],
                marker=marker,
                s=22,
                label=f"{word}, {'a quarter' if factor < 1 else 'four times'}",
            )
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("change of the token hit rate, points, at the middle size of each trace")
    caption = "Each constant of regret a quarter and four times as large: dots near the line say that it need not be tuned."
    save(figure, axes, figure_path("study_regret"), caption)


if __name__ == "__main__":
    main()
