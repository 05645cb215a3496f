"""``engine record``: a proxy in front of a server, and the trace that it writes."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from urllib.parse import urlsplit

from engine.hub import resolve_folder

GRACE_S = 5
"""For requests in progress when the recording is told to end; then they are broken off."""


def record(
    upstream: str, out: Path, *, host: str, port: int, keeps_text: bool, tokenizer: str | None
) -> int:
    """Pass requests on until SIGINT or SIGTERM; return the process's exit code. ValueError if an
    address, the file or the tokenizer cannot be used."""
    named = urlsplit(upstream)
    if named.scheme not in ("http", "https") or not named.hostname:
        raise ValueError(f"{upstream!r} is no address: give one as in http://127.0.0.1:8000.")
    import uvicorn

    from engine.plugins.record.proxy import create_proxy
    from engine.plugins.record.trace_writer import TraceWriter
    from engine.server.config import ServerConfig
    from engine.server.listening import bind
    from engine.text.hugging_face import load_tokenizer

    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    with bind(ServerConfig(host=host, port=port)) as listener:
        try:
            file = out.open("x+b")
        except OSError as error:
            why = f"{out} can not be made ({error.strerror}): name a new file."
            raise ValueError(why) from None
        with file:
            writer = TraceWriter(file, keeps_text=keeps_text, tokenizer=loaded)
            proxy = create_proxy(upstream.rstrip("/").removesuffix("/v1"), writer)
            port = listener.getsockname()[1]
            config = uvicorn.Config(
                proxy,
                log_level="warning",
                timeout_graceful_shutdown=GRACE_S,
                server_header=False,
                date_header=False,
                ws="none",
            )
            server = uvicorn.Server(config)
            # uvicorn does the same while it runs, and raises the signal again once it has shut
            # down: the summary is still to come.
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, server.handle_exit)
            print(f"http://{host}:{port}/v1 passes on to {upstream} and writes {out}", flush=True)
            try:
                server.run(sockets=[listener])
            finally:
                proxy.recorder.finish()  # A second signal skips the end of the application.
    for why, number in writer.skipped.items():
        print(f"not in the trace: {number:,}, since {why}")
    print(f"{writer.num_requests} requests; hybridcache simulate --trace {out}", flush=True)
    return 0


def add_flags(record: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    record.add_argument("--to", required=True, metavar="URL", help="the server to pass on to")
    record.add_argument("--out", required=True, metavar="FILE", help="the trace to make")
    record.add_argument(
        "--text",
        choices=("hash", "keep"),
        default="hash",
        help="hash: only which prompts begin alike can be told from the trace; keep: all that was "
        "said is in it (default: hash)",
    )
    record.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="directory of the served model's tokenizer and chat template; without it four "
        "characters count as a token",
    )
    record.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="TEXT",
        help="address to listen on (default: %(default)s)",
    )
    record.add_argument(
        "--port",
        type=int,
        default=8001,
        metavar="N",
        help="port to listen on (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code of the process."""
    return record(
        arguments.to,
        Path(arguments.out),
        host=arguments.host,
        port=arguments.port,
        keeps_text=arguments.text == "keep",
        tokenizer=None if arguments.tokenizer is None else resolve_folder(arguments.tokenizer),
    )
