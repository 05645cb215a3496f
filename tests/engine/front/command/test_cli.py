"""Tests of the command ``engine``: its output, and exit code 2 with one sentence on wrong input."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import json
import os
import pty
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from msgspec import structs

from engine import Engine
from engine.config import BUILTIN_PROMPTS
from engine.errors import WireError
from engine.front.command.cli import COMMANDS, main
from hybridcache.command.signals import prepare_streams
from hybridcache.lab.cli import main as hybridcache
from tests.test_refusals import exit_code

COMMAND = (sys.executable, "-m", "engine")
SMALL = ("--cache-gib", "0.05", "--max-model-len", "2048")


RUN = "simulate --trace short?head=9 --gib 1 --policy lru --no-bound"
PRINT = {
    main: f"--version|--help|serve --help|generate a --max-tokens 1 {' '.join(SMALL)}|grafana|"
    f"chat {' '.join(SMALL)}|convert --help|record --help|agent --help|bench --help",
    hybridcache: f"--version|trace stats short?head=9|trace convert short?head=9 /dev/stdout|{RUN}|"
    "optimum --trace short?head=9 --gib 1|benchmark --help|leaderboard --help",
}
WRITE = {
    main: "convert builtin FILE --to int8|record --to SERVER --port 0 --out FILE",
    hybridcache: f"trace convert short FILE|trace convert short FILE.gz|{RUN} --figure FILE.png|"
    f"{RUN} --output FILE|{RUN} --requests FILE|{RUN} --write-scenario FILE",
}


def ended(program: Callable[[], int], words: str, kind: str) -> tuple[int, str]:
    """Run a command in a fork, in which a stream or each file is on a full disk, the reader has
    gone, or Python has no streams, as if they were closed when it started. Returns its exit code
    and its output, which is read after its end."""
    reader, writer = os.pipe()
    if kind == "closed":
        os.close(reader)
    if (child := os.fork()) == 0:
        with contextlib.ExitStack() as at_end:
            at_end.callback(os._exit, 99)
            sys.stdin, sys.argv = io.StringIO("hi"), ["program", *words.split()]
            for number, name in enumerate(("stdout", "stderr"), 1):
                os.dup2(os.open("/dev/full", os.O_WRONLY) if name == kind else writer, number)
                setattr(sys, name, os.fdopen(number, "w", closefd=False))
            if kind == "file":
                resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))
            elif kind == "none":
                sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]
            try:
                code = program()
            except SystemExit as error:
                code = error.code
            sys.stderr.flush()
            sys.stdout.flush()
            is_inherited = kind != "none" or os.get_inheritable(sys.stdin.fileno())
            os._exit(code if is_inherited else 98)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, "" if kind == "closed" else os.fdopen(reader).read()


@pytest.mark.parametrize("kind", ["stdout", "stderr", "closed", "unread"])
def test_output_that_cannot_be_written_ends_no_server(kind: str) -> None:
    def serve() -> int:
        prepare_streams(is_server=True)
        for stream in [sys.stdout, sys.stderr] * 20:  # More than a pipe holds.
            print("x" * 9000, file=stream, flush=True)
        return 0

    assert ended(serve, "", kind)[0] == 0


@pytest.mark.parametrize("kind", ["stdout", "stderr", "file", "none"])
@pytest.mark.parametrize("program", PRINT)
def test_every_command_says_that_its_output_cannot_be_written(
    program: Callable[[], int], kind: str, tmp_path: Path
) -> None:
    assert COMMANDS.keys() <= {words.split()[0] for words in PRINT[main].split("|")}
    for number, words in enumerate((WRITE if kind == "file" else PRINT)[program].split("|")):
        why = {"stdout": " cannot be written (No space", "file": f"{tmp_path}/{number}"}
        words = words.replace("FILE", f"{tmp_path}/{number}")
        with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
            Thread(target=server.handle_request, daemon=True).start()
            words = words.replace("SERVER", f"http://127.0.0.1:{server.server_port}")
            code, said = ended(program, words, kind)
        assert code == 2 * (kind in why) and why.get(kind, "") in said, (words, said)
        sentences = re.findall("^(?:engine|hybridcache).*: (?!.*Errno)", said, re.M)
        assert kind not in why or len(sentences) == 1, (words, said)


def test_a_closed_pipe_ends_a_process_without_a_traceback() -> None:
    command = [*COMMAND, "generate", *SMALL, "--device", "cpu", "--json", "--max-tokens", "1"]
    command = ["env", "PYTHONIOENCODING=utf-8:strict", *command, "\udcff", *map(str, range(30))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().splitlines()
        usual = b"No C++ compiler", b"Compil"  # A compiled library may not be kept.
        assert [line for line in said if not line.startswith(usual)] == []
    assert process.returncode == 141


@pytest.mark.full
def test_a_process_without_standard_streams_ends() -> None:
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *COMMAND, "chat", *SMALL]
    assert subprocess.run(closed).returncode == 0


def run(*arguments: str) -> int:
    return exit_code(main, arguments)


def test_an_occupied_port_is_reported_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        flags = ["--model", "/no/such/model"]
        assert run("serve", "--port", str(port), *flags) == 2
    [first] = capsys.readouterr().err.splitlines()
    assert f"Cannot listen on 127.0.0.1:{port} (Address already in use)" in first


def test_the_builtin_model_solves_the_prompts_of_the_start_screen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = (*SMALL, "--device", "cpu", "--chat", "--json")  # Without a limit.
    for sampling in (("--temperature", "0"), ("--temperature", "1", "--sampling-seed", "5")):
        assert run("generate", *flags, *sampling, *BUILTIN_PROMPTS) == 0
        answers = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
        assert [answer.split("####")[1].strip() for answer in answers] == ["8", "18", "12"]


def test_generate_prints_cached_and_lost_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "Twice told tales. " * 20
    flags = ("--json", "--max-tokens", "4", "--temperature", "0", "--ignore-eos", *SMALL)
    assert run("generate", prompt, prompt, *flags) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == second["text"] and first["token_ids"] == second["token_ids"]
    assert (first["cached_tokens"], second["cached_tokens"]) == (0, (len(prompt) - 1) // 64 * 64)
    assert second["cached_tokens"] + sum(second["lost_tokens"].values()) == len(prompt)
    stops = ",".join(map(str, first["token_ids"][2:]))
    assert run("generate", prompt, *flags, "--stop-token-ids", stops) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == first["token_ids"][:3]
    assert run("generate", prompt, "--stop-token-ids", "5,x") == 2
    assert "--stop-token-ids: expected an integer such as 8, got '5,x'." in capsys.readouterr().err


def test_commands_report_a_failed_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream, failure = Engine.stream, WireError("failed", "not a number")

    def failed(*request: Any) -> Any:
        return (structs.replace(output, failure=failure) for output in stream(*request))

    monkeypatch.setattr(Engine, "stream", failed)
    assert run("generate", "abc", "--json", "--max-tokens", "1", *SMALL) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "not a number"
    assert run("generate", "abc", "--max-tokens", "1", *SMALL) == 1
    assert "not a number" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert run("chat", *SMALL) == 0
    assert "[not a number]" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["engine.front.command.cli", "hybridcache.lab.cli"])
def test_commands_accept_sigint_when_their_shell_ignores_it(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cover ``command &`` in a script, nohup, and some CI runners."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    try:
        monkeypatch.setattr(sys, "argv", ["command", "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(command).main()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with pytest.raises(SystemExit):
            importlib.import_module(command).main(["--help"])
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "a caller's handler must stay"
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_callback_ends_the_command(number: signal.Signals) -> None:
    """Guard against exceptions of a handler that Python discards while it deletes an object."""
    code = f"""
import os, sys, time
from hybridcache.command.signals import end_by_exception

class Deleted:
    def __del__(self):
        os.kill(os.getpid(), {number:d})
        for _ in range(100):
            pass

end_by_exception({signal.SIGINT:d}, {signal.SIGTERM:d})
try:
    Deleted()
    time.sleep(60)
finally:
    print("cleans up")
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout == "cleans up\n"
    assert ended.returncode in (128 + number, -number)
    assert "ignored" not in ended.stderr


TURNS = "\n".join((BUILTIN_PROMPTS[0], "", BUILTIN_PROMPTS[1])) + "\n"


def test_chat_prints_the_reused_tokens_of_each_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(TURNS))
    assert run("chat", *SMALL, "--device", "cpu", "--temperature", "0") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["5 + 3 = 8. #### 8", "6 * 3 = 18. #### 18"]
    counts = r"\[prompt (\d+) tokens: (\d+) reused, (\d+) computed; answer \d+ tokens\]\n"
    turns = [tuple(map(int, one)) for one in re.findall(counts, printed.err)]
    assert all(reused + computed == prompt for prompt, reused, computed in turns)
    assert [reused > 0 for _, reused, _ in turns] == [False, True]


@pytest.mark.full("ctrl-c")
@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["ctrl-c", "ctrl-d"])
def test_a_chat_in_a_terminal_ends_cleanly(key: str) -> None:
    controller, terminal = pty.openpty()
    command = [*COMMAND, "chat", *SMALL, "--device", "cpu", "--temperature", "0"]

    def become_foreground() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=become_foreground,
    )
    os.close(terminal)
    try:
        seen = _read_until(controller, "> ")
        assert "solves small word problems" in seen
        os.write(controller, (BUILTIN_PROMPTS[0] + "\n").encode())
        assert "#### 8" in _read_until(controller, "answer 18 tokens]\r\n> ")
        seen = b""
        while b"\n" not in seen:  # input() misses a signal between its prompt and its wait.
            os.write(controller, key.encode())
            while b"\n" not in seen and select.select([controller], [], [], 3.0)[0]:
                seen += os.read(controller, 4096)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def _read_until(controller: int, words: str) -> str:
    """Return the terminal's output until it ends with ``words``, without control sequences."""
    seen = ""
    while not seen.endswith(words):
        seen += os.read(controller, 4096).decode()
        seen = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", seen)
    return seen


WITHOUT_EXTRAS = """
import importlib.abc, sys
from importlib import metadata
from hybridcache.command.extras import extras_of
optional = {name for name in metadata.packages_distributions() if extras_of(name)}
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in optional:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from engine.front.command.cli import main
for line in sys.stdin:
    print("$", line.strip(), flush=True)
    try:
        code = main(line.split())
    except SystemExit as stop:
        code = stop.code
    print("=", code, flush=True)
"""


def test_commands_without_their_extras_name_the_missing_extra() -> None:
    """Check that one sentence names the extra to install, for each missing package."""
    works = ["--help", "--version", "record --help", "convert --help"]
    works += ["serve --help"]
    fails = ["serve --port 0", "generate x", "chat", "convert a b --to int8"]
    fails += ["record --to http://127.0.0.1:9 --out never.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS],
        input="\n".join((*works, *fails)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ran = re.findall(r"^\$ (.*?)\n(.*?)^= (\d+)$", done.stdout, re.M | re.S)
    assert [command for command, _, _ in ran] == [*works, *fails], done.stdout
    for command, printed, code in ran:
        if command in works:
            assert code == "0" and printed, (command, printed)
        else:
            sentence = r"engine( \w+)?: \w+ is not installed: pip install \S+engine\n"
            assert code == "2" and re.fullmatch(sentence, printed), (command, printed)
