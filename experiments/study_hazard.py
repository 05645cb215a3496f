"""How good could an online rule be? The best one that knows, in hindsight, how likely every class
of prompt is to be continued.

    python -m experiments.study_hazard

Mooncake's conversation trace: 61 % of its prompts are never continued, and the answers are hidden.
An online rule sees of a prompt how long it is, how many turns came before, how long they took, how
long the answer was. Here such a rule is given, for every class of these facts, the truth: which
part is continued at which age. It keeps each class until the age at which the next byte-step is no
longer worth its price, the price being the one at which memory is full on average (a Lagrangian
relaxation: memory may be over the limit now and under it then, requests in service take none,
checkpoints stand wherever they are needed). So no rule that sees only these facts, and is the same
from first to last, does better than *in hindsight*, up to the grid of ages. *Held out*: the ages
come from one half of the sessions and count on the other. Between them lies what can be learnt:
classes as fine as single prompts would reach the clairvoyant plan in hindsight, and nothing held
out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.hindsight import Hindsights
from experiments.lab import GB, QWEN3_NEXT, WORKLOADS, figure_path, keep
from hybridcache import Trace
from hybridcache.geometry.times import Roofline
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.serving import Serving
from hybridcache.lab.simulation.sizes import budget_bytes
from hybridcache.lab.simulation.sweep import Job, run_sweep
from hybridcache.lab.simulation.target import RunConfig

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SIZES_GB = (80, 320)
AGES: Ints = np.unique(np.round(2.0 ** np.arange(-1, 14, 0.25)).astype(np.int64))
"""Ages at which a class may be let go, requests; the first, 0, admits nothing."""
CAPTION = (
    "Full: the best rule that sees a prompt's class, with the truth about every class (hindsight). "
    "Hollow: the same, learnt on half of the "
    "sessions and measured on the others. Finer classes promise more and hold less; all of them "
    "stay far below the plan that knows the future."
)


@dataclass(frozen=True)
class Tips:
    """One entry a request: the prompt it leaves behind, until a later one goes on from it. Lengths
    in ids."""

    lengths: Ints
    answers: Ints
    turns: Ints
    """Prompts of the same session before."""
    gaps: Ints
    """Requests since the one before; 0: the first."""
    ages: Ints
    """Requests until it is continued, or until the trace ends."""
    gains: Ints
    """Tokens that its continuation reuses, beyond the head that all prompts share; 0: never
    continued."""
    sizes: Ints
    """Bytes beyond that head, one state included."""
    sessions: Ints
    """Number of the session's first request."""
    head_tokens: int
    """Reused in that head, by all requests together."""
    prompt_tokens: int

    def classes(self) -> dict[str, Ints]:
        """What a rule may see, from little to much; equal numbers are one class."""
        turn = np.minimum(self.turns, 8)
        length, answer, gap = (_log2(x) for x in (self.lengths, self.answers, self.gaps))
        return {
            "nothing": np.zeros_like(turn),
            "length": length,
            "answer": answer,
            "turns": turn,
            "turns, gap": turn * 32 + gap,
            "turns, length": turn * 32 + length,
            "turns, length, gap": (turn * 32 + length) * 32 + gap,
            "turns, length, gap, answer": ((turn * 32 + length) * 32 + gap) * 32 + answer,
        }


def read_tips(trace: Trace, head: int = 1) -> Tips:
    """``head``: ids that all prompts share. O(ids)."""
    requests = list(trace)
    number = len(requests)
    last: dict[int, int] = {}
    parents, shares = np.full(number, -1), np.zeros(number, np.int64)
    for request_number, request in enumerate(requests):
        prefix, path, known = 0, [], True
        for token in request.tokens.tolist():
            prefix = hash((prefix, token))
            path.append(prefix)
            known = known and prefix in last
            if known:
                parents[request_number] = last[prefix]
                shares[request_number] = len(path)
        last.update(dict.fromkeys(path, request_number))
    lengths = np.array([len(request.tokens) for request in requests])
    shares = np.minimum(shares, lengths - 1)
    turns, gaps, gains = (np.zeros(number, np.int64) for _ in range(3))
    sessions = np.arange(number)
    ages = number - np.arange(number)
    for child in range(number - 1, -1, -1):
        if shares[child] > head:
            ages[parents[child]] = child - parents[child]
            gains[parents[child]] = (shares[child] - head) * trace.unit
    for child in np.flatnonzero(shares > head):
        turns[child] = turns[parents[child]] + 1
        gaps[child] = child - parents[child]
        sessions[child] = sessions[parents[child]]
    own = np.maximum(lengths - head, 0)
    return Tips(
        lengths=lengths,
        answers=np.array([len(request.output) for request in requests]),
        turns=turns,
        gaps=gaps,
        ages=ages,
        gains=gains,
        sizes=own * trace.unit * QWEN3_NEXT.kv_bytes_per_token + QWEN3_NEXT.state_bytes,
        sessions=sessions,
        head_tokens=int(np.minimum(shares, head).sum()) * trace.unit,
        prompt_tokens=sum(request.num_tokens(trace.unit) for request in requests),
    )


def _log2(values: Ints) -> Ints:
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


Curves = tuple[Floats, Floats]
"""Tokens reused, and byte-steps spent, by class and by the age at which the class is let go:
float64[classes, ages]."""


def curves(tips: Tips, classes: Ints, chosen: npt.NDArray[np.bool_]) -> Curves:
    """Of the tips ``chosen``, each class kept until each of ``AGES``."""
    _, rows = np.unique(classes, return_inverse=True)
    shape = int(rows.max()) + 1, len(AGES)
    gains, costs = np.zeros(shape), np.zeros(shape)
    rows = rows[chosen]
    for column, age in enumerate(AGES):
        in_time = tips.ages[chosen] <= age
        np.add.at(gains[:, column], rows, tips.gains[chosen] * in_time)
        np.add.at(costs[:, column], rows, tips.sizes[chosen] * np.minimum(tips.ages[chosen], age))
    return gains, costs


def best_gain(known: Curves, counted: Curves, byte_steps: float) -> float:
    """Tokens reused in ``counted`` if every class goes at the age that is best in ``known`` at one
    price for all, the price at which ``byte_steps`` are spent in ``counted``."""

    def at(price: float) -> tuple[float, float]:
        ages = np.argmax(known[0] - price * known[1], axis=1)
        rows = np.arange(len(ages))
        return float(counted[0][rows, ages].sum()), float(counted[1][rows, ages].sum())

    low, high = 0.0, float(known[0].max()) + 1  # at the latter nothing is worth keeping
    if at(low)[1] <= byte_steps:
        return at(low)[0]
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] > byte_steps else (low, middle)
    (more, dear), (less, cheap) = at(low), at(high)
    return less + (more - less) * (byte_steps - cheap) / (dear - cheap)


def hit_rates(tips: Tips, classes: Ints, capacity_bytes: int) -> tuple[float, float]:
    """Token hit rate (in hindsight, held out) of the best rule that sees ``classes``."""
    everything = np.ones(len(classes), bool)
    half = np.random.default_rng(0).random(len(classes))[tips.sessions] < 0.5
    byte_steps = float(capacity_bytes) * len(classes)
    known = curves(tips, classes, everything)
    hindsight = best_gain(known, known, byte_steps)
    held_out = 0.0
    for fit in (half, ~half):
        counted = curves(tips, classes, ~fit)
        held_out += best_gain(curves(tips, classes, fit), counted, byte_steps * (~fit).mean())
    return (
        (hindsight + tips.head_tokens) / tips.prompt_tokens,
        (held_out + tips.head_tokens) / tips.prompt_tokens,
    )


def information_bits(classes: Ints, returns: npt.NDArray[np.bool_]) -> float:
    """Mutual information of class and return; what as many classes would show by chance (Miller and
    Madow) is taken off."""
    _, rows = np.unique(classes, return_inverse=True)
    counts = np.zeros((int(rows.max()) + 1, 2))
    np.add.at(counts, (rows, returns.astype(np.int64)), 1)
    joint = _entropy(counts.ravel())
    marginal = _entropy(counts.sum(0)) + _entropy(counts.sum(1))
    return float(marginal - joint - (len(counts) - 1) / (2 * len(rows) * np.log(2)))


def _entropy(counts: Floats) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    trace = WORKLOADS["mooncake"].open("mooncake", full=True).kept()
    tips = read_tips(trace)
    returns = tips.gains > 0
    whole = _entropy(np.array([returns.sum(), (~returns).sum()], float))
    records: list[dict[str, Any]] = []
    for gigabytes in SIZES_GB:
        capacity = budget_bytes(gigabytes * GB)
        for word, classes in tips.classes().items():
            hindsight, held_out = hit_rates(tips, classes, capacity)
            records.append(
                {
                    "gb": gigabytes,
                    "sees": word,
                    "classes": len(np.unique(classes)),
                    "hindsight": hindsight,
                    "held_out": held_out,
                    "information_bits": information_bits(classes, returns),
                    "entropy_bits": whole,
                }
            )
        for word, rate in landmarks(trace, gigabytes).items():
            records.append({"gb": gigabytes, "rule": word, "token_hit_rate": rate})
    keep("study_hazard", records)
    draw(records)
    print(f"whether a prompt is continued: {whole:.3f} bits, {returns.mean():.1%} are")
    for gigabytes in SIZES_GB:
        here = [record for record in records if record["gb"] == gigabytes]
        rows = [
            [
                record["sees"],
                str(record["classes"]),
                f"{record['information_bits']:.3f}",
                f"{record['hindsight']:.3f}",
                f"{record['held_out']:.3f}",
            ]
            for record in here
            if "sees" in record
        ]
        header = [f"{gigabytes} GB: a rule sees", "classes", "bits", "hindsight", "held out"]
        print(text_table(header, rows))
        print(
            ", ".join(f"{r['rule']} {r['token_hit_rate']:.3f}" for r in here if "rule" in r), "\n"
        )


def landmarks(trace: Trace, gigabytes: float) -> dict[str, float]:
    """Token hit rates of real replays, and of the clairvoyant plan."""
    gib = gigabytes * GB
    rules = {"LRU": ("lru", "aligned:512"), "regret": ("regret", "regret")}
    rates = {}
    for word, (policy, checkpoints) in rules.items():
        config = RunConfig(
            QWEN3_NEXT, budget_bytes(gib), grid=1, policy=policy, checkpoints=checkpoints
        )
        (result,) = run_sweep(trace, [Job(config, Serving(Roofline.fitting(QWEN3_NEXT)))])
        rates[word] = result.token_hit_rate
    rates["clairvoyant greedy"] = Hindsights(trace).at(gib, QWEN3_NEXT, 1).reached
    return rates


def draw(records: list[dict[str, Any]]) -> None:
    """A panel a size: a row a set of facts, and lines for the replays and the plan."""
    figure, axes = panels(len(SIZES_GB), width=6.2, height=3.6, columns=2)
    for axis, gigabytes in zip(axes, SIZES_GB, strict=True):
        here = [record for record in records if record["gb"] == gigabytes]
        seen = [record for record in here if "sees" in record]
        places = range(len(seen))
        for place, record in enumerate(seen):
            ends = [100 * record["held_out"], 100 * record["hindsight"]]
            axis.plot(ends, [place, place], color=COLOURS[0], alpha=0.3, linewidth=4)
        full = [100 * record["hindsight"] for record in seen]
        hollow = [100 * record["held_out"] for record in seen]
        axis.plot(full, places, "o", color=COLOURS[0], label="in hindsight")
        axis.plot(hollow, places, "o", color=COLOURS[0], mfc="white", label="held out")
        rules = [record for record in here if "rule" in record]
        for colour, style, record in zip(COLOURS[1:], ("--", "-", ":"), rules, strict=False):
            axis.axvline(
                100 * record["token_hit_rate"], color=colour, linestyle=style, label=record["rule"]
            )
        axis.set_yticks(places, [record["sees"] for record in seen], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"Mooncake conversation, {gigabytes} GB", fontsize=9)
        axis.set_xlabel("token hit rate, %")
    save(figure, axes, figure_path("study_hazard"), CAPTION)


if __name__ == "__main__":
    main()
