"""Train the built-in model: a byte-level hybrid like Qwen3-Next with its multi-token head.

    python -m experiments.training.train_builtin --out out/builtin --hours 2

Runs on one machine with a seed. A stopped run continues from its last checkpoint. Data: Python's
standard library (PSF License) and generated tasks (``experiments/training``).

Writes a model directory with ``config.json``, ``model.safetensors`` in bfloat16, and
``training.json``. The latter has the loss curve, held-out bits per byte at every draft depth, and
the share of solved tasks.

    # Install a trained model without more training:
    python -m experiments.training.train_builtin --out out/builtin --hours 0 --install
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from engine.config import BUILTIN_DIR, EngineConfig
from engine.engine import Engine
from engine.text.tokenizer import ByteTokenizer
from experiments.provenance import FIGURES, provenance
from experiments.training import corpus, evaluation, tasks
from experiments.training.model import Model, losses
from hybridcache.lab.figures import COLOURS, panels, save

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": 320,
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000.0,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "eos_token_id": [256, 258],
    "dtype": "bfloat16",
}
DEPTH = 3
"""Tokens that the multi-token head learns to predict."""
DRAFT_WEIGHT = 0.3
TASK_SHARE = 0.7
"""Share of tasks among the tokens; the rest is code."""
ANSWER_WEIGHT, DRAWN_WEIGHT, CODE_WEIGHT = 1.0, 0.1, 0.5
"""Weights of tokens in the loss. Answers follow from the text before them; random draws of a task
do not."""
WARM_UP = 100
SAVE_EVERY = 200
EVALUATE_EVERY = 1000
FILES = ("config.json", "model.safetensors", "training.json")


Row = list[tuple[int, float]]
"""Token ids, each with its weight in the loss."""


class Data:
    """Batches ``[batch, length]``. The batch of a step depends only on the seed and the step."""

    def __init__(self, batch: int, length: int, seed: int) -> None:
        self._batch, self._length, self._seed = batch, length, seed
        self._tokenizer = ByteTokenizer()
        self._code = np.array(
            [token for text in corpus.sources(held_out=False) for token in self._ids(text)],
            dtype=np.int16,
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return token ids and their weights."""
        rng = random.Random(f"{self._seed} {step}")
        rows = [
            self._task(rng) if rng.random() < TASK_SHARE else self._piece(rng)
            for _ in range(self._batch)
        ]
        both = np.array(rows)
        return torch.tensor(both[..., 0], dtype=torch.int64), torch.tensor(both[..., 1]).float()

    def held_out(self, rows: int) -> dict[str, Tensor]:
        """Return held-out token ids ``[rows, length]`` by kind."""
        code = [token for text in corpus.sources(held_out=True) for token in self._ids(text)]
        starts = np.linspace(0, len(code) - self._length, rows).astype(int)
        rng = random.Random(f"{self._seed} held out")
        return {
            "code": torch.tensor([code[s : s + self._length] for s in starts]),
            "tasks": torch.tensor([[i for i, _ in self._task(rng)] for _ in range(rows)]),
        }

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def _piece(self, rng: random.Random) -> Row:
        start = rng.randrange(len(self._code) - self._length)
        return [(i, CODE_WEIGHT) for i in self._code[start : start + self._length].tolist()]

    def _task(self, rng: random.Random) -> Row:
        template = self._tokenizer.chat_template
        assert template is not None
        row: Row = []
        while len(row) < self._length:
            for text, is_answer in tasks.parts(tasks.sample(rng, template.render)):
                weight = ANSWER_WEIGHT if is_answer else DRAWN_WEIGHT
                row += [(i, weight) for i in self._ids(text)]
        return row[: self._length]


def learning_rate(progress: float, peak: float) -> float:
    """Return the rate at ``progress``, a share of the run: constant, then falling to a tenth in the
    last third."""
    return peak * min(1.0, 1.0 - 0.9 * (progress - 2 / 3) * 3)


class Training:
    """Model, optimisers and clock of one run, stored in one file."""

    def __init__(self, data: Data, path: Path, *, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Model(CONFIG)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.curve: list[dict[str, float]] = []
        self._data, self._path, self._seed = data, path, seed
        hidden = [p for n, p in self.model.named_parameters() if _is_matrix(n, p)]
        rest = [p for n, p in self.model.named_parameters() if not _is_matrix(n, p)]
        self._peaks = (0.012, 0.002)
        self._optimisers = (
            torch.optim.Muon(hidden, lr=self._peaks[0], weight_decay=0.05),
            torch.optim.AdamW(rest, lr=self._peaks[1], betas=(0.9, 0.95), weight_decay=0.0),
        )
        if path.exists():
            self._load()

    def one_step(self, progress: float) -> list[float]:
        """Train on one batch. Returns the losses in nats per token, by depth."""
        token_ids, weights = self._data.batch(self.step)
        depth = random.Random(f"{self._seed} depth {self.step}").randint(1, DEPTH)
        ramp = min(1.0, (self.step + 1) / WARM_UP)
        for optimiser, peak in zip(self._optimisers, self._peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = ramp * learning_rate(progress, peak)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(token_ids, depth)
        found = losses(logits, token_ids, weights)
        (found[0] + DRAFT_WEIGHT * found[1:].mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self._optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += token_ids.numel()
        return [float(loss) for loss in found.detach()]

    @torch.inference_mode()
    def evaluate(self, rows: int) -> dict[str, float]:
        """Return held-out bits per byte, by kind and depth."""
        self.model.eval()
        bits = {}
        for kind, token_ids in self._data.held_out(rows).items():
            parts = [losses(self.model(part, DEPTH), part) for part in token_ids.split(8)]
            for depth, loss in enumerate(torch.stack(parts).mean(0)):
                bits[f"{kind}_{depth}"] = round(float(loss) / math.log(2), 4)
        self.model.train()
        return bits

    def save(self) -> None:
        """Write the state to the file, atomically."""
        part = self._path.with_suffix(".part")
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        torch.save(state, part)
        part.replace(self._path)

    def _load(self) -> None:
        state = torch.load(self._path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.curve = state["seconds"], state["curve"]


def _is_matrix(name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and not name.startswith(("lm_head", "model.embed_tokens"))


def export(
    model: Model, folder: Path, facts: dict[str, Any], config: dict[str, Any] = CONFIG
) -> None:
    """Write the model directory for ``engine serve``."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.to(torch.bfloat16).contiguous() for name, w in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def finish(training: Training, out: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Export the model, evaluate the exported directory with the engine, and write the facts."""
    facts: dict[str, Any] = {
        "provenance": provenance(),
        "data": {
            "code": f"the standard library of Python {platform.python_version()}, one module in "
            f"{corpus.HELD_OUT} held out; PSF License",
            "tasks": "generated from a seed: word problems, sums, look-ups, copying, chats, tool "
            "calls (experiments/training/tasks.py); part of this project",
            "task_share": TASK_SHARE,
        },
        "seed": settings.seed,
        "steps": training.step,
        "tokens": training.tokens,
        "seconds": round(training.seconds),
        "parameters": sum(weight.numel() for weight in training.model.parameters()),
        "held_out_bits_per_byte": training.evaluate(64),
        "curve": training.curve,
    }
    export(training.model, out, facts)
    engine = Engine(EngineConfig(model=str(out), device="cpu", cache_gib=0.25))
    facts["questions"] = settings.questions
    facts["solved"] = evaluation.solved(engine, settings.questions)
    export(training.model, out, facts)
    return facts


def install(out: Path) -> None:
    """Copy the model in ``out`` into the engine as the built-in model, and draw its curve."""
    BUILTIN_DIR.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(out / name, BUILTIN_DIR / name)
    draw(json.loads((out / "training.json").read_text(encoding="utf-8")))


def draw(facts: Mapping[str, Any]) -> None:
    """Draw held-out bits per byte over trained tokens, one line per depth, and the share of solved
    tasks."""
    figure, axes = panels(3, columns=3)
    rows = [*facts["curve"], facts["held_out_bits_per_byte"] | {"tokens": facts["tokens"]}]
    for axis, kind in zip(axes, ("code", "tasks"), strict=False):
        for depth, colour in zip(range(DEPTH + 1), COLOURS, strict=False):
            axis.plot(
                [row["tokens"] / 1e6 for row in rows],
                [row[f"{kind}_{depth}"] for row in rows],
                color=colour,
                marker="o",
                markersize=3,
                linewidth=1.4,
                label="next byte" if not depth else f"byte {depth + 1} ahead, by the head",
            )
        axis.set_ylim(bottom=0)
        axis.set_xlabel("trained tokens, millions")
        axis.set_ylabel("held-out bits per byte")
        axis.set_title(kind, fontsize=9)
    shares = facts["solved"]
    axes[2].barh(list(shares), [100 * share for share in shares.values()], color=COLOURS[0])
    axes[2].invert_yaxis()
    axes[2].set_xlim(0, 100)
    axes[2].set_xlabel(f"solved of {facts['questions']}, %")
    caption = (
        "The built-in model on held-out modules of Python's standard library and on newly "
        "generated tasks. The last point has more rows than the others. Solved: greedy "
        f"answers in bfloat16, word problems after {evaluation.SHOTS} solved ones."
    )
    save(figure, axes, FIGURES / "train_builtin.png", caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/builtin"), help="model directory")
    parser.add_argument(
        "--hours",
        type=float,
        default=2.0,
        help="hours of training, restarts included; 0 only evaluates and exports",
    )
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, default=200, help="questions per kind at the end")
    parser.add_argument("--install", action="store_true", help="install it as the built-in model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    data = Data(args.batch, args.length, args.seed)
    training = Training(data, args.out / "training.pt", seed=args.seed)
    train(training, args)
    facts = finish(training, args.out, args)
    if args.install:
        install(args.out)
    names = ("steps", "tokens", "held_out_bits_per_byte", "solved")
    print(json.dumps({name: facts[name] for name in names}))


def train(training: Training, args: argparse.Namespace) -> None:
    """Train until the hours are used up."""
    budget = args.hours * 3600
    if training.seconds >= budget:
        return
    with tqdm(total=round(budget), unit="s", desc="training") as bar:
        bar.update(round(training.seconds))
        while training.seconds < budget:
            start = time.monotonic()
            found = training.one_step(training.seconds / budget)
            training.seconds += time.monotonic() - start
            bar.n = round(training.seconds)
            bar.set_postfix(step=training.step, loss=f"{found[0]:.3f}")
            if training.step % EVALUATE_EVERY == 0:
                row = {"step": training.step, "tokens": training.tokens}
                training.curve.append(row | training.evaluate(16))
            if training.step % SAVE_EVERY == 0:
                training.save()
    training.save()


if __name__ == "__main__":
    main()
