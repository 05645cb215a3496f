"""Options and checks of several commands, and opening a trace."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hybridcache.geometry.units import counted

if TYPE_CHECKING:
    from hybridcache.lab.trace import Trace

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

TRACE_HELP = (
    "[word:]file[?option=value&...], or a generator: chat, few-shot, agent, branch, resend, short, "
    "conversations, sharegpt-like ..."
)


SHARED: dict[str, dict[str, Any]] = {
    "--processes": {"type": int, "default": 1, "help": "runs at the same time; changes no result"},
    "--skip-bad": {"action": "store_true", "help": "skip and count records that cannot be read"},
}
"""Options of more than one command that are no settings of a scenario."""


class Once(argparse.Action):
    """Action of a flag that may be given once: a second one is an error."""

    _last: argparse.Namespace | None = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self._last is namespace:
            hint = "" if self.type or self.choices else ": join values with commas"
            parser.error(f"{option_string} is given twice{hint}")
        self._last = namespace
        setattr(namespace, self.dest, values)


def share(parser: argparse._ActionsContainer, *flags: str) -> None:
    """Add some of the ``SHARED`` options to ``parser``."""
    for flag in flags:
        parser.add_argument(flag, **SHARED[flag])


def add_settings(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add flags for fields of ``Scenario``. Flags that are not given leave no trace in the
    options."""
    from hybridcache.lab.scenario import Scenario

    known = {one.name: one for one in fields(Scenario)}
    for name in names:
        facts = known[name].metadata
        help = facts["help"]
        if facts["names"] is not None:
            help += f": {', '.join(facts['names']())}"
        default = known[name].default
        usual = ",".join(default) if isinstance(default, tuple) else default
        if not (usual in (None, "", 0.0) or usual is True or "default" in help):
            help += f" (default {usual:g})" if isinstance(usual, float) else f" (default {usual})"
        flag = {"action": Once} | facts["flag"]
        if isinstance(default, bool):
            flag["action"] = argparse.BooleanOptionalAction if default else "store_true"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=help.replace("%", "%%"),
            **flag,
        )


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a scenario that were given as flags."""
    from hybridcache.lab.scenario import Scenario

    given = vars(options)
    names = [one.name for one in fields(Scenario) if one.name != "trace" and one.name in given]
    return {name: given[name] for name in names}


def opened(spec: str, options: argparse.Namespace) -> Trace:
    """Open the trace. With ``--skip-bad`` it is read once more, to report how many records are
    bad. ValueError if all are."""
    from hybridcache.lab.traces import open_trace

    trace = open_trace(spec, skip_bad=options.skip_bad)
    if options.skip_bad:
        num_requests = sum(1 for _ in trace)
        if not num_requests:
            raise ValueError(f"{spec}: {trace.is_empty_because}")
        found = counted(num_requests, "request")
        print(f"{spec}: {found}, {trace.bad.left_out()}", file=sys.stderr)
    return trace


def check_figure(options: argparse.Namespace) -> None:
    """Make the folder of ``--figure``. ValueError or OSError if no figure can be written there."""
    from hybridcache.lab.figures import figure_path

    if options.figure is not None:
        figure_path(options.figure)
