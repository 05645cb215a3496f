"""Does the placement without a knob hold on traces that nobody tuned it on? `regret` with its own
placement, as it was, and with the default words, on sessions with shared documents and on
depth-first searches, shapes that were looked at and shapes that were not.

    python -m experiments.study_heldout

The searches also have peers, as published and with what a running request holds counted in the same
memory, as it is for every cache of this project: where two or three states fit, that is most of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.lab import QWEN3_NEXT, STATIC_PLACEMENT, figure_path, keep, slim
from hybridcache import Placed, Prefill, open_trace, simulate
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.result import RunResult
from hybridcache.lab.simulation.sweep import collect_seldom
from hybridcache.policies.placement.learned import Learned

PEERS = ("sglang-plus", "sglang-plus-counted", "lightllm-counted", "marconi-counted")


class Before(Learned):
    """The rule as it was: a prompt goes on where the deepest evicted checkpoint stood, if that is
    no fork's."""

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        """As ``Learned``, told otherwise."""
        missed = prefill.missed
        goes_on = missed is not None and missed.label != "branch"
        goes_on = goes_on and missed.position + prefill.grid > prefill.branch_len
        return super().plan(prefill._replace(forks=not goes_on))


PLACEMENTS = {
    STATIC_PLACEMENT: "default words",
    "experiments.study_heldout:Before": "its own, before",
    "regret": "its own",
}


class Cell(NamedTuple):
    """A trace and the sizes at which memory is short."""

    spec: str
    gib: tuple[float, ...]
    seen: bool
    """Whether the rule was chosen with a look at it."""

    @property
    def has_peers(self) -> bool:
        return self.spec.startswith("tree-search")


DOCUMENTS, SEARCH = "shared-documents?", "tree-search?"
CELLS = (
    Cell(
        f"{DOCUMENTS}documents=3000&pause_s=8000&again=0.7&turns=6&sessions=600&length=6000",
        (20, 60, 160),
        True,
    ),
    Cell(f"{DOCUMENTS}documents=60&pause_s=300", (20, 60), True),
    Cell(f"{SEARCH}parallel=4", (0.5, 0.75, 1), True),
    Cell("chat?seed=0", (1, 2), True),
    Cell(
        f"{DOCUMENTS}seed=7&documents=200&pause_s=2000&again=0.4&sessions=400", (10, 40, 160), False
    ),
    Cell(f"{DOCUMENTS}seed=8&documents=900&turns=2&sessions=800&length=4000", (10, 40), False),
    Cell(f"{SEARCH}seed=7&parallel=3&toolsets=20&root=1500&depth=10", (0.35, 0.5, 0.75), False),
    Cell(f"{SEARCH}seed=8", (0.25, 0.35, 0.5), False),
    Cell("chat?seed=21", (1, 2), False),
)


def main() -> None:
    collect_seldom()
    records: list[dict[str, Any]] = []
    found: list[dict[str, list[RunResult]]] = []
    for cell in (bar := tqdm(CELLS, disable=None)):
        bar.set_description(cell.spec)
        runs = rates(cell)
        found.append(runs)
        for name, several in runs.items():
            records += [slim(cell.spec, run, name=name, seen=cell.seen) for run in several]
    keep("study_heldout", records)
    draw(found)
    for cell, runs in zip(CELLS, found, strict=True):
        rows = [
            [name, *(f"{100 * run.token_hit_rate:.1f}" for run in several)]
            for name, several in runs.items()
        ]
        seen = "seen" if cell.seen else "unseen"
        print(text_table([f"{cell.spec}, {seen}, GiB", *map(str, cell.gib)], rows), end="\n\n")


def rates(cell: Cell) -> dict[str, list[RunResult]]:
    """Runs by competitor, in the order of sizes."""
    result = simulate(
        open_trace(cell.spec).kept(),
        model=QWEN3_NEXT,
        gib=cell.gib,
        policy="regret",
        checkpoints=tuple(PLACEMENTS),
        baseline=PEERS if cell.has_peers else (),
        bound=False,
    )
    runs: dict[str, list[RunResult]] = {}
    for run in result.runs:
        words = str(run.config.checkpoints)
        runs.setdefault(run.config.baseline or PLACEMENTS[words], []).append(run)
    return runs


def draw(found: list[dict[str, list[RunResult]]]) -> None:
    """A panel a trace: token hit rate over sizes."""
    figure, axes = panels(len(found), width=4.9, height=3.4, columns=3)
    for axis, cell, runs in zip(axes, CELLS, found, strict=True):
        for colour, (name, several) in zip(COLOURS, runs.items(), strict=False):
            own = name in PLACEMENTS.values()
            axis.plot(
                cell.gib,
                [100 * run.token_hit_rate for run in several],
                color=colour,
                marker="o" if own else "x",
                linestyle="-" if own else "--",
                label=f"regret, {name}" if own else name,
            )
        axis.set_xscale("log")
        axis.set_xticks(cell.gib, [f"{gib:g}" for gib in cell.gib])
        axis.minorticks_off()
        axis.set_xlabel("GiB")
        axis.set_ylabel("token hit rate, %")
        word, _, options = cell.spec.partition("?")
        axis.set_title(f"{word}, {'seen' if cell.seen else 'unseen'}\n{options}", fontsize=7)
    caption = (
        "A fork is saved where the tree has seen other tokens follow. Peers of the searches: "
        "dashed; counted: with what a running request holds in the same memory."
    )
    save(figure, axes, figure_path("study_heldout"), caption)


if __name__ == "__main__":
    main()
