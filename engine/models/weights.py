"""Weights of a model of any family, from safetensors files or seeded."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.layers.linear import Build, Layer, Parameter
from engine.models.decoder import Decoder, Fill
from engine.weights.layer_names import is_buffer, model_name
from engine.weights.model_config import ModelConfig
from engine.weights.tensor_files import (
    FULL_DTYPES,
    WeightsError,
    dtype_name,
    enumerated,
    find_files,
    open_file,
)
from hybridcache.geometry.units import format_count

HEAD = "mtp."
"""Prefix of a multi-token prediction head, which is read only if requested."""
SKIPPED = ("model.visual.", "visual.")
"""Prefixes of known parts that are not supported: the visual tower."""
STACKED_EXPERTS = "experts.gate_up_proj", "block_sparse_moe.input_linear.weight"
"""Endings of the names of tensors that contain all experts of a layer."""
TIED_HEAD = "lm_head.weight"
"""Copy of the embedding if a model ties them; files may or may not contain it."""
OFFSET = "weight_offset"
"""Last part of the name of zero points, which ModelSlim also writes if all are 0."""
DUMMY_STD = 0.02


class WeightFiles:
    """Tensors of the safetensors files of one model directory."""

    def __init__(self, model_dir: Path, *, with_head: bool = False) -> None:
        """Map the files. Raises WeightsError if the head is requested and there is none."""
        self._started = time.monotonic()
        self.tensors: dict[str, torch.Tensor] = {}
        self.skipped: list[str] = []
        for file in find_files(model_dir):
            for name, tensor in open_file(file).items():
                if name.startswith(SKIPPED if with_head else (HEAD, *SKIPPED)):
                    self.skipped.append(name)
                else:
                    self.tensors[model_name(name)] = tensor
        if with_head and not any(name.startswith(HEAD) for name in self.tensors):
            raise WeightsError(
                "--draft mtp requires a multi-token head, and the checkpoint has none (no tensor "
                f"{HEAD}*): use --draft tree, or none."
            )

    def ties(self, embedding: str) -> bool:
        """Return True unless the files have a head that differs from ``embedding``."""
        head, own = self.tensors.get(TIED_HEAD), self.tensors.get(embedding)
        if head is None or own is None:
            return True
        return own.dtype is head.dtype and torch.equal(own, head)

    def check(self, parameters: Iterable[tuple[str, Parameter]], *, tied: bool) -> None:
        """Raise WeightsError unless every parameter has a tensor, and every tensor a parameter."""
        wanted: dict[str, tuple[tuple[int, ...], ...]] = {}
        dtypes: dict[str, tuple[torch.dtype, ...]] = {}
        known = {TIED_HEAD} if tied else set[str]()
        for name, parameter in parameters:
            scheme = parameter.scheme
            wanted[name], dtypes[name] = (parameter.shape,), FULL_DTYPES
            if scheme is not None:
                dtypes[name] = (scheme.dtype,)
                wanted[name_beside(name, scheme.scale_name)] = scheme.scale_shapes(*parameter.shape)
                known.add(name_beside(name, OFFSET))
            _check_whole_blocks(name, parameter)
        found = {name: one for name, one in self.tensors.items() if not is_buffer(name)}
        complaints = {
            "missing": sorted(wanted.keys() - found.keys()),
            "unexpected": sorted(found.keys() - wanted.keys() - known),
            "of the wrong shape": [
                f"{name} is {list(found[name].shape)} instead of {list(wanted[name][0])}"
                for name in sorted(wanted.keys() & found.keys())
                if found[name].shape not in wanted[name]
            ],
            "of a type that quantization_config does not give": [
                f"{name} is {dtype_name(found[name].dtype)}"
                for name in sorted(dtypes.keys() & found.keys())
                if found[name].dtype not in dtypes[name]
            ],
        }
        sentences = [f"{len(v)} {kind}: {enumerated(v)}" for kind, v in complaints.items() if v]
        if sentences:
            raise WeightsError(
                f"the checkpoint's tensors do not match its config.json: {'; '.join(sentences)}."
            )

    def fill(self, layer: Layer) -> None:
        """Copy the tensors of one layer, and check their numbers. Raises WeightsError."""
        for name, parameter in layer.parameters():
            tensor, scale, scheme = self.tensors[name], None, parameter.scheme
            if scheme is not None:
                scale_name = name_beside(name, scheme.scale_name)
                scale = self.tensors[scale_name]
                check_numbers(scale_name, scheme.row_scales(scale, *tensor.shape))
                offset = self.tensors.get(name_beside(name, OFFSET))
                if offset is not None and offset.count_nonzero():
                    raise WeightsError(
                        f"zero points of {name} are not zero: only symmetric weights are supported."
                    )
            parameter.fill(tensor, scale)
            check_numbers(name, parameter.target)

    def note(self) -> str:
        num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        seconds = time.monotonic() - self._started
        line = f"{num_bytes / 2**20:,.0f} MiB of weights in {seconds:.1f} s"
        heads = [name for name in self.skipped if model_name(name).startswith(HEAD)]
        if heads:
            line += "; its multi-token head is read with --draft mtp only"
        if len(self.skipped) > len(heads):
            line += "; its visual tower is not supported"
        if any(map(is_buffer, self.tensors)):
            line += "; buffers in its files (rotary_emb, position_ids) are ignored"
        return line


def check_numbers(name: str, tensor: torch.Tensor) -> None:
    """Raise WeightsError if a number of the tensor is NaN or infinite. One pass at memory speed."""
    is_sound = True
    if tensor.dtype is torch.float8_e4m3fn:  # NaN is 0x7f or 0xff.
        is_sound = not (tensor.view(torch.uint8) & 0x7F).eq(0x7F).any()
    elif tensor.dtype.is_floating_point and tensor.numel():
        is_sound = all(bound.isfinite() for bound in tensor.aminmax())
    if not is_sound:
        raise WeightsError(
            f"{name} contains NaN or infinite numbers: the file is damaged, or its writer failed; "
            "download it again."
        )


def _check_whole_blocks(name: str, parameter: Parameter) -> None:
    """Raise WeightsError if a rank would have part of a block of columns."""
    cut, scheme = parameter.cut, parameter.scheme
    columns = None if scheme is None else scheme.block[1]
    if cut is None or cut.dim == 0 or columns is None:
        return
    first, end = int(cut.index[0]), int(cut.index[-1]) + 1
    if first % columns or (end % columns and end != cut.size):
        raise WeightsError(
            f"--tp would split blocks of {columns} columns that share a scale: {name} has "
            f"{cut.size} columns, {len(cut)} per rank; use fewer ranks."
        )


def name_beside(name: str, word: str) -> str:
    """Return the name of the scales or zero points of a weight."""
    return f"{name.removesuffix('.weight')}.{word}"


class Dummy:
    """Seeded weights for any model. Each tensor depends only on the seed and its name."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fill(self, layer: Layer) -> None:
        for name, parameter in layer.parameters():
            self.draw(name, parameter)

    def draw(self, name: str, parameter: Parameter) -> None:
        """Fill a parameter with magnitudes as at a model's first training step."""
        if parameter.cut is not None:  # The numbers must not depend on the number of ranks.
            whole = parameter.target.new_empty(parameter.shape)
            self.draw(name, Parameter(whole, parameter.role))
            parameter.target.copy_(parameter.cut.of(whole))
            return
        target = parameter.target
        generator = torch.Generator(target.device)
        generator.manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if parameter.role in ("norm", "time_bias", "skip"):
            target.fill_(1.0)
        elif parameter.role == "centred_norm":
            target.zero_()
        elif parameter.role == "log_decay":
            target.uniform_(math.log(0.01), math.log(16.0), generator=generator)
        else:
            target.normal_(0.0, DUMMY_STD, generator=generator)


def load_model(
    settings: EngineConfig, family: type[Decoder], config: ModelConfig, build: Build
) -> tuple[Decoder, str]:
    """Build the model that ``settings`` name, and its multi-token head if it is used, with their
    weights. Also returns the number and the source of these.

    Raises WeightsError before any tensor is read if the weight files do not match the config, and
    ModelError if the family's head is not supported.
    """
    outline = replace(build, weights=replace(build.weights, device=torch.device("meta")))
    with_head, files, is_stacked = settings.drafts.head_len > 0, None, False
    fill: Fill = Dummy(settings.seed).fill
    if settings.load_format != "dummy":
        files = WeightFiles(settings.model_dir, with_head=with_head)
        fill, files.tensors = files.fill, family.published(files.tensors)
        is_stacked = any(name.endswith(STACKED_EXPERTS) for name in files.tensors)
        if config.tie_embeddings:
            config = replace(config, tie_embeddings=files.ties(f"{family.embedding_name}.weight"))
    make = partial(family, config, stacked_experts=is_stacked, with_prediction=with_head)
    parameters = list(make(outline).parameters())
    num_weights = sum(math.prod(parameter.shape) for _, parameter in parameters)
    counted = f"{format_count(num_weights)} parameters"  # Those of all ranks.
    if files is not None:
        files.check(parameters, tied=config.tie_embeddings)
    model = make(build, fill)
    if files is None:
        return model, f"{counted}; seeded (seed {settings.seed}), untrained"
    return model, f"{counted}; {files.note()}{build.weights.note()}"
