"""Tests of Markdown pages: run the code blocks of a page and check its links.

The blocks of a page run from top to bottom in an empty folder, depending on their language:

- ``python`` with prompts (``>>>``) is a doctest: its output must match the page.
- ``python`` that starts with a comment such as ``# mine.py`` is written to that file.
- Other ``python`` is executed. All Python blocks of a page share one namespace.
- ``console``: each line after ``$`` is a ``hybridcache`` or ``engine`` command. It runs in this
  process, and its output must match the page. ``...`` matches any text.
- ``sh``: all flags of ``hybridcache`` and ``engine`` commands must exist, and so must targets of
  ``make``, extras of ``pip install`` and scripts of ``python``. A ``curl`` command to the server of
  the pages is sent as curl would send it, and must be answered with 200.

A block may be indented, as in a list.

An HTML comment on the line before a block overrides this: ``<!-- file: NAME -->`` writes the block
to a file, ``<!-- not run: REASON -->`` skips it.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from engine.front.command.cli import main as engine
from hybridcache.lab.cli import main as hybridcache

COMMANDS: dict[str, Callable[[list[str]], int]] = {"engine": engine, "hybridcache": hybridcache}
ROOT = Path(__file__).resolve().parent.parent
SERVER = "http://127.0.0.1:8000"
"""Server address in the pages. Tests replace it by the address of a running server."""
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

_FENCE = re.compile(
    r"^(?: *<!-- *(?P<note>[^\n]*?) *-->\n)?(?P<indent> *)```(?P<language>\w+)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str
    note: str
    """Content of the HTML comment before it."""


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of ``page`` that have a language, in order."""
    content = page.read_text()
    for found in _FENCE.finditer(content):
        line = content.count("\n", 0, found.start("text"))
        text = textwrap.dedent(found["text"]) if found["indent"] else found["text"]
        yield Block(line, found["language"], text, found["note"] or "")


def make_targets() -> set[str]:
    """Return the targets of the Makefile and of those that it includes."""
    files = (ROOT / folder / "Makefile" for folder in ("", "tests", "experiments"))
    return {name for file in files for name in re.findall(r"^([a-z-]+):", file.read_text(), re.M)}


def needs_server(page: Path) -> bool:
    """Return whether a block of ``page`` sends a request to a server."""
    return any(
        SERVER in block.text
        and not block.note
        and (block.language in ("python", "console") or "curl " in block.text)
        for block in blocks(page)
    )


def run(page: Path, folder: Path, server: str | None = None) -> int:
    """Run the blocks of ``page`` and return how many ran.

    ``folder`` is the working directory, and its modules are importable. Raises AssertionError, with
    page and line, for the first block that fails.
    """
    namespace: dict[str, Any] = {"__name__": "page"}
    num_run = 0
    modules_before = set(sys.modules)
    try:
        for block in blocks(page):
            where = f"{page.relative_to(ROOT)}, line {block.line + 1}"
            text = block.text if server is None else block.text.replace(SERVER, server)
            kind, _, value = block.note.partition(":")
            if kind == "not run":
                assert value.strip(), f"{where}: a block marked 'not run' needs a reason"
                continue
            if kind == "file":
                (folder / value.strip()).write_text(text)
                continue
            if block.language == "python":
                _run_python(block, text, namespace, folder, where)
            elif block.language == "console":
                _run_console(text, where)
            elif block.language == "sh":
                _check_commands(text, where, server)
            else:
                continue
            num_run += 1
    finally:
        for name in set(sys.modules) - modules_before:
            source = getattr(sys.modules[name], "__file__", None) or ""
            if source.startswith(str(folder)):
                del sys.modules[name]
    return num_run


def _run_python(
    block: Block, text: str, namespace: dict[str, Any], folder: Path, where: str
) -> None:
    named = re.match(r"# (\w+\.py)\n", text)
    if named:
        (folder / named[1]).write_text(text)
    elif text.startswith(">>>"):
        report, runner = io.StringIO(), doctest.DocTestRunner(optionflags=OPTIONS)
        test = doctest.DocTestParser().get_doctest(text, namespace, where, where, block.line)
        result = runner.run(test, out=report.write, clear_globs=False)
        namespace.update(test.globs)
        assert not result.failed, report.getvalue()
    else:
        try:
            exec(compile("\n" * block.line + text, where, "exec"), namespace)
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error


def _run_console(text: str, where: str) -> None:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.replace("\\\n", " ").partition("\n")
        words = shlex.split(command, comments=True)
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            code = COMMANDS[words[0]](words[1:])
        got = stdout.getvalue()
        assert code == 0, f"{where}: {command} returned exit code {code}"
        is_same = doctest.OutputChecker().check_output(expected, got, OPTIONS)
        assert is_same, f"{where}: {command}\nexpected:\n{expected}\ngot:\n{got}"


def check_command(command: str) -> None:
    """Raise AssertionError unless the flags of a ``hybridcache`` or ``engine`` command exist."""
    _check_commands(command, command)


def _check_commands(text: str, where: str, server: str | None = None) -> None:
    for words in _commands(text):
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]
        if words[:2] in (["uvx", "--from"], ["pipx", "run"]):  # the command of a package
            package = words.index("--spec" if words[0] == "pipx" else "--from") + 1
            _check_install(["pip", "install", words[package]], where)
            words = words[package + 1 :]
        if not words:
            continue
        if words[0] == "curl":
            _run_curl(words[1:], where, server)
        elif words[0] in COMMANDS:
            _check_flags(words, where)
        elif words[0] == "pip":
            _check_install(words, where)
        elif words[0] == "make":
            missing = {word for word in words[1:] if "=" not in word} - make_targets()
            assert not missing, f"{where}: no Makefile has the target {missing}"
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if "/" in word), where
        elif words[0] == "python":
            name = words[2].replace(".", "/") if words[1] == "-m" else words[1].removesuffix(".py")
            files = (ROOT / f"{name}.py", ROOT / name / "__main__.py")
            assert any(file.exists() for file in files), f"{where}: there is no {name}"
        else:
            supported = ("cd", "git", "ray", "export")
            assert words[0] in supported, f"{where}: the command {words[0]!r} cannot be checked"


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command. A quoted word may span several lines."""
    command = ""
    for line in text.replace("\\\n", " ").splitlines():
        command += line
        try:
            yield shlex.split(command, comments=True)
            command = ""
        except ValueError:  # the quotation continues on the next line
            command += "\n"
    assert not command, f"unclosed quotation: {command}"


def _run_curl(words: list[str], where: str, server: str | None) -> None:
    """Send the request of a ``curl`` command if its address is on ``server``.

    Only a few options of curl are supported. As in curl, a body without a content type is sent as a
    form.
    """
    method, body, headers, urls = None, None, {}, []
    rest = iter(words)
    for word in rest:
        if word == "-H":
            name, _, value = next(rest).partition(":")
            headers[name.strip().lower()] = value.strip()
        elif word == "-d":
            body = next(rest)
        elif word == "-X":
            method = next(rest)
        elif word not in ("-s", "-N"):
            assert not word.startswith("-"), f"{where}: unsupported option of curl: {word}"
            urls.append(word)
    [url] = urls
    if server is None or not url.startswith(server):
        return
    if body is not None:
        headers.setdefault("content-type", "application/x-www-form-urlencoded")
    method = method or ("GET" if body is None else "POST")
    answer = httpx.request(method, url, headers=headers, content=body, timeout=120)
    assert answer.status_code == 200, f"{where}: curl {url}: {answer.status_code} {answer.text}"


def _check_flags(words: list[str], where: str) -> None:
    """Check that the ``--help`` of a command lists all of the flags."""
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    depth = 3 if words[:2] == ["hybridcache", "trace"] else 2
    verb = [word for word in words[1:depth] if not word.startswith("--")]
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as exited:
        COMMANDS[words[0]]([*verb, "--help"])
    assert exited.value.code == 0, f"{where}: there is no {' '.join(words[:depth])}"
    unknown = flags - set(re.findall(r"--[a-z0-9-]+", stdout.getvalue()))
    assert not unknown, f"{where}: {' '.join(words[:depth])} has no {', '.join(sorted(unknown))}"


def _check_install(words: list[str], where: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[2:]:
        found = re.fullmatch(r"(?:\.|hybrid-radix-cache)\[(.*)\]", word)
        for extra in found[1].split(",") if found else ():
            assert extra in project["optional-dependencies"], f"{where}: no extra {extra!r}"
        if word.startswith("./"):
            assert (ROOT / word / "pyproject.toml").exists(), f"{where}: {word} is no distribution"


# --- Links --------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of ``page``, as GitHub and MyST write them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """Return the links and the paths in code font with a missing file or heading as target."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    targets += re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
    broken = []
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file.parent == ROOT / "docs" / "examples":  # the site's build copies examples there
            file = ROOT / "examples" / file.name
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    paths = re.findall(r"`((?:engine|hybridcache|kernels|experiments|examples)/[\w./-]+)`", text)
    return broken + [path for path in paths if not (ROOT / path).exists()]
