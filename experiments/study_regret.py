"""Has `regret` a knob after all? Every constant inside it, a quarter and four times as large, on
every workload.

    python -m experiments.study_regret [--traces chat,resend]

It is called a policy without a knob; this measures how much the constants that its authors wrote
into it matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from experiments.lab import WORKLOADS, arguments, figure_path, keep, slim, sweep, workloads
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import text_table
from hybridcache.policies.eviction import regret, survival
from hybridcache.policies.placement import learned as learnt

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
    shares: dict[str, list[float]] = {}
    for word in (bar := workloads(options)):
        middle = WORKLOADS[word].middle

        def hit_rate(name: str, factor: float, size: float = middle, word: str = word) -> float:
            result = sweep(
                word, options, bar, gib=size, policy="regret", checkpoints="regret", bound=False
            )
            [run] = result.runs
            records.append(slim(word, run, constant=name, factor=factor))
            shares.setdefault(word, []).append(100 * (run.share_of_optimum or 0))
            return 100 * run.token_hit_rate

        plain = hit_rate("none", 1)
        for module, name in CONSTANTS:
            for factor in FACTORS:
                with changed(module, name, factor):
                    there = hit_rate(f"{_short(module)}.{name}", factor)
                changes.append((f"{_short(module)}.{name}", factor, word, there - plain))
    keep("study_regret", records)
    draw(changes, shares)
    words = list(dict.fromkeys(word for *_, word, _ in changes))
    rows = []
    for name, factor in dict.fromkeys((name, factor) for name, factor, _, _ in changes):
        line = {w: change for n, f, w, change in changes if (n, f) == (name, factor)}
        rows.append([f"{name} x {factor:g}", *(f"{line[word]:+.2f}" for word in words)])
    print(text_table(["points of token hit rate", *words], rows), end="\n\n")
    rows = [
        [word, *(f"{part:.1f}" for part in (found[0], min(found), max(found)))]
        for word, found in shares.items()
    ]
    print(text_table(["% of the best plan", "as it is", "worst", "best"], rows))


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


def draw(changes: list[Change], shares: dict[str, list[float]]) -> None:
    """Left a row a constant, a mark a trace: the change in hit rate, at a quarter and at four times
    its value. Right a row a trace: the share of the best plan, unchanged and over all changes."""
    figure, axes = panels(2, width=6.6, height=5.2, columns=2)
    change, share = axes
    words = list(shares)
    names = list(dict.fromkeys(name for name, *_ in changes))
    for number, word in enumerate(words):
        for factor, marker in zip(FACTORS, ("v", "^"), strict=True):
            found = {n: moved for n, f, w, moved in changes if (f, w) == (factor, word)}
            change.scatter(
                [found[name] for name in names],
                [place + (number - len(words) / 2) * 0.1 for place in range(len(names))],
                color=COLOURS[number],
                marker=marker,
                s=18,
            )
        change.scatter([], [], color=COLOURS[number], s=22, marker="s", label=word)
        low, high = min(shares[word]), max(shares[word])
        share.plot([low, high], [number, number], color=COLOURS[number], linewidth=7, alpha=0.35)
        share.plot(shares[word][0], number, "o", color=COLOURS[number])
        share.annotate(
            f"{shares[word][0]:.0f} ({low:.0f} to {high:.0f})",
            (low, number),
            xytext=(-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
        )
    change.axvline(0, color="black", linewidth=0.6)
    change.set_yticks(range(len(names)), names, fontsize=8)
    change.invert_yaxis()
    change.set_xlabel("change of the token hit rate, points")
    share.set_yticks(range(len(words)), words, fontsize=8)
    share.set_ylim(len(words) - 0.4, -0.6)
    share.set_xlim(0, 102)
    share.set_xlabel("token hit rate as a share of the best plan, %")
    caption = (
        "Each constant of regret a quarter (down) and four times (up) as large, at the middle size "
        "of each trace: marks near the line say that "
        "it need not be tuned. Right, the same in terms of the best plan with hindsight "
        "(clairvoyant greedy): dots as it is, bars from the worst "
        "to the best of all changes. No setting closes the distance to the plan."
    )
    save(figure, axes, figure_path("study_regret"), caption)


if __name__ == "__main__":
    main()
