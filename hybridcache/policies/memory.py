"""Serialization of learned policy state as JSON-compatible data, for restarts.

Policies in ``REMEMBERING`` are written attribute by attribute, and items by serial. Reading creates
only classes of this package and runs none of their code. Restored state replaces a policy's state
only if the attributes, their types and the table widths are equal.

    None, bool, int, float, str                     unchanged
    list                                            [...]
    {"tuple": [...]}, {"set": [...]}                of values
    {"dict": [[key, value], ...]}                   in its order
    {"array": dtype, "shape": [...], "data": text}  little-endian, base64; shape null: array.array
    {"random": [...]}                               the state of a random.Random
    {"item": serial}
    {"columns": [[item, cell, time, worth], ...]}
    {"object": number, "class": "module:Name", "fields": {...}}, and {"same": number} from then on
"""

from __future__ import annotations

import base64
import random
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from hybridcache.policies.eviction.columns import Columns
from hybridcache.policies.eviction.survival import Survival
from hybridcache.policies.placement.adaptive import Adaptive

REMEMBERING: tuple[type, ...] = (Survival, Adaptive)
"""Policies that learn more than the uses and the age of items."""
PACKAGE = "hybridcache.policies."
PLAIN = (bool, int, float, str)
_GONE = object()
"""Placeholder of an item that no longer exists."""

ItemOf = Callable[[int], Any]
"""Lookup of an item by serial. Returns None if it does not exist."""


class Unfit(ValueError):
    """Raised if restored state does not fit the present policy."""


class Writer:
    """Writer of one policy and the memos of its items."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._kept: list[object] = []
        """References that keep numbered objects alive, so that their ids stay unique."""

    def write(self, value: Any) -> Any:
        """Convert ``value`` to JSON data. O(size).

        Raises Unfit for objects other than plain data and classes of this package.
        """
        if value is None or type(value) in PLAIN:
            return value
        kind = type(value)
        if kind is list:
            return [self.write(one) for one in value]
        if kind is tuple:
            return {"tuple": [self.write(one) for one in value]}
        if kind in (set, frozenset):
            return {"set": [self.write(one) for one in value]}
        if isinstance(value, dict):
            return {"dict": [[self.write(key), self.write(one)] for key, one in value.items()]}
        if isinstance(value, np.generic):
            return self.write(value.item())
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
            return _table(little.dtype.str, list(value.shape), little.tobytes())
        if kind is array and value.typecode != "u":
            return _table(value.typecode, None, value.tobytes())
        if kind is random.Random:
            return {"random": self.write(value.getstate())}
        if kind is Columns:
            rows = zip(value.items, value.cells, value.times, value.worths, strict=False)
            return {"columns": [[self.write(one) for one in row] for row in rows]}
        if hasattr(value, "serial") and hasattr(value, "kind"):
            return {"item": value.serial}
        return self._write_object(value)

    def _write_object(self, value: Any) -> Any:
        number = self._numbers.get(id(value))
        if number is not None:
            return {"same": number}
        kind = type(value)
        if not kind.__module__.startswith(PACKAGE):
            raise Unfit(f"{kind.__module__}.{kind.__qualname__} cannot be serialized")
        if isinstance(value, tuple):
            fields = {"": self.write(tuple(value))}
            return {"object": -1, "class": _name(kind), "fields": fields}
        number = self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)
        fields = {name: self.write(one) for name, one in _fields(value).items()}
        return {"object": number, "class": _name(kind), "fields": fields}


class Reader:
    """Reader of the data of a ``Writer``."""

    def __init__(self, item_of: ItemOf, before: Reader | None = None) -> None:
        """Create a reader. ``before`` is a reader of earlier data with shared objects."""
        self._item_of = item_of
        self._objects: dict[int, object] = {} if before is None else before._objects

    def read(self, plain: Any) -> Any:
        """Restore a value.

        Items that no longer exist are dropped from lists, sets, dicts and columns, and become None
        elsewhere. Raises Unfit, or any other exception for data that no ``Writer`` produced.
        """
        value = self._read(plain)
        return None if value is _GONE else value

    def _read(self, plain: Any) -> Any:
        if plain is None or type(plain) in PLAIN:
            return plain
        if isinstance(plain, list):
            return [one for one in map(self._read, plain) if one is not _GONE]
        if "item" in plain:
            item = self._item_of(plain["item"])
            return _GONE if item is None else item
        if "tuple" in plain:
            return tuple(map(self.read, plain["tuple"]))
        if "set" in plain:
            return {one for one in map(self._read, plain["set"]) if one is not _GONE}
        if "dict" in plain:
            pairs = ((self._read(key), self.read(one)) for key, one in plain["dict"])
            return {key: one for key, one in pairs if key is not _GONE}
        if "array" in plain:
            return _read_table(plain)
        if "random" in plain:
            generator = random.Random()
            generator.setstate(self.read(plain["random"]))
            return generator
        if "columns" in plain:
            columns = Columns()
            for item, *numbers in plain["columns"]:
                found = self._read(item)
                if found is not _GONE:
                    columns.put(found, *numbers)
            return columns
        return self._read_object(plain)

    def _read_object(self, plain: Mapping[str, Any]) -> Any:
        if "same" in plain:
            return self._objects[plain["same"]]
        kind = _class(plain["class"])
        if issubclass(kind, tuple):
            return tuple.__new__(kind, self.read(plain["fields"][""]))
        value = self._objects[plain["object"]] = object.__new__(kind)
        for name, one in plain["fields"].items():
            object.__setattr__(value, name, self.read(one))
        return value


def remembers(policy: object) -> bool:
    """Return True if ``policy`` has learned state worth saving."""
    return isinstance(policy, REMEMBERING)


def load_state(policy: Any, remembered: Any) -> None:
    """Replace the state of ``policy`` by ``remembered``, the result of a ``Reader``.

    Raises Unfit, with ``policy`` unchanged, if the class or the attributes differ.
    """
    _check_fits(type(policy).__name__, policy, remembered)
    for name, value in _fields(remembered).items():
        setattr(policy, name, value)


def _check_fits(where: str, own: Any, other: Any) -> None:
    """Raise Unfit unless ``other`` has the same structure as ``own``."""
    if own is None or other is None:
        return
    if {type(own), type(other)} == {int, float}:
        return
    if type(own) is not type(other):
        raise Unfit(f"{where} must be of type {type(own).__name__}")
    if isinstance(own, np.ndarray):
        if own.dtype != other.dtype or own.shape[1:] != other.shape[1:]:
            raise Unfit(f"{where} has another table layout")
    elif type(own).__module__.startswith(PACKAGE) and not isinstance(own, tuple):
        fields, others = _fields(own), _fields(other)
        if fields.keys() != others.keys():
            raise Unfit(f"{where} has other attributes")
        for name, value in fields.items():
            _check_fits(f"{where}.{name}", value, others[name])


def _fields(value: object) -> dict[str, Any]:
    """Return all attributes that are set, including slots."""
    names: list[str] = []
    for kind in type(value).__mro__:
        slots: str | Iterable[str] = kind.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return found | getattr(value, "__dict__", {})


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str) -> type:
    """Return the class of this package with this name. Raises Unfit if there is none."""
    module, _, qualified = name.partition(":")
    found = getattr(sys.modules.get(module), qualified, None)
    if not isinstance(found, type) or _name(found) != name or not module.startswith(PACKAGE):
        raise Unfit(f"there is no {name}")
    return found


def _table(kind: str, shape: list[int] | None, data: bytes) -> dict[str, Any]:
    return {"array": kind, "shape": shape, "data": base64.b64encode(data).decode()}


def _read_table(plain: Mapping[str, Any]) -> Any:
    data = base64.b64decode(plain["data"], validate=True)
    if plain["shape"] is None:
        return array(plain["array"], data)
    little = np.frombuffer(data, np.dtype(plain["array"])).reshape(plain["shape"])
    return little.astype(little.dtype.newbyteorder("="))
