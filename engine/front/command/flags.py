"""Command-line flags from the fields of dataclasses and their docstrings."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from engine.config import ConfigError
from hybridcache.command.parser import HelpFormatter, Parser, did_you_mean
from hybridcache.fields import class_body, documented

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
    fields are set by ``--set``. The help has the first clause of each docstring."""
    homes = {flag[1].name: flag for config in configs for flag in flags_of(config)}
    for title, names in groups.items():
        if flags := [homes.pop(name) for name in names.split() if name in homes]:
            add_flags(parser, title, flags)
    parser.add_argument_group("other settings").add_argument(
        "--set",
        action=Set,
        homes=homes,
        default=(),
        metavar="NAME=VALUE",
        help="one of: " + ", ".join(homes) + "; may be repeated; `--set help` explains all",
    )
    hints = {}
    for name in homes:
        hints["--" + name.replace("_", "-")] = f"use --set {name}=VALUE"
        hints["--no-" + name.replace("_", "-")] = f"use --set {name}=false"
    parser.foreign = hints | dict(parser.foreign)
    parser.formatter_class = ShortHelp


class Set(argparse.Action):
    """Stores the settings without flags under their names, and lists these names."""

    def __init__(self, homes: Mapping[str, Flag], **options: Any) -> None:
        self._homes = homes
        super().__init__(**options)

    def texts(self) -> dict[str, str]:
        """Return the help of each setting."""
        found = {}
        for name, (config, field) in self._homes.items():
            words = _kind(_type_hints(config)[name], field.default).get("choices", ())
            found[name] = ", ".join(words) + "; " * bool(words) + _help(config, field)
        return found

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, given: Any, option: str | None = None
    ) -> None:
        name, equals, text = given.partition("=")
        name, text = name.strip().replace("-", "_"), text.strip()
        if given == "help":
            parser.formatter_class = HelpFormatter
            texts = (f"  {name:32}{text}" for name, text in self.texts().items())
            wrapped = (textwrap.fill(one, 110, subsequent_indent=" " * 34) for one in texts)
            print(parser.format_help(), "settings of --set:", *wrapped, sep="\n")
            parser.exit()
        if name not in self._homes:
            flag = "--" + name.replace("_", "-")
            hint = did_you_mean(name, self._homes) or "; `--set help` lists them"
            hint = f": use {flag}" if flag in parser._option_string_actions else hint
            parser.error(f"argument --set: {name!r} is not one of its settings{hint}")
        if not equals or not text:
            parser.error(f"argument --set: write {name}=VALUE")
        config, field = self._homes[name]
        kind = _kind(_type_hints(config)[name], field.default)
        words = {word: word for word in kind.get("choices", ())}
        words |= {"true": True, "false": False} if "action" in kind else {}
        if words and text not in words:
            parser.error(f"argument --set: {name} must be one of {', '.join(words)} (got {text!r})")
        try:
            setattr(namespace, name, words[text] if words else kind["type"](text))
        except ValueError:
            what = kind["type"].__name__
            parser.error(f"argument --set: {name}: invalid {what} value: {text!r}")
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), name))


class ShortHelp(HelpFormatter):
    """Shows only the first clause of each help, and the default."""

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        if isinstance(action, Set):
            return text
        default = re.search(r" \(default: [^()]*\)$", text)
        said = text[: default.start()] if default else text
        return said.partition("; ")[0] + (default[0] if default else "")


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
        is_set = name in getattr(arguments, "set", ())
        flag = f"--set {name}" if is_set else "--" + name.replace("_", "-")
        raise ConfigError(f"{flag}{said}{words}") from None


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
