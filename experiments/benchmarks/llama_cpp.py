"""llama.cpp for comparison: forward passes on GGUF files.

Uses ``llama-cpp-python``. `make llama` builds it into ``out/llama`` (minutes). Only this module
uses that folder.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.provenance import ROOT

FOLDER = ROOT / "out" / "llama"
ABSENT = "llama.cpp is not built. Run `make llama` (some minutes)."


def load() -> tuple[ModuleType, ModuleType] | None:
    """Return the modules ``llama_cpp`` and ``gguf``, or None if they are not built."""
    if not (FOLDER / "llama_cpp").is_dir():
        return None
    sys.path.append(str(FOLDER))
    return importlib.import_module("llama_cpp"), importlib.import_module("gguf")


CrashError = BrokenProcessPool
"""Raised if the process of a `RemoteModel` ended."""


class RemoteModel:
    """`LlamaModel` in a second process, which may crash. Methods return their seconds there."""

    def __init__(self, path: Path, **sizes: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, spawn, initializer=_open, initargs=(path, sizes))

    def clear(self) -> float:
        return self._call("clear")[0]

    def forward(
        self, pieces: Sequence[tuple[int, int, Sequence[int]]], every: bool = False
    ) -> float:
        return self._call("forward", pieces, every)[0]

    def logits(self, count: int = 1) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = self._call("logits", count)[1]
        return found

    def close(self) -> None:
        """End the process, which frees the model."""
        self._process.shutdown()

    def _call(self, name: str, *arguments: Any) -> tuple[float, Any]:
        return self._process.submit(_timed, name, *arguments).result()


_model: LlamaModel | None = None
"""Model of this process, which belongs to a `RemoteModel`."""


def _open(path: Path, sizes: dict[str, int]) -> None:
    global _model
    modules = load()
    assert modules is not None, ABSENT
    _model = LlamaModel(modules[0], path, **sizes)


def _timed(name: str, *arguments: Any) -> tuple[float, Any]:
    """Return the seconds and the result of a method of the model."""
    start = time.perf_counter()
    result = getattr(_model, name)(*arguments)
    return time.perf_counter() - start, result


class LlamaModel:
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

    def forward(
        self, pieces: Sequence[tuple[int, int, Sequence[int]]], every: bool = False
    ) -> None:
        """Compute (sequence, position, tokens) pieces of at most 512 tokens in total, with logits
        of each piece's last token, or of every token."""
        batch, at = self._batch, 0
        for sequence, start, tokens in pieces:
            for offset, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = token, start + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = every or offset == len(tokens) - 1
                at += 1
        batch.n_tokens = at
        if self._llama.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode a batch")

    def logits(self, count: int = 1) -> npt.NDArray[np.float32]:
        """Return the logits of the last ``count`` tokens that have some, ``[count, vocab]``."""
        get, context, shape = self._llama.llama_get_logits_ith, self._context, (self._vocab_size,)
        found = [np.ctypeslib.as_array(get(context, i), shape) for i in range(-count, 0)]
        return np.stack(found)


def quantize(llama: ModuleType, source: Path, target: Path, kind: str) -> None:
    """Write the GGUF file ``source`` in another format, such as Q4_K_M. Raises RuntimeError."""
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise RuntimeError(f"llama.cpp cannot write {source.name} as {kind}")
