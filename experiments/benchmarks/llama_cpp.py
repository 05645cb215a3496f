"""llama.cpp for comparison: export of checkpoints to GGUF, and forward passes.

Uses ``llama-cpp-python``. `make llama` builds it into ``out/llama`` (minutes). Only this module
uses that folder.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from experiments.provenance import ROOT

FOLDER = ROOT / "out" / "llama"
ABSENT = "llama.cpp is not built. Run `make llama` (some minutes)."

RENAMED = {
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def load() -> tuple[ModuleType, ModuleType] | None:
    """Return the modules ``llama_cpp`` and ``gguf``, or None if they are not built."""
    if not (FOLDER / "llama_cpp").is_dir():
        return None
    sys.path.append(str(FOLDER))
    return importlib.import_module("llama_cpp"), importlib.import_module("gguf")


def export(gguf: ModuleType, model_dir: Path, path: Path, format: str) -> None:
    """Write a dense Qwen3.5 checkpoint as a GGUF file.

    Matrices are stored as ``F32``, ``BF16`` or ``Q8_0``, other tensors in float32.
    """
    config = json.loads((model_dir / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen35")
    _describe(writer, config)
    kind = getattr(gguf.GGMLQuantizationType, format)
    for name, tensor in _tensors(model_dir, config):
        is_matrix = tensor.ndim == 2 and "conv1d" not in name
        values = np.ascontiguousarray(tensor.float().numpy())
        if is_matrix and format != "F32":
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "head_count": "num_attention_heads",
    "head_count_kv": "num_key_value_heads",
    "key_length": "head_dim",
    "value_length": "head_dim",
    "layer_norm_rms_eps": "rms_norm_eps",
    "ssm_conv_kernel": "linear_conv_kernel_dim",
    "ssm_state_size": "linear_key_head_dim",
    "ssm_group_count": "linear_num_key_heads",
    "ssm_time_step_rank": "linear_num_value_heads",
    "vocab_size": "vocab_size",
}
"""Field of the GGUF file -> field of config.json."""


def _describe(writer: Any, config: dict[str, Any]) -> None:
    for name, field in FIELDS.items():
        getattr(writer, f"add_{name}")(config[field])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([11, 11, 10, 0])  # For images. Text has one position.
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    writer.add_full_attention_interval(4)
    writer.add_tokenizer_model("none")


def _tensors(model_dir: Path, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(model_dir.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            place = name.removeprefix("model.").removeprefix("language_model.")
            prefix = ""
            if place.startswith("layers."):
                _, layer, place = place.split(".", 2)
                prefix = f"blk.{layer}."
            if place == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            if place == "linear_attn.A_log":
                tensor = -tensor.float().exp()
            elif place.endswith("norm.weight") and place != "linear_attn.norm.weight":
                tensor = tensor.float() + 1
            yield prefix + RENAMED[place], _tiled(place, tensor.squeeze(), config)


def _tiled(place: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Reorder value heads from grouped by key head (the checkpoint) to interleaved (GGUF)."""
    part = place.removeprefix("linear_attn.").removesuffix(".weight")
    heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    size = config["linear_value_head_dim"]
    keys = 2 * heads * config["linear_key_head_dim"]
    order = torch.arange(value_heads).view(heads, -1).T.flatten()
    rows = (order[:, None] * size + torch.arange(size)).flatten()
    if part in ("in_proj_b", "in_proj_a", "A_log", "dt_bias"):
        return tensor[order]
    if part == "in_proj_z":
        return tensor[rows]
    if part in ("in_proj_qkv", "conv1d"):
        return torch.cat([tensor[:keys], tensor[keys:][rows]])
    return tensor[:, rows] if part == "out_proj" else tensor


class CrashError(Exception):
    """Raised if the process of llama.cpp ended."""


class Remote:
    """`Model` in a second process, which may crash. Methods return their seconds there."""

    def __init__(self, path: Path, **sizes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, path, sizes), daemon=True)
        self._process.start()
        end.close()
        self._receive()

    def clear(self) -> float:
        return self._call("clear")[0]

    def forward(self, pieces: Sequence[tuple[int, int, Sequence[int]]]) -> float:
        return self._call("forward", pieces)[0]

    def logits(self) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = self._call("logits")[1]
        return found

    def close(self) -> None:
        """End the process, which frees the model."""
        self._line.close()
        self._process.join(timeout=10)
        self._process.kill()

    def _call(self, name: str, *arguments: Any) -> tuple[float, Any]:
        with suppress(BrokenPipeError):  # `_receive` reports the end of the process.
            self._line.send((name, arguments))
        return self._receive()

    def _receive(self) -> tuple[float, Any]:
        try:
            seconds, result = self._line.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            reason = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise CrashError(f"the other side crashed ({reason})") from None
        return seconds, result


def _serve(line: Connection, path: Path, sizes: dict[str, int]) -> None:
    """Call methods of a model as they are received, until the line is closed."""
    modules = load()
    assert modules is not None, ABSENT
    model = Model(modules[0], path, **sizes)
    line.send((0.0, None))
    with suppress(EOFError):
        while True:
            name, arguments = line.recv()
            start = time.perf_counter()
            result = getattr(model, name)(*arguments)
            line.send((time.perf_counter() - start, result))


class Model:
    """GGUF file with a context for several sequences."""

    def __init__(
        self, llama: ModuleType, path: Path, *, streams: int, room: int, threads: int
    ) -> None:
        self._llama = llama
        llama.llama_backend_init()
        self._quiet = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._quiet, None)
        self._model = llama.llama_model_load_from_file(
            str(path).encode(), llama.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = streams * room, streams
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no context for {path.name}")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(512, 0, 1)

    def clear(self) -> None:
        """Remove all sequences."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def forward(self, pieces: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Compute (sequence, position, tokens) pieces of at most 512 tokens in total, with logits
        of each piece's last token."""
        batch, at = self._batch, 0
        for sequence, start, tokens in pieces:
            for offset, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = token, start + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = offset == len(tokens) - 1
                at += 1
        batch.n_tokens = at
        if self._llama.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode a batch")

    def logits(self) -> npt.NDArray[np.float32]:
        """Return the logits of the last piece, ``[vocab]``."""
        found = self._llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(found, (self._vocab_size,)).copy()
