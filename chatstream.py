# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.2,<4"]
# ///
"""chatstream: a streaming chat server in one file, to run and to learn from.

    pip install aiohttp && python chatstream.py      # then open http://localhost:8080

The way of one token, from the upstream (any OpenAI-compatible model server) to a pixel:

    upstream ──bytes──> EventParser ──events──> Relay ──`data: {…}\\n\\n`──> client ──> pixel
        ^                (lines, any split)      (checks, normalises)          │
        └──────── abort: the client left, the drain is over, nothing comes ────┘

    GET  /                      the page (index.html)
    POST /stream                a chat completion, streamed
    POST /v1/chat/completions   the same, so that any OpenAI client works
    GET  /v1/models             the models that may be asked for
    GET  /healthz               200 while the process lives
    GET  /readyz                200, or 503 once draining
    GET  /metrics               Prometheus text format

Read `Chatstream.chat` first: it is the whole program in four sentences. Above it stand the
parts without I/O (settings, errors, validation, events), below it the server around it.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - who runs an older one reads this line
    sys.exit("chatstream needs Python 3.11 or newer; this is " + sys.version.split()[0])

import argparse
import asyncio
import base64
import hashlib
import hmac
import io
import ipaddress
import json
import logging
import math
import os
import re
import signal
import ssl
import urllib.request
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

NEEDS_AIOHTTP = "chatstream needs aiohttp 3.14.2 or newer: pip install 'aiohttp>=3.14.2,<4'"
try:
    import aiohttp
    from aiohttp import web
    from aiohttp.abc import AbstractStreamWriter
except ModuleNotFoundError:
    sys.exit(NEEDS_AIOHTTP)
# Older ones hand a half-read connection to the next request (aio-libs/aiohttp#12795, #12953).
if tuple(map(int, re.findall(r"\d+", aiohttp.__version__)[:3])) < (3, 14, 2):
    sys.exit(f"{NEEDS_AIOHTTP}; this is {aiohttp.__version__}")

log = logging.getLogger("chatstream")

Chat = dict[str, Any]  # a chat-completions request or chunk, as parsed JSON


# ---- Settings ----------------------------------------------------------------------------
# One dataclass. The environment variables, the flags and --help are read off it, so that a
# new setting is one new line. First the kinds of value: the docstring of each is what a
# person is told when a value is bad.


class BadSetting(Exception):
    """The set-up cannot work, or is not safe: one line for stderr, exit status 2."""


def as_text(value: str) -> str:
    """a text"""
    return value


def as_secret(value: str) -> str:
    """visible ASCII characters, since it travels in a header"""
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError
    return value


def as_names(value: str) -> tuple[str, ...]:
    """one name or more, comma-separated"""
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names:
        raise ValueError
    return names


def as_url(value: str) -> str:
    """an http(s) URL such as http://localhost:11434/v1, without password, ? or #"""
    url = urlsplit(value)  # .port raises ValueError for a bad one
    if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:
        raise ValueError
    if re.search(r"[\s?#@]", value):
        raise ValueError
    return value.rstrip("/")


def as_port(value: str) -> int:
    """a whole number from 0 to 65535"""
    if not 0 <= int(value) <= 65535:
        raise ValueError
    return int(value)


def as_count(value: str) -> int:
    """a whole number from 1"""
    if int(value) < 1:
        raise ValueError
    return int(value)


def as_seconds(value: str) -> float:
    """a number of seconds above 0"""
    if not 0 < float(value) < math.inf:
        raise ValueError
    return float(value)


def as_drain_seconds(value: str) -> float:
    """a number of seconds, 0 or above"""
    return 0.0 if float(value) == 0 else as_seconds(value)


def as_switch(value: str) -> bool:
    """true or false"""
    return {"true": True, "1": True, "false": False, "0": False}[value.lower()]


def spell(value: Any) -> str:
    """A default as a person types it: `("a", "b")` -> `a,b`, False -> `false`."""
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def setting(kind: Callable[[str], Any], default: Any, what: str, shown: str = "") -> Any:
    """A field of Settings: how its text is read, its default, and a line for --help."""
    told = {"kind": kind, "what": what, "shown": shown or spell(default)}
    return field(default=default, repr=kind is not as_secret, metadata=told)


OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Settings:
    """All that can be set. Secrets have no flag (anybody on the machine can read those) and
    no place in the `repr`. Raises BadSetting where the set-up would not be safe."""

    api_key: str = setting(as_secret, "", "the upstream's key; with neither it nor a URL: the demo")
    base_url: str = setting(as_url, "", "any OpenAI-compatible upstream", OPENAI_URL)
    model: tuple[str, ...] = setting(as_names, ("gpt-4o-mini",), "models allowed; * = any")
    host: str = setting(as_text, "127.0.0.1", "address to listen on; public ones need a token")
    port: int = setting(as_port, 8080, "port; 0 = any free one")
    token: str = setting(as_secret, "", "access token that clients must send")
    allowed_hosts: tuple[str, ...] = setting(as_names, (), "further Host names served")
    max_streams: int = setting(as_count, 1000, "streams at once; one more gets 503")
    max_body_bytes: int = setting(as_count, 1048576, "longest request body")
    max_event_bytes: int = setting(as_count, 1048576, "longest upstream event; bounds memory")
    connect_seconds: float = setting(as_seconds, 10.0, "to connect to the upstream")
    idle_seconds: float = setting(as_seconds, 300.0, "longest upstream silence; models think")
    write_seconds: float = setting(as_seconds, 30.0, "longest time a client may read nothing")
    heartbeat_seconds: float = setting(as_seconds, 10.0, "a silent stream gets a comment so often")
    drain_seconds: float = setting(as_drain_seconds, 30.0, "a shutdown waits so long for streams")
    tls_cert: str = setting(as_text, "", "PEM file: serve HTTPS")
    tls_key: str = setting(as_text, "", "PEM file: the certificate's key")
    reuse_port: bool = setting(as_switch, False, "processes may share the port, one per core")

    def __post_init__(self) -> None:
        if not self.token and not is_loopback(self.host):
            raise BadSetting(
                f"CHATSTREAM_HOST={self.host!r} without CHATSTREAM_TOKEN lets everybody there "
                "spend your key: set CHATSTREAM_TOKEN, or listen on 127.0.0.1"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise BadSetting("CHATSTREAM_TLS_CERT and CHATSTREAM_TLS_KEY: set both or neither")

    @property
    def demo(self) -> bool:
        return not self.api_key and not self.base_url

    @property
    def look_seconds(self) -> float:
        """How often a stream's timer looks: so often that no limit is missed by much."""
        limits = (self.idle_seconds, self.write_seconds, self.heartbeat_seconds)
        return min(1.0, *(limit / 8 for limit in limits))


def variable(name: str) -> str:
    """A field's environment variable: `port` -> CHATSTREAM_PORT, `model` -> OPENAI_MODEL."""
    prefix = "OPENAI" if name in ("api_key", "base_url", "model") else "CHATSTREAM"
    return f"{prefix}_{name.upper()}"


def is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadSetting(f"{message}; --help lists the flags")


def argument_parser() -> ArgumentParser:
    """--help, and a flag for every field that is no secret."""
    parser = ArgumentParser("chatstream.py", allow_abbrev=False)
    parser.description = "Serves a chat page and streams OpenAI-compatible completions to it."
    parser.epilog = "Secrets have a variable and no flag: "
    for each in fields(Settings):
        told = each.metadata
        if told["kind"] is as_secret:
            parser.epilog += f"{variable(each.name)} ({told['what']}). "
            continue
        value: Any = {"nargs": "?", "const": "true"} if told["kind"] is as_switch else {}
        what = f"{told['what']} [{variable(each.name)}, {told['shown'] or 'not set'}]"
        flag = "--" + each.name.replace("_", "-")
        parser.add_argument(flag, metavar=told["kind"].__name__[3:].upper(), help=what, **value)
    return parser


def read_settings(environ: Mapping[str, str], arguments: list[str]) -> Settings:
    """Settings from flags, else variables, else defaults. Raises BadSetting."""
    flags = vars(argument_parser().parse_args(arguments))
    values = {}
    for each in fields(Settings):
        name, kind = variable(each.name), each.metadata["kind"]
        value = flags.get(each.name)
        if value is None:
            value = environ.get(name, "").strip()
            if not value:  # set but empty counts as unset: compose files write `X: ${X}`
                continue
        try:
            values[each.name] = kind(value)
        except (ValueError, KeyError):
            shown = "(not shown)" if kind is as_secret or "@" in value else repr(value)
            raise BadSetting(f"{name}={shown} must be {kind.__doc__}") from None
    return Settings(**values)


# ---- Errors ------------------------------------------------------------------------------
# Raise early, convert once: every failure is a Failure, and `Chatstream.handle` alone turns it
# into an answer. Before the first event that is an HTTP status and JSON; after it, one event.

ERRORS = {
    # code: (status, outcome in the metrics, message)
    "invalid_json": (400, "rejected", "The request body is not valid JSON."),
    "invalid_request": (400, "rejected", "The request body must be a JSON object."),
    "invalid_messages": (400, "rejected", "`messages` must be a non-empty list of messages."),
    "stream_required": (400, "rejected", "This server only streams: leave `stream` out."),
    "invalid_token": (401, "rejected", "The access token is missing or wrong."),
    "forbidden_host": (403, "rejected", "This host name is not in CHATSTREAM_ALLOWED_HOSTS."),
    "forbidden_origin": (403, "rejected", "Requests from other web pages are not served."),
    "not_found": (404, "rejected", "There is nothing at this path."),
    "model_not_found": (404, "rejected", "This model is not one of those at /v1/models."),
    "method_not_allowed": (405, "rejected", "This path does not have this method."),
    "request_timeout": (408, "rejected", "The request body did not arrive in time."),
    "body_too_large": (413, "rejected", "The request body is too large."),
    "unsupported_media_type": (415, "rejected", "Send plain `Content-Type: application/json`."),
    "internal_error": (500, "rejected", "Something went wrong in this server."),
    "upstream_unreachable": (502, "upstream_error", "The model server cannot be reached."),
    "upstream_auth": (502, "upstream_error", "The model server refuses this server's key."),
    "upstream_error": (502, "upstream_error", "The model server failed."),
    "upstream_invalid": (502, "upstream_error", "The model server sent no valid event stream."),
    "event_too_large": (502, "upstream_error", "The model server sent too large an event."),
    "empty_stream": (502, "upstream_error", "The model server sent an empty answer."),
    "stream_truncated": (502, "truncated", "The model server broke off its answer."),
    "upstream_rejected": (400, "upstream_error", "The model server refused the request."),
    "too_many_streams": (503, "rejected", "Too many answers are being streamed just now."),
    "server_draining": (503, "rejected", "This server is shutting down."),
    "upstream_timeout": (504, "timeout", "The model server did not answer in time."),
}
TYPES = {401: "authentication_error", 429: "rate_limit_error", 502: "upstream_error"}
TYPES |= {500: "server_error", 503: "server_error", 504: "upstream_error"}

# What an upstream's own message must not carry out: addresses inside the network, file paths
# (of two names or more; /v1/… is no file).
PRIVATE = re.compile(
    r"\b(?:localhost|127\.\d+|10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01])|169\.254)[.\d]*(?::\d+)?\b"
    r"|(?<![\w:/.])/(?!v\d)[\w.-]+(?:/[\w.-]+)+|\b[A-Z]:\\[^\s'\"]+"
)
MARKUP = re.compile(r"<(?:!doctype|html|head|body)\b|Traceback \(most recent", re.IGNORECASE)


class Failure(Exception):
    """Why a request has no complete answer: a code of ERRORS, and what departs from its row.

    `cause` is for the log alone; all else is what the client may know."""

    def __init__(self, code: str, message: str = "", /, cause: str = "", **departs: Any) -> None:
        super().__init__(code)
        self.status, self.outcome, self.message = ERRORS[code]
        self.status = departs.get("status", self.status)
        self.outcome = departs.get("outcome", self.outcome)
        self.message = message or self.message
        self.type: str = departs.get("type") or TYPES.get(self.status, "invalid_request_error")
        self.code: str = departs.get("code") or code
        self.param: str | None = departs.get("param")
        self.headers: dict[str, str] = departs.get("headers", {})
        self.cause = cause

    def body(self, request_id: str) -> bytes:
        """`{"error": {"message": "…", "type": "…", "param": null, "code": "…", …}}`"""
        error = {"message": self.message, "type": self.type, "param": self.param}
        return json.dumps(
            {"error": {**error, "code": self.code, "request_id": request_id}}
        ).encode()


def public(message: str, secrets: Iterable[str]) -> str:
    """An upstream's message as the world may see it; empty if it is no message for people."""
    if MARKUP.search(message):
        return ""
    for word in secrets:
        message = message.replace(word, "***")
    return PRIVATE.sub("***", message)[:500]


def reported(error: Any, code: str, secrets: Iterable[str], **departs: Any) -> Failure:
    """The Failure that an upstream reports, in any of its dialects:

    {"error": {…}} · {"error": "text"} · {"object": "error", "message": …} · [{"error": {…}}]
    · {"message": …} · {"detail": …}"""
    if isinstance(error, list) and error:
        error = error[0]
    if isinstance(error, dict):
        inner = error.get("error")
        if isinstance(inner, dict) or (inner and "message" not in error):
            error = inner
    if not isinstance(error, dict):
        error = {"message": error}
    told = {}
    for key in ("type", "code", "param"):
        value = error.get(key)
        if isinstance(value, str) and len(value) <= 64:
            told[key] = public(value, secrets)
    message = error.get("message") or error.get("detail")
    return Failure(
        code, public(message, secrets) if isinstance(message, str) else "", **told, **departs
    )


# ---- The request -------------------------------------------------------------------------
# What a client sends, checked without I/O. All that we do not know passes, so that what
# upstreams add next year works.

ROLES = ("system", "developer", "user", "assistant", "tool")


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")  # NaN, Infinity: Python reads them, RFC 8259 does not


decode_json = json.JSONDecoder(parse_constant=refuse_constant).raw_decode
encode_json = json.JSONEncoder(allow_nan=False).encode


def parse_json(data: bytes) -> Any:
    """JSON as RFC 8259 has it, white space around it allowed. Raises ValueError for all else,
    bad UTF-8 too, and RecursionError for deep nesting."""
    text = data.decode().strip(" \t\r\n")
    value, end = decode_json(text)
    if end != len(text):
        raise ValueError("more than one value")
    return value


def parse_object(data: bytes) -> Chat:
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def check_message(message: Any, where: str) -> None:
    """Raises Failure for what is no chat message; never quotes it."""
    if not isinstance(message, dict):
        raise Failure("invalid_messages", f"{where} must be an object.")
    if message.get("role") not in ROLES:
        raise Failure("invalid_messages", f"{where}.role must be one of {', '.join(ROLES)}.")
    content = message.get("content")
    parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    if not (content is None or isinstance(content, str) or parts):
        raise Failure("invalid_messages", f"{where}.content must be text, parts or null.")


def choose_model(asked: Any, allowed: tuple[str, ...]) -> str | None:
    """The model to ask for; None leaves the choice to an upstream that may be asked for any."""
    if asked is None:
        return None if allowed[0] == "*" else allowed[0]
    if not isinstance(asked, str):
        raise Failure("invalid_request", "`model` must be a string.")
    if asked not in allowed and "*" not in allowed:
        raise Failure("model_not_found")
    return asked


def validate(data: bytes, allowed: tuple[str, ...]) -> bytes:
    """The body to send on for the body received: encoded anew from what was checked, so that
    a repeated key cannot slip a model past the check. Raises Failure."""
    try:
        chat = parse_json(data)
        if not isinstance(chat, dict):
            raise Failure("invalid_request")
        if chat.get("stream") is not None and chat["stream"] is not True:
            raise Failure("stream_required")
        messages = chat.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Failure("invalid_messages")
        for index, message in enumerate(messages):
            check_message(message, f"messages[{index}]")
        chat["model"] = choose_model(chat.get("model"), allowed)
        if chat["model"] is None:
            del chat["model"]
        return encode_json(chat | {"stream": True}).encode()
    except (ValueError, RecursionError):  # no UTF-8, no JSON, 1e999, nested 100,000 deep
        raise Failure("invalid_json") from None


# ---- Server-sent events ------------------------------------------------------------------
# The parser needs nothing else of this file: bytes in, events out. Copy it where you like.


class Event(NamedTuple):
    name: bytes  # b"" unless an `event:` line gave one
    data: bytes  # the `data:` lines, joined by b"\n"


class EventTooLarge(Exception):
    """The event under way is longer than the parser's limit."""


class EventParser:
    """Server-sent events from bytes in any pieces (WHATWG HTML standard, section 9.2.6).

    One thing beyond the standard: a line `error: {…}`, which llama.cpp sent through 2025
    (ggml-org/llama.cpp#16109), counts as `event: error` with that data."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes of data in one event, and so of memory
        self.partial = bytearray()  # the line that has no end yet
        self.after_cr = False  # the last piece ended in CR: a LF now would be its other half
        self.at_start = True
        self.name = b""
        self.data: list[bytes] = []
        self.size = 0
        self.stray = False  # there was a line that no event stream has

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that this piece completes. Raises EventTooLarge after the good ones."""
        if self.after_cr and piece.startswith(b"\n"):
            piece = piece[1:]
        self.after_cr = piece.endswith(b"\r")
        # On bytes, splitlines() ends a line at LF, CRLF and CR, as the standard does. On str
        # it would end one at U+2028 too, which is text.
        lines = piece.splitlines()
        rest = lines.pop() if lines and not piece.endswith((b"\n", b"\r")) else b""
        if lines:
            lines[0] = bytes(self.partial) + lines[0]
            self.partial.clear()
            if self.at_start:
                self.at_start = False
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        for line in lines:
            if line:
                self.take(line)
            else:  # a blank line ends the event
                event = Event(self.name, b"\n".join(self.data))
                self.name, self.data, self.size = b"", [], 0
                if event.data:
                    yield event
        self.partial += rest
        if len(self.partial) > self.limit + len("data: "):
            raise EventTooLarge

    def take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name in (b"data", b"error"):
            self.size += len(value)
            if self.size > self.limit:
                raise EventTooLarge
            self.data.append(value)
        if name in (b"event", b"error"):
            self.name = value if name == b"event" else name
        elif name not in (b"", b"data", b"id", b"retry"):  # b"": a comment
            self.stray = True

    def is_inside(self) -> bool:
        """Whether an event has begun and not ended."""
        return bool(self.partial or self.data or self.name)

    def close(self) -> Iterator[Event]:
        """The event that lacks only its blank line, or its newline; upstreams do that."""
        return self.feed(b"\n\n")


# ---- The relay's rules -------------------------------------------------------------------
# What may go out: chunks, one error, [DONE]. Anything else breaks some client. No I/O here.

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": keep-alive\n\n"
CONTENT = re.compile(rb'"content": ?"')  # in valid JSON the start of a string, wherever it is


def as_chunk(completion: Chat) -> bytes:
    """A whole completion as one chunk: `{"choices": [{"message": …}]}` -> `[{"delta": …}]`."""
    choices = [dict(choice) for choice in completion["choices"] if isinstance(choice, dict)]
    for choice in choices:
        choice["delta"] = choice.pop("message", {})
    chunk = {**completion, "object": "chat.completion.chunk", "choices": choices}
    return encode_json(chunk).encode()


class Relay:
    """An upstream's bytes in, the client's bytes out, both in any pieces.

    It is over when `done` (the answer is whole) or when there is a `failure`; what came
    before the failure has then been given out."""

    def __init__(self, limit: int, secrets: tuple[str, ...]) -> None:
        self.parser = EventParser(limit)
        self.secrets = secrets
        self.events = 0  # chunks given out
        self.heard = 0  # events that came, the dropped ones too
        self.finished = False  # a `finish_reason` came: the end may follow without [DONE]
        self.done = False
        self.failure: Failure | None = None
        self.frame: tuple[bytes, bytes] | None = None  # of an event: see learn()
        self.is_json: bool | None = None  # no stream: some upstreams answer in one piece
        self.body = bytearray()

    def feed(self, piece: bytes) -> bytes:
        """What goes out now that this piece has come."""
        if self.frame and self.differs_in_text(piece, *self.frame):
            self.heard += 1
            self.events += 1
            return piece
        if self.is_json is None:
            self.is_json = piece.lstrip().startswith(b"{")
        if self.is_json:
            self.body += piece
            if len(self.body) > self.parser.limit:
                self.failure = Failure("event_too_large")
            return b""
        heard, out = self.heard, self.forward(self.parser.feed(piece))
        if self.heard == heard + 1 and out == piece:
            self.learn(piece)
        return out

    def differs_in_text(self, piece: bytes, head: bytes, tail: bytes) -> bool:
        """Whether this piece is one event, the same as one that was checked but for its text.

        Nearly every token comes so, and the JSON parser is most of what one costs. A string
        that holds no quote, no backslash and no control character cannot end early or be
        bad, and the rest is what was parsed before: so the whole is as valid as that was."""
        if not (piece.startswith(head) and piece.endswith(tail)) or self.parser.is_inside():
            return False
        try:
            text = piece[len(head) : -len(tail)].decode()
        except UnicodeDecodeError:
            return False
        fits = len(head) + len(tail) <= len(piece) <= self.parser.limit
        return fits and text.isprintable() and '"' not in text and "\\" not in text

    def learn(self, piece: bytes) -> None:
        """Takes the event apart: b'data: {…"content":"', its text, b'"…}\\n\\n'."""
        if start := CONTENT.search(piece):
            text, quote, rest = piece[start.end() :].partition(b'"')
            if b"\\" not in text:
                self.frame = (piece[: start.end()], quote + rest)

    def forward(self, events: Iterable[Event]) -> bytes:
        """The events that may go out, each as exactly b"data: PAYLOAD\\n\\n"."""
        out = []
        try:
            for event in events:
                self.heard += 1
                out.append(self.check(event))
                if self.done:
                    break
        except EventTooLarge:
            self.failure = Failure("event_too_large")
        except (ValueError, RecursionError):
            self.failure = Failure("upstream_invalid", cause="a payload that is no JSON object")
        except Failure as failure:
            self.failure = failure
        return b"".join(out)

    def error_event(self, data: bytes) -> Failure:
        try:
            said = parse_object(data)
        except (ValueError, RecursionError):
            said = {}
        return reported(said, "upstream_error", self.secrets, cause="an error event")

    def check(self, event: Event) -> bytes:
        """One event as it goes out, b"" for one that is dropped. Raises Failure, and
        ValueError or RecursionError for a payload that is no JSON object."""
        data = event.data
        if data.strip() == b"[DONE]":  # the whole payload, never a token that contains it
            if not self.events:
                raise Failure("empty_stream")
            self.done = True
            return DONE
        if event.name == b"error":
            raise self.error_event(data)
        chunk = parse_object(data)
        if chunk.get("error") or chunk.get("object") == "error":
            raise reported(chunk, "upstream_error", self.secrets, cause="an error in the stream")
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            return b""
        for choice in choices:
            if isinstance(choice, dict):
                self.finished = self.finished or bool(choice.get("finish_reason"))
                if "message" in choice and "delta" not in choice:
                    data = as_chunk(chunk)
        self.events += 1
        # Where a line ended inside the payload a space goes out: in JSON they mean the same.
        return b"data: %b\n\n" % data.replace(b"\n", b" ")

    def whole(self) -> bytes:
        """A completion in one piece goes out as one chunk and [DONE]."""
        payload = bytes(self.body).strip().removesuffix(b"data: [DONE]")  # decolua/9router#3492
        out = self.forward([Event(b"", payload)])
        if not self.failure and not self.events:
            self.failure = Failure("upstream_invalid", cause="JSON that is no completion")
        self.done = not self.failure
        return out + DONE if self.done else b""

    def close(self, cut: bool) -> bytes:
        """What goes out now that the bytes have ended, `cut` off or in good order."""
        out = self.whole() if self.is_json else self.forward(self.parser.close())
        half = self.failure and self.failure.code == "upstream_invalid"  # a payload cut in two
        if self.done or (self.failure and not half):
            return out
        if self.finished and not half:
            self.done = True
            return out + DONE
        if self.events or cut or (half and not self.is_json):
            self.failure = Failure("stream_truncated")
        elif not half:
            self.failure = Failure("upstream_invalid" if self.parser.stray else "empty_stream")
        return out


# ---- What can be watched -----------------------------------------------------------------

OUTCOMES = (
    "completed",
    "client_gone",
    "upstream_error",
    "truncated",
    "timeout",
    "drained",
    "rejected",
)
BUCKETS = [0.01 * 2**power for power in range(16)]  # OpenTelemetry GenAI: 0.01 s … 327.68 s


class Histogram:
    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)  # the last one is above all buckets
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(BUCKETS, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        below = 0
        for bound, count in zip([*BUCKETS, "+Inf"], self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {below}"


class Metrics:
    """Counters since the start, in Prometheus' text format. No label comes from a client."""

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.events = 0
        self.first_chunk = Histogram()
        self.duration = Histogram()

    def text(self, active: int, draining: bool, max_streams: int) -> str:
        streams = "chatstream_streams_total"
        first = "gen_ai_client_operation_time_to_first_chunk_seconds"
        duration = "gen_ai_client_operation_duration_seconds"
        families: list[tuple[str, str, str, Iterable[str]]] = [
            ("chatstream_active_streams", "gauge", "Streams running now.", [f"{active}"]),
            ("chatstream_draining", "gauge", "1 while shutting down.", [f"{draining:d}"]),
            ("chatstream_max_streams", "gauge", "Streams allowed at once.", [f"{max_streams}"]),
            ("chatstream_events_total", "counter", "Chunks relayed.", [f"{self.events}"]),
            (
                streams,
                "counter",
                "Requests to the stream routes, by outcome.",
                [f'{streams}{{outcome="{name}"}} {n}' for name, n in self.outcomes.items()],
            ),
            (first, "histogram", "Request to first chunk.", self.first_chunk.lines(first)),
            (duration, "histogram", "Request to end of answer.", self.duration.lines(duration)),
        ]
        lines = []
        for name, kind, what, samples in families:
            lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
            lines += [line if " " in line else f"{name} {line}" for line in samples]
        return "\n".join(lines) + "\n"


# ---- One stream --------------------------------------------------------------------------
# A request on its way. Its timer, the drain and the log look at it from outside, so it is an
# object; what it does is in `Chatstream` below.

COMMON_HEADERS = {"Server": "chatstream", "X-Content-Type-Options": "nosniff"}
STREAM_HEADERS = COMMON_HEADERS | {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # else nginx holds the whole answer back
}


class EventStream(web.StreamResponse):
    _send_headers_immediately = False  # they go out with the first event, in one packet


class Stream:
    def __init__(self, request: web.BaseRequest, settings: Settings, relay: Relay) -> None:
        wanted = request.headers.get("X-Request-Id", "")
        sane = re.fullmatch(r"[A-Za-z0-9._-]{1,128}", wanted)
        self.id = wanted if sane else os.urandom(12).hex()
        self.request = request
        self.settings = settings
        self.relay = relay
        self.loop = asyncio.get_running_loop()
        self.task = asyncio.current_task()
        self.response: web.StreamResponse | None = None  # made when the status is settled
        self.upstream: aiohttp.ClientResponse | None = None
        self.outcome = "client_gone"  # what it is, unless somebody says otherwise
        self.cause = ""
        self.status = 0
        self.first_event: float | None = None
        # For the timer: what it saw last, and when that changed
        self.receiving = True  # the request's body is not here yet
        self.started = self.moved_at = self.sent_at = self.loop.time()
        self.moved = (0, 0)
        self.sent = 0
        self.timer: asyncio.TimerHandle | None = None
        self.beating: asyncio.Task[None] | None = None
        self.limit: asyncio.Timeout | None = None
        self.verdict: Failure | None = None

    async def open(self) -> AbstractStreamWriter:
        """The point of no return: the status is 200 from here on."""
        if self.response is None:
            self.response = EventStream(headers=STREAM_HEADERS | {"X-Request-Id": self.id})
            self.status = 200
        writer = await self.response.prepare(self.request)
        assert writer is not None
        return writer

    def tick(self) -> None:
        """The one timer of a stream. To set a deadline at each read and write would cost more
        than they do; so they only count, and this looks once in a while what has moved."""
        now, settings, relay = self.loop.time(), self.settings, self.relay
        transport = self.request.transport
        unread = transport.get_write_buffer_size() if transport else 0
        if self.moved != (relay.heard, unread):
            self.moved, self.moved_at = (relay.heard, unread), now
        if self.sent != relay.events:
            self.sent, self.sent_at = relay.events, now
        waits_for_client = self.receiving or unread > 0
        limit = settings.write_seconds if waits_for_client else settings.idle_seconds
        left = self.moved_at + limit - now
        until_beat = self.sent_at + settings.heartbeat_seconds - now
        if left <= 0:
            self.give_up(unread)
        elif until_beat <= 0 and not waits_for_client:
            self.sent_at = now
            self.beating = self.loop.create_task(self.beat())
        self.end_broken_body()
        delays = (left, until_beat, settings.look_seconds)
        self.timer = self.loop.call_later(min(d for d in delays if d > 0), self.tick)

    def give_up(self, unread: int) -> None:
        if unread:
            self.drop_client()
        else:
            self.stop(Failure("request_timeout" if self.receiving else "upstream_timeout"))

    async def beat(self) -> None:
        """A comment, so that proxies and people know that the silence is no breakdown."""
        with suppress(ConnectionError):
            await (await self.open()).write(HEARTBEAT)

    def end_broken_body(self) -> None:
        """Broken chunked encoding makes aiohttp drop the upstream's connection without a word
        to the reader, who would wait for the idle limit."""
        answer = self.upstream
        if answer and answer.connection and answer.connection.closed:
            answer.content.feed_eof()

    def stop(self, failure: Failure) -> None:
        """Ends the wait for the upstream from outside, with this failure."""
        if self.limit and not self.verdict:
            self.verdict = failure
            self.limit.reschedule(self.loop.time())

    def drop_client(self) -> None:
        """A client that reads nothing has gone. aiohttp then cancels the handler, as it does
        for a closed tab."""
        if self.request.transport:
            self.request.transport.abort()

    def let_upstream_go(self) -> None:
        """At once, since tokens cost money: close() over TLS would wait for a goodbye."""
        if self.upstream:
            if self.upstream.connection and self.upstream.connection.transport:
                self.upstream.connection.transport.abort()
            self.upstream.close()

    def stop_timers(self) -> None:
        for handle in (self.timer, self.beating):
            if handle:
                handle.cancel()


# ---- The upstream ------------------------------------------------------------------------

BROKEN = (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError)


class UpstreamAnswer(aiohttp.ClientResponse):
    """An answer that can be let go even before its head has come."""

    async def start(self, connection: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        try:
            return await super().start(connection)
        except BaseException:
            if connection.transport:
                connection.transport.abort()
            raise


def describe(error: BaseException) -> str:
    """An error for the log, without the addresses that its own text has."""
    cause = getattr(error, "os_error", None) or getattr(error, "certificate_error", None) or error
    number = getattr(cause, "errno", None)
    reason = getattr(cause, "verify_message", "") or (os.strerror(number) if number else "")
    return f"{type(cause).__name__} {reason}".strip()


def died_before_answering(error: BaseException) -> bool:
    """A connection that was there, and ended before any byte of an answer. (aiohttp keeps
    the part of a head that did come in `message`, which is else a text.)"""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return isinstance(error.message, str)
    reset = isinstance(error, aiohttp.ClientOSError | ConnectionError)
    return reset and not isinstance(error, aiohttp.ClientConnectorError)


async def read(answer: aiohttp.ClientResponse) -> bytes:
    """What has come, as soon as anything has; b"" at the end, in good order or not."""
    try:
        return await answer.content.readany()
    except BROKEN:
        return b""


async def read_whole(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    body = bytearray()
    while piece := await read(answer):
        body += piece
        if len(body) > limit:
            raise Failure("event_too_large")
    return bytes(body)


def environment_proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL. Found once, at the start: aiohttp's
    trust_env would look anew for every request, and read passwords from .netrc besides."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    return proxy if not proxy or "://" in proxy else "http://" + proxy


# ---- The page ----------------------------------------------------------------------------


def page_headers(html: str, https: bool) -> dict[str, str]:
    """Only the script and the style that stand in the file run: their hashes are computed
    from it, so that the policy cannot drift from the page."""
    hashes = {}
    for tag in ("script", "style"):
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(each.encode()).digest()) for each in blocks)
        hashes[tag] = " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), "
        "midi=(), payment=(), usb=()",
        "ETag": f'"{hashlib.sha256(html.encode()).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",
    }
    return headers | ({"Strict-Transport-Security": "max-age=31536000"} if https else {})


# ---- The server --------------------------------------------------------------------------

STREAM_ROUTES = ("/stream", "/v1/chat/completions")
RETRY_SOON = {"Retry-After": "1"}
Handler = Callable[[Stream], Awaitable[web.StreamResponse | None]]


def host_name(authority: str) -> str:
    """`LocalHost:8080` -> `localhost`, `[::1]:8080` -> `[::1]`."""
    return re.sub(r":\d*$", "", authority.lower())


def json_response(value: Any, **more: Any) -> web.Response:
    return web.json_response(value, headers={"Cache-Control": "no-store"}, **more)


def server_tls(settings: Settings) -> ssl.SSLContext | None:
    if not settings.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except OSError as error:
        raise BadSetting(
            f"CHATSTREAM_TLS_CERT={settings.tls_cert!r} CHATSTREAM_TLS_KEY={settings.tls_key!r} "
            f"must be PEM files that belong together, the key without a password "
            f"({describe(error)})"
        ) from None
    return context


class Chatstream:
    """The server: `start()` it, then `drain()` it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.live: set[Stream] = set()
        self.draining = False
        url = settings.base_url or OPENAI_URL
        self.proxy = environment_proxy(url)
        self.secrets = tuple(filter(None, (settings.api_key, settings.token, urlsplit(url).netloc)))
        self.hosts = {host_name(name) for name in settings.allowed_hosts}
        if is_loopback(settings.host):
            self.hosts |= {"localhost", "127.0.0.1", "[::1]", settings.host}
        html = Path(__file__).with_name("index.html").read_text(encoding="utf-8")
        self.page_body = html.encode()
        self.page_headers = page_headers(html, bool(settings.tls_cert))
        self.routes: dict[str, tuple[str, Handler]] = {
            "/": ("GET", self.page),
            "/stream": ("POST", self.chat),
            "/v1/chat/completions": ("POST", self.chat),
            "/v1/models": ("GET", self.models),
            "/healthz": ("GET", self.healthz),
            "/readyz": ("GET", self.readyz),
            "/metrics": ("GET", self.show_metrics),
        }

    # -- a stream, from the request to the last byte

    async def chat(self, stream: Stream) -> web.StreamResponse | None:
        """Check the request; ask the upstream; relay what it says; let it go, come what may."""
        stream.tick()
        try:
            async with asyncio.timeout(None) as stream.limit:  # which Stream.stop() pulls
                body = validate(await self.read_body(stream.request), self.settings.model)
                self.admit(stream)
                answer = await self.ask(stream, body)
                await self.pass_on(stream, answer)
        except TimeoutError:
            raise stream.verdict or Failure("upstream_timeout") from None
        finally:
            stream.limit = None
            stream.let_upstream_go()
        stream.outcome = "completed"
        return stream.response

    async def read_body(self, request: web.BaseRequest) -> bytes:
        """The request's body. Raises Failure; how long it may take, Stream.tick() watches."""
        limit = self.settings.max_body_bytes
        if (request.content_length or 0) > limit:
            raise Failure("body_too_large")
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # aiohttp's server does not
        body = bytearray()
        try:
            while piece := await request.content.readany():
                body += piece
                if len(body) > limit:
                    raise Failure("body_too_large")
        except (web.RequestPayloadError, aiohttp.http_exceptions.HttpProcessingError):
            raise Failure("invalid_request", "The request body's encoding is broken.") from None
        return bytes(body)

    def admit(self, stream: Stream) -> None:
        if self.draining:
            raise Failure("server_draining", headers=RETRY_SOON)
        if len(self.live) >= self.settings.max_streams:
            raise Failure("too_many_streams", headers=RETRY_SOON)
        self.live.add(stream)
        stream.receiving = False
        stream.moved_at = stream.sent_at = stream.loop.time()

    async def ask(self, stream: Stream, body: bytes) -> aiohttp.ClientResponse:
        """The upstream's answer, if it is one to relay. Raises Failure for any other."""
        answer = stream.upstream = await self.request_upstream(
            stream, "POST", "chat/completions", body
        )
        await self.check_status(answer)
        kind = answer.headers.get("Content-Type", "text/event-stream")
        if kind.lower().startswith("text/html"):
            raise Failure("upstream_error", cause="an HTML page")
        if not kind.lower().startswith(("text/event-stream", "application/json")):
            raise Failure("upstream_invalid", cause="neither an event stream nor JSON")
        return answer

    async def request_upstream(
        self, stream: Stream, method: str, path: str, body: bytes | None = None
    ) -> aiohttp.ClientResponse:
        """The answer's head. Tries once more when the connection died before any byte of an
        answer: a server may close a pooled one in the moment in which we use it."""
        headers = {
            "Accept": "text/event-stream" if body else "application/json",
            "Accept-Encoding": "identity",  # a compressed stream comes in bursts
            "Content-Type": "application/json",
            "User-Agent": "chatstream",
            "X-Request-Id": stream.id,
        }
        if self.settings.api_key:
            headers["Authorization"] = f"Bearer {self.settings.api_key}"
        url = f"{self.settings.base_url or OPENAI_URL}/{path}"
        for tries_left in (1, 0):
            try:
                return await self.session.request(
                    method,
                    url,
                    data=io.BytesIO(body) if body else None,  # aiohttp warns of long bytes
                    headers=headers,
                    proxy=self.proxy,
                    allow_redirects=False,  # the key would travel along
                )
            except aiohttp.ServerTimeoutError:
                raise Failure("upstream_timeout", cause="connecting took too long") from None
            except aiohttp.ClientResponseError as error:
                raise Failure("upstream_invalid", cause=describe(error)) from None
            except BROKEN as error:
                if not (tries_left and died_before_answering(error)):
                    raise Failure("upstream_unreachable", cause=describe(error)) from None
        raise AssertionError("not reached")

    async def check_status(self, answer: aiohttp.ClientResponse) -> None:
        """Raises the Failure that the answer's status means, if it means one."""
        status = answer.status
        if 200 <= status < 300:
            return
        cause = f"HTTP {status}"
        if status in (401, 403):
            raise Failure("upstream_auth", cause=f"{cause}: is OPENAI_API_KEY right?")
        if not 400 <= status < 500:
            raise Failure("upstream_error", cause=cause)
        body = await read_whole(answer, self.settings.max_event_bytes)
        try:
            said = parse_json(body)
        except (ValueError, RecursionError):
            said = None
        kept = {
            name: value
            for name, value in answer.headers.items()
            if name.lower().startswith(("retry-after", "x-ratelimit-")) and value.isascii()
        }
        raise reported(
            said, "upstream_rejected", self.secrets, status=status, headers=kept, cause=cause
        )

    async def pass_on(self, stream: Stream, answer: aiohttp.ClientResponse) -> None:
        """Relays the upstream's events, each the moment its last byte is in. While the client
        reads too slowly the write waits, and so the upstream does: that is the back-pressure."""
        relay, read = stream.relay, answer.content.readany
        writer: AbstractStreamWriter | None = None
        while not relay.failure:
            try:
                piece = await read()
            except BROKEN:
                out = relay.close(cut=True)
            else:
                out = relay.feed(piece) if piece else relay.close(cut=False)
            if not out:
                continue
            if writer is None:
                stream.first_event = stream.loop.time() - stream.started
                writer = await stream.open()
            if relay.done:
                return await writer.write_eof(out)
            await writer.write(out)
        raise relay.failure

    # -- the other routes

    async def page(self, stream: Stream) -> web.StreamResponse:
        known = stream.request.if_none_match or ()
        if any(tag.value in ("*", self.page_headers["ETag"].strip('"')) for tag in known):
            return web.Response(status=304, headers=self.page_headers)
        return web.Response(body=self.page_body, headers=self.page_headers)

    async def models(self, stream: Stream) -> web.StreamResponse:
        """`{"object": "list", "data": [{"id": "…", "object": "model"}]}`"""
        names = [name for name in self.settings.model if name != "*"]
        if "*" in self.settings.model:
            names += [name for name in await self.upstream_models(stream) if name not in names]
        data = [{"id": name, "object": "model"} for name in names]
        return json_response({"object": "list", "data": data})

    async def upstream_models(self, stream: Stream) -> list[str]:
        try:
            async with asyncio.timeout(self.settings.connect_seconds):
                stream.upstream = await self.request_upstream(stream, "GET", "models")
                await self.check_status(stream.upstream)
                body = await read_whole(stream.upstream, self.settings.max_event_bytes)
                data = parse_object(body)["data"]
                return [each["id"] for each in data if isinstance(each["id"], str)]
        except TimeoutError:
            raise Failure("upstream_timeout") from None
        except (ValueError, RecursionError, KeyError, TypeError):
            raise Failure("upstream_invalid", "The model server's list is no list.") from None
        finally:
            stream.let_upstream_go()

    async def healthz(self, stream: Stream) -> web.StreamResponse:
        return json_response({"status": "ok"})

    async def readyz(self, stream: Stream) -> web.StreamResponse:
        if self.draining:
            raise Failure("server_draining", headers=RETRY_SOON)
        return json_response({"status": "ok"})

    async def show_metrics(self, stream: Stream) -> web.StreamResponse:
        text = self.metrics.text(len(self.live), self.draining, self.settings.max_streams)
        return web.Response(
            body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    # -- every request

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The one place where a failure becomes an answer, and where a stream is settled."""
        relay = Relay(self.settings.max_event_bytes, self.secrets)
        stream = Stream(request, self.settings, relay)
        try:
            response = await self.route(stream)
        except asyncio.CancelledError:  # aiohttp's word for: the client has gone
            raise
        except ConnectionError:  # the same, met while writing
            response = stream.response or web.Response()
        except Failure as failure:
            response = await self.fail(stream, failure)
        except Exception as error:
            log.exception("a bug in chatstream")
            response = await self.fail(stream, Failure("internal_error", cause=describe(error)))
        finally:
            stream.stop_timers()
            self.live.discard(stream)
            if request.method == "POST" and request.path in STREAM_ROUTES:
                self.settle(stream)
        if not response.prepared:
            response.headers.update(COMMON_HEADERS | {"X-Request-Id": stream.id})
            if self.draining:
                response.force_close()
        return response

    async def route(self, stream: Stream) -> web.StreamResponse:
        """Who gets in, and where to. Raises Failure.

        A page on another origin, or one whose DNS name was rebound to this machine, must not
        be able to spend the key: a browser tells both by headers that it does not let pages
        set, and asks first before it sends JSON elsewhere."""
        request, path = stream.request, stream.request.path
        guarded = path in ("/", "/stream") or path.startswith("/v1/")
        if guarded:
            self.check_origin(request)
        if path not in self.routes:
            raise Failure("not_found")
        method, handler = self.routes[path]
        if request.method != method and (request.method, method) != ("HEAD", "GET"):
            allow = "GET, HEAD" if method == "GET" else method
            raise Failure("method_not_allowed", headers={"Allow": allow})
        if guarded and self.draining:
            raise Failure("server_draining", headers=RETRY_SOON)
        if method == "POST":
            encoded = request.headers.get("Content-Encoding", "identity").lower() != "identity"
            if encoded or request.content_type != "application/json":
                raise Failure("unsupported_media_type")
        if guarded and path != "/":
            self.check_token(request)
        return await handler(stream)

    def check_origin(self, request: web.BaseRequest) -> None:
        host = request.headers.get("Host", "")
        if self.hosts and host_name(host) not in self.hosts:
            raise Failure("forbidden_host")
        if request.method != "POST":
            return
        site = request.headers.get("Sec-Fetch-Site")
        origin = request.headers.get("Origin")
        if site is not None:
            same = site in ("same-origin", "none")
        else:
            same = origin is None or origin.partition("://")[2].lower() == host.lower()
        if not same:
            raise Failure("forbidden_origin")

    def check_token(self, request: web.BaseRequest) -> None:
        scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
        right = hmac.compare_digest(  # in a time that tells nothing about where they differ
            sent.strip().encode(errors="surrogateescape"), self.settings.token.encode()
        )
        if self.settings.token and not (right and scheme.lower() == "bearer"):
            raise Failure("invalid_token", headers={"WWW-Authenticate": "Bearer"})

    async def fail(self, stream: Stream, failure: Failure) -> web.StreamResponse:
        """Tells the client: by a status while there is none yet, else by a last event, after
        which there is no [DONE]."""
        stream.outcome, stream.cause = failure.outcome, f"{failure.code} {failure.cause}".strip()
        body = failure.body(stream.id)
        if stream.response is None:
            stream.status = failure.status
            headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
            return web.Response(status=failure.status, body=body, headers=headers | failure.headers)
        with suppress(ConnectionError):
            await (await stream.open()).write_eof(b"data: %b\n\n" % body)
        return stream.response

    def settle(self, stream: Stream) -> None:
        """Counts a stream, in one outcome, and writes its line in the log."""
        total = stream.loop.time() - stream.started
        self.metrics.outcomes[stream.outcome] += 1
        self.metrics.events += stream.relay.events
        first = stream.first_event
        if first is not None:
            self.metrics.first_chunk.observe(first)
        if stream.outcome != "rejected":
            self.metrics.duration.observe(total)
        log.info(
            "id=%s outcome=%s status=%s events=%d first=%s total=%.3fs%s",
            stream.id,
            stream.outcome,
            stream.status or "-",
            stream.relay.events,
            "-" if first is None else f"{first:.3f}s",
            total,
            f" cause={stream.cause!r}" if stream.cause else "",
        )

    # -- start and end

    async def start(self) -> str:
        """Listens; returns the address. Raises BadSetting where it cannot."""
        s = self.settings
        tls = server_tls(s)
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the default lets the 101st stream wait
            timeout=aiohttp.ClientTimeout(total=None, connect=s.connect_seconds),
            cookie_jar=aiohttp.DummyCookieJar(),  # else one person's cookie goes to the next
            response_class=UpstreamAnswer,
            read_bufsize=2**16,
        )
        server = web.Server(
            self.handle,
            handler_cancellation=True,  # else a silent stream outlives its reader
            auto_decompress=False,  # else 60 KB become 60 MB
            access_log=None,
            keepalive_timeout=75,
        )
        self.runner = web.ServerRunner(server, shutdown_timeout=0.2)
        await self.runner.setup()
        try:
            site = web.TCPSite(
                self.runner,
                s.host,
                s.port,
                ssl_context=tls,
                backlog=1024,
                reuse_port=s.reuse_port or None,
            )
            await site.start()
        except (OSError, ValueError) as error:
            await self.stop()
            raise BadSetting(
                f"CHATSTREAM_HOST={s.host} CHATSTREAM_PORT={s.port}: cannot listen there "
                f"({describe(error)}): is another program using the port? 0 takes any free one"
            ) from None
        self.site = site
        port = self.runner.addresses[0][1]
        host = f"[{s.host}]" if ":" in s.host else s.host
        return f"{'https' if s.tls_cert else 'http'}://{host}:{port}"

    async def drain(self) -> None:
        """Ends without cutting an answer, if the drain time allows it."""
        self.draining = True  # 1. no new streams, and soon no new connections
        await self.site.stop()
        await self.wait_for_streams(self.settings.drain_seconds)  # 2. the running ones go on
        for stream in self.live:  # 3. those left are told
            stream.stop(Failure("server_draining", outcome="drained", headers=RETRY_SOON))
        await self.wait_for_streams(1.0)
        for stream in self.live:  # 4. those that do not even read that are dropped
            stream.drop_client()
        await self.stop()

    async def wait_for_streams(self, seconds: float) -> None:
        if self.live:
            tasks = [stream.task for stream in self.live if stream.task]
            await asyncio.wait(tasks, timeout=seconds)

    async def stop(self) -> None:
        await self.session.close()
        await self.runner.cleanup()


# ---- The demo ----------------------------------------------------------------------------
# A small OpenAI-compatible upstream of our own, for a start with no key: the same code path,
# no network. Its models show what goes wrong in real life.

DEMO_MODELS = ("demo", "demo-slow-start", "demo-cut-off", "demo-error", "demo-rate-limit")
DEMO_ANSWER = """\
# Hello from the demo

This is **not a model**. It is a small upstream inside `chatstream.py` that answers word by
word, as a model does, so that there is something to watch. You asked:

> {question}

To leave the demo, stop the server and set one of these:

1. `OPENAI_API_KEY` to use OpenAI
2. `OPENAI_BASE_URL` to use any compatible server, such as Ollama:

```sh
OPENAI_BASE_URL=http://localhost:11434/v1 OPENAI_MODEL=llama3.2 python chatstream.py
```

| model here | what it shows |
| --- | --- |
| `demo-slow-start` | silence, and the heartbeats in it |
| `demo-cut-off` | an answer that breaks off |
| `demo-error` | an error half-way |
| `demo-rate-limit` | 429 with `Retry-After` |

Open *Wire* to see each line as it arrives. \U0001f44b
"""


def demo_event(**fields: Any) -> bytes:
    chunk = {"id": "chatcmpl-demo", "object": "chat.completion.chunk", "created": 0} | fields
    return b"data: %b\n\n" % json.dumps(chunk, ensure_ascii=False).encode()


def demo_delta(delta: Chat, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return demo_event(model="demo", choices=[choice])


def demo_error(message: str, code: str) -> Chat:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


async def demo_upstream(request: web.BaseRequest, silence: float) -> web.StreamResponse:
    chat = json.loads(await request.content.read())
    model, question = chat["model"], chat["messages"][-1].get("content")
    if model == "demo-rate-limit":
        error = demo_error("The demo allows no request just now.", "rate_limit_exceeded")
        return web.json_response(error, status=429, headers={"Retry-After": "5"})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    if model == "demo-slow-start":
        await asyncio.sleep(silence)
    await response.write(demo_delta({"role": "assistant", "content": ""}))
    question = question if isinstance(question, str) else "(something that is no text)"
    quoted = question[:2000].replace("\n", "\n> ")
    words = re.findall(r"\s*\S+\s*", DEMO_ANSWER.replace("{question}", quoted))
    fails = model in ("demo-cut-off", "demo-error")
    for word in words[: len(words) // 2 if fails else None]:
        await response.write(demo_delta({"content": word}))
        await asyncio.sleep(0.02)
    if model == "demo-error":
        error = demo_error("The demo model ran out of memory.", "out_of_memory")
        await response.write(b"data: %b\n\n" % json.dumps(error).encode())
    if not fails:
        await response.write(demo_delta({}, "stop"))
        usage = {"prompt_tokens": 0, "completion_tokens": len(words), "total_tokens": len(words)}
        await response.write(demo_event(model=model, choices=[], usage=usage))
        await response.write(DONE)
    return response


@asynccontextmanager
async def with_demo(settings: Settings) -> AsyncIterator[Settings]:
    """The settings, pointed at a demo upstream on a loopback port if they name no upstream."""
    if not settings.demo:
        yield settings
        return
    silence = 1.5 * settings.heartbeat_seconds
    server = web.Server(
        lambda request: demo_upstream(request, silence), handler_cancellation=True, access_log=None
    )
    runner = web.ServerRunner(server, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield replace(settings, base_url=url, model=DEMO_MODELS)
    finally:
        await runner.cleanup()


# ---- Start and stop ----------------------------------------------------------------------


def start_line(address: str, settings: Settings) -> str:
    upstream = settings.base_url or OPENAI_URL
    if settings.model == DEMO_MODELS:
        upstream = "the built-in demo (set OPENAI_API_KEY or OPENAI_BASE_URL to leave it)"
    return (
        f"chatstream listens on {address}\n  upstream  {upstream}\n"
        f"  model     {', '.join(settings.model)}\n  stop      Ctrl+C"
    )


async def serve(chosen: Settings) -> None:
    """Runs until the first SIGINT or SIGTERM, then drains; the second one ends it at once."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    signals = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) > 1:
            os._exit(1)
        loop.call_soon_threadsafe(stopping.set)

    async with with_demo(chosen) as settings:
        server = Chatstream(settings)
        address = await server.start()
        # signal.signal, for Windows too, where the loop has no add_signal_handler
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, on_signal)
        print(start_line(address, settings), flush=True)
        await stopping.wait()
        print(f"draining: up to {settings.drain_seconds:g} s; Ctrl+C again to end now", flush=True)
        await server.drain()


def is_our_fault(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, aiohttp.http_exceptions.HttpProcessingError)


def main() -> int:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    # Malformed HTTP is answered by aiohttp itself, and is no reason for a traceback.
    logging.getLogger("aiohttp.server").addFilter(is_our_fault)
    try:
        asyncio.run(serve(read_settings(os.environ, sys.argv[1:])))
    except BadSetting as error:
        print(f"chatstream: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was anything to drain
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
