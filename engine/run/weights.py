"""Weights into layers: from safetensors, every tensor accounted for, or seeded for tries without
files."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.run.layers.parameters import Layer, Parameter
from engine.run.model_config import ModelError
from engine.run.quantization.names import model_name
from engine.run.quantization.scheme import Quantization, Scheme

SKIPPED = ("mtp.", "model.mtp.", "model.visual.", "visual.")
"""Parts of a model's files that are known and not served: multi-token prediction heads, the visual
tower."""
MOST_NAMED = 8
"""Tensors of each kind that an error names; the rest are counted."""
DUMMY_STD = 0.02
FULL_DTYPES = ("F64", "F32", "F16", "BF16")
FILE_DTYPES = {"int8": "I8", "fp8": "F8_E4M3"}
"""As the headers of safetensors files spell them."""
INDEX_NAMES = ("model.safetensors.index.json", "quant_model_weights.safetensors.index.json")
"""Of Hugging Face and of ModelSlim."""


class WeightsError(ModelError):
    """Weight files that do not fit the model, or can not be read: one message that names what is
    wrong."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a weight file, unread."""

    name: str
    """As the file has it."""
    path: Path
    file: Any
    """The open file: a header lists tens of thousands of tensors, and is read once."""
    shape: tuple[int, ...]
    dtype: str
    """As the header spells it: BF16, F8_E4M3 ..."""


class WeightFiles:
    """The safetensors files of one model directory, open until ``close``. Reads headers only, until
    ``fill``."""

    def __init__(
        self, model_dir: Path, num_workers: int, quantization: Quantization | None = None
    ) -> None:
        self._quantization = quantization
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="weights")
        self._started = time.monotonic()
        self._num_bytes = 0
        headers = self._pool.map(open_file, find_files(model_dir))
        self.tensors: dict[str, Tensor] = {}
        self.skipped: list[str] = []
        for tensor in (tensor for header in headers for tensor in header):
            if tensor.name.startswith(SKIPPED):
                self.skipped.append(tensor.name)
            else:
                self.tensors[model_name(tensor.name)] = tensor
        if quantization is not None:
            names = (*self.tensors, *self.skipped)
            quantization.check_ignored(name.rpartition(".")[0] for name in names)

    @property
    def has_stacked_experts(self) -> bool:
        """Whether all experts of a layer come as one tensor."""
        return any(name.endswith("experts.gate_up_proj") for name in self.tensors)

    def check(self, parameters: Iterable[tuple[str, Parameter]], *, tied: bool) -> None:
        """Every parameter has its tensor and every tensor its parameter. Raises WeightsError naming
        all that have not."""
        wanted: dict[str, tuple[tuple[int, ...], ...]] = {}
        schemes: dict[str, Scheme | None] = {}
        for name, parameter in parameters:
            shape, scheme = tuple(parameter.target.shape), parameter.scheme
            wanted[name], schemes[name] = (shape,), scheme
            if scheme is not None:
                wanted[scale_name(name, scheme)] = scale_shapes(scheme, *shape)
        self._check_dtypes(schemes)
        offsets = {offset_name(name) for name, scheme in schemes.items() if scheme is not None}
        unexpected = sorted(set(self.tensors) - set(wanted) - offsets)
        if tied and "lm_head.weight" in unexpected:
            unexpected.remove("lm_head.weight")  # a copy of the embedding
        missing = sorted(set(wanted) - set(self.tensors))
        misshaped = [
            f"{name} is {list(self.tensors[name].shape)} instead of {list(shapes[0])}"
            for name, shapes in sorted(wanted.items())
            if name in self.tensors and self.tensors[name].shape not in shapes
        ]
        complaints = [
            f"{len(names)} {kind}: {_enumerate(names)}"
            for kind, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of the wrong shape", misshaped),
            )
            if names
        ]
        if complaints:
            raise WeightsError(
                f"the checkpoint's tensors do not fit its config.json: {'; '.join(complaints)}."
            )

    def _check_dtypes(self, schemes: Mapping[str, Scheme | None]) -> None:
        """What config.json says is 8-bit is so in the files, and nothing else is."""
        found = {name: self.tensors[name].dtype for name in schemes if name in self.tensors}
        plain, coded = [], []
        for name, dtype in sorted(found.items()):
            scheme = schemes[name]
            if scheme is not None and dtype != FILE_DTYPES[scheme.format]:
                plain.append(f"{name} is {dtype}")
            elif scheme is None and dtype not in FULL_DTYPES:
                coded.append(f"{name} is {dtype}")
        if plain:
            assert self._quantization is not None
            raise WeightsError(
                f"config.json says that {self._quantization.describe()} are {len(plain)} weights "
                f"which are not ({_enumerate(plain)}): name them under "
                f"{self._quantization.ignore_key}."
            )
        if coded:
            raise WeightsError(
                f"quantization_config in config.json does not say how {len(coded)} weights are "
                f"quantised: {_enumerate(coded)}."
            )

    def fill(self, layer: Layer) -> None:
        """Read the tensors of one layer, in parallel, and put them where they go. Raises
        WeightsError."""
        for num_bytes in self._pool.map(self._fill_one, layer.parameters()):
            self._num_bytes += num_bytes

    def _fill_one(self, item: tuple[str, Parameter]) -> int:
        name, parameter = item
        tensor, scale = self._read(name), None
        if parameter.scheme is not None:
            scale = self._read(scale_name(name, parameter.scheme))
            offset = offset_name(name)
            if offset in self.tensors and self._read(offset).count_nonzero():
                raise WeightsError(f"{offset} is not zero: only symmetric weights are served.")
        parameter.fill(tensor, scale)
        return tensor.nbytes + (0 if scale is None else scale.nbytes)

    def _read(self, name: str) -> torch.Tensor:
        source = self.tensors[name]
        try:
            tensor: torch.Tensor = source.file.get_tensor(source.name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{source.path.name} can not be read: {error}.") from None
        return tensor

    def close(self) -> str:
        """End the workers and close the files; a line on what was read."""
        self._pool.shutdown()
        self.tensors.clear()
        seconds = time.monotonic() - self._started
        line = f"{self._num_bytes / 2**20:,.0f} MiB of weights in {seconds:.1f} s"
        if self.skipped:
            line += (
                f"; {len(self.skipped)} tensors left alone ({_enumerate(sorted(self.skipped), 2)})"
            )
        return line


def find_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model, single or sharded. Raises WeightsError."""
    indices = [model_dir / name for name in INDEX_NAMES if (model_dir / name).is_file()]
    if not indices:
        files = sorted(model_dir.glob("*.safetensors"))
        if not files:
            found = "GGUF is not served, and " if any(model_dir.glob("*.gguf")) else ""
            raise WeightsError(
                f"{found}there are no .safetensors files in {model_dir}; use load_format dummy to "
                "try without weights."
            )
        return files
    index = indices[0]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{index.name} is not a valid index of safetensors files.") from None
    if not all(isinstance(name, str) for name in names):
        raise WeightsError(f"{index.name} is not a valid index of safetensors files.")
    absent = [name for name in names if not (model_dir / name).is_file()]
    if absent:
        raise WeightsError(f"files named in {index.name} are missing: {_enumerate(absent)}.")
    return [model_dir / name for name in names]


def open_file(path: Path) -> list[Tensor]:
    """The tensors of one file. Raises WeightsError for a truncated or corrupted one."""
    try:
        file = safe_open(path, framework="pt")
        return [
            Tensor(name, path, file, tuple(part.get_shape()), part.get_dtype())
            for name in file.keys()  # noqa: SIM118 (not a dict)
            for part in (file.get_slice(name),)
        ]
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path.name} is truncated or corrupted ({error}); fetch it again."
        ) from None


def scale_name(name: str, scheme: Scheme) -> str:
    """Of the scales of the weight ``name``."""
    return f"{name.removesuffix('.weight')}.{scheme.scale_name}"


def offset_name(name: str) -> str:
    """Of the zero points of the weight ``name``, which ModelSlim writes where they are all 0."""
    return f"{name.removesuffix('.weight')}.weight_offset"


def scale_shapes(scheme: Scheme, num_rows: int, num_columns: int) -> tuple[tuple[int, ...], ...]:
    """All that the scales of a weight ``[num_rows, num_columns]`` may have; one for a row or for
    all come without the last dimensions too."""
    shape = scheme.scale_shape(num_rows, num_columns)
    if not scheme.has_channel_scales:
        return (shape,)
    return (shape, shape[:1]) if scheme.block[0] is not None else (shape, (1,), ())


class Dummy:
    """Seeded weights for any model: each tensor's are drawn from the seed and its name alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fill(self, layer: Layer) -> None:
        for name, parameter in layer.parameters():
            self.draw(name, parameter)

    def draw(self, name: str, parameter: Parameter) -> None:
        """Magnitudes as a model has them at its first training step."""
        target = parameter.target
        generator = torch.Generator(target.device)
        generator.manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if parameter.role == "norm":
            target.fill_(1.0)
        elif parameter.role == "centred_norm":
            target.zero_()
        elif parameter.role == "time_bias":
            target.fill_(1.0)
        elif parameter.role == "log_decay":
            target.uniform_(math.log(0.01), math.log(16.0), generator=generator)
        else:
            target.normal_(0.0, DUMMY_STD, generator=generator)


def _enumerate(names: list[str], most: int = MOST_NAMED) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
