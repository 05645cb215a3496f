"""Bodies of requests, decoded within limits, and of answers: errors and streams of events.

``msgspec`` holds the interpreter while it decodes a body and converts its fields to their types.
The number of bytes and of values is therefore limited, and long bodies are decoded in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ClassVar, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from engine.errors import (
    ContextOverflow,
    DuplicateId,
    EngineStopped,
    InvalidRequest,
    Json,
    JsonObject,
    QueueFull,
    RequestError,
)
from engine.front.server.settings import ServerConfig
from engine.text.bounded import read_json, whole_text
from hybridcache.adapters.client_habits import line_of

logger = logging.getLogger(__name__)

# --- Errors ---------------------------------------------------------------------------------------

NAMED = re.compile(r"'(\w[\w.]*)'|^([a-z]\w*) ")
"""Name of a parameter in a message; those of the engine begin with it."""
MAX_QUOTED, MAX_MESSAGE = 60, 280
"""Maximum length of a quotation from the request, and of the whole message."""
ANTHROPIC = "/v1/messages"
"""Prefix of the paths that answer in Anthropic's form."""
ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    **dict.fromkeys((500, 502), "api_error"),
}
REFUSALS: dict[str, tuple[int, str | None, dict[str, str] | None]] = {
    InvalidRequest.kind: (400, None, None),
    ContextOverflow.kind: (400, "context_length_exceeded", None),
    DuplicateId.kind: (409, "duplicate_request_id", None),
    QueueFull.kind: (429, "queue_full", {"Retry-After": "1"}),
    EngineStopped.kind: (503, "stopped", {"Retry-After": "10"}),
}
"""Status, code and headers of each kind of ``RequestError``; others are failures of the engine."""
KINDS = {404: "not_found_error", 429: "rate_limit_error"} | dict.fromkeys(
    (500, 502, 503), "server_error"
)


class APIError(Exception):
    """An answer with a status other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        for_anthropic: str | None = None,
    ) -> None:
        """``param``: part of the body that caused it. With status 400 it is by default the one that
        the message names in quotation marks or begins with. ``for_anthropic``: message in
        Anthropic's dialect, if its clients parse it."""
        super().__init__(short(message, MAX_MESSAGE))
        if param is None and status == 400 and (named := NAMED.search(message)):
            param = named[1] or named[2]
        self._for_anthropic = for_anthropic or str(self)
        self.status, self.code, self.headers = status, code, headers
        self.param = None if param is None else short(param)

    def body(self, scope: Scope | None = None) -> JsonObject:
        """Return the body of the answer to the request of ``scope``, or in OpenAI's form."""
        if scope is not None and scope["path"].startswith(ANTHROPIC):
            kind = ANTHROPIC_KINDS.get(self.status, "invalid_request_error")
            error: JsonObject = {"type": kind, "message": self._for_anthropic}
            if self.code is not None:
                error["details"] = {"error_code": self.code}
            request_id = scope.get("state", {}).get("request_id")
            return {"type": "error", "error": error, "request_id": request_id}
        kind = KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    def response(self, scope: Scope) -> Response:
        """Return the response to the request of ``scope``, and add the message to its log line."""
        scope.setdefault("state", {})["error"] = str(self)
        content = msgspec.json.encode(self.body(scope))
        return Response(content, self.status, self.headers, "application/json")


ABSENT = {
    "/api/tags": "Ollama's own API is not served: use /v1/models.",
    "/api/generate": "Ollama's own API is not served: use /v1/completions.",
    "/api/embed": "Embeddings are not served: this server only generates text.",
    "/api/": "Ollama's own API is not served: use /v1/chat/completions.",
    "/v1/embeddings": "Embeddings are not served: this server only generates text.",
    "/v1/load_lora_adapter": "LoRA is not supported: merge the adapter into the model.",
}
"""Beginnings of paths that clients of other servers use -> what to use here."""
ABSENT_FIELDS = {
    "keep_alive": "is not supported: the model stays loaded until the server ends",
    "num_ctx": "is a setting of the server: start it with --max-model-len",
    "options": "is not supported: write its parameters beside the messages",
    "lora_request": "is not supported: merge the adapter into the model",
}
"""Parameters of other servers -> the sentence about them."""
SAME_FIELDS = (
    ("tools", "functions"),
    ("tool_choice", "function_call"),
    ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "num_predict"),
    ("stop", "stop_sequences"),
    ("messages", "input", "prompt"),
    ("system", "instructions"),
    ("response_format", "text", "output_config", "format", "json_schema"),
    ("structured_outputs", "regex", "ebnf", "guided_json", "guided_regex", "guided_choice"),
    ("structured_outputs", "guided_grammar", "grammar"),
    ("reasoning_effort", "reasoning", "thinking", "think"),
    ("echo", "prompt_logprobs"),
)
"""Names of one parameter in several APIs and their versions."""


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        path, message = request.url.path, str(error.detail)
        if error.status_code == 404:
            hints = (hint for start, hint in ABSENT.items() if path.startswith(start))
            said = "OpenAI's clients need an address with /v1, Anthropic's one without"
            message = next(hints, f"There is no path {path}: see /openapi.json; {said}.")
        elif error.status_code == 405:
            message = f"{path} does not support {request.method}: see /openapi.json."
        error = APIError(error.status_code, message, headers=error.headers)
    return of_failure(error).response(request.scope)


HANDLERS = dict.fromkeys((APIError, RequestError, HTTPException, Exception), _refuse)
"""Functions that convert each failure of an application to the answer of an ``APIError``."""


def quoted(text: str) -> str:
    """Return text of a client in quotation marks, cut to a bounded length."""
    return f"'{short(text)}'"


def short(text: str, most: int = MAX_QUOTED) -> str:
    """Return ``text`` on one line, cut at ``most`` characters."""
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return whole_text(" ".join(cut.splitlines()))


def of_failure(error: Exception) -> APIError:
    """Convert ``error`` to the error that clients get, no matter which process raised it."""
    if isinstance(error, APIError):
        return error
    if not isinstance(error, RequestError):
        logger.error("A request failed.", exc_info=error)
        return APIError(500, "The server failed on this request; see its log for the reason.")
    if error.kind not in REFUSALS:
        return APIError(500, f"The engine failed on this request: {str(error).rstrip('.')}.")
    (status, code, headers), for_anthropic = REFUSALS[error.kind], None
    if isinstance(error, ContextOverflow):  # The sentence that Anthropic's clients recognise.
        room = error.max_model_len - min(error.max_tokens, 1)
        for_anthropic = f"prompt is too long: {error.prompt_len} tokens > {room} maximum"
    return APIError(status, str(error), code=code, headers=headers, for_anthropic=for_anthropic)


# --- Bodies of requests ---------------------------------------------------------------------------

LONG = 4096
"""Bytes, characters or tokens above which work is done in a thread."""
_threads = ThreadPoolExecutor(2, thread_name_prefix="server")
"""Threads for long work, which does not delay short work."""
LARGE_BODY, MAX_LARGE_BODIES = 4 << 20, 8
"""Bytes above which a body is large, and number of large ones that are received at once."""
MEDIA_SHARE, REST = 7 / 8, " without images, documents and sound"
"""Part of ``max_body_mib`` that only images, documents and sound may fill, and what is left."""
PIECE = 1 << 18
DATA = re.compile(rb"(?<![A-Za-z0-9+/=])[A-Za-z0-9+/=]{4096,}")
"""Bytes of a body that are searched at once for long base64, which costs little to read."""
MAX_NODES = 100_000
"""Maximum names, lists and objects of a JSON text: decoding holds the interpreter for 50 ms."""
TOO_MANY = f"it has more than {MAX_NODES:,} names, lists and objects"
UNMARKED = bytes(set(range(256)) - set(b'[{:"'))
"""Bytes that begin no list, object or text, and end no name."""

Result = TypeVar("Result")


async def run(size: int, work: Callable[[], Result]) -> Result:
    """Run ``work`` directly if its ``size`` is small, else in a thread, and return its result."""
    if size <= LONG:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_threads, work)


class FixedObject(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Object of a fixed form inside a body. Unknown names are refused unless they are null."""


class Body(FixedObject, kw_only=True):
    """Base of all bodies."""

    NEUTRAL: ClassVar[Mapping[str, Collection[object] | None]] = {}
    """Parameters that are not supported -> values without effect, or None if all have none."""
    ENTRIES: ClassVar[Mapping[str, Callable[[JsonObject, str], JsonObject]]] = {}
    """Lists of ``LISTS`` -> function that returns an entry in the form that is converted to its
    type. It gets the entry and its place in the body, and may raise APIError or ValueError."""

    model: str | None = None
    cache_salt: str | None = None
    """Requests with different salts share neither cache entries nor stored responses."""


Kind = TypeVar("Kind", bound=Body)
LISTS = "messages", "input", "tools"
"""Lists of a body that are read entry by entry; the first two are chats."""


def decode(kind: type[Kind], raw: bytes, config: ServerConfig) -> Kind:
    """Return the body ``raw`` as ``kind``; lone surrogates become U+FFFD. Raises APIError 400 with
    one sentence about the first fault, or the first refused image, and 413 for much text. O(its
    size)."""
    refuses_images, most_mib = config.images == "refuse", config.max_body_mib * (1 - MEDIA_SHARE)
    most, rest = int(most_mib * 2**20), raw
    if len(raw) > most:  # In pieces, between which other threads run.
        starts = range(0, len(raw), PIECE)
        rest = b"".join(DATA.sub(b"", raw[at : at + PIECE]) for at in starts)
    if len(rest) > most:
        raise _too_large(most_mib, config, REST)
    try:
        text = raw.decode()
        if num_nodes(rest) > MAX_NODES:
            raise ValueError(TOO_MANY)
        body = settled(read_json(text))
        if not isinstance(body, dict):
            raise ValueError("it has no names and values between { and }")
    except ValueError as error:
        raise APIError(400, f"The body cannot be read ({error}): send one JSON object.") from None
    try:
        for name, allowed in kind.NEUTRAL.items():
            value = body.pop(name, None)
            if value is not None and allowed is not None and value not in allowed:
                raise ValueError(f"'{name}' is not supported: omit it.")
        for name in LISTS:
            form, entries = kind.ENTRIES.get(name), body.get(name)
            for at, entry in enumerate(entries if isinstance(entries, list) else ()):
                place = f"{name}.{at}"
                if name != "tools":
                    entry = _written(entry, place, refuses_images)
                body[name][at] = form(entry, place) if form and isinstance(entry, dict) else entry
    except ValueError as error:
        raise APIError(400, str(error)) from None
    if len(raw) > most < len(repr(body)):
        raise _too_large(most_mib, config, REST)
    return converted(body, kind)


def _too_large(most_mib: float, config: ServerConfig, what: str = "") -> APIError:
    message = f"The body{what} is larger than {most_mib:g} MiB: send less, or serve with "
    message += f"ServerConfig(max_body_mib=N), now {config.max_body_mib:g}, of engine.serve_engine."
    return APIError(413, message)


MEDIA = {
    **dict.fromkeys(("image", "image_url", "input_image", "computer_screenshot"), "An image"),
    **dict.fromkeys(("document", "file", "input_file"), "A document"),
    **dict.fromkeys(("input_audio", "audio"), "A sound"),
}
"""Types of parts that no served model reads -> their common name."""


def _written(entry: Json, place: str, refuses: bool, is_content: bool = False) -> Json:
    """Return a message, item or part with text in place of parts that no template writes. O(parts).

    A refused part would end the session of an agent. Images, documents and sound become a line, or
    raise APIError 400; blocks of history become the text of ``line_of``.
    """
    if not isinstance(entry, dict):
        return entry
    kind, line = entry.get("type"), None
    if isinstance(kind, str) and (medium := MEDIA.get(kind)) is not None:
        if refuses:
            said = f"'{place}': {medium} is not supported: send text"
            raise APIError(400, f"{said}, or start the server with --images text.")
        line = f"[{medium} was left out here, because the model reads text only.]"
    elif is_content:
        line = line_of(entry)
    if line is not None:
        mark = entry.get("cache_control")
        return {"type": "text", "text": line} | ({"cache_control": mark} if mark else {})
    for name in ("content", "output"):
        found = entry.get(name)
        if isinstance(found, dict) and found.get("type") in MEDIA:
            found = [found]
        if isinstance(found, list):
            places = (f"{place}.{name}.{at}" for at in range(len(found)))
            parts = zip(found, places, strict=True)
            entry[name] = [_written(part, its, refuses, True) for part, its in parts]
    return entry


REMEDIES = {
    "web_search": 'turn it off in the client (Codex: web_search = "disabled" in config.toml; '
    "Claude Code: --disallowedTools WebSearch)",
    "custom": "send a function in its place (Codex: a model catalogue without "
    "apply_patch_tool_type)",
}
"""Beginnings of types of tools that are not supported -> what to do in the client."""


def checked_tool(tool: JsonObject, place: str, *, served: Collection[str]) -> JsonObject:
    """Return a tool. Raises APIError 400 with the remedy if its type is none of ``served``."""
    kind = tool.get("type")
    if isinstance(kind, str) and kind not in served:
        usual = "turn it off in the client, or send a function in its place"
        advice = next((said for word, said in REMEDIES.items() if kind.startswith(word)), usual)
        said = f"'{place}' is a tool of the type {quoted(kind)}, which is not supported"
        raise APIError(400, f"{said}: {advice}.", param=f"{place}.type")
    return tool


def num_nodes(raw: bytes) -> int:
    """Return the number of names, lists and objects of a JSON text, in a few short calls."""
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    marks = plain.translate(None, UNMARKED).replace(b'""', b"")
    return len(b"".join(marks.split(b'"')[::2]))  # Without the pieces inside texts.


FREE = {"arguments", "input", "input_schema", "json", "parameters", "schema"}
"""Names of objects of any form, such as JSON schemas and arguments of calls."""


def settled(value: Json) -> Json:
    """Return JSON without nulls in objects, which mean the default everywhere in these APIs, and
    with 3 in place of 3.0. Objects of any form stay as they are; others are copies. O(its size)."""
    if isinstance(value, dict):
        return {
            name: entry
            if type(entry) is str or (name in FREE and isinstance(entry, dict))
            else settled(entry)
            for name, entry in value.items()
            if entry is not None
        }
    if isinstance(value, list):
        is_plain = {*map(type, value)}.isdisjoint((dict, list, float))
        return value if is_plain else [*map(settled, value)]
    if isinstance(value, float) and abs(value) <= 2**53 and value.is_integer():
        return int(value)
    return value


TYPES = {"bool": "a boolean", "float": "a number", "int": "an integer", "str": "a string"}
TYPES |= {"array": "an array", "object": "an object"}
"""JSON's names of the types in the messages of msgspec."""


def converted(value: object, of_type: type[Result], place: str = "") -> Result:
    """Return the settled JSON ``value`` at this ``place`` of a body as ``of_type``. Raises APIError
    400 with one sentence about the first fault."""
    try:
        return msgspec.convert(value, of_type, str_keys=True)
    except msgspec.ValidationError as error:
        raise _refusal(error, of_type, place) from None


def _refusal(error: msgspec.ValidationError, of_type: type[Result], place: str) -> APIError:
    if isinstance(error.__cause__, ValueError):
        return APIError(400, str(error.__cause__))
    text, _, at = str(error).replace("`", "").partition(" - at ")
    what = "A name in " if at.startswith("key") else "A value of " if at.endswith("[...]") else ""
    fields: tuple[str, ...] = getattr(of_type, "__struct_fields__", ())
    path = at.rpartition("$")[2].removesuffix("[...]")
    param, code = (place + re.sub(r"\[(\d+)\]", r".\1", path)), None
    if found := re.fullmatch(r"Object (missing required|contains unknown) field (.*)", text):
        param += f".{found[2]}"
        said = "is missing: add it"
        if found[1] == "contains unknown":
            said, code = _about_unknown(found[2], () if at else fields), "unknown_parameter"
    else:
        if text.startswith("Expected "):
            text = text.replace(" | null", "").replace(" | ", " or ")
            text = re.sub(rf"\b({'|'.join(TYPES)})\b", lambda found: TYPES[found[1]], text)
        said = short(text.replace("Expected ", "must be "), 120)
        said = re.sub("Invalid (enum )?value (.*)", r"cannot be \2: see /openapi.json", said)
    param = param.removeprefix(".")
    return APIError(400, f"{what}{quoted(param)} {said}.", param=param, code=code)


def _about_unknown(name: str, fields: Collection[str]) -> str:
    """Return the sentence about a parameter ``name`` that is none of these ``fields``."""
    groups = (group for group in SAME_FIELDS if name in group)
    if known := next((one for group in groups for one in group if one in fields), None):
        return f"is not a parameter here: use '{known}'"
    usual = "is not a parameter here: drop it, or see /openapi.json for the names"
    return ABSENT_FIELDS.get(name, usual)


class ClientGone(APIError):
    """The client disconnected before its answer was ready. The log shows it."""

    def __init__(self) -> None:
        super().__init__(499, "The client has disconnected.")


async def read_body(
    request: Request, kind: type[Kind], config: ServerConfig, large: asyncio.Semaphore
) -> tuple[Kind, int]:
    """Return the body as ``kind`` and its bytes. Raises APIError 400, 408 (slow), 413 (large), 415
    (packed). ``large`` bounds the memory of large bodies: each waits for it until it is decoded."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"Content-Encoding {quoted(encoding)} is not supported: send the body unpacked."
        raise APIError(415, message)
    raw, most, is_large = bytearray(), int(config.max_body_mib * 2**20), False
    size = int(request.headers.get("content-length", 0))
    try:
        async with asyncio.timeout(config.body_timeout_s):
            pieces = request.stream()
            while size <= most:
                if size > LARGE_BODY and not is_large:
                    is_large = await large.acquire()
                if not (piece := await anext(pieces, b"")):
                    break
                raw += piece
                size = max(size, len(raw))
        if size > most:
            raise _too_large(config.max_body_mib, config)
        content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if not re.fullmatch(r"application/(.*\+)?json", content_type):
            # Foreign web pages cannot set this header without permission, so they cannot post to a
            # server on localhost.
            raise APIError(
                400,
                "The body needs the header Content-Type: application/json. "
                "With curl, add -H 'Content-Type: application/json'.",
            )
        return await run(size, partial(decode, kind, bytes(raw), config)), size
    except TimeoutError:
        raise APIError(408, "The body did not arrive in time: send it again.") from None
    except ClientDisconnect:
        raise ClientGone from None
    finally:
        if is_large:
            large.release()


def json_response(value: object) -> Response:
    """Return ``value`` as a response. O(its size)."""
    return Response(msgspec.json.encode(value), media_type="application/json")
