"""Train the built-in model: a byte-level hybrid of Qwen3-Next's kind with its multi-token head.

    python -m experiments.train_builtin --out out/builtin --hours 2

One run on one machine, seeded; stopped and started again it goes on from its last checkpoint. Data:
Python's standard library (PSF License) and made-up tasks (``experiments/training``). Writes a model
directory (``config.json``, ``model.safetensors`` in bfloat16), the loss curve, and what was held
out: bits per byte of code at every draft depth, and of solved problems.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from engine.text.byte_tokenizer import ByteTokenizer
from experiments.provenance import provenance
from experiments.training import corpus, tasks
from experiments.training.model import Model, losses

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
"""Tokens that the multi-token head is trained to see ahead."""
DRAFT_WEIGHT = 0.3
TASK_SHARE = 0.7
"""Of the tokens; the rest is code."""
WARM_UP = 100
SAVE_EVERY = 200
EVALUATE_EVERY = 1000


class Data:
    """Batches ``[batch, length]``, drawn by step: step n is the same whenever it is asked for."""

    def __init__(self, batch: int, length: int, seed: int) -> None:
        self._batch, self._length, self._seed = batch, length, seed
        self._tokenizer = ByteTokenizer()
        self._code = np.array(
            [token for text in corpus.sources(held_out=False) for token in self._ids(text)],
            dtype=np.int16,
        )

    def batch(self, step: int) -> Tensor:
        rng = random.Random(f"{self._seed} {step}")
        rows = [
            self._task(rng) if rng.random() < TASK_SHARE else self._piece(rng)
            for _ in range(self._batch)
        ]
        return torch.tensor(np.array(rows), dtype=torch.int64)

    def held_out(self, rows: int) -> dict[str, Tensor]:
        """Kind to ``[rows, length]``."""
        code = [token for text in corpus.sources(held_out=True) for token in self._ids(text)]
        starts = np.linspace(0, len(code) - self._length, rows).astype(int)
        rng = random.Random(f"{self._seed} held out")
        return {
            "code": torch.tensor([code[s : s + self._length] for s in starts]),
            "tasks": torch.tensor([self._task(rng) for _ in range(rows)]),
        }

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def _piece(self, rng: random.Random) -> list[int]:
        start = rng.randrange(len(self._code) - self._length)
        return self._code[start : start + self._length].tolist()

    def _task(self, rng: random.Random) -> list[int]:
        template = self._tokenizer.chat_template
        assert template is not None
        row: list[int] = []
        while len(row) < self._length:
            row.extend(self._ids(tasks.sample(rng, template.render)))
        return row[: self._length]


def learning_rate(progress: float, peak: float) -> float:
    """Of a run that is ``progress`` of 1 done: flat, then down to a tenth over the last third."""
    return peak * min(1.0, 1.0 - 0.9 * (progress - 2 / 3) * 3)


class Training:
    """Model, optimisers and clock of one run; a file holds all of it."""

    def __init__(self, data: Data, path: Path, *, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Model(CONFIG)
        self.step, self.seconds = 0, 0.0
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
        """Losses of one batch in nats a token, by depth."""
        token_ids = self._data.batch(self.step)
        depth = random.Random(f"{self._seed} depth {self.step}").randint(1, DEPTH)
        ramp = min(1.0, (self.step + 1) / WARM_UP)
        for optimiser, peak in zip(self._optimisers, self._peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = ramp * learning_rate(progress, peak)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(token_ids, depth)
        found = losses(logits, token_ids)
        (found[0] + DRAFT_WEIGHT * found[1:].mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self._optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return [float(loss) for loss in found.detach()]

    @torch.inference_mode()
    def evaluate(self, rows: int) -> dict[str, float]:
        """Bits per byte by kind and depth, held out."""
        self.model.eval()
        bits = {}
        for kind, token_ids in self._data.held_out(rows).items():
            parts = [losses(self.model(part, DEPTH), part) for part in token_ids.split(8)]
            for depth, loss in enumerate(torch.stack(parts).mean(0)):
                bits[f"{kind}_{depth}"] = round(float(loss) / math.log(2), 4)
        self.model.train()
        return bits

    def save(self) -> None:
        """Whole or not at all."""
        part = self._path.with_suffix(".part")
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
            "step": self.step,
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
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]


def _is_matrix(name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and not name.startswith(("lm_head", "model.embed_tokens"))


def export(
    model: Model, folder: Path, facts: dict[str, Any], config: dict[str, Any] = CONFIG
) -> None:
    """The model directory that ``engine serve`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.to(torch.bfloat16).contiguous() for name, w in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/builtin"), help="model directory")
    parser.add_argument("--hours", type=float, default=2.0, help="of training, restarts included")
    parser.add_argument("--batch", type=int, default=2, help="sequences a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    data = Data(args.batch, args.length, args.seed)
    training = Training(data, args.out / "training.pt", seed=args.seed)
    budget = args.hours * 3600
    with tqdm(total=round(budget), unit="s", desc="training") as bar:
        bar.update(round(training.seconds))
        while training.seconds < budget:
            start = time.monotonic()
            found = training.one_step(training.seconds / budget)
            training.seconds += time.monotonic() - start
            bar.n = round(training.seconds)
            bar.set_postfix(step=training.step, loss=f"{found[0]:.3f}")
            if training.step % EVALUATE_EVERY == 0:
                row = {"step": training.step, "tokens": training.step * args.batch * args.length}
                training.curve.append(row | training.evaluate(16))
            if training.step % SAVE_EVERY == 0:
                training.save()
    training.save()
    facts = {
        "provenance": provenance(),
        "steps": training.step,
        "tokens": training.step * args.batch * args.length,
        "seconds": round(training.seconds),
        "held_out_bits_per_byte": training.evaluate(64),
        "curve": training.curve,
    }
    export(training.model, args.out, facts)
    print(json.dumps({k: facts[k] for k in ("steps", "tokens", "held_out_bits_per_byte")}))


if __name__ == "__main__":
    main()
