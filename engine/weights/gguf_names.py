"""Weights of models in GGUF files, with published names.

The changes of llama.cpp's converter are undone: by the order of rows and columns in quantised
matrices, and by arithmetic in small tensors. Source: ``conversion/*.py`` of
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch

from engine.weights.parameters import Source
from engine.weights.tensor_files import WeightsError
from hybridcache.geometry.gguf import GGML_TYPES, GgufFile, StoredTensor
from hybridcache.geometry.gguf_config import BLOCK_NAME, GgufModel
from hybridcache.geometry.sizes import ModelError
from hybridcache.geometry.units import counted, enumerated
from kernels.linear import blocks
from kernels.linear.formats import Matrix, Plain

Piece = tuple[str, Matrix, torch.Tensor | None]
"""Word, stored tensor with at least two dimensions, and the file row of each row of the model, or
None if the order is the same."""
Orders = Mapping[str, Mapping[str, torch.Tensor]]
"""Words that a tensor stands for, each with the file row of each row of the model. Words that are
missing keep their order. ``columns`` has the order of columns by word."""
FLOAT32 = Plain(torch.float32)
SMALL = re.compile(r"ssm_(a|d|norm|conv1d(_[qkv])?)|shortconv\.conv|ffn_gate_inp_shexp")
"""Words of tensors with several dimensions that are changed by arithmetic or get another shape."""
FORMATS = {GGML_TYPES[number].name: format for number, format in blocks.GGML_TYPES.items()}
"""Formats by ggml's name of the type."""
OTHER_PARTS = {"v.": "visual.", "mm.": "visual.", "mtp.": "mtp."}
"""Beginnings of names of other parts in files of Ollama's converter, and of the published names
by which they are skipped."""
ROPE_FACTORS, ONE = "rope_freqs.weight", np.float32(1).tobytes()
"""Tensor with a factor of each rotary frequency. Factors of 1 are ignored."""
MOST_EXPERTS, MOST_WEIGHTS, MOST_ROWS = 4096, 1 << 17, 1 << 20
"""Limits of experts per layer, of weights of a model, and of rows in another order."""


def _names(*texts: str) -> dict[str, str]:
    """Map words of GGUF, each followed by the name in a layer of the model."""
    words = " ".join(texts).split()
    return dict(zip(words[::2], words[1::2], strict=True))


ATTENTION = "attn_q {0}.q_proj attn_k {0}.k_proj attn_v {0}.v_proj attn_output {0}.o_proj"
MLP = "ffn_gate{1} {0}.gate_proj ffn_up{1} {0}.up_proj ffn_down{1} {0}.down_proj"
W123 = "ffn_gate{1} {0}.w1 ffn_up{1} {0}.w3 ffn_down{1} {0}.w2"
JOINED = "ffn_gate{1} {0}.input_linear ffn_up{1} {0}.input_linear ffn_down{1} {0}.output_linear"
MAMBA = """
    ssm_in {0}.in_proj ssm_conv1d {0}.conv1d ssm_dt.bias {0}.dt_bias ssm_a {0}.A_log
    ssm_d {0}.D ssm_norm {0}.norm ssm_out {0}.out_proj"""
NORMS = "attn_norm input_layernorm ffn_norm post_attention_layernorm"
QWEN3 = _names(
    NORMS,
    ATTENTION.format("self_attn"),
    "attn_q_norm self_attn.q_norm attn_k_norm self_attn.k_norm",
    MLP.format("mlp", ""),
)
QWEN3_5 = QWEN3 | _names(
    """
    post_attention_norm post_attention_layernorm
    attn_qkv linear_attn.in_proj_qkv attn_gate linear_attn.in_proj_z
    ssm_beta linear_attn.in_proj_b ssm_alpha linear_attn.in_proj_a
    ssm_conv1d linear_attn.conv1d ssm_dt.bias linear_attn.dt_bias ssm_a linear_attn.A_log
    ssm_norm linear_attn.norm ssm_out linear_attn.out_proj
    ffn_gate_inp mlp.gate ffn_gate_inp_shexp mlp.shared_expert_gate""",
    MLP.format("mlp.shared_expert", "_shexp"),
    MLP.format("mlp.experts.{}", "_exps"),
)
GRANITE = _names(
    NORMS,
    ATTENTION.format("self_attn"),
    MAMBA.format("mamba"),
    "ffn_gate_inp block_sparse_moe.router.layer",
    JOINED.format("block_sparse_moe.experts.{}", "_exps"),
    JOINED.format("shared_mlp", ""),
    JOINED.format("shared_mlp", "_shexp"),
)
NEMOTRON = _names(
    "attn_norm norm",
    ATTENTION.format("mixer"),
    MAMBA.format("mixer"),
    "ffn_gate_inp mixer.gate exp_probs_b.bias mixer.gate.e_score_correction_bias",
    "ffn_latent_down mixer.fc1_latent_proj ffn_latent_up mixer.fc2_latent_proj",
    MLP.format("mixer", ""),
    MLP.format("mixer.shared_experts", "_shexp"),
    MLP.format("mixer.experts.{}", "_exps"),
)
FALCON = _names(
    "attn_norm input_layernorm ffn_norm pre_ff_layernorm",
    ATTENTION.format("self_attn"),
    MAMBA.format("mamba"),
    MLP.format("feed_forward", ""),
)
JAMBA = FALCON | _names(
    """
    ssm_x mamba.x_proj ssm_dt mamba.dt_proj ssm_dt.bias mamba.dt_proj.bias
    ssm_dt_norm mamba.dt_layernorm ssm_b_norm mamba.b_layernorm ssm_c_norm mamba.c_layernorm
    ffn_gate_inp feed_forward.router""",
    MLP.format("feed_forward.experts.{}", "_exps"),
)
LFM2 = _names(
    "attn_norm operator_norm ffn_norm ffn_norm",
    ATTENTION.replace("o_proj", "out_proj").format("self_attn"),
    """
    attn_q_norm self_attn.q_layernorm attn_k_norm self_attn.k_layernorm
    shortconv.conv conv.conv shortconv.in_proj conv.in_proj shortconv.out_proj conv.out_proj
    ffn_gate_inp feed_forward.gate exp_probs_b.bias feed_forward.expert_bias""",
    W123.format("feed_forward", ""),
    W123.format("feed_forward.experts.{}", "_exps"),
)
KIMI = _names(
    NORMS,
    ATTENTION.format("self_attn"),
    """
    ssm_conv1d_q self_attn.q_conv1d ssm_conv1d_k self_attn.k_conv1d ssm_conv1d_v self_attn.v_conv1d
    ssm_f_a self_attn.f_a_proj ssm_f_b self_attn.f_b_proj ssm_g_a self_attn.g_a_proj
    ssm_g_b self_attn.g_b_proj ssm_beta self_attn.b_proj ssm_a self_attn.A_log
    ssm_dt.bias self_attn.dt_bias ssm_norm self_attn.o_norm
    attn_kv_a_mqa self_attn.kv_a_proj_with_mqa attn_kv_a_norm self_attn.kv_a_layernorm
    attn_kv_b self_attn.kv_b_proj attn_k_b self_attn.kv_b_proj attn_v_b self_attn.kv_b_proj
    ffn_gate_inp block_sparse_moe.gate
    exp_probs_b.bias block_sparse_moe.gate.e_score_correction_bias""",
    MLP.format("mlp", ""),
    MLP.format("block_sparse_moe.shared_experts", "_shexp"),
    W123.format("block_sparse_moe.experts.{}", "_exps"),
)
HEAD = _names(
    "nextn.eh_proj mtp.fc nextn.shared_head_norm mtp.norm",
    "nextn.enorm mtp.pre_fc_norm_embedding nextn.hnorm mtp.pre_fc_norm_hidden",
)
"""Names of Qwen's multi-token head outside its layer."""


class Model(GgufModel):
    """Config and weights of the model in a GGUF file."""

    def __init__(self, file: GgufFile) -> None:
        """Raises ModelError if the architecture is not supported."""
        super().__init__(file)
        self._form = FORMS[self.arch]

    def weights(self) -> dict[str, Source]:
        """Return the weights by published name, without reading them. Experts have one each. Raises
        WeightsError for unknown tensors, and for shapes that do not belong together."""
        pieces: dict[str, list[Piece]] = {}
        made: dict[str, Source] = {}
        unknown, _ = [], self.config
        factors = self.file.tensors.get(ROPE_FACTORS)
        if factors is not None and (factors.data.tobytes() != ONE * math.prod(factors.shape)):
            raise WeightsError(
                f"{self.file.path.name} changes rotary frequencies ({ROPE_FACTORS}), which is not "
                f"supported for models of {self.arch}."
            )
        for name, stored in self.file.tensors.items():
            part = next((one for one in OTHER_PARTS if name.startswith(one)), None)
            if part is not None:
                read = partial(self._matrix, name, stored)
                made[OTHER_PARTS[part] + name] = Source(stored.shape, FLOAT32, read)
                continue
            try:
                for target, piece in self._targets(name, self._matrix(name, stored)):
                    pieces.setdefault(target, []).append(piece)
            except KeyError:
                unknown.append(name[:80])
        if unknown:
            raise WeightsError(
                f"{self.file.path.name} has {counted(len(unknown), 'tensor')} that models of "
                f"{self.arch} do not have: {enumerated(unknown)}."
            )
        for target, found in pieces.items():
            made |= self._sources(target, found)
            if len(made) > MOST_WEIGHTS:
                raise WeightsError(f"{self.file.path.name} has more than {MOST_WEIGHTS:,} weights.")
        return made

    def _matrix(self, name: str, stored: StoredTensor) -> Matrix:
        """Return views of the file's bytes. A vector has one column. Raises WeightsError for a type
        without a format."""
        format = FORMATS.get(stored.type.name)
        if format is None:
            raise WeightsError(
                f"{name[:80]} in {self.file.path.name} is stored as {stored.type.name}, which is "
                "not supported: use a file of another type, such as Q4_K_M or Q8_0."
            )
        *rows, num_columns = stored.shape if len(stored.shape) > 1 else (*stored.shape, 1)
        [(field_name, field)] = format.fields.items()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            data = torch.from_numpy(stored.data)
        fields = {field_name: data.view(field.dtype).view(*rows, field.width(num_columns))}
        return Matrix(format, fields, num_columns)

    def _targets(self, name: str, stored: Matrix) -> Iterator[tuple[str, Piece]]:
        """Yield the published names of one tensor, with a piece for each. Raises KeyError for an
        unknown tensor."""
        found, form = BLOCK_NAME.fullmatch(name), self._form
        if found is None:
            stem = name.removesuffix(".weight")
            yield f"{form.outer[stem]}.weight", (stem, stored, None)
            return
        block, word = int(found[1]), found[2]
        if block >= self.num_layers + self.num_heads:
            raise KeyError
        module = f"{form.layers}.{block}"
        if block >= self.num_layers:
            module = f"mtp.layers.{block - self.num_layers}"
            if form.names is not QWEN3_5:  # The head is not supported, and skipped by its name.
                yield f"mtp.{name}", (word, stored, None)
                return
        if word == "ssm_dt":  # Ollama's name of the bias.
            word = "ssm_dt.bias"
        stem, dot, suffix = word.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, dot, suffix = word, "", "" if word in ("ssm_a", "ssm_d") else ".weight"
        if stem in HEAD and form.names is QWEN3_5:
            yield HEAD[stem] + dot + suffix, (stem, stored, None)
            return
        for part, matrix in self._split(block, stem, stored):
            orders = self._orders.get(part, {})
            if orders and sum(map(len, orders.values())) != matrix.shape[-2]:
                raise self._wrong_shape(name, stored)
            for own in orders or [part]:
                exact = form.names.get(own + dot + suffix) or form.names[own] + dot + suffix
                yield f"{module}.{exact}", (own, matrix, orders.get(own))

    def _split(self, block: int, word: str, stored: Matrix) -> list[tuple[str, Matrix]]:
        """Return the words that a tensor stands for, with its rows for each."""
        sizes: Mapping[str, int] = {word: stored.shape[-2]}
        if word == "ffn_gate_up_exps":
            half = stored.shape[-2] // 2
            sizes = {"ffn_gate_exps": half, "ffn_up_exps": half}
        elif word == "attn_qkv" and not self.has("ssm_out.weight", block):
            kept = self.config["head_dim"] * self.config["num_key_value_heads"]
            queries = self.config["head_dim"] * self.config["num_attention_heads"]
            queries *= 2 if self._form.names is QWEN3_5 else 1
            sizes = {"attn_q": queries, "attn_k": kept, "attn_v": kept}
        if sum(sizes.values()) != stored.shape[-2]:
            raise self._wrong_shape(f"blk.{block}.{word}", stored)
        return list(zip(sizes, stored.split([*sizes.values()]), strict=True))

    @cached_property
    def _orders(self) -> Orders:
        return self._form.orders(self)

    def _wrong_shape(self, name: str, stored: Matrix) -> WeightsError:
        place = f"{name[:80]} in {self.file.path.name}"
        return WeightsError(f"{place} has the wrong shape, {list(stored.shape)}.")

    def _sources(self, target: str, found: list[Piece]) -> dict[str, Source]:
        """Return the weight ``target``, or those of all experts."""
        if len(found) > 1:
            order = [*self._form.names]
            found = sorted(found, key=lambda piece: order.index(piece[0]))
        word, first, rows = found[0]
        parts = [matrix for _, matrix, _ in found]
        if len(found) != (2 if ".input_linear." in target or word == "attn_k_b" else 1):
            fault = "half of" if len(found) == 1 else "several tensors for"
            raise WeightsError(f"{self.file.path.name} has {fault} {target}.")
        if word == "attn_k_b":
            return {target: self._latent(target, *parts)}
        if any(part.shape != first.shape for part in parts):
            raise self._wrong_shape(target, parts[1])
        if "{}" in target:
            count = min(self.whole("expert_count", 0), MOST_EXPERTS)
            if len(first.shape) != 3 or len(first) != count:
                raise self._wrong_shape(target, first)
            return {target.format(e): _source(parts, expert=e) for e in range(count)}
        if first.num_columns == 1 or SMALL.fullmatch(word):
            return {target: self._small(word, parts, rows)}
        if len(first.shape) != 2:
            raise self._wrong_shape(target, first)
        columns = self._orders.get("columns", {}).get(word)
        return {target: _source(parts, rows, columns)}

    def _small(self, word: str, parts: Sequence[Matrix], rows: torch.Tensor | None) -> Source:
        """Return a vector, or a small tensor, with the converter's arithmetic undone on reading."""
        first, names = parts[0], self._form.names
        count = math.prod(first.shape) * len(parts)
        shape: tuple[int, ...] = (count,)
        if "conv" in word and first.num_columns > 1:
            shape = count // first.num_columns, 1, first.num_columns
        elif word == "ffn_gate_inp_shexp":
            shape = 1, count
        elif word == "ssm_a" and names is JAMBA:
            shape = first.shape
        elif word == "ssm_a" and names is KIMI:
            shape = 1, 1, count, 1
        centred = names is QWEN3_5 and word.endswith("norm") and word != "ssm_norm"

        def read() -> Matrix:
            values = torch.cat([part.widened(torch.float32) for part in parts])
            values = values if rows is None else values[rows]
            if word == "ssm_a":
                values = values.double().neg().log().float()
            return _plain((values - 1 if centred else values).reshape(shape))

        return Source(shape, FLOAT32, read)

    def _latent(self, target: str, keys: Matrix, values: Matrix) -> Source:
        """Return the product that expands a latent, from keys ``[H, rank, K]``, which the converter
        has transposed, and values ``[H, V, rank]``."""
        if len(keys.shape) != 3 or values.shape[::2] != keys.shape[:2]:
            raise self._wrong_shape(target, keys)
        num_heads, rank, key_dim = keys.shape

        def read() -> Matrix:
            parts = keys.widened(torch.float32).mT, values.widened(torch.float32)
            return _plain(torch.cat(parts, dim=1).reshape(-1, rank))

        return Source((num_heads * (key_dim + values.shape[1]), rank), FLOAT32, read)


def _source(
    parts: Sequence[Matrix],
    rows: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    expert: int | None = None,
) -> Source:
    """Return a matrix, or that of one expert, with the rows of all parts: as they are stored if the
    formats are equal, else widened."""
    first, is_stored = parts[0], all(part.format == parts[0].format for part in parts)
    count = sum(part.shape[-2] for part in parts) if rows is None else len(rows)

    def read() -> Matrix:
        own = parts if expert is None else [part[expert] for part in parts]
        if len(own) == 1:
            return own[0]
        if not is_stored:
            return _plain(torch.cat([part.widened(torch.float32) for part in own]))
        names = first.format.fields
        fields = {name: torch.cat([part.fields[name] for part in own]) for name in names}
        return Matrix(first.format, fields, first.num_columns)

    format = first.format if is_stored else FLOAT32
    return Source((count, first.num_columns), format, read, rows, columns)


def _plain(values: torch.Tensor) -> Matrix:
    return Matrix(FLOAT32, {"weight": values}, values.shape[-1])


# --- Orders of rows -------------------------------------------------------------------------------


def _value_heads(model: Model) -> Orders:
    """Return the place of each value head in a file: tiled by key head, so that head p belongs to
    key head p mod K. Models group them by key head, and so do files that say so (Ollama's)."""
    if model.file.metadata.get(f"{model.arch}.ssm.v_head_reordered") is False:
        return {}
    keys, values = (model.config[f"linear_num_{kind}_heads"] for kind in ("key", "value"))
    if keys == values or not keys or values % keys:
        return {}
    heads = _range(values).view(-1, keys).T.flatten()
    dim = model.config["linear_value_head_dim"]
    rows = _range(len(heads) * dim).view(-1, dim)[heads].flatten()
    others = _range(2 * keys * model.config["linear_key_head_dim"])
    channels = torch.cat([others, len(others) + rows])
    orders = {"attn_qkv": channels, "ssm_conv1d": channels, "attn_gate": rows}
    orders |= dict.fromkeys(("ssm_beta", "ssm_alpha", "ssm_a", "ssm_dt"), heads)
    return {**{word: {word: own} for word, own in orders.items()}, "columns": {"ssm_out": rows}}


def _interleaved(model: Model) -> Orders:
    """Return the rows of Qwen3-Next's fused inputs, which are interleaved by key head."""
    keys, values = (model.config[f"linear_num_{kind}_heads"] for kind in ("key", "value"))
    if not keys or values % keys:
        return {}
    group, dim = values // keys, model.config["linear_key_head_dim"]
    width = group * model.config["linear_value_head_dim"]

    def by_kind(*widths: int) -> list[torch.Tensor]:
        rows = _range(keys * sum(widths)).view(keys, sum(widths))
        return [part.flatten() for part in rows.split(widths, dim=1)]

    *qkv, z = by_kind(dim, dim, width, width)
    beta, alpha = by_kind(group, group)
    return {
        "ssm_ba": {"ssm_beta": beta, "ssm_alpha": alpha},
        "ssm_in": {"attn_qkv": torch.cat(qkv), "attn_gate": z},
    }


def _unrotated(model: Model) -> Orders:
    """Return the rows of queries and keys. The two dimensions of a rotated pair are next to each
    other in the file, and half a head apart in the model."""
    dim = model.config["head_dim"]
    if dim % 2:
        return {}
    pairs = _range(dim).view(-1, 2).T.flatten()
    kinds = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    counts = {word: model.config[key] for word, key in kinds.items()}
    return {
        word: {word: (_range(count * dim).view(count, dim)[:, pairs]).flatten()}
        for word, count in counts.items()
    }


def _range(count: int) -> torch.Tensor:
    """Return the numbers below ``count``. Raises ModelError if they are too many."""
    if count > MOST_ROWS:
        raise ModelError(f"heads with {count:,} rows are not supported; {MOST_ROWS:,} are.")
    return torch.arange(count)


@dataclass(frozen=True, slots=True)
class Form:
    """Names and orders of an architecture."""

    names: Mapping[str, str]
    """Published name in a layer of each word. Several tensors with one name are its rows, in
    order; ``{}`` is an expert."""
    orders: Callable[[Model], Orders] = lambda model: {}
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    layers: str = "model.layers"

    @property
    def outer(self) -> Mapping[str, str]:
        """Names of tensors outside the layers."""
        names = dict.fromkeys(("output_norm", "token_embd_norm"), self.norm)
        names["rope_freqs"] = "rotary_emb"  # A buffer, which is ignored.
        return {"token_embd": self.embedding, "output": "lm_head", **names}


_NEMOTRON = Form(
    NEMOTRON,
    _unrotated,
    embedding="backbone.embeddings",
    norm="backbone.norm_f",
    layers="backbone.layers",
)
FORMS: Mapping[str, Form] = {
    "qwen3": Form(QWEN3),
    "qwen3next": Form(QWEN3_5, _interleaved),
    "qwen35": Form(QWEN3_5, _value_heads),
    "qwen35moe": Form(QWEN3_5, _value_heads),
    "lfm2": Form(LFM2, norm="model.embedding_norm"),
    "lfm2moe": Form(LFM2, norm="model.embedding_norm"),
    "granitehybrid": Form(GRANITE, _unrotated),
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
    "falcon-h1": Form(FALCON, norm="model.final_layernorm"),
    "jamba": Form(JAMBA, norm="model.final_layernorm"),
    "kimi-linear": Form(KIMI),
}
"""Forms by ``general.architecture``: all of ``gguf_config.ARCHITECTURES``."""
