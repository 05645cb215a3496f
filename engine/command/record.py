"""``engine record``: a proxy in front of a server, and the trace that it writes."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit


def record(
    upstream: str, out: Path, *, host: str, port: int, keeps_text: bool, tokenizer: str | None
) -> int:
    """Pass on until interrupted; the process's exit code. ValueError: an address, a file or a
    tokenizer that can not be used."""
    if urlsplit(upstream).scheme not in ("http", "https"):
        raise ValueError(f"{upstream!r} is no address: give one as in http://127.0.0.1:8000.")
    import uvicorn

    from engine.record.proxy import create_proxy
    from engine.record.trace import TraceWriter
    from engine.text.hugging_face import load_tokenizer

    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    try:
        file = out.open("x", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{out} can not be made ({error.strerror}): name a new file.") from None
    with file:
        writer = TraceWriter(file, keeps_text=keeps_text, tokenizer=loaded)
        app = create_proxy(upstream.rstrip("/").removesuffix("/v1"), writer)
        print(f"http://{host}:{port}/v1 passes on to {upstream} and writes {out}", flush=True)
        uvicorn.run(app, host=host, port=port, log_level="warning")
    for why, number in writer.skipped.items():
        print(f"not in the trace: {number:,}, since {why}")
    print(f"{writer.num_requests} requests; hybridcache simulate --trace {out}")
    return 0
