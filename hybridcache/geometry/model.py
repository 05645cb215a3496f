"""Cost of a model's prefixes: bytes to store them, FLOPs to compute them again.

>>> geometry = ModelGeometry.preset("qwen3-next")
>>> geometry.kv_bytes_per_token, geometry.state_bytes, round(geometry.state_tokens)
(24576, 77266944, 3144)
>>> geometry.flops(0, 2048) > geometry.flops(1024, 2048)
True
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path

from hybridcache.command.extras import ENGINE_DISTRIBUTION
from hybridcache.command.parser import or_known
from hybridcache.geometry import mixers
from hybridcache.geometry.checkpoints import CheckpointFormat
from hybridcache.geometry.config_format import Values
from hybridcache.geometry.families import read, text_part
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.gguf import gguf_file
from hybridcache.geometry.gguf_config import GgufModel
from hybridcache.geometry.sizes import (
    ExpertsSizes,
    LayerSizes,
    MixerSizes,
    MLPSizes,
    ModelSizes,
    SizesError,
)

BUILTIN = "builtin"
"""Name of the model of the engine. The presets do not include it."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """Byte and FLOP counts of one model, summed over all layers."""

    name: str
    """Name of the preset, or of the configuration."""
    num_full_layers: int
    """Layers that store one KV row per token."""
    num_linear_layers: int
    """Layers that store one state per sequence (GDN, KDA, Mamba ...)."""
    kv_bytes_per_token: int
    """Size of one token's KV row in all these layers, at least 1."""
    recurrent_elements: int
    """Number of values in the recurrent states of one sequence."""
    conv_bytes: int
    """Size of the conv states of one sequence."""
    state_dtype: str
    """Dtype of the recurrent state, a key of ``DTYPE_BYTES``. int8 includes one fp32 scale per
    128 numbers."""
    active_params: int
    """Number of weights that each token is multiplied with, embeddings excluded."""
    total_params: int
    """Number of all weights."""
    scan_flops_per_token: int
    """FLOPs of the linear layers' recurrences: 6 per state number."""
    attention_flops_per_pair: int
    """FLOPs of one query with one key (QK and PV), summed over all full layers and heads."""
    checkpoint_dtype: str = "auto"
    """Format of recurrent states in checkpoints, as read by ``CheckpointFormat.parse``. Any value
    except ``auto`` stores running states outside the cache's memory."""
    checkpoint_bytes: int | None = None
    """Size of one checkpoint in ``checkpoint_dtype``, or None if checkpoints are plain states."""

    def __post_init__(self) -> None:
        _refuse_unknown(state_dtype=self.state_dtype)
        for one in fields(self):
            value, least = getattr(self, one.name), int(one.name == "kv_bytes_per_token")
            if one.type == "int" and not (isinstance(value, Integral) and int(value) >= least):
                raise ValueError(f"{one.name} must be whole, at least {least} (got {value!r}).")

    @classmethod
    @cache  # Each run of a sweep reads its model.
    def preset(cls, name: str, **dtypes: str) -> ModelGeometry:
        """Return a bundled model by name or by an unambiguous prefix of it (``qwen3-next``). Raises
        ValueError if none or several match."""
        full_name = preset_name(name)
        preset = presets()[full_name]
        dtypes = {"state_dtype": preset.get("state_dtype", "float32")} | dtypes
        layers: list[LayerSizes] = []  # Their order has no meaning, only their sums do.
        for count, kind, sizes in preset["layers"]:
            made = KINDS[kind](**sizes)
            if isinstance(made, MLPSizes | ExpertsSizes):
                layers += [LayerSizes(mlp=made)] * count
            else:
                layers += [LayerSizes((made,))] * count
        model = ModelSizes(preset["hidden"], preset["vocab"], tuple(layers))
        geometry = cls.from_sizes(full_name, model, **dtypes)
        # Published figures, where a preset has them, replace the sums over its layers.
        stated = {key: preset[key] for key in ("active_params", "total_params") if key in preset}
        return replace(geometry, **stated)

    @classmethod
    def from_config(cls, config: Fields, name: str = "model", **dtypes: str) -> ModelGeometry:
        """Read a parsed Hugging Face ``config.json``, with or without ``text_config``.

        ``dtypes`` are ``kv_dtype`` and ``conv_dtype`` (default: the ``dtype`` of the file, bfloat16
        if it has none), ``state_dtype`` (float32) and ``checkpoint_dtype`` (auto: same as the
        states). Raises ValueError if the config does not describe a supported language model.
        """
        text = text_part(config)
        try:
            sizes, _ = read(text)
        except KeyError as error:
            raise ValueError(f"the field {error} is missing: add it") from error
        except SizesError:
            raise
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"a field has a value of the wrong type: {error}") from error
        if not sizes.row_size:
            raise ValueError("a model without a single attention layer is not supported")
        found = (part.get(key) for part in (text, config) for key in ("dtype", "torch_dtype"))
        stated = next((dtype.removeprefix("torch.") for dtype in found if dtype), None)
        if stated in DTYPE_BYTES:
            dtypes = {"kv_dtype": stated, "conv_dtype": stated} | dtypes
        return cls.from_sizes(name, sizes, **dtypes)

    @classmethod
    def load(cls, name: str, **dtypes: str) -> ModelGeometry:
        """Read a preset by its name, a ``config.json`` or a GGUF file, the directory of one, or
        ``builtin``, the model that the engine contains. Raises OSError if the file cannot be read,
        and ValueError if no preset has this name, the file is not that of a supported model, or the
        engine is not installed."""
        if name == BUILTIN and not Path(name).exists():
            engine = find_spec("engine")
            if engine is None or engine.origin is None:
                raise ValueError(
                    f"model {name} is part of the engine, which is not installed: "
                    f"pip install {ENGINE_DISTRIBUTION}"
                )
            name = str(Path(engine.origin).parent / "models" / BUILTIN)
        path = Path(name)
        file = gguf_file(path) if name else None
        if file is not None:
            named = path.resolve().name.removesuffix(".gguf")
            return cls.from_config(GgufModel(file).config, named, **dtypes)
        if name and path.is_dir():
            path = path / "config.json"
        if path.suffix == ".json":
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
                name = path.resolve().parent.name if path.stem == "config" else path.stem
                return cls.from_config(config, name, **dtypes)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        return cls.preset(name, **dtypes)

    @classmethod
    def from_sizes(
        cls,
        name: str,
        sizes: ModelSizes,
        *,
        kv_dtype: str = "bfloat16",
        state_dtype: str = "float32",
        conv_dtype: str = "bfloat16",
        checkpoint_dtype: str = "auto",
    ) -> ModelGeometry:
        """Sum the costs that all layers declare."""
        _refuse_unknown(kv_dtype=kv_dtype, conv_dtype=conv_dtype)
        active, total = sizes.num_params()
        kept = [{spec.kind for spec in mixer.keeps} for mixer in sizes.mixers]
        num_recurrent = sizes.size_of("recurrent")
        conv_bytes = sizes.size_of("conv") * DTYPE_BYTES[conv_dtype]
        format = CheckpointFormat.parse(checkpoint_dtype) if num_recurrent else None
        return cls(
            name=name,
            num_full_layers=sum("kv" in kinds for kinds in kept),
            num_linear_layers=sum(bool(kinds - {"kv"}) for kinds in kept),
            kv_bytes_per_token=sizes.row_size * DTYPE_BYTES[kv_dtype],
            recurrent_elements=num_recurrent,
            conv_bytes=conv_bytes,
            state_dtype=state_dtype,
            active_params=active,
            total_params=total,
            scan_flops_per_token=6 * num_recurrent,
            attention_flops_per_pair=sum(mixer.pair_flops for mixer in sizes.mixers),
            checkpoint_dtype=checkpoint_dtype,
            checkpoint_bytes=None if format is None else format.num_bytes(sizes, conv_bytes),
        )

    @property
    def recurrent_bytes(self) -> int:
        """Size of one sequence's recurrent state. int8 has one fp32 scale per 128 numbers."""
        scales = self.recurrent_elements // 128 * 4 if self.state_dtype == "int8" else 0
        return self.recurrent_elements * DTYPE_BYTES[self.state_dtype] + scales

    @property
    def state_bytes(self) -> int:
        """Size of one checkpoint: conv and recurrent states of all linear layers."""
        if self.checkpoint_bytes is not None:
            return self.checkpoint_bytes
        return self.recurrent_bytes + self.conv_bytes

    @property
    def state_tokens(self) -> float:
        """Number of tokens with the same KV size as one checkpoint."""
        return self.state_bytes / self.kv_bytes_per_token

    @property
    def flops_per_token(self) -> int:
        """FLOPs of one token in all layers, without the pairs of attention."""
        return 2 * self.active_params + self.scan_flops_per_token

    def flops(self, start: int, end: int) -> int:
        """Return the forward FLOPs of a prefill of tokens [start, end) after ``start`` reused."""
        num_tokens = end - start
        num_pairs = num_tokens * (start + end + 1) // 2
        return num_tokens * self.flops_per_token + num_pairs * self.attention_flops_per_pair


def _refuse_unknown(**dtypes: str) -> None:
    for name, dtype in dtypes.items():
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"{name} must be one of {', '.join(DTYPE_BYTES)} (got {dtype!r}).")


# --- Bundled models -----------------------------------------------------------------------------

KINDS: Mapping[str, Callable[..., MixerSizes | MLPSizes | ExpertsSizes]] = {
    "attention": mixers.AttentionSizes,
    "latent_attention": mixers.LatentAttentionSizes,
    "delta": mixers.DeltaSizes,
    "mamba": mixers.MambaSizes,
    "short_conv": mixers.ShortConvSizes,
    "mlp": MLPSizes,
    "experts": ExpertsSizes,
}
"""Kinds of layers in ``presets.json``, where feed-forward blocks are layers of their own."""


@cache
def presets() -> dict[str, Values]:
    """Return all bundled models as published, by full name."""
    text = files(__package__).joinpath("presets.json").read_text(encoding="utf-8")
    found: dict[str, Values] = json.loads(text)
    return found


def preset_name(name: str) -> str:
    """Return the full name of the preset that ``name`` is or begins, ignoring case and punctuation.
    Raises ValueError if none or several match."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    names = list(presets())
    exact = [each for each in names if plain(each) == plain(name)]
    begins = [each for each in names if plain(each).startswith(plain(name))]
    found = exact or begins
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"model {name!r} means several: {', '.join(found)}")
    # Names on the Hub begin with an owner.
    known = or_known(name.rpartition("/")[2], names)
    raise ValueError(f"there is no model {name!r}{known}; others: docs/how-to/own-model.md")
