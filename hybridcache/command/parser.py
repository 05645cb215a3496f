"""Parser of the commands ``hybridcache`` and ``engine``."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``, did you mean x?`` with the most similar of the ``known`` names, in any case; empty
    if none is.

    >>> did_you_mean("LRUU", ("lru", "fifo")), did_you_mean("x", ("lru", "fifo"))
    (", did you mean 'lru'?", '')
    """
    lowered = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), [*lowered], n=1)
    return f", did you mean {lowered[near[0]]!r}?" if near else ""


def or_known(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about a ``name`` that is none of the ``known`` ones, which it
    lists.

    >>> or_known("lruu", ("lru", "fifo")), or_known("x", ("lru", "fifo"))
    (", did you mean 'lru'? known: lru, fifo", '; known: lru, fifo')
    """
    known = [*known]
    return f"{did_you_mean(name, known) or ';'} known: {', '.join(known)}"


def with_flags(message: str, names: Iterable[str]) -> str:
    """Return ``message`` with flags in place of the names of settings, which also Python has. A
    name of several words is a setting wherever it occurs; one of a single word only before "must".

    >>> with_flags("grid must fit cache_gib: a grid.", ["grid", "cache_gib"])
    '--grid must fit --cache-gib: a grid.'
    """
    for name in names:
        place = r"(?<![\w./'\"-])%s(?![\w/'\"-]|\.\w)" if "_" in name else r"^%s(?= must )"
        message = re.sub(place % re.escape(name), "--" + name.replace("_", "-"), message)
    return message


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Puts a flag and its help on one line; keeps the lines of examples."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Break lines at spaces, never inside a name such as ``s3-fifo``."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """Parser that reports an error in one sentence and exits with 2.

    Unknown flags are reported by the parser of their verb, with the most similar flag.
    """

    _given: Sequence[str] = ()
    foreign: Mapping[str, str] = {}
    """Flags of other programs -> what to use here, unless this parser lacks the flag named."""

    def __init__(self, *args: Any, input_flag: str = "", **options: Any) -> None:
        """``input_flag`` is the flag to suggest for a value without a flag."""
        self._input_flag = input_flag
        super().__init__(*args, **{"formatter_class": HelpFormatter} | options)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # Here, so that the command reports a failure.
        super().exit(status, message)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse would hide that the disk is full.

    def format_help(self) -> str:
        if len(self._actions) > 12:  # Else the usage would be longer than a screen.
            needed = [a for a in self._actions if a.required and a.option_strings]
            parts = [f"{a.option_strings[0]} {a.metavar or a.dest.upper()}" for a in needed]
            self.usage = self.usage or " ".join(["%(prog)s", *parts, "[options]"])
        return super().format_help()

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        self._given, self._seen = args or (), list[argparse.Action]()
        if "-hf" in self._given and "-hf" in self.foreign:  # argparse reads -h and -f.
            self.error(self._unknown(["-hf"]))
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return parsed, unknown

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> object:
        is_new = action not in self._seen or isinstance(action, argparse._AppendAction)
        if action.option_strings and not is_new:
            once = "it is given twice: give it once, with commas between the values of a list"
            raise argparse.ArgumentError(action, once)
        self._seen.append(action)
        return super()._get_values(action, arg_strings)

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        if action.type is Path and not arg_string:  # Path("") is the working directory.
            raise argparse.ArgumentError(action, "the name of a file must not be empty")
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> NoReturn:
        if "are required" in message:  # perhaps because a flag is misspelt or left out
            known = tuple(self._option_string_actions)
            flags = [arg for arg in self._given if arg.startswith("--")]
            # argparse accepts the beginning of a flag, too.
            unknown = [f for f in flags if not any(k.startswith(f.split("=")[0]) for k in known)]
            message = self._unknown(unknown) if unknown else message
        message = message.replace("invalid int value:", "expected an integer such as 8, got")
        message = message.replace("invalid float value:", "expected a number such as 8, got")
        found = re.search(r"(invalid choice: '(.*?)') \(choose from (.*)\)", message)
        if found and (near := did_you_mean(found[2], re.findall(r"[^', ]+", found[3]))):
            message = message[: found.end(1)] + near
        end = "" if message.endswith("?") else "."
        self.exit(2, f"{self.prog}: {message.rstrip('.')}{end} See `{self.prog} --help`.\n")

    def _unknown(self, arguments: Sequence[str]) -> str:
        flag = arguments[0].partition("=")[0]
        names = {known[2:] for known in self._option_string_actions if known[:2] == "--"} - {"help"}
        near = difflib.get_close_matches(flag.lstrip("-"), names, n=1) if flag[:1] == "-" else []
        hint = f", did you mean --{near[0]}?" if near else ""
        said = self.foreign.get(flag, "")
        own = re.findall(r"--[a-z][a-z-]*", re.sub("`.*?`", "", said))
        if said and all(name in self._option_string_actions for name in own):
            hint = f": {said}"
        if self._input_flag and not flag.startswith("-"):
            hint = f": write {self._input_flag} {flag}"
            if any(arg.partition("=")[0] == self._input_flag for arg in self._given):
                hint = ": join several values with commas"
        return f"unrecognized arguments: {' '.join(arguments)}{hint}"
