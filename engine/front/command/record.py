"""Command ``engine record``: runs a proxy in front of a server and writes a trace."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from urllib.parse import urlsplit

from engine.config import BUILTIN_DIR, BUILTIN_NAME
from engine.front.command.remote import base_of, no_answer
from engine.weights.hub import display_name, resolve_folder
from hybridcache.command.signals import log_to_stderr
from hybridcache.geometry.gguf import is_gguf
from hybridcache.geometry.units import counted

GRACE_S = 5
"""Seconds that running requests may take after the recording is stopped; then they are aborted."""


def add_flags(record: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    record.add_argument("--to", required=True, metavar="URL", help="server to pass requests on to")
    record.add_argument("--out", required=True, metavar="FILE", help="trace to write")
    said = "hash: the trace shows only which prompts have a common prefix; keep: it has all "
    said += "prompts and answers (default: hash)"
    record.add_argument("--text", choices=("hash", "keep"), default="hash", help=said)
    said = "directory or GGUF file with the served model's tokenizer and chat template, ORG/NAME, "
    said += "or builtin; without it four characters are counted as a token, which is an estimate"
    record.add_argument("--tokenizer", metavar="DIR", help=said)
    said = "address to listen on (default: %(default)s)"
    record.add_argument("--host", default="127.0.0.1", metavar="TEXT", help=said)
    said = "port to listen on (default: %(default)s)"
    record.add_argument("--port", type=int, default=8001, metavar="N", help=said)


def run(arguments: argparse.Namespace) -> int:
    """Pass requests on until SIGINT or SIGTERM, and return the exit code of the process.

    Raises ValueError if an address, the file or the tokenizer cannot be used.
    """
    upstream, out = base_of(arguments.to), Path(arguments.out)
    named = urlsplit(upstream)
    if named.scheme not in ("http", "https") or not named.hostname:
        raise ValueError(f"{arguments.to!r} is not an address such as http://127.0.0.1:8000.")
    import httpx
    import uvicorn

    from engine.front.command.proxy import PIECE, Proxy, TraceWriter
    from engine.front.server.settings import ServerConfig, bind, local_address
    from engine.text.gguf_tokenizer import load_tokenizer
    from engine.text.tokenizer import BackendTokenizer
    from engine.text.tokenizer_files import HFTokenizer

    tokenizer: BackendTokenizer | None = None
    model = "CONFIG_JSON"
    counted_by = f"{PIECE} characters as a token, an estimate (see --tokenizer)"
    if arguments.tokenizer is not None:
        path = Path(resolve_folder(arguments.tokenizer))
        tokenizer = load_tokenizer(path, None) if is_gguf(path) else HFTokenizer(path)
        if tokenizer is None:
            raise ValueError(f"{path} has no tokenizer: name a file or directory with one.")
        counted_by = f"the tokenizer of {display_name(path)}"
        model = BUILTIN_NAME if path == BUILTIN_DIR else str(path)
    try:  # Before the file is made, which a second start would find.
        httpx.get(upstream, timeout=10, trust_env=named.scheme == "https").close()
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ValueError(no_answer(upstream, error, "start it first, or correct --to")) from None
    except httpx.TransportError:  # It listens, and is slow or busy.
        pass
    log_to_stderr("warning", "engine", "uvicorn")
    with bind(ServerConfig(host=arguments.host, port=arguments.port)) as listener:
        try:
            file = out.open("xb", buffering=0)
            keeps_text = arguments.text == "keep"
            writer = TraceWriter(
                file, keeps_text=keeps_text, tokenizer=tokenizer, counted_by=counted_by
            )
        except OSError as error:
            why = f"{out} cannot be created ({error.strerror}): name a new file."
            raise ValueError(why) from None
        with file:
            proxy = Proxy(upstream, writer)
            config = uvicorn.Config(
                proxy,
                log_config=None,
                proxy_headers=False,  # The server reads them.
                timeout_graceful_shutdown=GRACE_S,
                server_header=False,
                date_header=False,
                ws="none",
            )
            server = uvicorn.Server(config)
            # uvicorn installs the same handlers while it runs, and raises the signal again after
            # its shutdown: without these, the process would end before the summary.
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, server.handle_exit)
            print(f"{local_address(listener)} passes on to {upstream} and writes {out}", flush=True)
            try:
                server.run(sockets=[listener])
            finally:
                proxy.finish()  # A second signal skips the shutdown of the application.
    for why, number in writer.skipped.items():
        print(f"not in the trace: {number:,}, since {why}")
    print(f"tokens counted by: {counted_by}")
    requests = counted(writer.num_requests, "request")
    print(f"{requests}; hybridcache simulate --trace {out} --model {model}", flush=True)
    return 0
