"""Measure the effect of low-bit checkpoints on a model's answers.

    python -m experiments.studies.checkpoint_dtype
    python -m experiments.studies.checkpoint_dtype --families

The cost is measured on held-out modules and word problems with the built-in model. The second half
of each text is computed from a checkpoint at its middle. The cost is the divergence (KL, nats per
token) of the next-byte distributions from those of a run without checkpoints, and the number of
changed greedy choices. ``hybridcache simulate --checkpoint-dtype`` has the gain in hits.

``--families`` measures a small model of every family with states. Heads and states have the sizes
of the published models. Weights are drawn as in transformers and scaled so that every block adds as
much to the residual stream as the embedding. The skip weight of state spaces is zero, so no
information bypasses the states. The figures are thus those of models that depend strongly on their
states.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from engine import Engine, EngineConfig, SamplingParams
from engine.config import TILE
from engine.engine import load_runner
from engine.runner.sampler import Sampler
from engine.schedule.scheduler import Batch, Segment
from engine.text.tokenizer_files import HFTokenizer
from experiments import texts
from experiments.studies.common import keep, plain_table

GROUPS = ("head", "row", "column")
DTYPES = ("auto", "bfloat16", *(f"{kind}:{of}" for kind in ("int8", "fp8") for of in GROUPS))
FORMATS = ("bfloat16", "int8:head", "int8:row", "int8:column", "fp8:column")
"""Formats that are measured for every family."""
NUM_TEXTS, NUM_TOKENS = 8, 1024
"""Number of texts of each kind, and the length of one."""


def pieces(kind: str, count: int = NUM_TEXTS, length: int = NUM_TOKENS) -> list[np.ndarray]:
    """Return ``count`` held-out texts of a kind, each with ``length`` bytes."""
    encode = HFTokenizer().encode
    if kind == "code":
        code = encode("".join(texts.sources(held_out=True)))
        starts = np.linspace(0, len(code) - length, count).astype(int)
        return [np.array(code[start : start + length], np.int32) for start in starts]
    rng, found = random.Random("checkpoint dtype"), []
    for _ in range(count):
        text = ""
        while len(text) < length:
            prompt, problem = texts.few_shot(rng, 4)
            text += f"{prompt} {problem.working}\n"
        found.append(np.array(encode(text)[:length], np.int32))
    return found


class Resumer:
    """Runner that computes the second half of a text from a checkpoint at its middle."""

    def __init__(self, dtype: str, model: str | None = None, gib: float = 0.05) -> None:
        self.config = EngineConfig(
            model=model,
            device="cpu",
            checkpoint_dtype=dtype,
            cache_gib=gib,
            max_running=2,
            draft="none",
        )
        self._runner = load_runner(self.config)
        self._vocab_size = self._runner.vocab_size if model is None else VOCAB
        self.state_bytes = self._runner.memory.state_bytes

    def logprobs(self, token_ids: np.ndarray) -> torch.Tensor:
        """Return the log-probabilities of the second half, float64 ``[half, vocab]``."""
        runner = self._runner
        half = len(token_ids) // 2 // TILE * TILE
        memory = runner.memory
        # Rows start at the first. Slots are the last ones, which do not overlap these rows.
        state_slot, slot = (0, memory.num_slots - 1)
        if not memory.owns_states:
            state_slot = memory.num_slots - 2
        rows = np.arange(len(token_ids), dtype=np.int32)
        first = Segment(0, state_slot, token_ids[:half], 0, False, ((half, slot),), 0)
        runner.forward(Batch((first,), (), ((0, 0, rows),)))
        second = Segment(0, state_slot, token_ids[half:], half, False, (), len(token_ids) - half)
        logits = runner.forward(Batch((second,), ((slot, state_slot),)))
        return logits[:, : self._vocab_size].double().log_softmax(-1)

    def greedy_answers(self, prompts: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
        """Return the continuation of each text, resumed from a checkpoint near its end."""
        sampler = Sampler()
        engine = Engine(self.config, runner=load_runner(self.config), sampler=sampler)
        answer = SamplingParams(temperature=0.0, max_tokens=len(prompts[0]) // 16, ignore_eos=True)
        engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        outputs = engine.generate(prompts, answer)
        assert all(output.cached_len for output in outputs)
        return [tuple(output.token_ids) for output in outputs]


def compare(
    dtype: str, resumer: Resumer, expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Return the cost of a format on some texts."""
    pairs = list(zip(expected, found, strict=True))
    divergence = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
    changed = torch.cat([p.argmax(-1) != q.argmax(-1) for p, q in pairs])
    return {
        "checkpoint_dtype": dtype,
        "state_bytes": resumer.state_bytes,
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "choices_changed": float(changed.double().mean()),
    }


def costs() -> list[dict[str, Any]]:
    """Return one record per format and kind of text."""
    records: list[dict[str, Any]] = []
    exact: dict[str, list[torch.Tensor]] = {}
    texts_of = {kind: pieces(kind) for kind in ("code", "problems")}
    for dtype in DTYPES:
        resumer = Resumer(dtype)
        for kind, batch in texts_of.items():
            found = [resumer.logprobs(text) for text in batch]
            expected = exact.setdefault(kind, found)
            records.append({"text": kind} | compare(dtype, resumer, expected, found))
    return records


VOCAB = 512
LOGIT_STD = 3.0
SHARED: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512}
SHARED |= {"num_hidden_layers": 4}
SHARED |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
SHARED |= {"bos_token_id": None, "pad_token_id": None}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128}
DELTA |= {"linear_value_head_dim": 128, "head_dim": 64}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2}
KDA = {"linear_num_heads": 2, "linear_head_dim": 128, "kv_lora_rank": 64, "num_experts": 1}
KDA |= {"num_key_value_heads": 4, "first_k_dense_replace": 9, "num_experts_per_token": 1}
KDA |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
SORTS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": DELTA | {"layer_types": SORTS},
    "olmo_hybrid": DELTA | {"layer_types": SORTS, "linear_num_key_heads": 4},
    "kimi_linear": KDA | {"layer_types": SORTS},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 512, "head_dim": 64},
    "granitemoehybrid": MAMBA
    | {"layer_types": SORTS, "num_local_experts": 0}
    | {"shared_intermediate_size": 512, "attention_multiplier": 0.125},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 128}
    | {"n_groups": 1, "head_dim": 64}
    | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"]},
    "jamba": {"num_experts": 1, "attn_layer_period": 4, "attn_layer_offset": 3},
}
"""Settings of the small model of each ``model_type``, in addition to ``SHARED``."""


def write_model(model_type: str, directory: Path) -> str:
    """Write a small model of a family, with seeded weights. Returns its path."""
    import transformers

    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **(SHARED | MODELS[model_type]))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(".D"):
            parameter.zero_()

    def scale_to_one(module: Any, _: Any, out: torch.Tensor) -> torch.Tensor:
        factor = 1.0 / out.square().mean().sqrt()
        module.weight.mul_(factor)
        return out * factor

    last = ("embed_tokens", "embeddings", "out_proj", "o_proj", "down_proj", "output_linear")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in last:
            module.register_forward_hook(scale_to_one)
    logits = model(torch.randint(0, VOCAB, (1, 512)), use_cache=False).logits
    model.lm_head.weight.mul_(LOGIT_STD / logits.std())
    model.save_pretrained(directory)
    return str(directory)


def family_costs() -> list[dict[str, Any]]:
    """Return one record per family and format: divergence after a checkpoint, and changed greedy
    answers.

    Answers have a sixteenth of the length of the texts.
    """
    records: list[dict[str, Any]] = []
    rng = np.random.default_rng(3)
    batch = [rng.integers(0, VOCAB, NUM_TOKENS).astype(np.int32) for _ in range(NUM_TEXTS)]
    for model_type in MODELS:
        exact: list[torch.Tensor] = []
        answers: list[list[tuple[int, ...]]] = []
        with TemporaryDirectory() as folder:
            model = write_model(model_type, Path(folder))
            for dtype in ("auto", *FORMATS):
                resumer = Resumer(dtype, model, 0.25)
                found = [resumer.logprobs(text) for text in batch]
                exact = exact or found
                answers.append(resumer.greedy_answers(batch))
                changed = sum(a != b for a, b in zip(answers[0], answers[-1], strict=True))
                record = {"family": model_type} | compare(dtype, resumer, exact, found)
                records.append(record | {"answers_changed": changed, "answers": len(batch)})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", action="store_true", help="measure the cost of every family")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    records = family_costs() if options.families else costs()
    name = f"study_checkpoint_{'families' if options.families else 'dtype'}"
    keep(name, records, table=plain_table)


if __name__ == "__main__":
    main()
