"""Weights of a model of any family, from safetensors files or seeded."""

from __future__ import annotations

import math
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from engine.weights.forms import read_quantization
from engine.weights.layer_names import is_buffer, model_name
from engine.weights.model_config import RawConfig
from engine.weights.parameters import FileFormats, Layer, Parameter, Source
from engine.weights.scheme import Quantization, Scheme, Stored
from engine.weights.tensor_files import (
    FULL_DTYPES,
    WeightsError,
    dtype_name,
    enumerated,
    find_files,
    open_file,
)
from kernels.linear.formats import Format, Matrix

Publish = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
"""``Decoder.published`` of a family."""
HEAD = "mtp."
"""Prefix of a multi-token prediction head, which is read only if requested."""
SKIPPED = ("model.visual.", "visual.")
"""Prefixes of known parts that are not supported: the visual tower."""
NANS = {torch.float8_e4m3fn: 0x7F, torch.float8_e8m0fnu: 0xFF}
"""Bits that are all set in a number of eight bits that is none."""
STACKED_EXPERTS = "experts.gate_up_proj", "block_sparse_moe.input_linear.weight"
"""Endings of the names of tensors that contain all experts of a layer."""
TIED_HEAD = "lm_head.weight"
"""Copy of the embedding if a model ties them; files may or may not contain it."""
DUMMY_STD = 0.02


class RawWeights(ABC):
    """Weights of one model, before they are read, by published name."""

    formats: FileFormats | None = None
    """Formats of the quantised weights, or None if there are none."""

    def __init__(self, *, with_head: bool) -> None:
        """``with_head``: True if the multi-token head is read."""
        self._started, self._with_head = time.monotonic(), with_head
        self.skipped: list[str] = []

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of all weights that are read."""

    @property
    def is_stacked(self) -> bool:
        """True if a tensor contains all experts of a layer."""
        return False

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Return the names without parts that are not read, which ``note`` counts. Raises
        WeightsError if the head is requested and there is none."""
        parts = SKIPPED if self._with_head else (HEAD, *SKIPPED)
        found = list(names)
        self.skipped += [name for name in found if name.startswith(parts) or is_buffer(name)]
        left = [name for name in found if not (name.startswith(parts) or is_buffer(name))]
        if self._with_head and not any(name.startswith(HEAD) for name in left):
            raise WeightsError(
                "--draft mtp requires a multi-token head, and the checkpoint has none (no tensor "
                f"{HEAD}*): use --draft tree, or none."
            )
        return left

    def rename(self, published: Publish) -> None:
        """Give tensors the names and shapes of published files, see ``Decoder.published``. GGUF
        has one form only."""
        return

    @abstractmethod
    def ties(self, embedding: str) -> bool:
        """Return True unless the files have a head that differs from ``embedding``."""

    @abstractmethod
    def check(self, parameters: Iterable[tuple[str, Parameter]], *, tied: bool) -> None:
        """Raise WeightsError unless every parameter has a tensor, and every tensor a parameter."""

    @abstractmethod
    def source(self, name: str, shape: tuple[int, ...]) -> Source:
        """Return the weight ``name`` of a model that has passed ``check``."""

    def fill(self, layer: Layer) -> None:
        """Copy the tensors of one layer, and check their numbers. Raises WeightsError."""
        for name, parameter in layer.parameters():
            parameter.fill(self.source(name, parameter.shape))
            target = parameter.target
            matrix = target if isinstance(target, Matrix) else Matrix.of(target)
            for tensor in matrix.fields.values():
                check_numbers(name, tensor)

    def close(self) -> None:
        """Free the files, as far as the model does not use their bytes."""
        return

    def note(self) -> str:
        seconds = time.monotonic() - self._started
        line = f"{self.num_bytes / 2**20:,.0f} MiB of weights in {seconds:.1f} s"
        heads = [name for name in self.skipped if model_name(name).startswith(HEAD)]
        if heads:
            line += "; its multi-token head is read with --draft mtp only"
        buffers = [name for name in self.skipped if is_buffer(name)]
        if len(self.skipped) > len(heads) + len(buffers):
            line += "; its visual tower is not supported"
        if buffers:
            line += "; buffers in its files (rotary_emb, position_ids) are ignored"
        return line


def raise_complaints(complaints: Mapping[str, Sequence[str]]) -> None:
    """Raise WeightsError if there are names of tensors under any kind of complaint."""
    found = {kind: sorted(names) for kind, names in complaints.items() if names}
    sentences = [f"{len(names)} {kind}: {enumerated(names)}" for kind, names in found.items()]
    if sentences:
        raise WeightsError(
            f"the checkpoint's tensors do not match its config.json: {'; '.join(sentences)}."
        )


class WeightFiles(RawWeights):
    """Tensors of the safetensors files of one model directory."""

    formats: Quantization | None

    def __init__(
        self, model_dir: Path, config: RawConfig | None = None, *, with_head: bool = False
    ) -> None:
        """Map the files, and read the formats that ``config``, the contents of config.json, or a
        file beside it describes. Raises ModelError for unsupported formats, and if the head is
        requested and there is none."""
        super().__init__(with_head=with_head)
        found: dict[str, torch.Tensor] = {}
        for file in find_files(model_dir):
            found |= open_file(file)
        self.tensors = {model_name(name): found[name] for name in self.wanted(found)}
        self.formats = read_quantization(config or {}, model_dir, self.tensors)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_stacked(self) -> bool:
        return any(name.endswith(STACKED_EXPERTS) for name in self.tensors)

    def rename(self, published: Publish) -> None:
        self.tensors = published(self.tensors)

    def ties(self, embedding: str) -> bool:
        head, own = self.tensors.get(TIED_HEAD), self.tensors.get(embedding)
        if head is None or own is None:
            return True
        return own.dtype is head.dtype and torch.equal(own, head)

    def check(self, parameters: Iterable[tuple[str, Parameter]], *, tied: bool) -> None:
        wanted: dict[str, Stored] = {}
        by_fields: dict[str, str] = {}
        for name, parameter in parameters:
            own = self._stored(name, parameter.shape)
            wanted.update(own)
            scheme = self._scheme(name, parameter.shape)
            if scheme is not None:
                by_fields |= dict.fromkeys(own, scheme.FIELDS)
                check_whole_blocks(name, parameter, scheme.format)
        found = self.tensors
        needed = {name for name, stored in wanted.items() if not stored.is_optional}
        known = wanted.keys() | ({TIED_HEAD} if tied else set())
        both = [(name, found[name], wanted[name]) for name in sorted(wanted.keys() & found.keys())]
        complaints = {
            "missing": [*needed - found.keys()],
            "unexpected": [*found.keys() - known],
            "of the wrong shape": [],
            "of a type that quantization_config does not give": [
                f"{name} is {dtype_name(tensor.dtype)}"
                for name, tensor, stored in both
                if stored.dtypes and tensor.dtype not in stored.dtypes
            ],
        }
        for name, tensor, stored in both:
            if stored.shapes and tensor.shape not in stored.shapes:
                kind = "of the wrong shape"
                if fields := by_fields.get(name):
                    kind += f" (use the config of these files, or correct its {fields})"
                said = f"{name} is {list(tensor.shape)} instead of {list(stored.shapes[0])}"
                complaints.setdefault(kind, []).append(said)
        raise_complaints(complaints)

    def _scheme(self, name: str, shape: tuple[int, ...]) -> Scheme | None:
        """Return the layout of a weight, or None if it is in full precision."""
        if self.formats is None or len(shape) != 2 or not name.endswith(".weight"):
            return None
        return self.formats.scheme(name.removesuffix(".weight"))

    def _stored(self, name: str, shape: tuple[int, ...]) -> dict[str, Stored]:
        """Return the tensors of a weight in the files, by name."""
        scheme = self._scheme(name, shape)
        if scheme is None:
            return {name: Stored((shape,), FULL_DTYPES)}
        stem = name.removesuffix("weight")
        return {stem + word: stored for word, stored in scheme.tensors(*shape).items()}

    def source(self, name: str, shape: tuple[int, ...]) -> Source:
        scheme = self._scheme(name, shape)
        if scheme is None:
            return Source.of(self.tensors[name])
        stem, words = name.removesuffix("weight"), scheme.tensors(*shape)
        own = {word: self.tensors[stem + word] for word in words if stem + word in self.tensors}
        for word, tensor in own.items():
            if word != "weight":
                check_numbers(stem + word, tensor)

        def read() -> Matrix:
            try:
                return scheme.matrix(own, *shape)
            except ValueError as error:
                raise WeightsError(f"{name} {error}") from None

        return Source(shape, scheme.format, read)


def check_numbers(name: str, tensor: torch.Tensor) -> None:
    """Raise WeightsError if a number of the tensor is NaN or infinite. One pass at memory speed."""
    is_sound = True
    if bits := NANS.get(tensor.dtype):
        is_sound = not (tensor.view(torch.uint8) & bits).eq(bits).any()
    elif tensor.dtype.is_floating_point and tensor.numel():
        is_sound = all(bound.isfinite() for bound in tensor.aminmax())
    if not is_sound:
        raise WeightsError(
            f"{name} contains NaN or infinite numbers: the file is damaged, or its writer failed; "
            "download it again."
        )


def check_whole_blocks(name: str, parameter: Parameter, format: Format) -> None:
    """Raise WeightsError if a rank would have part of a block of columns."""
    cut = parameter.cut
    if cut is not None and cut.dim == 1 and not format.has_whole(cut.index, cut.size):
        raise WeightsError(
            f"--tp would split blocks of {format.unit} columns that share a scale: {name} has "
            f"{cut.size} columns, {len(cut)} per rank; use fewer ranks."
        )


class Dummy:
    """Seeded weights for any model. Each tensor depends only on the seed and its name."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fill(self, layer: Layer) -> None:
        for name, parameter in layer.parameters():
            self.draw(name, parameter)

    def draw(self, name: str, parameter: Parameter) -> None:
        """Fill a parameter with magnitudes as at a model's first training step."""
        target = parameter.target
        assert isinstance(target, torch.Tensor)  # Without files, weights are in full precision.
        if parameter.cut is not None:  # The numbers must not depend on the number of ranks.
            whole = target.new_empty(parameter.shape)
            self.draw(name, Parameter(whole, parameter.role))
            target.copy_(parameter.cut.of(whole))
            return
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
