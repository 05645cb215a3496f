"""``hybridcache``: traces, simulations and the optimum on the command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from hybridcache.command.extras import how_to_install, version
from hybridcache.command.parser import Parser
from hybridcache.command.signals import end_by_exception, open_closed_streams
from hybridcache.lab.command.leaderboard import add_leaderboard
from hybridcache.lab.command.optimum import add_optimum
from hybridcache.lab.command.simulate import add_simulate
from hybridcache.lab.command.trace import add_trace

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 if it did its work, 1 if some of its runs failed, 2 if the request
    was impossible or all runs failed, and 130 if it was stopped."""
    if arguments is None:
        open_closed_streams()
        end_by_exception(signal.SIGINT)
    options = argparse.Namespace()
    try:
        _parser().parse_args(arguments, options)
        run: Command = options.run
        if arguments is None:  # only as the main program of a process
            from hybridcache.lab.simulation.grid import collect_seldom

            collect_seldom()
        with warnings.catch_warnings():
            warnings.showwarning = _WarningPrinter()
            code = run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has closed the pipe: discard the rest, also at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _stopped(options)
    except (ValueError, KeyError, ModuleNotFoundError, OSError, MemoryError) as error:
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
            if isinstance(cause, KeyboardInterrupt):  # A request that it cut could not be ended.
                return _stopped(options)
        print(f"hybridcache: {_sentence(error)}", file=sys.stderr)
        return 2


def _stopped(options: argparse.Namespace) -> int:
    """Say what an interrupted command has kept."""
    kept = getattr(options, "output", None)
    is_kept = kept is not None and kept.exists()
    done = f"what was done is in {kept}"
    if getattr(options, "goes_on", False):
        done += ", and the same command goes on from there"
    print(f"hybridcache: stopped; {done if is_kept else 'nothing is kept'}", file=sys.stderr)
    return 130


class _WarningPrinter:
    """Prints each warning once, as one sentence, without the line of code that gave it."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(self, message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in self._shown:
            self._shown.add(str(message))
            print(f"hybridcache: {message}", file=sys.stderr)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"this host has too little memory for it ({error})"
    if isinstance(error, ModuleNotFoundError):
        return how_to_install(error)
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = Parser(
        prog="hybridcache", description="A laboratory for prefix caches of hybrid LLMs."
    )
    parser.add_argument("--version", action="version", version=f"hybridcache {version()}")
    commands = parser.add_subparsers(title="commands", required=True)
    for add in (add_trace, add_simulate, add_optimum, add_leaderboard):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
