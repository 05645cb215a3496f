"""What do checkpoints in fewer bits cost in a model's answers, and what do they gain in hits?

    python -m experiments.study_checkpoint_dtype

Cost: held-out modules and word problems on the built-in model. Each text is computed to its end
from a checkpoint half way; the divergence (KL, nats a token) is of the next-byte distributions
after it from those of a run that resumed from nothing, and the greedy choice that changed is
counted. Gain: the simulator with Qwen3-Next's sizes, whose checkpoints weigh what the format says.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from engine.config import TILE, EngineConfig
from engine.run.model_runner import ModelRunner
from engine.schedule.batch import Batch, Segment
from engine.text.byte_tokenizer import ByteTokenizer
from experiments.provenance import FIGURES, RESULTS, write_json_lines
from experiments.training import corpus, tasks
from hybridcache import ModelGeometry, SimulationResult, simulate
from hybridcache.lab.figures import COLOURS, panels, save, size_axis
from hybridcache.lab.report import text_table

WORDS = (
    "auto",
    "bfloat16",
    "int8:head",
    "int8:row",
    "int8:column",
    "fp8:head",
    "fp8:row",
    "fp8:column",
)
SIMULATED = ("auto", "bfloat16", "int8:head", "int8:row")
GOAL = 0.01
"""Nats a token that a format may cost."""


def texts(kind: str, count: int, length: int) -> list[np.ndarray]:
    """Held-out bytes of a kind, each ``length`` long."""
    encode = ByteTokenizer().encode
    if kind == "code":
        code = encode("".join(corpus.sources(held_out=True)))
        starts = np.linspace(0, len(code) - length, count).astype(int)
        return [np.array(code[start : start + length], np.int32) for start in starts]
    rng, found = random.Random("checkpoint dtype"), []
    for _ in range(count):
        text = ""
        while len(text) < length:
            prompt, problem = tasks.few_shot(rng, 4)
            text += f"{prompt} {problem.working}\n"
        found.append(np.array(encode(text)[:length], np.int32))
    return found


class Resumer:
    """Log-probabilities of a text's second half, computed from a checkpoint at its middle."""

    def __init__(self, word: str) -> None:
        config = EngineConfig(
            device="cpu", checkpoint_dtype=word, cache_gib=0.05, max_running=2, draft="none"
        )
        self._runner = ModelRunner(config)
        self.state_bytes = self._runner.memory.state_bytes

    def logprobs(self, token_ids: np.ndarray) -> torch.Tensor:
        """float64 ``[half, vocab]``."""
        runner = self._runner
        half = len(token_ids) // 2 // TILE * TILE
        memory = runner.memory
        # Rows from the first on; slots from the last down, which lie over none of them.
        own, slot = (0, memory.num_slots - 1)
        if not memory.owns_states:
            own = memory.num_slots - 2
        rows = np.arange(len(token_ids), dtype=np.int32)
        first = Segment(0, own, token_ids[:half], 0, False, ((half, slot),), "none")
        runner.forward(Batch((first,), (), ((0, 0, rows),)))
        second = Segment(0, own, token_ids[half:], half, False, (), "all")
        logits = runner.forward(Batch((second,), ((slot, own),)))
        return logits[:, : ByteTokenizer.vocab_size].double().log_softmax(-1)


def costs(count: int, length: int) -> list[dict[str, Any]]:
    """A record for each format and kind of text."""
    records: list[dict[str, Any]] = []
    exact: dict[str, list[torch.Tensor]] = {}
    asked = {kind: texts(kind, count, length) for kind in ("code", "problems")}
    for word in WORDS:
        resumer = Resumer(word)
        for kind, some in asked.items():
            found = [resumer.logprobs(text) for text in some]
            expected = exact.setdefault(kind, found)
            pairs = list(zip(expected, found, strict=True))
            divergence = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
            changed = torch.cat([p.argmax(-1) != q.argmax(-1) for p, q in pairs])
            near = torch.cat([(p.exp() * (p - q)).sum(-1)[:TILE] for p, q in pairs])
            records.append(
                {
                    "checkpoint_dtype": word,
                    "text": kind,
                    "state_bytes": resumer.state_bytes,
                    "kl_mean": float(divergence.mean()),
                    "kl_first_64": float(near.mean()),
                    "kl_max": float(divergence.max()),
                    "choices_changed": float(changed.double().mean()),
                    "below_goal": float(divergence.mean()) < GOAL,
                }
            )
    return records


def gains(trace: str, gib: str) -> dict[str, SimulationResult]:
    """Hits of LRU over memory, by format, with Qwen3-Next's sizes."""
    return {
        word: simulate(
            trace,
            model=ModelGeometry.preset("qwen3-next", checkpoint_dtype=word),
            gib=gib,
            policy=["lru"],
        )
        for word in SIMULATED
    }


def draw(records: Sequence[Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> None:
    """What each format costs; what it gains, a panel a trace."""
    figure, axes = panels(1 + len(found))
    words = [word for word in WORDS if word != "auto"]
    for colour, kind in zip(COLOURS, ("code", "problems"), strict=False):
        costs_of = {r["checkpoint_dtype"]: r["kl_mean"] for r in records if r.get("text") == kind}
        axes[0].plot(
            [costs_of[word] for word in words], words, "o", color=colour, label=f"KL on {kind}"
        )
    axes[0].axvline(GOAL, color="grey", linestyle=":", label="what may be lost")
    axes[0].set_xscale("log")
    axes[0].set_xlabel("KL, nats a token")
    for axis, (trace, results) in zip(axes[1:], found.items(), strict=True):
        for colour, (word, result) in zip(COLOURS[2:], results.items(), strict=False):
            axis.plot(
                [run.gib for run in result.runs],
                [100 * run.token_hit_rate for run in result.runs],
                color=colour,
                label=f"{word} ({result.geometry.state_bytes / 2**20:.0f} MiB)",
            )
        size_axis(axis)
        axis.set_ylim(0, 100)
        axis.set_ylabel("token hit rate, %")
        axis.set_title(trace, fontsize=9)
    caption = (
        "Left: the built-in model, whose second half of a text is computed from a checkpoint in "
        "each format. Right: LRU on the arena with Qwen3-Next's sizes; running states lie beside "
        "it where checkpoints have a format of their own."
    )
    save(figure, axes, FIGURES / "study_checkpoint_dtype.png", caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=8, help="of each kind")
    parser.add_argument("--length", type=int, default=1024, help="bytes of a text")
    parser.add_argument("--traces", default="chat,resend", help="words, commas between")
    parser.add_argument("--gib", default="1:16:7", help="sizes to simulate")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    records = costs(options.texts, options.length)
    rows = [
        [r["checkpoint_dtype"], r["text"], f"{r['state_bytes']:,}"]
        + [f"{r[name]:.2g}" for name in ("kl_mean", "kl_first_64", "kl_max", "choices_changed")]
        for r in records
    ]
    header = ["format", "text", "bytes", "KL", "KL, first 64", "KL, most", "choices changed"]
    print(text_table(header, rows), end="\n\n", flush=True)
    found = {trace: gains(trace, options.gib) for trace in options.traces.split(",")}
    for trace, results in found.items():
        for word, result in results.items():
            print(trace, word, *(f"{100 * run.token_hit_rate:.1f}" for run in result.runs))
            records += [
                {
                    "trace": trace,
                    "checkpoint_dtype": word,
                    "gib": run.gib,
                    "token_hit_rate": run.token_hit_rate,
                    "state_bytes": result.geometry.state_bytes,
                }
                for run in result.runs
            ]
    write_json_lines(RESULTS / "study_checkpoint_dtype.jsonl", records, vars(options))
    draw(records, found)


if __name__ == "__main__":
    main()
