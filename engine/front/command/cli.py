"""The command ``engine`` and its verbs. Invalid input ends with exit code 2 and one sentence."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import BUILTIN_PROMPTS, ConfigError, EngineConfig, check_no_foreign_kernels
from engine.front.command import record, remote
from engine.front.command.flags import add_flags, add_grouped_flags, flags_of, read_config
from engine.front.server.settings import API_KEY_VARIABLE, ServerConfig
from engine.models import read_model
from engine.weights.hub import resolve_config, resolve_folder
from hybridcache.command.extras import how_to_install, version
from hybridcache.command.parser import Parser, with_flags
from hybridcache.command.signals import end_by_exception, prepare_streams
from hybridcache.geometry.gguf import said_of
from hybridcache.geometry.units import counted, format_seconds

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.errors import JsonObject
    from engine.front.async_engine import AsyncEngine
    from engine.requests.request import SamplingParams
    from engine.text.answers import RequestOutput


Command = Callable[[argparse.Namespace], int]
GROUPS = {
    "most used": "model device quantization cache_gib max_model_len max_running host port "
    "api_key_file log_requests log_format state_dir",
    "model": "revision tokenizer chat_template dtype",
    "prefix cache": "prefix_cache checkpoints checkpoint_dtype eviction grid exact admission "
    "host_gib disk_gib state_dir_mismatch",
    "clients": "served_model_name admin_key_file salt_by_key allowed_host trusted_proxy "
    "cors_origin keep_alive_s idle_timeout_s drain_s",
    "chats": "default_max_tokens chat_template_kwargs preserve_thinking images",
    "speed and several engines": "token_budget step_s graphs draft tp replicas ray router role "
    "transfer_at prefill",
}
"""Titles of the help -> settings in that group. The others are fields of the Python config alone
(``engine.serve_engine``)."""
SERVE_EXAMPLES = """examples:
  engine serve                                           the small built-in model
  engine serve --model Qwen/Qwen3-0.6B                   a model of the Hugging Face Hub
  engine serve --model model.gguf                        a GGUF file; of the Hub: ORG/NAME:Q4_K_M
  engine serve --model ./my-model --state-dir ./cache    the cache survives a restart"""
FOREIGN = {
    flag: use
    for use, flags in {
        "use --model": "-m -hf --hf-repo --model-path --model-tag",
        "use --served-model-name": "-a --alias",
        "use --max-model-len": "-c --ctx-size --context-length --max-seq-len",
        "use --max-running": "-np --parallel --max-num-seqs --max-running-requests",
        "use --token-budget": "--max-num-batched-tokens --chunked-prefill-size",
        "use --cache-gib, a size in GiB": "--gpu-memory-utilization --mem-fraction-static",
        "use --tp": "-tp --tensor-parallel-size --tp-size",
        "use --replicas": "-dp --data-parallel-size --dp-size",
        "use --host-gib": "--cpu-offload-gb --swap-space --cache-ram",
        "use --draft": "--speculative-config --draft-model -md",
        "use --device": "-ngl --n-gpu-layers --gpu-layers",
        "pages have one token (EngineConfig(page_size=N) in Python)": "--block-size",
        "use --checkpoints": "--placement",
        "use --eviction (the name in `hybridcache simulate` is another)": "--policy",
        "use --cache-gib (the name in `hybridcache simulate` is another)": "--gib",
        "use --dtype and --checkpoint-dtype": "--kv-cache-dtype",
        f"use --api-key-file, or the environment variable {API_KEY_VARIABLE}": "--api-key",
        "put a proxy with TLS in front": "--ssl-keyfile --ssl-certfile --ssl-key-file "
        "--ssl-cert-file --ssl-ca-certs",
        "use --graphs off": "--enforce-eager",
        "use --chat-template-kwargs": "--default-chat-template-kwargs",
        "use --no-log-requests": "--disable-log-requests",
        "settings are flags, there is no configuration file": "--config",
        "start a server for each model, with a router in front": "--models-dir --models-max",
        "omit it, this is always so or not needed": "--enable-prefix-caching "
        "--enable-chunked-prefill --trust-remote-code",
        "use --prefix-cache none": "--no-enable-prefix-caching --disable-radix-cache",
        "omit it, the chat template tells how the model calls tools and reasons": "--jinja "
        "--tool-call-parser --reasoning-parser --enable-auto-tool-choice",
        "set the environment variable OMP_NUM_THREADS": "-t --threads",
        "LoRA is not supported, merge the adapter into the model": "--enable-lora --lora-modules "
        "--lora --lora-paths",
        "embeddings are not served": "--embedding --embeddings",
    }.items()
    for flag in flags.split()
}
"""Flags of vLLM, SGLang and llama.cpp -> what to use here."""
SPIN_COUNT = "1000"
"""Rounds that a waiting thread spins before it sleeps. The 300,000 of OpenMP take longer than a
time slice, so on a busy machine waiting threads would delay those that compute."""
RECORD = ("--to URL --out FILE [options]", "pass requests on to a server and write a trace of them")
GENERATE = ("[options] [PROMPT ...]", "continue prompts or answer them")
CONVERT = ("MODEL OUT --to FORMAT [options]", "convert weights to eight or four bits")
SKIPPED = ("seed", "stop", "logit_bias")
"""Sampling parameters that are not flags of ``generate``, or are defined separately."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    if arguments is None:
        is_asked = {"-h", "--help"} & {*sys.argv}
        prepare_streams(is_server=sys.argv[1:2] in (["serve"], ["record"]) and not is_asked)
        end_by_exception(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        warnings.showwarning = lambda text, *_, **__: print(f"engine: {text}", file=sys.stderr)
        limit_spinning()
    name, flags = "engine", set[str]()
    try:
        parsed = _parser(sys.argv[1:] if arguments is None else arguments).parse_args(arguments)
        name += f" {parsed.verb}"
        flags |= vars(parsed).keys() - {"prompt", "named"}
        check_no_foreign_kernels()
        code: int = parsed.command(parsed)
        sys.stdout.flush()  # Here, so that a broken pipe is handled below.
        return code
    except BrokenPipeError:  # As of `| head -1`: the reader has all it needs.
        return 141
    except (ValueError, OSError, ModuleNotFoundError) as error:
        said = how_to_install(error, "engine") if isinstance(error, ImportError) else said_of(error)
        print(f"{name}: {with_flags(said, flags)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from engine.errors import RunnerLost

        if not isinstance(error, RunnerLost):
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser(arguments: Sequence[str]) -> Parser:
    """Return the parser of ``arguments``. Verbs that are not named there lack their flags, which
    may need packages that are not installed."""
    parser = Parser(
        prog="engine",
        description="Inference with a prefix cache for hybrid models: KV and recurrent state in "
        "one radix tree.",
    )
    parser.add_argument("--version", action="version", version=f"engine {version()}")
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="COMMAND", parser_class=Parser
    )

    for verb, (command, add_own, usage, said) in COMMANDS.items():
        sub: Parser = verbs.add_parser(
            verb,
            help=said,
            description=said[0].upper() + said[1:] + ".",
            usage=f"engine {verb} {usage}".rstrip(),
            allow_abbrev=False,  # --api-key is not --api-key-file.
        )
        sub.set_defaults(command=command)
        sub.foreign = FOREIGN
        if verb in arguments:
            add_own(sub)
    return parser


def _add_serve(serve: Parser) -> None:
    serve.epilog = SERVE_EXAMPLES
    serve.add_argument("named", nargs="?", metavar="MODEL", help="the same as --model")
    add_grouped_flags(serve, (ServerConfig, EngineConfig), GROUPS)


def _add_sampling(parser: Parser, *skipped: str) -> argparse._ArgumentGroup:
    """Add a flag for each sampling parameter, but those ``skipped``; returns their group."""
    from engine.requests.request import SamplingParams

    flags = [flag for flag in flags_of(SamplingParams) if flag[1].name not in (*SKIPPED, *skipped)]
    return add_flags(parser, "sampling", flags, omits_absent=True)


def _add_generate(generate: Parser) -> None:
    add = generate.add_argument
    add("prompt", nargs="*", help="texts to continue; by default one text from standard input")
    said = "send each prompt as a message of the user, whose answer has no limit by default"
    add("--chat", action="store_true", help=said)
    add("--json", action="store_true", help="print one JSON object per prompt")
    add = _add_sampling(generate).add_argument
    add("--sampling-seed", type=int, metavar="N", help="the same seed gives the same tokens")
    said = "end the answer before this text; may be repeated"
    add("--stop", action="append", default=[], metavar="TEXT", help=said)
    add_grouped_flags(generate, (EngineConfig,), GROUPS)


def _add_chat(chat: Parser) -> None:
    chat.add_argument("--system", metavar="TEXT", help="system message of the chat")
    add = _add_sampling(chat, "max_tokens", "logprobs").add_argument
    said = "maximum number of tokens of an answer; by default there is no limit"
    add("--max-tokens", type=int, metavar="N", help=said)
    add_grouped_flags(chat, (EngineConfig,), GROUPS)


def _add_convert(convert: Parser) -> None:
    add = convert.add_argument
    add("model", help="model directory in full precision")
    add("out", help="directory to create")
    said = "int8: one scale per output channel, as in compressed-tensors; fp8: one per block of "
    said += "128 x 128; int4: compressed-tensors with a scale per 32 columns, or per 128"
    add("--to", choices=("int8", "fp8", "int4", "int4-128"), required=True, help=said)
    said = "additional layers to leave unchanged: words of their names, such as "
    said += "linear_attn.out_proj, or a regular expression after re:"
    add("--ignore", nargs="+", action="extend", default=[], metavar="PATTERN", help=said)


def _engine_config(arguments: argparse.Namespace) -> EngineConfig:
    if named := getattr(arguments, "named", None):
        if arguments.model not in (None, named):
            said = f"MODEL is {named} and --model is {arguments.model}"
            raise ConfigError(f"{said}: give one of them.")
        arguments.model = named
    return read_config(EngineConfig, arguments)


def _serve(arguments: argparse.Namespace) -> int:
    server_config = read_config(ServerConfig, arguments)
    return serve_engine(_engine_config(arguments), server_config)


def limit_spinning() -> None:
    """Let threads of OpenMP that wait sleep soon. Has no effect once torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def serve_engine(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve until a signal ends it, as ``engine serve`` does, and return the exit code.

    A script that calls it must do so under ``if __name__ == "__main__"``. Raises ValueError for
    settings that do not fit together, the machine or the model.
    """
    from engine.front.server.settings import bind, local_address
    from engine.front.worker.spawn import spawn

    limit_spinning()
    # A taken port is reported before slow work.
    with bind(server_config) as listener, ExitStack() as stack:
        needs_key = bool(server_config.api_key_file or os.environ.get(API_KEY_VARIABLE))
        if not needs_key and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            said = f"warning: --host {server_config.host} accepts clients of other machines, and no"
            said += " key is required: set --api-key-file, or let a proxy or firewall limit access."
            print(said, file=sys.stderr, flush=True)
        address = local_address(listener)
        start: Callable[[], tuple[AsyncEngine, str]]
        if server_config.replicas > 1:
            if engine_config.state_dir is not None:
                raise ConfigError("--replicas cannot share a --state-dir: remove one of them.")
            from engine.front.worker.replicas import start_replicas

            start = partial(start_replicas, engine_config, server_config, address)
        else:
            engine_config = resolve_config(engine_config, read_model)
            log = server_config.log_level, server_config.log_format
            spawned = spawn(engine_config, address, None, *log)
            stack.callback(spawned.end)
            from engine.front.worker.process_channel import start_engine

            start = partial(start_engine, engine_config, spawned)
        from engine.front.server.access import Access  # Half a second, while the process starts.
        from engine.front.server.app import serve

        access = Access(server_config)
        print("loading the model ...", file=sys.stderr, flush=True)
        engine, screen = start()
        if needs_key:  # Also in the curl command of the screen.
            header = " -H 'Content-Type"
            screen = screen.replace(header, " -H 'Authorization: Bearer KEY'" + header)
            said = f", one of {API_KEY_VARIABLE}" * (API_KEY_VARIABLE in os.environ)
            print(f"  keys         {access.words()}{said}")
        if listener.getsockname()[0] in ("0.0.0.0", "::"):
            place = address.rpartition(":")[2]
            print(f"  team         http://HOST:{place}, HOST: name or address of this machine")
        print(screen, flush=True)
        serve(engine, server_config, listener, access)
    if engine.failure is not None:
        print(f"engine serve: {engine.failure}", file=sys.stderr)
        return 1
    return 0


def _loaded(arguments: argparse.Namespace, **asked: Any) -> tuple[Engine, SamplingParams]:
    """Return the engine of the parsed ``arguments``, and the sampling with the fields ``asked``."""
    from engine.requests.request import SamplingParams

    engine_config = _engine_config(arguments)
    read_config(SamplingParams, arguments, **asked)  # Raises ValueError before slow work.
    from engine.engine import Engine

    engine = Engine(engine_config)
    return engine, read_config(SamplingParams, arguments, engine.sampling_defaults, **asked)


def _convert(arguments: argparse.Namespace) -> int:
    from engine.front.command.convert import convert

    source = Path(resolve_folder(arguments.model, read_model))
    print(convert(source, Path(arguments.out), arguments.to, arguments.ignore))
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from engine.front.chat_prompt import Conversation, Rendering
    from engine.requests.request import RequestSpec

    stop = tuple(arguments.stop)
    asked = {"max_tokens": None} if arguments.chat and "max_tokens" not in arguments else {}
    engine, sampling = _loaded(arguments, seed=arguments.sampling_seed, stop=stop, **asked)
    texts = arguments.prompt or [sys.stdin.read()]
    assert engine.tokenizer is not None, "an engine that loads a model loads its tokenizer"
    num_failed = 0
    for text in texts:
        spec = RequestSpec(text, sampling)
        if arguments.chat:
            messages: list[JsonObject] = [{"role": "user", "content": text}]
            chat = Rendering(engine.tokenizer, Conversation(messages)).prompt()
            spec = RequestSpec(chat.tokens, sampling, **chat.marks)
        for output in engine.stream(spec):
            if not arguments.json:
                print(output.new_text, end="", flush=True)
        num_failed += output.error is not None
        if arguments.json:
            print(json.dumps(_record(text, output)))  # In ASCII, which any output can encode.
        else:
            print(f"\n[{_summary(output)}]", file=sys.stderr)
    engine.close()
    return 1 if num_failed else 0


def _chat(arguments: argparse.Namespace) -> int:
    """Answer the lines of the standard input until its end or Ctrl-C, and return the exit code. A
    message that is refused, for example because it is too long, is removed from the conversation.
    Raises ValueError if the model has no chat template."""
    from engine.errors import RequestError
    from engine.front.chat_prompt import Conversation, Rendering
    from engine.requests.request import RequestSpec

    engine, sampling = _loaded(arguments)
    tokenizer, system = engine.tokenizer, arguments.system
    if tokenizer is None or tokenizer.chat_template is None:
        said = "has no chat template: use `engine generate`, or another --model."
        raise ValueError(f"{engine.model_name} {said}")
    if sys.stdin.isatty() and engine.config.model is None:
        print("The built-in model solves small word problems, such as:", BUILTIN_PROMPTS[0])
    messages: list[JsonObject] = [] if system is None else [{"role": "system", "content": system}]
    try:
        for line in _messages_of_user():
            messages.append({"role": "user", "content": line})
            try:
                prompt = Rendering(tokenizer, Conversation(messages)).prompt()
                spec = RequestSpec(prompt.tokens, sampling, **prompt.marks)
                for output in engine.stream(spec):  # Leaving the loop aborts the request.
                    print(output.new_text, end="", flush=True)
                print(flush=True)
                if output.failure is not None:
                    raise RequestError.from_wire(output.failure)
            except (ValueError, RequestError) as error:
                print(f"[{error}]", file=sys.stderr, flush=True)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": output.text})
            reused, total = output.cached_len, len(output.prompt_token_ids)
            said = f"{reused:,} reused, {total - reused:,} computed; answer {len(output.output):,}"
            print(f"[prompt {total:,} tokens: {said} tokens]", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print()
    finally:
        engine.close()
    return 0


def _messages_of_user() -> Iterator[str]:
    """Yield messages, one per line, with a prompt in a terminal. Blank lines are omitted."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # Editing and history for input().
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def _record(prompt: str, output: RequestOutput) -> dict[str, object]:
    scores = [one._asdict() for one in output.logprobs or ()]
    return {
        "prompt": prompt,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        **({} if output.error is None else {"error": output.error}),
        **({"logprobs": scores} if scores else {}),
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.cached_len,
        "lost_tokens": None if output.losses is None else output.losses._asdict(),
        "timings_s": output.timings._asdict(),
    }


def _summary(output: RequestOutput) -> str:
    said = f"{counted(len(output.prompt_token_ids), 'prompt token')}, {output.cached_len:,} from "
    said += f"the cache; {len(output.output):,} generated, {output.error or output.finish_reason}"
    ttft_s = output.timings.ttft_s
    return said if ttft_s is None else f"{said}; TTFT {format_seconds(ttft_s)}"


COMMANDS: dict[str, tuple[Command, Callable[[Parser], None], str, str]] = {
    "serve": (_serve, _add_serve, "[MODEL] [options]", "answer OpenAI clients over HTTP"),
    "generate": (_generate, _add_generate, *GENERATE),
    "chat": (_chat, _add_chat, "[options]", "chat with a model in this terminal"),
    "convert": (_convert, _add_convert, *CONVERT),
    "record": (record.run, record.add_flags, *RECORD),
    "agent": (remote.agent, remote.add_agent, *remote.AGENT),
    "bench": (remote.bench, remote.add_bench, *remote.BENCH),
    "grafana": (remote.grafana, lambda _: None, "", "print a dashboard for Grafana"),
}
"""Verb -> function, function that adds its flags, usage, and help."""
