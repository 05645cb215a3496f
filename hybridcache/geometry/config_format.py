"""Reader of ``config.json`` with the names, types, defaults and aliases of transformers.

A ``Schema`` lists the fields of one ``model_type``. Reading returns a ``Config`` in which every
field has a value. It records the keys that are read, so that a family can refuse the others.

>>> format = Schema(table(hidden_size=64, rms_norm_eps=1e-6), aliases={"d_model": "hidden_size"})
>>> config = format.read({"d_model": 32, "colour": "red"})
>>> config["hidden_size"], config["rms_norm_eps"], "colour" in config
(32, 1e-06, False)
>>> format.read({"hidden_size": "64"})
Traceback (most recent call last):
    ...
hybridcache.geometry.sizes.SizesError: hidden_size in config.json must be an integer (got "64").
"""

from __future__ import annotations

import json
import math
import warnings
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import UnionType
from typing import Any, get_args, get_origin

from hybridcache.geometry.sizes import SizesError

Values = dict[str, Any]
"""Values of one model by key. ``Schema`` has their types, and ``Schema.read`` checks them."""

ROPE_KEYS: Mapping[str, object] = {
    "rope_parameters": dict | None,
    "rope_scaling": dict | None,
    "rope_theta": float | None,
    "partial_rotary_factor": float | None,
    "original_max_position_embeddings": int | None,
}
"""Keys of rotary embeddings, which may be nested; see ``rope`` in the engine."""

WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string"}
WORDS |= {f"list[{k}]": f"a list of {WORDS[k].split()[1]}s" for k in ("int", "float", "str")}
WORDS |= {"list": "a list", "dict": "an object", "None": "null"}
FLOATS = ("Infinity", "-Infinity", "NaN")
COMMON: Mapping[str, object] = {
    "dtype": str | None,
    "torch_dtype": str | None,
    "is_causal": object,
    "per_layer_config": object,
    "transformers_weights": object,
    "fusion_config": object,
}
"""Keys of any model that the code of transformers looks up, although its classes lack them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Type of one value and, for a field of transformers' class, its default."""

    kind: object
    """Type: ``int``, ``list[str]``, ``int | None`` ... An integer is a valid ``float``."""
    default: object = None


def table(**defaults: object) -> Mapping[str, Entry]:
    """Build a table of fields from ``name=default``, or ``name=Entry(...)`` if the type of the
    default is not the only valid one."""
    return {
        name: default if isinstance(default, Entry) else Entry(type(default), default)
        for name, default in defaults.items()
    }


@dataclass(frozen=True, slots=True)
class Schema:
    """Keys of one ``model_type``."""

    fields: Mapping[str, Entry]
    """Fields that change logits or sizes. Present in every ``Config``."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of fields. A value under an alias takes precedence over the field's name."""
    extras: Mapping[str, object] = field(default_factory=dict)
    """Types of keys that are not fields. Present in a ``Config`` only if the file has them."""
    complete: Callable[[Values], None] = lambda values: None
    """Callback that fills in derived fields and removes the values it has used."""

    def read(self, raw: Mapping[str, object]) -> Config:
        """Read the text part of a ``config.json``. Raises SizesError for a value of the wrong
        type."""
        defaults: Values = {name: own.default for name, own in self.fields.items()}
        kinds = {**COMMON, **self.extras}
        kinds |= {name: own.kind for name, own in self.fields.items()}
        values, given = defaults.copy(), set[str]()
        for key in sorted(raw, key=self.aliases.__contains__):
            name = self.aliases.get(key, key)
            if name in kinds:
                values[name] = checked(key, _decoded(raw[key]), kinds[name])
                given.add(name)
        for key in raw.keys() - kinds.keys() - self.aliases.keys():
            for near in get_close_matches(key, sorted(kinds.keys() - given), 1, 0.9):
                text = f"config.json: {key} is not read, did you mean {near}? It has its default."
                warnings.warn(text, stacklevel=2)
        if values.get("num_key_value_heads", 0) is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        self.complete(values)
        return Config(values, defaults, frozenset(given))


@dataclass(eq=False)
class Config(UserDict[str, Any]):
    """Values of one model, including all fields. Records the names that were looked up."""

    data: Values
    _defaults: Values
    given: frozenset[str]
    """Names of fields and extras in the file, after resolving aliases."""
    _read: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self.data[name]

    def ignore(self, *names: str) -> None:
        """Mark names as read because they have no effect in this model."""
        self._read.update(names)

    def unread(self) -> Values:
        """Return values of the file that were never read and differ from transformers' default."""
        return {
            name: value
            for name, value in self.data.items()
            if name not in self._read
            and name in self.given
            and not (name in self._defaults and value == self._defaults[name])
        }


def _decoded(value: object) -> object:
    """Decode ``{"__float__": "Infinity"}``, transformers' form of infinities, at any depth."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in FLOATS:
            return float(value["__float__"])
        return {name: _decoded(part) for name, part in value.items()}
    return [_decoded(part) for part in value] if isinstance(value, list) else value


def checked(name: str, value: Any, kind: object) -> Any:
    """Return ``value`` if it has type ``kind``; convert an integer if ``kind`` is float. Raises
    SizesError if it has another type."""
    if not fits(value, kind):
        names = (kind.__name__ if isinstance(kind, type) else str(kind)).split(" | ")
        wanted = " or ".join(WORDS[each] for each in names)
        raise SizesError(f"{name} in config.json must be {wanted} (got {json.dumps(value)}).")
    return float(value) if kind is float else value


def fits(value: object, kind: object) -> bool:
    """Return True if a JSON value has type ``kind`` (see ``Entry.kind``)."""
    if isinstance(kind, UnionType):
        return any(fits(value, part) for part in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(part, get_args(kind)[0]) for part in value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return fits(value, int) or (isinstance(value, float) and not math.isnan(value))
    return isinstance(kind, type) and isinstance(value, kind)
