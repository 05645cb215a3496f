"""Models of benchmarks: random weights, and steps of a runner without an engine around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.runner.model_runner import ModelRunner
from engine.schedule.batch import Batch, Segment

GEOMETRY_7M: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000.0,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 0,
    "max_position_embeddings": 32768,
    "eos_token_id": [256, 258],
    "dtype": "float32",
}
"""Small byte-level hybrid like Qwen3-Next, about twice the size of the built-in one."""
GEOMETRY_530M = {
    "model_type": "qwen3_5_text",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""Qwen3.5-0.8B's layers with a smaller vocabulary."""
NUM_SLOTS = 9
"""Number of state slots that are used, from the first on."""


def make_checkpoint(config: dict[str, Any], dtype: str, directory: str) -> Any:
    """Save a random transformers model to ``directory`` and return it."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    settings = {name: value for name, value in config.items() if name != "model_type"}
    loaded = transformers.AutoConfig.for_model(config["model_type"], **{**settings, "dtype": dtype})
    model = transformers.AutoModelForCausalLM.from_config(loaded, dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
    return model.eval()


def prefill(runner: ModelRunner, tokens: np.ndarray) -> None:
    """Compute ``tokens`` as one request. Its KV rows are the first after the slots."""
    rows = kv_rows(runner, 0, len(tokens))
    runner.forward(Batch((Segment(0, 0, tokens, 0, False),), (), ((0, 0, rows),)))


def kv_rows(runner: ModelRunner, start: int, end: int) -> npt.NDArray[np.int32]:
    """Return KV indices [start, end), counted from the first row that does not overlap the
    ``NUM_SLOTS`` slots."""
    return np.arange(start, end, dtype=np.int32) + NUM_SLOTS * runner.memory.slab_rows


class Decode:
    """Decode loop of ``streams`` requests with the same prompt."""

    def __init__(self, runner: ModelRunner, prompt: np.ndarray, streams: int) -> None:
        self._runner, self._streams, self._length = runner, streams, len(prompt)
        room = len(prompt) + 128
        writes = tuple(
            (row, 0, kv_rows(runner, row * room, (row + 1) * room)) for row in range(streams)
        )
        segments = tuple(Segment(row, row, prompt, 0, False) for row in range(streams))
        runner.forward(Batch(segments, (), writes))

    def step(self) -> torch.Tensor:
        """Compute one token per request. Returns logits ``[streams, vocab]``."""
        token = np.array([5], dtype=np.int32)
        segments = (Segment(row, row, token, self._length, True) for row in range(self._streams))
        logits = self._runner.forward(Batch(tuple(segments)))
        self._length += 1
        return logits
