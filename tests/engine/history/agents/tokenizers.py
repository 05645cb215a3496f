"""Small byte-level tokenizer, trained at run time, and random tokenizations of texts."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from engine.text.hugging_face import HFTokenizer
from engine.text.tokenizer import EncodeOptions

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PARTS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_ALONE = EncodeOptions(add_special_tokens=False)
CORPUS = Path(__file__).resolve().parents[4] / "README.md"


def make_model_dir(directory: Path, template: str, tokenizer_file: Path | None = None) -> Path:
    """Write a directory with a tokenizer and a chat template. About a second.

    The tokenizer is that of ``tokenizer_file``, or one trained on the README.
    """
    import tokenizers

    if tokenizer_file is not None:
        backend = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    else:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=1500,
            special_tokens=list(SPECIAL),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator([CORPUS.read_text(encoding="utf-8")], trainer)
        parts = [tokenizers.AddedToken(part, special=False, normalized=False) for part in PARTS]
        backend.add_tokens(parts)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def sampled_like(tokenizer: HFTokenizer, text: str, seed: int) -> list[int]:
    """Return ids of ``text`` that the tokenizer would not choose, like those sampled from a
    model."""
    draw = random.Random(seed)
    while (token_ids := _cut_ids(tokenizer, text, draw)) == tokenizer.encode(text, _ALONE):
        pass
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text
    return token_ids


def _cut_ids(tokenizer: HFTokenizer, text: str, draw: random.Random) -> list[int]:
    token_ids: list[int] = []
    for piece in _uncut(text):
        start = 0
        while start < len(piece):
            end = start + draw.randrange(4, 40) if not piece.startswith("<") else len(piece)
            token_ids += tokenizer.encode(piece[start:end], _ALONE)
            start = end
    return token_ids


def _uncut(text: str) -> list[str]:
    marks = "|".join(map(re.escape, (*SPECIAL, *PARTS)))
    return [piece for piece in re.split(f"({marks})", text) if piece]
