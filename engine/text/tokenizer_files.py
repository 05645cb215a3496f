"""Files of a Hugging Face directory with its tokenizer, its template and its end tokens."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.config import BUILTIN_DIR
from engine.text.tokenizer import BYTE_OF, BackendTokenizer, Settings, content_of, special_tokens_of
from hybridcache.geometry.gguf import ABSENT, unreadable

if TYPE_CHECKING:
    import tokenizers

Piece = TypeVar("Piece", str, bytes)


class HFTokenizer(BackendTokenizer):
    """A ``tokenizer.json`` with the template, special tokens and end tokens of its directory.
    ``transformers`` is used only to convert a directory without a ``tokenizer.json``."""

    def __init__(self, model_dir: Path = BUILTIN_DIR, max_ids: int | None = None) -> None:
        """Load the files of ``model_dir``. ``max_ids`` is the number of ids of the model. Raises
        FileNotFoundError if there is no tokenizer, and ValueError if it has more ids."""
        eos, source = named_eos(model_dir), str(model_dir)
        try:
            settings = _read_settings(model_dir)
            backend = _load_backend(model_dir, settings)
            super().__init__(backend, settings, eos_token_ids=eos, max_ids=max_ids, source=source)
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"{model_dir / 'tokenizer_config.json'} has a setting of another type ({error}): "
                "download it again."
            ) from error


def named_eos(model_dir: Path) -> frozenset[int]:
    """Return the end tokens of generation_config.json, or else of config.json, which are ids or
    texts of tokens. Raises ValueError for other values."""
    config = read_json(model_dir / "config.json")
    places = (
        ("generation_config.json", read_json(model_dir / "generation_config.json")),
        ("config.json", config),
        ("config.json", config.get("text_config") or {}),
    )
    for name, settings in places:
        if (named := settings.get("eos_token_id")) is None:
            continue
        ids, added = set[int](), dict[str, int]()
        for one in named if isinstance(named, list) else [named]:
            if isinstance(one, str) and not added:
                added = _ids_by_text(model_dir)
            token: Any = added.get(one) if isinstance(one, str) else one
            if type(token) in (int, float) and float(token).is_integer():
                ids |= {int(token)} if token >= 0 else set()  # -1 stands for none.
            elif one is not None:
                raise ValueError(
                    f"{model_dir / name}: eos_token_id must be token ids or texts of tokens "
                    f"(got {one!r}): correct it."
                )
        return frozenset(ids)
    return frozenset()


def _ids_by_text(model_dir: Path) -> dict[str, int]:
    """Return the ids of tokens by their texts, without loading the tokenizer."""
    listed = read_json(model_dir / "tokenizer_config.json").get("added_tokens_decoder") or {}
    described = read_json(model_dir / "tokenizer.json")
    vocab = (described.get("model") or {}).get("vocab")
    found: dict[str, int] = {**vocab} if isinstance(vocab, dict) else {}
    found |= {str(content_of(token)): int(token_id) for token_id, token in listed.items()}
    return found | {one["content"]: one["id"] for one in described.get("added_tokens") or ()}


def has_tokenizer(model_dir: Path) -> bool:
    """Return True if there is a tokenizer.json, or a file that it can be converted from."""
    forms = "tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab*"
    return any(any(model_dir.glob(form)) for form in forms)


def _load_backend(model_dir: Path, settings: Settings) -> tokenizers.Tokenizer:
    import tokenizers

    path, ranks = model_dir / "tokenizer.json", model_dir / "tiktoken.model"
    for file in (path, ranks):
        if (fault := unreadable(file)) not in (None, ABSENT):
            raise ValueError(f"{file} {fault}.")
    if not has_tokenizer(model_dir):
        raise FileNotFoundError(
            f"No tokenizer in {model_dir}: put the model's tokenizer.json there."
        )
    try:
        if path.exists():
            return tokenizers.Tokenizer.from_file(str(path))
        if ranks.exists():
            return _convert_ranks(ranks, settings)
    except Exception as error:  # The library has no class of its own.
        read = path if path.exists() else ranks
        raise ValueError(f"{read} cannot be read ({error}): download it again.") from error
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
    except Exception as error:  # A missing package, or a file of another form.
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"the tokenizer of {model_dir} cannot be converted ({why}): put the model's "
            "tokenizer.json there, or install sentencepiece and protobuf for a tokenizer.model."
        ) from error


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def cased(digits: str, others: str, upper: str = UPPER, lower: str = LOWER, end: str = "") -> str:
    """Return the pattern of words of GPT-4o, which separates words before capital letters."""
    pairs = (f"[{upper}]*[{lower}]+", f"[{upper}]+[{lower}]*")
    words = "|".join(rf"[^\r\n\p{{L}}\p{{N}}]?{pair}{end}" for pair in pairs)
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[{others}]*|{SPACES}"


NO_HAN = rf"{UPPER}&&[^\p{{Han}}]", rf"{LOWER}&&[^\p{{Han}}]"
KIMI_WORDS = r"[\p{Han}]+|" + cased(r"\p{N}{1,3}", r"\r\n", *NO_HAN, end=f"{CONTRACTIONS}?")
"""Words into which Kimi Linear's tokenizer splits a text before it merges bytes (the program
tokenization_kimi.py of the model; transformers' own converter splits as Llama 3 does)."""
KIMI_SPECIALS = 258
"""Number of special tokens after the ranks in Kimi Linear's vocabulary. Those without a name in
tokenizer_config.json are reserved."""


def _convert_ranks(path: Path, settings: Settings) -> tokenizers.Tokenizer:
    """Read Kimi Linear's tiktoken.model: in each line a token in base 64, and its rank."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letter_of = {byte: letter for letter, byte in BYTE_OF.items()}
    spelled = {token: "".join(map(letter_of.__getitem__, token)) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = merges_into(token, ranks)
        merges += [(spelled[left], spelled[right]) for left, right in pairs]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    words = pre_tokenizers.Split(tokenizers.Regex(KIMI_WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    backend.decoder = decoders.ByteLevel()
    named = settings.get("added_tokens_decoder") or {}
    backend.add_special_tokens(
        [
            content_of(named.get(str(i))) or f"<|reserved_token_{i}|>"
            for i in range(len(ranks), len(ranks) + KIMI_SPECIALS)
        ]
    )
    return backend


def merges_into(token: Piece, ids: Mapping[Piece, int]) -> list[tuple[Piece, Piece]]:
    """Return the pairs of known tokens of which ``token`` consists, by their ids."""
    cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
    known = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
    return sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in ``path``, or {} if the file does not exist. Raises ValueError for any
    other content."""
    if (fault := unreadable(path)) is not None:
        if fault == ABSENT:
            return {}
        raise ValueError(f"{path} {fault}.")
    with suppress(ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    raise ValueError(f"{path} is not an object in JSON: download it again.")


def _read_settings(model_dir: Path) -> Settings:
    """Return the tokenizer_config.json of a directory, with the contents of the files that replace
    or complete it."""
    settings = read_json(model_dir / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # Files of older versions of transformers.
        settings |= read_json(model_dir / "special_tokens_map.json")
        added = read_json(model_dir / "added_tokens.json")
        special = {*map(content_of, special_tokens_of(settings))}
        settings["added_tokens"] = [
            {"content": text, "normalized": text not in special, "special": text in special}
            for text in sorted(added, key=added.__getitem__)
        ]
    path = model_dir / "chat_template.jinja"
    if (fault := unreadable(path)) not in (None, ABSENT):
        raise ValueError(f"{path} {fault}.")
    if fault is None:
        settings["chat_template"] = path.read_text(encoding="utf-8")
    others = sorted(model_dir.glob("additional_chat_templates/*.jinja"))
    if others and isinstance(default := settings.get("chat_template"), str):
        named = {"default": default} | {one.stem: one.read_text("utf-8") for one in others}
        settings["chat_template"] = [{"name": k, "template": v} for k, v in named.items()]
    return settings
