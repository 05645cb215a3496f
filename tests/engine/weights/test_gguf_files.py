"""GGUF files: what the reader returns, and that bad files are refused in one sentence."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from engine.models import read_model
from engine.text.gguf_tokenizer import read_tokenizer
from engine.weights.gguf_names import FORMATS, Model
from engine.weights.model_config import ModelError
from hybridcache.geometry import gguf as reader
from hybridcache.geometry.gguf import GGML_TYPES, GgufFile, choose_files, gguf_file
from kernels.linear import blocks
from tests.gguf_files import finish, write_gguf

METADATA = {
    "small": 7,
    "negative": -7,
    "rate": 1e-6,
    "wide": (2**63, gguf.GGUFValueType.UINT64),
    "byte": (200, gguf.GGUFValueType.UINT8),
    "double": (0.1, gguf.GGUFValueType.FLOAT64),
    "yes": True,
    "text": "größer\n",
    "empty": "",
    "words": ["a", "", "ü"],
    "numbers": [1, 2, 3],
    "rates": [0.5, 0.25],
    "flags": [True, False],
}
TENSORS = {
    "matrix": (np.arange(64 * 6, dtype=np.float32).reshape(6, 64), "F32"),
    "half": (np.arange(12, dtype=np.float32).reshape(3, 4), "F16"),
    "vector": (np.arange(5, dtype=np.float32), "F32"),
    "stack": (np.arange(2 * 3 * 32, dtype=np.float32).reshape(2, 3, 32), "Q8_0"),
    "brain": (np.arange(8, dtype=np.float32).reshape(2, 4), "BF16"),
}


def write(path: Path, metadata=METADATA, tensors=TENSORS, alignment=None, **options) -> Path:
    writer = gguf.GGUFWriter(path, "qwen3", **options)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        value, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_key_value(key, value, kind or gguf.GGUFValueType.get_type(value))
    for name, (values, kind) in tensors.items():
        own = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, own), raw_dtype=own)
    finish(writer)
    return path


@pytest.mark.parametrize("alignment", [32, 64])
def test_metadata_and_tensors_are_read(alignment, tmp_path) -> None:
    file = GgufFile(write(tmp_path / "model.gguf", alignment=alignment))
    for key, value in METADATA.items():
        found = file.metadata[key]
        value = value[0] if isinstance(value, tuple) else value
        found = found.tolist() if isinstance(found, np.ndarray) else found
        assert (found, type(found)) == (value, type(value))
    assert file.tensors.keys() == TENSORS.keys()
    for name, (values, kind) in TENSORS.items():
        stored, own = file.tensors[name], gguf.GGMLQuantizationType[kind]
        assert stored.shape == values.shape
        exact = gguf.quants.dequantize(gguf.quants.quantize(values, own), own)
        found = gguf.quants.dequantize(stored.data.reshape(-1, len(stored.data)), own)
        found = found.reshape(values.shape)
        assert np.array_equal(found, exact), name


def test_a_start_reads_the_header_once(tmp_path) -> None:
    path = write(tmp_path / "model.gguf")
    file = gguf_file(path)
    assert gguf_file(path) is file is gguf_file(tmp_path)
    os.utime(path, ns=(1, 1))
    assert gguf_file(path) is not file


def test_version_2_is_read(tmp_path) -> None:
    path = write(tmp_path / "model.gguf")
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", 2)
    path.write_bytes(content)
    assert GgufFile(path).tensors.keys() == TENSORS.keys()


def test_sizes_of_types_are_those_of_ggml() -> None:
    """Types of activations, Q8_1 and Q8_K, are in no files."""
    sizes = {one.name: gguf.GGML_QUANT_SIZES[one] for one in gguf.GGMLQuantizationType}
    for number, type in GGML_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == type.name
        assert sizes[type.name] == (type.columns, type.num_bytes)
        if (format := FORMATS.get(type.name)) is not None:
            [field] = format.fields.values()
            assert field.dtype.itemsize * field.width(256) == type.num_bytes * 256 // type.columns
    assert FORMATS.keys() < {type.name for type in GGML_TYPES.values()}
    assert len(FORMATS) == len(blocks.GGML_TYPES)


def split(folder: Path) -> list[Path]:
    options = {"split_max_tensors": 2, "small_first_shard": False}
    write(folder / "model.gguf", **options)
    return sorted(folder.glob("model-*.gguf"))


def test_split_files_are_one_model(tmp_path) -> None:
    """Any part names the model. The first has the metadata."""
    paths = split(tmp_path)
    assert [path.name for path in paths] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for path in paths:
        file = GgufFile(path)
        assert file.metadata["text"] == METADATA["text"]
        assert file.tensors.keys() == TENSORS.keys()
        matrix = file.tensors["matrix"]
        assert np.array_equal(matrix.data.view(np.float32).reshape(6, 64), TENSORS["matrix"][0])


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        GgufFile(path)
    message = str(error.value)
    assert message.count(". ") == 0 and message.endswith(".") and len(message) < 300
    return message


def test_incomplete_splits_are_refused(tmp_path) -> None:
    first, second, third = split(tmp_path)
    kept = second.read_bytes()
    second.unlink()
    assert f"parts of the model are missing: {second.name}." in refusal(first)
    shutil.copy(third, second)
    assert f"{second.name} does not belong to the other parts" in refusal(first)
    second.write_bytes(kept)
    shutil.copy(first, tmp_path / "renamed.gguf")
    assert "renamed.gguf is one of 3 parts of a model" in refusal(tmp_path / "renamed.gguf")


def test_truncated_files_are_refused_at_every_length(tmp_path) -> None:
    """Padding after the last tensor may be missing."""
    path = write(tmp_path / "model.gguf")
    content = path.read_bytes()
    end = len(content) - 16  # "brain" has 16 bytes in the last 32.
    for size in [*range(0, 1200, 7), *range(1200, end, 97), end - 1]:
        path.write_bytes(content[:size])
        assert re.search("is empty|begin with GGUF|truncated", refusal(path)), size
    path.write_bytes(content[:end])
    assert GgufFile(path).tensors.keys() == TENSORS.keys()


def test_files_that_are_no_files_are_refused(tmp_path) -> None:
    assert "absent.gguf does not exist: correct the path" in refusal(tmp_path / "absent.gguf")
    assert "is a folder: name a file." in refusal(tmp_path)


class Draft:
    """Header of a file, byte by byte."""

    def __init__(self, num_tensors: int = 0, num_keys: int = 0, version: int = 3) -> None:
        self.content = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)

    def text(self, text: str, size: int | None = None) -> Draft:
        data = text.encode()
        self.content += struct.pack("<Q", len(data) if size is None else size) + data
        return self

    def numbers(self, form: str, *values: float) -> Draft:
        self.content += struct.pack(f"<{form}", *values)
        return self

    def key(self, name: str, value: int = 1) -> Draft:
        return self.text(name).numbers("II", 4, value)

    def tensor(self, name: str, *shape: int, kind: int = 0, first: int = 0) -> Draft:
        self.text(name).numbers(f"I{len(shape)}Q", len(shape), *shape)
        return self.numbers("IQ", kind, first)

    def write(self, path: Path, num_bytes: int = 4096) -> Path:
        path.write_bytes(self.content + bytes(num_bytes))
        return path


HUGE = 2**63
BAD = {
    "magic": (Draft().numbers("I", 0), None),
    "version 1": (Draft(version=1), "is a GGUF file of version 1, which is not supported"),
    "big-endian": (Draft(version=3 << 24), "is a GGUF file in big-endian order"),
    "many tensors": (Draft(HUGE), "9,223,372,036,854,775,808 tensors and 0 keys are too many"),
    "many keys": (Draft(0, 10**6), "0 tensors and 1,000,000 keys are too many"),
    "long key": (Draft(0, 1).text("a", HUGE), "its header does not end"),
    "long text": (Draft(0, 1).text("a").numbers("IQ", 8, HUGE), "its header does not end"),
    "type of value": (Draft(0, 1).text("a").numbers("I", 13), "'a' has an unknown type"),
    "long array": (Draft(0, 1).text("a").numbers("IIQ", 9, 0, HUGE), "header does not end"),
    "wide array": (Draft(0, 1).text("a").numbers("IIQ", 9, 12, HUGE), "header does not end"),
    "texts": (Draft(0, 1).text("a").numbers("IIQ", 9, 8, HUGE), "more than 1,048,576 texts"),
    "nested": (Draft(0, 1).text("a").numbers("IIQ", 9, 9, 1), "'a' has an unknown type"),
    "one key twice": (Draft(0, 2).key("a").key("a"), "the key 'a' occurs twice"),
    "alignment": (Draft(0, 1).key("general.alignment", 0), "general.alignment is 0"),
    "odd alignment": (Draft(0, 1).key("general.alignment", 4), "general.alignment is 4"),
    "dimensions": (Draft(1).tensor("a", 1, 1, 1, 1, 1), "'a' has 5 dimensions"),
    "no dimensions": (Draft(1).tensor("a"), "'a' has 0 dimensions"),
    "no elements": (Draft(1).tensor("a", 4, 0), "'a' of F32 has the shape (0, 4)"),
    "long name": (Draft(1).tensor(9000 * "a", 0), f"'{80 * 'a'}...' of F32"),
    "type": (Draft(1).tensor("a", 4, kind=99), "'a' in bad.gguf is stored as type 99 of ggml"),
    "blocks": (Draft(1).tensor("a", 33, 2, kind=8), "'a' of Q8_0 has the shape (2, 33)"),
    "vector of blocks": (Draft(1).tensor("a", 32, kind=8), "'a' of Q8_0 has the shape (32,)"),
    "sizes": (Draft(1).tensor("a", HUGE, HUGE, HUGE), "it has 4.1 KiB of "),
    "far away": (Draft(1).tensor("a", 4, first=HUGE), "it has 4.1 KiB of 8,589,934,592.0 GiB"),
    "overlap": (Draft(2).tensor("a", 9).tensor("b", 9, first=32), "tensors overlap"),
    "begin": (Draft(1).tensor("a", 9, first=8), "do not begin at multiples of 32 bytes"),
    "one twice": (Draft(2).tensor("a", 8).tensor("a", 8, first=32), "the tensor 'a' occurs twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(case, tmp_path) -> None:
    draft, message = BAD[case]
    path = draft.write(tmp_path / "bad.gguf")
    if case == "magic":
        path.write_bytes(b"PK" + path.read_bytes())
    assert (message or "bad.gguf is not a GGUF file: it does not begin with GGUF.") in refusal(path)


def test_long_headers_are_refused_before_they_are_read(tmp_path) -> None:
    """The file is sparse: 2^40 bytes of zeros."""
    path = tmp_path / "bad.gguf"
    draft = Draft(0, 1).text("a").numbers("IIQ", 9, 0, 2**39)
    path.write_bytes(draft.content)
    with path.open("r+b") as file:
        file.truncate(2**40)
    assert "its header is longer than 32.0 MiB" in refusal(path)
    assert reader.MOST_HEADER_BYTES + 60 * reader.MOST_TEXTS < 100 << 20


# --- Choice of a model ----------------------------------------------------------------------------

REPOSITORY = [
    "README.md",
    "mmproj-F16.gguf",
    "imatrix_unsloth.gguf",
    "Model-9B-Q4_K_M.gguf",
    "Model-9B-UD-Q4_K_XL.gguf",
    "Model-9B-IQ4_XS.gguf",
    "Model-9B-Q8_0-00002-of-00002.gguf",
    "Model-9B-Q8_0-00001-of-00002.gguf",
    "BF16/Model-9B-BF16-00001-of-00002.gguf",
    "BF16/Model-9B-BF16-00002-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("model-9b-iq4_xs", ["Model-9B-IQ4_XS.gguf"]),
        (None, ["Model-9B-Q4_K_M.gguf"]),
        ("q4_k_m", ["Model-9B-Q4_K_M.gguf"]),
        ("UD-Q4_K_XL", ["Model-9B-UD-Q4_K_XL.gguf"]),
        ("IQ4_XS", ["Model-9B-IQ4_XS.gguf"]),
        ("Q8_0", ["Model-9B-Q8_0-00001-of-00002.gguf", "Model-9B-Q8_0-00002-of-00002.gguf"]),
        ("BF16", REPOSITORY[-2:]),
    ],
)
def test_label_chooses_the_files_of_one_model(label, expected) -> None:
    assert choose_files(REPOSITORY, "ORG/NAME", label) == expected


def test_choices_are_listed_if_the_label_does_not_decide() -> None:
    two = ["a-Q8_0.gguf", "b-Q8_0.gguf"]
    assert choose_files(["only.gguf", "mmproj-only.gguf"], "folder") == ["only.gguf"]
    assert choose_files(two, "ORG/NAME", "b-q8_0.gguf") == ["b-Q8_0.gguf"]
    for names, label, message in (
        (two, None, "ORG/NAME has several models: choose one of a-Q8_0.gguf, b-Q8_0.gguf."),
        (two, "Q8_0", "ORG/NAME has 2 models with the format Q8_0: choose one of a-Q8_0.gguf, b-Q"),
        (REPOSITORY, "Q5_K_M", "ORG/NAME has 0 models with the format Q5_K_M: choose one of BF16/"),
        (["mmproj-F16.gguf", "model.safetensors"], None, "ORG/NAME has no model in GGUF files."),
    ):
        with pytest.raises(ModelError) as error:
            choose_files(names, "ORG/NAME", label)
        assert message in str(error.value)


# --- Mutations ------------------------------------------------------------------------------------

EXTREMES = [0, 1, 2**8, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Return the file with one to four changes, most of them in the header."""
    made = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = int(len(made) * chance.random() ** 2)
        kind = chance.randrange(6)
        if kind == 0:
            made[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            made[at : at + 1] = bytes([made[at] ^ (1 << chance.randrange(8))]) if made else b""
        elif kind == 2:
            made[at : at + 8] = struct.pack("<Q", chance.choice(EXTREMES))
        elif kind == 3:
            del made[at : at + chance.randint(1, 40)]
        elif kind == 4:
            made[at:at] = made[at : at + chance.randint(1, 40)]
        else:
            found = [one.start() for one in re.finditer(rb"[a-z0-9_.]{5,}", bytes(made[:8000]))]
            if len(found) > 1:
                one, two = chance.sample(found, 2)
                made[one : one + 5], made[two : two + 5] = made[two : two + 5], made[one : one + 5]
    return bytes(made)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[bytes]:
    """Two small models with vocabularies."""
    from tests.engine.small_models import make_oracle

    found = []
    for family in ("qwen3_5", "granite_moe_hybrid_dense"):
        folder = tmp_path_factory.mktemp(family)
        make_oracle(family).save_pretrained(folder)
        tokens = ["ab", "abc", *(chr(256 + n) if n < 33 else chr(n) for n in range(2, 199))]
        extra = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * 198 + [3],
            "tokenizer.ggml.merges": ["a b", "ab c"],
            "tokenizer.ggml.eos_token_id": 198,
            "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
        }
        write_gguf(gguf, folder, folder / "model.gguf", "Q8_0", extra)
        found.append((folder / "model.gguf").read_bytes())
    return found


def consume(path: Path) -> int:
    """Read everything. Returns the number of weights."""
    model = Model(GgufFile(path))
    read_model(model.config)
    weights = model.weights()
    for source in weights.values():
        stored = source.read()
        if len(source.shape) == 2:
            stored.widened(torch.float32)
    read_tokenizer(model.file)
    return len(weights)


@pytest.mark.parametrize("count", [pytest.param(20_000, marks=pytest.mark.full), 300])
@pytest.mark.filterwarnings("ignore:config.json")
def test_mutated_files_raise_nothing_but_the_errors_of_models(count, originals, tmp_path) -> None:
    chance, refused, path = random.Random(3), 0, tmp_path / "model.gguf"
    for content in originals:
        path.write_bytes(content)
        assert consume(path) > 30
    for number in range(count):
        path.unlink()
        path.write_bytes(mutated(originals[number % 2], chance))
        try:
            consume(path)
        except ModelError as error:
            assert 10 < len(str(error)) < 1000
            refused += 1
    assert 0.3 * count < refused < count
