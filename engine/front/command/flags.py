"""Command-line flags from the fields of dataclasses and their docstrings."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from engine.config import ConfigError
from hybridcache.command.field_texts import class_body, documented
from hybridcache.command.parser import HelpFormatter, Parser

Config = TypeVar("Config")
METAVARS: dict[type, str] = {int: "N", float: "X", str: "TEXT"}
_type_hints = functools.cache(typing.get_type_hints)

Flag = tuple[Any, dataclasses.Field[Any]]
"""A dataclass and one of its fields."""


def flags_of(config: type) -> list[Flag]:
    """Return the fields of a dataclass."""
    return [(config, field) for field in dataclasses.fields(config)]


def add_flags(
    parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag], omits_absent: bool = False
) -> argparse._ArgumentGroup:
    """Add ``flags`` in a new group. With ``omits_absent``, absent ones are not in the arguments."""
    group = parser.add_argument_group(title)
    for config, field in flags:
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS if omits_absent else field.default,
            help=_help(config, field),
            **_kind(_type_hints(config)[field.name], field.default),
        )
    return group


def add_grouped_flags(parser: Parser, configs: Iterable[type], groups: Mapping[str, str]) -> None:
    """Add one flag for each field of ``configs`` in ``groups``: title to names of fields. The other
    fields are set in Python. The help has the first clause of each docstring."""
    homes = {flag[1].name: flag for config in configs for flag in flags_of(config)}
    for title, names in groups.items():
        if flags := [homes.pop(name) for name in names.split() if name in homes]:
            add_flags(parser, title, flags)
    hints = {}
    for name, (config, _) in homes.items():
        for negation in ("", "no-"):
            hints[f"--{negation}{name.replace('_', '-')}"] = f"use {config.__name__}({name}=...)"
    parser.foreign = hints | dict(parser.foreign)
    parser.formatter_class = ShortHelp


class ShortHelp(HelpFormatter):
    """Shows only the first clause of each help, and the one with the default."""

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        default = re.search(r" \(default: [^()]*\)$", text)
        said = text[: default.start()] if default else text
        first, *others = said.split("; ")
        kept = [one for one in others if one.startswith("by default")]
        return "; ".join([first, *kept]) + (default[0] if default else "")


def read_config(
    config: type[Config],
    arguments: argparse.Namespace,
    defaults: Mapping[str, Any] | None = None,
    **fixed: Any,
) -> Config:
    """Return the config of the parsed ``arguments`` and ``fixed`` values. ``defaults`` are used for
    absent arguments. Raises ValueError if the config rejects a value, by the name of its flag."""
    values = {
        field.name: getattr(arguments, field.name)
        for _, field in flags_of(config)
        if hasattr(arguments, field.name)
    }
    try:
        return config(**(dict(defaults or {}) | values | fixed))
    except ConfigError as error:
        name, said, words = str(error).partition(" must be ")
        if name not in values:
            raise
        raise ConfigError(f"--{name.replace('_', '-')}{said}{words}") from None


@functools.cache
def _docstrings(config: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass."""
    return {name: " ".join(text.split()) for name, _, text in documented(class_body(config))}


def _help(config: type, field: dataclasses.Field[Any]) -> str:
    """Return a docstring as the help of a flag: without a capital letter and the final period."""
    text = _docstrings(config)[field.name].removesuffix(".").replace("%", "%%")
    text = text if text[:2].isupper() else text[0].lower() + text[1:]
    default = field.default
    if default in (None, "", ()) or isinstance(default, bool):
        return text
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} (default: {shown})"


def _kind(hint: Any, default: Any) -> dict[str, Any]:
    """Return the arguments of ``add_argument`` for values of the annotated type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if hint is bool:
        has_negation = default is not False
        return {"action": argparse.BooleanOptionalAction if has_negation else "store_true"}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]

        def listed(text: str) -> tuple[object, ...]:
            words = [word.strip() for word in text.split(",")]
            if "" in words:
                raise argparse.ArgumentTypeError(f"{text!r} has an empty name between its commas")
            return tuple(map(kind, words))

        listed.__name__ = kind.__name__  # For argparse's error.
        return {"type": listed, "metavar": f"{METAVARS[kind]},..."}
    return {"type": hint, "metavar": METAVARS[hint]}
