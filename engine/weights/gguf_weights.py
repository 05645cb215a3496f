"""Weights of a GGUF file, in its formats and the order of its columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from engine.weights.checkpoint import TIED_HEAD, RawWeights, check_whole_blocks, raise_complaints
from engine.weights.gguf_names import FORMATS, Model
from engine.weights.parameters import Layer, Parameter, Source
from kernels.linear.formats import Format, Plain


class GgufWeights(RawWeights):
    """Tensors of one model in a GGUF file."""

    def __init__(self, model: Model, *, with_head: bool = False) -> None:
        """Raises WeightsError for unknown tensors, and if the head is requested and there is
        none."""
        super().__init__(with_head=with_head)
        sources = model.weights()
        self._sources = {name: sources[name] for name in self.wanted(sources)}
        self._file, self._arch, self._bytes = model.file, model.arch, Counter[str]()
        for tensor in model.file.tensors.values():
            self._bytes[tensor.type.name] += tensor.data.nbytes
        self.formats = self

    @property
    def num_bytes(self) -> int:
        return self._bytes.total()

    def format(self, module: str) -> Format | None:
        source = self._sources.get(f"{module}.weight")
        return None if source is None or isinstance(source.format, Plain) else source.format

    def column_order(self, module: str) -> torch.Tensor | None:
        source = self._sources.get(f"{module}.weight")
        return None if source is None else source.columns

    def described(self) -> Sequence[tuple[str, Format]]:
        formats = (FORMATS[name] for name, _ in self._bytes.most_common())
        return [(one.describe(), one) for one in formats if not isinstance(one, Plain)]

    def note(self) -> str:
        shares = {name: 100 * size / self.num_bytes for name, size in self._bytes.most_common()}
        said = (f"{name} {share:.{0 if share >= 1 else 2}f} %" for name, share in shares.items())
        return f"GGUF of {self._arch}: {', '.join(said)}; {super().note()}"

    def ties(self, embedding: str) -> bool:
        return TIED_HEAD not in self._sources

    def check(self, parameters: Iterable[tuple[str, Parameter]], *, tied: bool) -> None:
        wanted, found = dict(parameters), self._sources
        both = [(name, wanted[name], found[name]) for name in wanted.keys() & found.keys()]
        complaints = {
            "missing": [*wanted.keys() - found.keys()],
            "unexpected": [*found.keys() - wanted.keys() - ({TIED_HEAD} if tied else set())],
            "of the wrong shape": [
                f"{name} is {list(source.shape)} instead of {list(parameter.shape)}"
                for name, parameter, source in both
                if source.shape != parameter.shape
            ],
        }
        raise_complaints(complaints)
        for name, parameter, source in both:
            check_whole_blocks(name, parameter, source.format)

    def source(self, name: str, shape: tuple[int, ...]) -> Source:
        return self._sources[name]

    def fill(self, layer: Layer) -> None:
        super().fill(layer)
        self._file.drop_pages()  # The layer has a copy. Memory never holds the model twice.

    def close(self) -> None:
        self._sources = {}
