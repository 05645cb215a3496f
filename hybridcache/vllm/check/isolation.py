"""Workload of prompts with equal tokens that must share nothing: images, adapters, salts,
embeddings."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core import kv_cache_utils

IMAGE = 77
"""Token of each position of an image."""
PARTS = {
    "image": ("_gen_mm_extra_hash_keys", lambda request, start, end, at: ([], at)),
    "adapter": ("_gen_lora_extra_hash_keys", lambda request: []),
    "embedding": ("_gen_prompt_embeds_extra_hash_keys", lambda request, start, end: []),
}
"""Function of vLLM that hashes each part, and one in its place that leaves the part out."""


def drop_from_hashes(part: str) -> None:
    """Leave a part out of all later block hashes of this process, so that contents cross over."""
    setattr(kv_cache_utils, *PARTS[part])


def identity(*names: Any) -> int:
    """Return a number that differs between names."""
    return zlib.crc32(repr(names).encode()) * 1_000_003


@dataclass(frozen=True)
class Turn:
    """One request. Its fields are those of a trace, and what vLLM's hashes also contain."""

    session: int
    tokens: np.ndarray
    output: np.ndarray
    namespace: str | None = None
    boundaries: tuple[int, ...] = ()
    images: tuple[tuple[str, int, int], ...] = ()
    """Name, offset and length of each image."""
    adapter: tuple[str, str, int] | None = None
    """Name, path and number of a LoRA adapter."""
    embeddings: torch.Tensor | None = None
    prompt_logprobs: int | None = None

    def request_fields(self) -> dict[str, Any]:
        """Return the arguments of vLLM's ``Request`` beyond those of text."""
        features = [
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier=name,
                mm_position=PlaceholderRange(offset, length),
            )
            for name, offset, length in self.images
        ]
        lora = None
        if self.adapter is not None:
            name, path, number = self.adapter
            lora = LoRARequest(name, number, path)
        return {"mm_features": features, "lora_request": lora, "prompt_embeds": self.embeddings}

    def contents(self) -> tuple[int, np.ndarray]:
        """Return the identity of the request's weights and salt, and of each of its positions."""
        ids = np.append(self.tokens, self.output).astype(np.int64) + 1
        for name, offset, length in self.images:
            ids[offset : offset + length] += identity("image", name)
        if self.embeddings is not None:
            rows = [zlib.crc32(row.numpy().tobytes()) for row in self.embeddings]
            ids[: len(rows)] = np.array(rows, np.int64) + 1
        return identity("adapter", self.adapter and self.adapter[:2]), ids


def mixed(
    seed: int = 0,
    sessions: int = 40,
    turns: int = 4,
    embedded: float = 0.15,
    block: int = 128,
    is_text: bool = False,
) -> Iterator[Turn]:
    """Yield conversations with one head. A share ``embedded`` of them consists of embeddings. A
    third of the prompts ends at a block: these come again at the end. ``is_text`` yields nothing
    but tokens of the same lengths."""
    draw, again = random.Random(seed), list[Turn]()
    table = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))

    def text(length: int) -> list[int]:
        return [draw.randrange(1000, 9999) for _ in range(length)]

    head = text(300)
    adapters = [None, None, ("a", "/p1", 1), ("a", "/p2", 1), ("x", "/p1", 2)]
    for session in range(sessions):
        salt, adapter = draw.choice([None, None, "x", "y"]), draw.choice(adapters)
        is_embedded = draw.random() < embedded
        tokens, images = [*head], list[tuple[str, int, int]]()
        for _ in range(turns):
            if not is_embedded and draw.random() < 0.7:
                length = draw.choice([32, 64, 200, 333])
                images.append((f"{draw.choice('cd')}{length}", len(tokens), length))
                tokens += [IMAGE] * length
            tokens += text(draw.randrange(20, 200)) if draw.random() < 0.7 else [5] * 64
            if ends_at_block := draw.random() < 0.3:
                tokens += text(-len(tokens) % block)
            answer = text(draw.randrange(3, 80))
            one = Turn(session, np.array(tokens, np.int32), np.array(answer, np.int32))
            if not is_text:
                rows = torch.stack([table[(one * 7 + session // 2) % 10] for one in tokens])
                one = replace(
                    one,
                    namespace=salt,
                    images=tuple(images),
                    adapter=adapter,
                    embeddings=rows if is_embedded else None,
                    prompt_logprobs=1 if draw.random() < 0.05 else None,
                )
            yield one
            if ends_at_block:
                again.append(replace(one, session=sessions + len(again)))
            tokens = tokens + answer
    yield from reversed(again)
