"""Parser of the commands ``hybridcache`` and ``engine``."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Parser that reports an error in one sentence and exits with 2.

    Unknown flags are reported by the parser of their verb, with the most similar flag.
    """

    _given: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        self._given = args or ()
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        if "are required" in message:  # perhaps because a flag is misspelt
            known = tuple(self._option_string_actions)
            flags = [arg for arg in self._given if arg.startswith("--")]
            # argparse accepts the beginning of a flag, too.
            unknown = [f for f in flags if not any(k.startswith(f.split("=")[0]) for k in known)]
            message = self._unknown(unknown) if unknown else message
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(found[1], re.findall(r"[^', ]+", found[2]), n=1)
            if near:
                message = f"{message.partition(' (choose from')[0]}, did you mean {near[0]}?"
        end = "" if message.endswith("?") else "."
        self.exit(2, f"{self.prog}: {message.rstrip('.')}{end} See `{self.prog} --help`.\n")

    def _unknown(self, arguments: Sequence[str]) -> str:
        flag = arguments[0].partition("=")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        return f"unrecognized arguments: {' '.join(arguments)}{hint}"
