# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.2,<4"]
# ///
"""chatstream: a streaming chat server in one file, to run and to learn from.

    pip install "aiohttp>=3.14.2,<4" && python chatstream.py   # then open http://localhost:8080

The way of one token, from the upstream (any OpenAI-compatible model server) to a pixel:

    upstream ──bytes──> EventParser ──events──> Relay ──`data: {…}\\n\\n`──> client ──> pixel
        ^               lines, any split        what may go out               │
        └───────── abort: the client left, the time is up, we shut down ──────┘

    GET  /                      the page (index.html)
    POST /stream                a chat completion, streamed
    POST /v1/chat/completions   the same, so that any OpenAI client works
    GET  /v1/models             the models that may be asked for
    GET  /healthz               200 while the process lives
    GET  /readyz                200, or 503 once draining
    GET  /metrics               Prometheus text format

Read `Chatstream.chat` first: it is the whole program in four sentences. Above it stand the
parts without I/O (settings, errors, requests, events), below it the server around it.
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
import socket
import ssl
import time
import urllib.request
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn, cast
from urllib.parse import urlsplit

NEEDS_AIOHTTP = "chatstream needs aiohttp 3.14.2 or newer: pip install 'aiohttp>=3.14.2,<4'"
try:
    import aiohttp
except ImportError:
    sys.exit(NEEDS_AIOHTTP)
# Older ones hand a half-read connection to the next request (aio-libs/aiohttp#12795, #12953).
if tuple(map(int, re.findall(r"\d+", aiohttp.__version__)[:3])) < (3, 14, 2):
    sys.exit(f"{NEEDS_AIOHTTP}; this is {aiohttp.__version__}")
from aiohttp import web  # noqa: E402 - once its version is known to do
from aiohttp.http import StreamWriter  # noqa: E402

Chat = dict[str, Any]  # a chat-completions request or chunk, as parsed JSON


# ---- Settings ----------------------------------------------------------------------------
# One dataclass, from which the environment variables, the flags and --help are read off: a
# new setting is one new line.


class BadSetting(Exception):
    """The set-up cannot work, or is not safe: one line for stderr, exit status 2."""


class Kind(NamedTuple):
    allowed: str  # what a person is told when a value is bad
    read: Callable[[str], Any]  # raises ValueError or KeyError for such a value


def read_secret(text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError
    return text


def read_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError
    return names


def read_url(text: str) -> str:
    url = urlsplit(text)
    good = url.scheme in ("http", "https") and url.hostname and url.port != 0  # may raise
    if not good or re.search(r"[\s?#@]", text):
        raise ValueError
    str(url.hostname).encode("idna")  # may raise: no name that could be looked up
    return text.rstrip("/")


def number(of: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = of(text)
        if not least <= value <= most:
            raise ValueError
        return value

    return read


LEAST, MOST = math.ulp(0), sys.float_info.max  # the smallest number above 0, and the largest
TEXT = Kind("a text", str)
SECRET = Kind("visible ASCII characters, since it travels in a header", read_secret)
NAMES = Kind("one name or more, comma-separated", read_names)
URL = Kind("an http(s) URL such as http://localhost:11434/v1, no password, ? or #", read_url)
PORT = Kind("a whole number from 0 to 65535", number(int, 0, 65535))
COUNT = Kind("a whole number from 1", number(int, 1, sys.maxsize))
SECONDS = Kind("a number of seconds above 0", number(float, LEAST, MOST))
SECONDS_OR_0 = Kind("a number of seconds, 0 or above", number(float, 0, MOST))
SWITCHES = {"true": True, "1": True, "false": False, "0": False}
SWITCH = Kind("true or false", lambda text: SWITCHES[text.lower()])


def setting(kind: Kind, default: Any, what: str, shown: str = "") -> Any:
    """A field of Settings: how its text is read, its default, and a line for --help."""
    if isinstance(default, tuple):
        shown = ",".join(default)
    elif not shown:
        shown = f"{default:g}" if isinstance(default, float) else str(default).lower()
    told = {"kind": kind, "what": what, "shown": shown}
    return field(default=default, repr=kind is not SECRET, metadata=told)


OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Settings:
    """All that can be set. Secrets have no flag (anybody on the machine can read those) and
    no place in the `repr`. Raises BadSetting where the set-up would not be safe."""

    api_key: str = setting(SECRET, "", "the upstream's key; with neither it nor a URL: the demo")
    base_url: str = setting(URL, "", "any OpenAI-compatible upstream", OPENAI_URL)
    model: tuple[str, ...] = setting(
        NAMES, ("gpt-4o-mini",), "models that may be asked for, the default one first; * = any"
    )
    host: str = setting(TEXT, "127.0.0.1", "address to listen on; a public one needs a token")
    port: int = setting(PORT, 8080, "port; 0 = any free one")
    token: str = setting(SECRET, "", "access token that clients must send")
    allowed_hosts: tuple[str, ...] = setting(NAMES, (), "further Host names served")
    max_streams: int = setting(COUNT, 1000, "streams at once; one more gets 503")
    max_body_bytes: int = setting(COUNT, 1048576, "longest request body")
    max_event_bytes: int = setting(COUNT, 1048576, "longest upstream event: bounds the memory")
    connect_seconds: float = setting(SECONDS, 10.0, "longest time to connect to the upstream")
    idle_seconds: float = setting(SECONDS, 300.0, "longest silence of an upstream that thinks")
    write_seconds: float = setting(SECONDS, 30.0, "longest time a client may read nothing")
    heartbeat_seconds: float = setting(SECONDS, 10.0, "how often a silent stream gets a comment")
    drain_seconds: float = setting(SECONDS_OR_0, 30.0, "how long a shutdown waits for streams")
    tls_cert: str = setting(TEXT, "", "PEM file of a certificate: serve HTTPS")
    tls_key: str = setting(TEXT, "", "PEM file of the certificate's key")
    reuse_port: bool = setting(SWITCH, False, "let processes share the port, one per core")

    def __post_init__(self) -> None:
        if not self.token and not is_loopback(self.host):
            raise BadSetting(
                f"CHATSTREAM_HOST={self.host!r} without CHATSTREAM_TOKEN lets everybody there "
                "spend your key: set CHATSTREAM_TOKEN, or listen on 127.0.0.1"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise BadSetting("CHATSTREAM_TLS_CERT and CHATSTREAM_TLS_KEY: set both or neither")

    @property
    def look_seconds(self) -> float:
        """How often a stream's timer looks: so often that no limit is missed by much."""
        limits = (self.idle_seconds, self.write_seconds, self.heartbeat_seconds)
        return max(0.01, min(1.0, min(limits) / 8))


def is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def variable(name: str) -> str:
    """A field's environment variable: `port` -> CHATSTREAM_PORT, `model` -> OPENAI_MODEL."""
    prefix = "OPENAI" if name in ("api_key", "base_url", "model") else "CHATSTREAM"
    return f"{prefix}_{name.upper()}"


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flag_only = re.sub(r"(arguments: -*[\w-]*).*", r"\1", message)  # its value may be a secret
        raise BadSetting(f"{flag_only}; --help lists the flags")


def argument_parser() -> ArgumentParser:
    """--help, and a flag for every field that is no secret."""
    parser = ArgumentParser(
        "chatstream.py",
        usage="python chatstream.py [--flag value] ...",
        description="Serves a chat page, and streams OpenAI-compatible completions to it.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
        allow_abbrev=False,
    )
    parser.epilog = "A flag beats its variable. Secrets have a variable and no flag: "
    for each in fields(Settings):
        kind, what, shown = each.metadata.values()
        if kind is SECRET:
            parser.epilog += f"{variable(each.name)} ({what}). "
            continue
        flag, value = "--" + each.name.replace("_", "-"), each.name.rpartition("_")[2].upper()
        told = f"{what} [{variable(each.name)}{shown and ', ' + shown}]"
        if kind is SWITCH:  # `--reuse-port` alone means true
            parser.add_argument(flag, metavar="true", help=told, nargs="?", const="true")
        else:
            parser.add_argument(flag, metavar=value, help=told)
    return parser


def read_settings(environ: Mapping[str, str], arguments: list[str]) -> Settings:
    """Settings from flags, else variables, else defaults. Raises BadSetting."""
    flags = vars(argument_parser().parse_args(arguments))
    values = {}
    for each in fields(Settings):
        name, kind = variable(each.name), each.metadata["kind"]
        text = flags.get(each.name)
        if text is None:
            text = environ.get(name, "").strip()
            if not text:  # set but empty counts as unset: compose files write `X: ${X}`
                continue
        try:
            values[each.name] = kind.read(text)
        except (ValueError, KeyError):
            shown = "(not shown)" if kind is SECRET or "@" in text else repr(text)
            raise BadSetting(f"{name}={shown} must be {kind.allowed}") from None
    return Settings(**values)


# ---- Errors ------------------------------------------------------------------------------
# Raise early, convert once: all that goes wrong is a Failure, and `Chatstream.handle` alone
# turns it into an answer: a status and JSON before the first event, after it one event.

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
TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
TYPES |= {502: "upstream_error", 503: "server_error", 504: "upstream_error"}
RETRY_SOON = {"Retry-After": "1"}


class Failure(Exception):
    """Why a request has no complete answer: a code of ERRORS, and what departs from its row
    (status, outcome, type, code, param, headers). `cause` is for the log alone."""

    def __init__(self, code: str, message: str = "", /, cause: str = "", **departs: Any) -> None:
        super().__init__(code)
        status, outcome, told = ERRORS[code]
        self.status: int = departs.get("status", status)
        self.outcome: str = departs.get("outcome", outcome)
        self.message = message or told
        self.type = departs.get("type") or TYPES.get(self.status, "invalid_request_error")
        self.code: str = departs.get("code") or code
        self.param: str | None = departs.get("param")
        self.headers: dict[str, str] = departs.get("headers", {})
        self.cause = cause

    def body(self, request_id: str) -> bytes:
        """`{"error": {"message": "…", "type": "…", "param": null, "code": "…", …}}`"""
        error = {name: getattr(self, name) for name in ("message", "type", "param", "code")}
        return json.dumps({"error": error | {"request_id": request_id}}).encode()


# What an upstream's own message must not carry out: addresses inside the network, file paths
# (of two names or more; /v1/… is none), and what is no message for people at all.
PRIVATE = re.compile(
    r"\b(?:localhost|127\.\d+|10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01])|169\.254)[.\d]*(?::\d+)?\b"
    r"|\[?(?:\bf[cd][0-9a-f]{2}:|::1\b)[0-9a-f:]*\]?(?::\d+)?"
    r"|(?<![\w/.])/(?!v\d)[\w.-]+(?:/[\w.-]+)+|\b[A-Z]:[\\/][^\s'\"]+|\bfile:[^\s'\"]+"
)
MARKUP = re.compile(r"<(?:!doctype|html|head|body)\b|Traceback \(most recent", re.IGNORECASE)


Secrets = re.Pattern[str]


def secret_pattern(*secrets: str) -> Secrets:
    """Finds these words: a long one anywhere, a short one only where it stands alone, since
    some people's key for their own machine is `x`."""
    words = [re.escape(word) for word in secrets if word]
    long = [word if len(word) > 8 else rf"(?<!\w){word}(?!\w)" for word in words]
    return re.compile("|".join(long) or r"(?!)")


def public(message: str, secrets: Secrets) -> str:
    """An upstream's message as the world may see it; "" if it is none."""
    if MARKUP.search(message):
        return ""
    return PRIVATE.sub("***", secrets.sub("***", message))[:500]


def reported(error: Any, code: str, secrets: Secrets, **departs: Any) -> Failure:
    """The Failure that an upstream reports, in any of its dialects: {"error": {…}},
    {"error": "…"}, {"object": "error", "message": …}, [{"error": {…}}], {"detail": …}."""
    if isinstance(error, list) and error:
        error = error[0]
    if isinstance(error, dict):
        inner = error.get("error")
        if isinstance(inner, dict) or (inner and "message" not in error):
            error = inner
    if not isinstance(error, dict):
        error = {"message": error}
    for name in ("type", "code", "param"):
        value = error.get(name)
        if isinstance(value, str) and len(value) <= 64:
            departs[name] = public(value, secrets)
    message = error.get("message") or error.get("detail")
    return Failure(code, public(message, secrets) if isinstance(message, str) else "", **departs)


# ---- The request -------------------------------------------------------------------------
# What a client sends, checked without I/O. What we do not know passes, so that parameters
# that upstreams add next year work.

ROLES = ("system", "developer", "user", "assistant", "tool")


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")  # NaN, Infinity: Python reads them, RFC 8259 does not


decode_json = json.JSONDecoder(parse_constant=refuse_constant).raw_decode
encode_json = json.JSONEncoder(allow_nan=False).encode


def parse_json(data: bytes) -> Any:
    """JSON as RFC 8259 has it, white space around it allowed. Raises ValueError for anything
    else, bad UTF-8 too, and RecursionError for deep nesting."""
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
        chat |= {"stream": True, "model": choose_model(chat.get("model"), allowed)}
        if chat["model"] is None:
            del chat["model"]
        return encode_json(chat).encode()
    except (ValueError, RecursionError):  # no UTF-8, no JSON, 1e999, nested 100,000 deep
        raise Failure("invalid_json") from None


# ---- Server-sent events ------------------------------------------------------------------
# The parser needs nothing else of this file: bytes in, events out. Copy it where you like.


class Event(NamedTuple):
    name: bytes  # b"" unless an `event:` line gave one
    data: bytes  # the `data:` lines, joined by b"\n"


BOM = b"\xef\xbb\xbf"  # byte order mark, in UTF-8


class EventTooLarge(Exception):
    """The event under way is longer than the parser's limit."""


@dataclass(slots=True)
class EventParser:
    """Server-sent events from bytes in any pieces (WHATWG HTML standard, section 9.2.6).

    One thing beyond the standard: a line `error: {…}`, which llama.cpp sent through 2025
    (ggml-org/llama.cpp#16109), counts as `event: error` with that data."""

    limit: int  # bytes of data in one event, and so of memory
    partial: bytearray = field(default_factory=bytearray)  # the line that has no end yet
    after_cr: bool = False  # the last piece ended in CR: a LF now would be its other half
    at_start: bool = True
    name: bytes = b""
    data: list[bytes] = field(default_factory=list)
    size: int = 0
    stray: bool = False  # there was a line that no event stream has

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
                lines[0] = lines[0].removeprefix(BOM)
        for line in lines:
            if line:
                self.take(line)
            else:  # a blank line ends the event
                event = Event(self.name, b"\n".join(self.data))
                self.name, self.data, self.size = b"", [], 0
                if event.data:
                    yield event
        self.partial += rest
        if self.partial.startswith(b":"):  # a comment, of any length
            del self.partial[1:]
        if len(self.partial) > self.limit + len("data: "):
            raise EventTooLarge

    def take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name in (b"data", b"error"):
            self.size += len(value) + 1  # with its line end: an empty line takes memory too
            if self.size > self.limit + 1:
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


@dataclass(slots=True)
class Relay:
    """An upstream's bytes in, the client's bytes out, both in any pieces.

    It is over when `done` (the answer is whole) or when there is a `failure`; what came
    before the failure has then been given out."""

    parser: EventParser
    secrets: Secrets
    events: int = 0  # chunks given out
    heard: int = 0  # events that came, the dropped ones too
    finished: bool = False  # a `finish_reason` came: the end may follow without [DONE]
    done: bool = False
    failure: Failure | None = None
    around: tuple[bytes, bytes] = (b"", b"")  # the text of a chunk: see remember()
    is_json: bool | None = None  # no stream: some upstreams answer in one piece
    body: bytearray = field(default_factory=bytearray)  # of such an answer

    def feed(self, piece: bytes) -> bytes:
        """What goes out now that this piece has come."""
        if self.is_one_event(piece) and self.is_like_last(piece[6:-2]):
            self.heard += 1
            self.events += 1
            return piece
        if self.is_json is None and (start := piece.lstrip(BOM + b" \t\r\n")):
            self.is_json = start.startswith(b"{")
        if not self.is_json:
            return self.forward(self.parser.feed(piece))
        self.body += piece
        if len(self.body) > self.parser.limit:
            self.failure = Failure("event_too_large")
        return b""

    def is_one_event(self, piece: bytes) -> bool:
        framed = piece.startswith(b"data: ") and piece.endswith(b"\n\n")
        return framed and not self.parser.is_inside()

    def is_like_last(self, data: bytes) -> bool:
        """Whether this payload is one that was checked, but for its text: nearly every token
        comes so, and to parse its JSON is most of what it costs. A string without quote,
        backslash and control character can neither end early nor be bad, and around it
        stands what was parsed before: so the whole is as valid, and means the same."""
        head, tail = self.around
        if not (head and data.startswith(head) and data.endswith(tail)):
            return False
        if not len(head) + len(tail) <= len(data) <= self.parser.limit:
            return False
        try:
            text = data[len(head) : -len(tail)].decode()
        except UnicodeDecodeError:
            return False
        return text.isprintable() and '"' not in text and "\\" not in text

    def remember(self, data: bytes) -> None:
        """Takes a valid payload apart: {…"content":" and its text and "…}."""
        if start := CONTENT.search(data):
            text, quote, rest = data[start.end() :].partition(b'"')
            if b"\\" not in text:
                self.around = (data[: start.end()], quote + rest)

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
        if self.is_like_last(data):
            self.events += 1
            return b"data: %b\n\n" % data
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
        line = data.replace(b"\n", b" ").replace(b"\r", b" ")  # between two tokens of JSON
        self.remember(line)
        return b"data: %b\n\n" % line

    def whole(self) -> bytes:
        """A completion in one piece goes out as one chunk and [DONE]."""
        payload = bytes(self.body).strip(BOM + b" \t\r\n")
        payload = payload.removesuffix(b"data: [DONE]")  # some glue it on: decolua/9router#3492
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

OUTCOMES = ("completed", "client_gone", "upstream_error", "truncated", "timeout", "drained")
BUCKETS = [0.01 * 2**power for power in range(16)]  # OpenTelemetry GenAI: 0.01 s … 327.68 s


class Histogram:
    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)  # the last one is above all buckets
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(BUCKETS, value)] += 1
        self.sum += value

    def samples(self) -> Iterator[tuple[str, float]]:
        below = 0
        for bound, count in zip([*BUCKETS, "+Inf"], self.counts, strict=True):
            below += count
            yield f'_bucket{{le="{bound}"}}', below
        yield from (("_sum", self.sum), ("_count", below))


class Metrics:
    """Counters since the start. No label comes from a client, so none is unbounded."""

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys((*OUTCOMES, "rejected"), 0)
        self.events = 0
        self.first_chunk = Histogram()
        self.duration = Histogram()

    def text(self, active: int, draining: bool, max_streams: int) -> str:
        """Prometheus' text format, version 0.0.4."""
        outcomes = [(f'{{outcome="{name}"}}', n) for name, n in self.outcomes.items()]
        genai = "gen_ai_client_operation"  # OpenTelemetry's name; seconds
        families: list[tuple[str, str, str, Iterable[tuple[str, float]]]] = [
            ("chatstream_active_streams", "gauge", "Streams running now.", [("", active)]),
            ("chatstream_draining", "gauge", "1 while shutting down.", [("", int(draining))]),
            ("chatstream_max_streams", "gauge", "Streams allowed at once.", [("", max_streams)]),
            ("chatstream_streams_total", "counter", "Requests, by how they ended.", outcomes),
            ("chatstream_events_total", "counter", "Chunks relayed.", [("", self.events)]),
        ]
        for name, what, histogram in (
            ("time_to_first_chunk", "From the request to the first chunk.", self.first_chunk),
            ("duration", "From the request to the end of the answer.", self.duration),
        ):
            families.append((f"{genai}_{name}_seconds", "histogram", what, histogram.samples()))
        lines = []
        for name, kind, what, samples in families:
            lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{suffix} {value}" for suffix, value in samples]
        return "\n".join(lines) + "\n"


# ---- One stream --------------------------------------------------------------------------
# A request on its way. Its timer, the drain and the log look at it from outside, so it is an
# object; what it does stands in `Chatstream`.

COMMON_HEADERS = {"Server": "chatstream", "X-Content-Type-Options": "nosniff"}
STREAM_HEADERS = COMMON_HEADERS | {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # else nginx holds the whole answer back
}


class EventStream(web.StreamResponse):
    # aiohttp's own switch: the headers go out with the first event, in one packet. Should it
    # vanish, they go out in a packet of their own.
    _send_headers_immediately = False


@dataclass(eq=False, slots=True)
class Stream:
    request: web.BaseRequest
    settings: Settings
    relay: Relay
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)
    id: str = ""
    response: web.StreamResponse | None = None  # ours, once its status is settled
    answer: aiohttp.ClientResponse | None = None  # the upstream's
    # for the log and the metrics
    status: int = 0
    outcome: str = "client_gone"  # what it is, unless somebody says otherwise
    cause: str = ""
    started: float = 0.0
    first_event: float | None = None  # seconds after that
    # for the timer: what it saw last, and when that had changed
    receiving: bool = True  # the request's body is not here yet
    ending: bool = False  # all is sent, but not yet taken
    heard: int = 0
    heard_at: float = 0.0
    taken: int = 0
    taken_at: float = 0.0
    sent: int = 0
    sent_at: float = 0.0
    timer: asyncio.TimerHandle | None = None
    beating: asyncio.Task[None] | None = None
    # for stop()
    limit: asyncio.Timeout | None = None
    verdict: Failure | None = None

    def __post_init__(self) -> None:
        wanted = self.request.headers.get("X-Request-Id", "")
        sane = wanted and re.fullmatch(r"[A-Za-z0-9._-]{1,128}", wanted)
        self.id = wanted if sane else os.urandom(12).hex()
        self.started = self.heard_at = self.taken_at = self.sent_at = self.loop.time()

    async def open(self) -> StreamWriter:
        """The point of no return: the status is 200 from here on."""
        if self.response is None:
            self.response = EventStream(headers=STREAM_HEADERS | {"X-Request-Id": self.id})
            self.status = 200
        await self.response.prepare(self.request)
        return cast(StreamWriter, self.request.writer)

    async def end(self, data: bytes) -> None:
        """The last bytes. Stays until the client has taken them all, so that the time limits
        and the drain know of it until then."""
        self.ending = True
        if self.beating:
            self.beating.cancel()  # nothing may follow
        await (await self.open()).write_eof(data)
        while self.unread():  # noqa: ASYNC110 - asyncio tells of less than 16 KB, not of none
            await asyncio.sleep(self.settings.look_seconds / 4)

    def unread(self) -> int:
        """Bytes that wait for the client. Not those in the kernel, nor those in asyncio's TLS
        (64 KB): over TLS the write limit sees a stalled client that much later."""
        transport = self.request.transport
        return transport.get_write_buffer_size() if transport else 0

    def watch(self) -> None:
        self.timer = self.loop.call_later(self.settings.look_seconds, self.tick)

    def tick(self) -> None:
        """The one timer of a stream. To set a deadline at each read and each write would cost
        more than they do; so they only count, and this looks now and then what has moved."""
        now, settings, unread = self.loop.time(), self.settings, self.unread()
        waits_for_client = self.receiving or self.ending or unread > 0
        taken = self.request.writer.output_size - unread
        if taken > self.taken or not waits_for_client:
            self.taken, self.taken_at = taken, now
        if self.heard != self.relay.heard or waits_for_client:
            self.heard, self.heard_at = self.relay.heard, now
        if self.sent != self.relay.events:
            self.sent, self.sent_at = self.relay.events, now
        if waits_for_client:
            left = self.taken_at + settings.write_seconds - now
        else:
            left = self.heard_at + settings.idle_seconds - now
        until_beat = self.sent_at + settings.heartbeat_seconds - now
        if left <= 0:
            self.time_out(unread)
        elif until_beat <= 0 and not waits_for_client:
            self.sent_at = now
            self.beating = self.loop.create_task(self.beat())
        self.end_broken_body()
        delays = (left, until_beat, settings.look_seconds)
        self.timer = self.loop.call_later(min(d for d in delays if d > 0), self.tick)

    def time_out(self, unread: int) -> None:
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
        to the reader, who would wait until the idle limit. So the timer looks for it."""
        answer = self.answer
        if answer and answer.connection and answer.connection.closed:
            answer.content.feed_eof()

    def stop(self, failure: Failure) -> None:
        """Ends `Chatstream.chat` from outside, with this failure."""
        if self.limit and not self.verdict:
            self.verdict = failure
            self.limit.reschedule(self.loop.time())

    def drop_client(self) -> None:
        """Who reads nothing has gone: aiohttp then cancels the handler, as for a closed tab."""
        if self.request.transport:
            self.request.transport.abort()

    def let_upstream_go(self) -> None:
        """At once, since tokens cost money: close() over TLS would wait for a goodbye."""
        if self.answer and self.answer.connection:  # else its body has been read to the end
            if self.answer.connection.transport:
                self.answer.connection.transport.abort()
            self.answer.close()

    def stop_timers(self) -> None:
        for each in (self.timer, self.beating):
            if each:
                each.cancel()


# ---- The upstream ------------------------------------------------------------------------

BROKEN = (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError)


class DiedBeforeAnswering(aiohttp.ClientError):
    """The connection was there, and ended before any byte of an answer."""


class UpstreamAnswer(aiohttp.ClientResponse):
    """An answer that can be let go even before its head has come, and that tells whether any
    byte of it came. Both need aiohttp's connection while it waits for the head."""

    async def start(self, connection: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        protocol: Any = connection.protocol
        receive, heard = protocol.data_received, []

        def data_received(data: bytes) -> None:
            heard.append(len(data))
            receive(data)

        protocol.data_received = data_received
        try:
            return await super().start(connection)
        except BaseException as error:
            if connection.transport:
                connection.transport.abort()
            if isinstance(error, BROKEN) and not heard:
                raise DiedBeforeAnswering from error
            raise
        finally:
            del protocol.data_received


def describe(error: BaseException) -> str:
    """An error for the log, without the addresses that its own text has."""
    if isinstance(error, DiedBeforeAnswering) and error.__cause__:
        error = error.__cause__
    cause = getattr(error, "os_error", None) or getattr(error, "certificate_error", None) or error
    reason = ""
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = f"{cause.verify_message}; SSL_CERT_FILE can name authorities (macOS needs it)"
    elif isinstance(cause, ssl.SSLError | socket.gaierror):
        reason = str(cause.strerror if isinstance(cause, socket.gaierror) else cause.reason)
    elif isinstance(cause, OSError) and cause.errno:
        reason = os.strerror(cause.errno)
    return f"{type(cause).__name__} {reason}".strip()


async def read_whole(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """A body that is no stream, up to the limit; its part if it breaks off."""
    body = bytearray()
    with suppress(*BROKEN):
        async for piece in answer.content.iter_any():
            body += piece
            if len(body) > limit:
                break
    return bytes(body)


def read_rest(answer: aiohttp.ClientResponse) -> bytes:
    """What had come before the connection broke: aiohttp gives the error out first."""
    answer.content.set_exception(cast(Exception, None))
    return answer.content.read_nowait()


def environment_proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL. Found once, at the start: aiohttp's
    trust_env would look anew for every request, and read passwords from .netrc besides."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and "://" not in proxy:
        proxy = "http://" + proxy
    if proxy and not proxy.startswith(("http://", "https://")):
        raise BadSetting("the environment names a proxy that is none for HTTP; see no_proxy")
    return proxy


class Upstream:
    """The model server, and our connections to it."""

    def __init__(self, settings: Settings, proxy: str | None, secrets: Secrets) -> None:
        self.settings, self.proxy, self.secrets = settings, proxy, secrets
        self.url = settings.base_url or OPENAI_URL
        headers = {
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",  # a compressed stream comes in bursts
            "Content-Type": "application/json",
            "User-Agent": "chatstream",
        }
        if settings.api_key:
            headers["Authorization"] = f"Bearer {settings.api_key}"
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # by default the 101st stream waits
            timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_seconds),
            cookie_jar=aiohttp.DummyCookieJar(),  # else one person's cookie goes to the next
            headers=headers,
            response_class=UpstreamAnswer,
            read_bufsize=2**16,
        )

    async def send(
        self, stream: Stream, method: str, path: str, body: bytes
    ) -> aiohttp.ClientResponse:
        return await self.session.request(
            method,
            self.url + path,
            data=io.BytesIO(body) if len(body) > 2**20 else body,  # aiohttp warns of long bytes
            headers={"X-Request-Id": stream.id},
            proxy=self.proxy,
            allow_redirects=False,  # the key would travel along
        )

    async def request(
        self, stream: Stream, method: str, path: str, body: bytes = b""
    ) -> aiohttp.ClientResponse:
        """The upstream's answer, if its status is a good one. Tries once more if a connection
        dies before any byte came: a server may close a pooled one just when we use it."""
        try:
            try:
                answer = stream.answer = await self.send(stream, method, path, body)
            except DiedBeforeAnswering:
                answer = stream.answer = await self.send(stream, method, path, body)
        except aiohttp.ServerTimeoutError:
            raise Failure("upstream_timeout", cause="connecting took too long") from None
        except aiohttp.ClientHttpProxyError as error:
            raise Failure("upstream_unreachable", cause=describe(error)) from None
        except aiohttp.ClientResponseError as error:  # what came is no HTTP
            raise Failure("upstream_invalid", cause=describe(error)) from None
        except BROKEN as error:
            raise Failure("upstream_unreachable", cause=describe(error)) from None
        if not 200 <= answer.status < 300:
            raise await self.status_failure(answer)
        return answer

    async def status_failure(self, answer: aiohttp.ClientResponse) -> Failure:
        """What a bad status means: the client's fault is told as it came, ours is a 502."""
        status, cause = answer.status, f"HTTP {answer.status}"
        if status in (401, 403):
            return Failure("upstream_auth", cause=f"{cause}: is OPENAI_API_KEY right?")
        if not 400 <= status < 500:
            return Failure("upstream_error", cause=cause)
        kept = {
            name: value
            for name, value in answer.headers.items()
            if re.match("retry-after$|x-ratelimit-", name.lower()) and value.isascii()
        }
        try:
            error = parse_json(await read_whole(answer, self.settings.max_event_bytes))
        except (ValueError, RecursionError):
            error = None
        departs = {"status": status, "headers": kept, "cause": cause}
        return reported(error, "upstream_rejected", self.secrets, **departs)

    async def ask(self, stream: Stream, body: bytes) -> aiohttp.ClientResponse:
        """The upstream's answer, if it is one to relay. Raises Failure for any other."""
        answer = await self.request(stream, "POST", "/chat/completions", body)
        kind = answer.headers.get("Content-Type", "text/event-stream").lower()
        if kind.startswith("text/html"):
            raise Failure("upstream_error", cause="an HTML page")
        if not kind.startswith(("text/event-stream", "application/json")):
            raise Failure("upstream_invalid", cause="neither an event stream nor JSON")
        return answer

    async def models(self, stream: Stream) -> list[str]:
        """The names that the upstream lists. Raises Failure."""
        try:
            async with asyncio.timeout(self.settings.connect_seconds):
                answer = await self.request(stream, "GET", "/models")
                listed = parse_object(await read_whole(answer, self.settings.max_event_bytes))
            return [each["id"] for each in listed["data"] if isinstance(each["id"], str)]
        except TimeoutError:
            raise Failure("upstream_timeout") from None
        except (ValueError, RecursionError, KeyError, TypeError):
            raise Failure("upstream_invalid", "The model server lists no models.") from None
        finally:
            stream.let_upstream_go()


# ---- Who gets in -------------------------------------------------------------------------
# A page on another origin, or one whose name was rebound to this machine's address, must not
# be able to spend the key. Browsers tell of both in headers that no page can change, and ask
# before they send JSON from elsewhere.


def host_name(authority: str) -> str:
    """`LocalHost:8080` -> `localhost`, `[::1]:8080` -> `[::1]`."""
    return re.sub(r":\d*$", "", authority.lower())


def check_origin(request: web.BaseRequest, hosts: set[str]) -> None:
    """Raises Failure for a Host that is not ours and for a POST from another origin."""
    host = request.headers.get("Host", "").lower()
    if hosts and host_name(host) not in hosts:
        raise Failure("forbidden_host")
    if request.method != "POST":
        return
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is not None:
        same = site in ("same-origin", "none")
    else:  # no browser, or an old one
        same = origin is None or origin.partition("://")[2].lower() == host
    if not same:
        raise Failure("forbidden_origin")


def check_media_type(request: web.BaseRequest) -> None:
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity" or request.content_type != "application/json":
        raise Failure("unsupported_media_type")


def check_token(request: web.BaseRequest, token: str) -> None:
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    # compare_digest takes a time that does not tell where the two differ
    right = hmac.compare_digest(sent.strip().encode(errors="surrogateescape"), token.encode())
    if token and not (right and scheme.lower() == "bearer"):
        raise Failure("invalid_token", headers={"WWW-Authenticate": "Bearer"})


# ---- The page ----------------------------------------------------------------------------


def page_headers(html: str, https: bool) -> dict[str, str]:
    """Only the script and the style that stand in the file may run: their hashes are taken
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
Handler = Callable[[Stream], Awaitable[web.StreamResponse | None]]


def log_line(line: str) -> None:
    """On stderr; `logging` would cost a twelfth of all that a short stream does."""
    with suppress(OSError):
        print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=sys.stderr)


def server_tls(settings: Settings) -> ssl.SSLContext | None:
    if not settings.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except OSError as error:
        raise BadSetting(
            f"CHATSTREAM_TLS_CERT={settings.tls_cert!r} CHATSTREAM_TLS_KEY={settings.tls_key!r} "
            f"must be PEM files that belong together, without a password ({describe(error)})"
        ) from None
    return context


class Chatstream:
    """The server: `start()` it, and `drain()` it in the end."""

    def __init__(
        self,
        settings: Settings,
        proxy: str | None = None,
        log: Callable[[str], None] = log_line,
    ) -> None:
        try:
            html = Path(__file__).with_name("index.html").read_text(encoding="utf-8")
        except OSError:
            raise BadSetting("index.html is missing: it must lie beside chatstream.py") from None
        self.settings, self.proxy, self.log = settings, proxy, log
        url = urlsplit(settings.base_url or OPENAI_URL)
        words = (settings.api_key, settings.token, url.netloc, url.hostname or "")
        self.secrets = secret_pattern(*words)
        self.hosts = {host_name(name) for name in settings.allowed_hosts}
        if is_loopback(settings.host):
            self.hosts |= {"localhost", "127.0.0.1", "[::1]", settings.host}
        self.page_body = html.encode()
        self.page_headers = page_headers(html, bool(settings.tls_cert))
        self.metrics = Metrics()
        self.arriving: set[Stream] = set()  # their bodies are not here yet
        self.live: set[Stream] = set()
        self.draining = False
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
        self.arriving.add(stream)
        stream.watch()
        try:
            async with asyncio.timeout(None) as stream.limit:  # Stream.stop() ends it
                body = validate(await self.read_body(stream.request), self.settings.model)
                self.admit(stream)
                answer = await self.upstream.ask(stream, body)
                del body  # a long conversation need not stay in memory while its answer streams
                last = await self.pass_on(stream, answer)
        except TimeoutError:
            raise stream.verdict or Failure("upstream_timeout") from None
        finally:
            stream.limit = None
            stream.let_upstream_go()
        await stream.end(last)
        stream.outcome = "completed"
        return stream.response

    async def read_body(self, request: web.BaseRequest) -> bytes:
        """The request's body. Raises Failure; how long it may take, Stream.tick() watches."""
        limit = self.settings.max_body_bytes
        if (request.content_length or 0) > limit:
            raise Failure("body_too_large")
        waits = request.headers.get("Expect", "").lower() == "100-continue"
        if waits and request.transport and request.version >= (1, 1):
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
        if len(self.live) >= self.settings.max_streams:
            raise Failure("too_many_streams", headers=RETRY_SOON)
        self.arriving.discard(stream)
        self.live.add(stream)
        stream.receiving = False
        stream.heard_at = stream.sent_at = stream.loop.time()

    async def pass_on(self, stream: Stream, answer: aiohttp.ClientResponse) -> bytes:
        """Relays the upstream's events, each the moment its last byte is in; returns the last.
        While the client reads too slowly we wait, and so the upstream does: back-pressure."""
        relay, read, client = stream.relay, answer.content.readany, stream.request.protocol
        writer: StreamWriter | None = None
        while not relay.failure:
            try:
                piece = await read()
                out = relay.feed(piece) if piece else relay.close(cut=False)
            except BROKEN:
                out = relay.feed(read_rest(answer))
                if not (relay.done or relay.failure):
                    out += relay.close(cut=True)
            if not out:
                continue
            if writer is None:
                stream.first_event = stream.loop.time() - stream.started
                writer = await stream.open()
            if relay.done:
                return out
            await writer.write(out, drain=False)
            if client.writing_paused:
                await asyncio.shield(writer.drain())  # cancelled, it could never wait again
        raise relay.failure

    # -- the other routes

    async def page(self, stream: Stream) -> web.StreamResponse:
        tags = [tag.value for tag in stream.request.if_none_match or ()]
        if "*" in tags or self.page_headers["ETag"].strip('"') in tags:
            return web.Response(status=304, headers=self.page_headers)
        return web.Response(body=self.page_body, headers=self.page_headers)

    async def models(self, stream: Stream) -> web.StreamResponse:
        """`{"object": "list", "data": [{"id": "…", "object": "model"}]}`"""
        names = dict.fromkeys(self.settings.model)  # in their order, each once
        if "*" in names:
            del names["*"]
            names |= dict.fromkeys(await self.upstream.models(stream))
        data = [{"id": name, "object": "model"} for name in names]
        return web.json_response({"object": "list", "data": data})

    async def healthz(self, stream: Stream) -> web.StreamResponse:
        return web.json_response({"status": "ok"})

    async def readyz(self, stream: Stream) -> web.StreamResponse:
        if self.draining:
            raise Failure("server_draining", headers=RETRY_SOON)
        return web.json_response({"status": "ok"})

    async def show_metrics(self, stream: Stream) -> web.StreamResponse:
        text = self.metrics.text(len(self.live), self.draining, self.settings.max_streams)
        kind = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=text.encode(), headers=kind)

    # -- every request

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The one place where a failure becomes an answer, and where a stream is settled."""
        relay = Relay(EventParser(self.settings.max_event_bytes), self.secrets)
        stream = Stream(request, self.settings, relay)
        response: web.StreamResponse | None = None
        try:
            response = await self.route(request)(stream)
        except ConnectionError:  # the client has gone, seen while writing; else we are cancelled
            response = stream.response
        except Failure as failure:
            response = await self.fail(stream, failure)
        except Exception as error:
            logging.getLogger("chatstream").exception("a bug in chatstream")
            response = await self.fail(stream, Failure("internal_error", cause=describe(error)))
        finally:
            stream.stop_timers()
            self.arriving.discard(stream)
            self.live.discard(stream)
            if request.method == "POST" and request.path in STREAM_ROUTES:
                self.settle(stream)
        response = response or web.Response()
        if not response.prepared:
            response.headers.update(COMMON_HEADERS | {"X-Request-Id": stream.id})
            response.headers.setdefault("Cache-Control", "no-store")
            if self.draining:
                response.force_close()
        return response

    def route(self, request: web.BaseRequest) -> Handler:
        """Who gets in, and where to. Raises Failure."""
        path = request.path
        guarded = path in ("/", "/stream") or path.startswith("/v1/")
        if guarded:
            check_origin(request, self.hosts)
        if path not in self.routes:
            raise Failure("not_found")
        method, handler = self.routes[path]
        allowed = ("GET", "HEAD") if method == "GET" else (method,)
        if request.method not in allowed:
            raise Failure("method_not_allowed", headers={"Allow": ", ".join(allowed)})
        if guarded and self.draining:
            raise Failure("server_draining", headers=RETRY_SOON)
        if method == "POST":
            check_media_type(request)
        if guarded and path != "/":
            check_token(request, self.settings.token)
        return handler

    async def fail(self, stream: Stream, failure: Failure) -> web.StreamResponse:
        """Tells the client: by a status while that can be chosen, else by a last event, after
        which there is no [DONE]."""
        stream.outcome, stream.cause = failure.outcome, f"{failure.code} {failure.cause}".strip()
        if failure.cause and stream.request.path not in STREAM_ROUTES:
            self.log(f"id={stream.id} status={failure.status} cause={stream.cause!r}")
        body = failure.body(stream.id)
        if stream.response is None:
            stream.status = failure.status
            headers = {"Content-Type": "application/json"} | failure.headers
            return web.Response(status=failure.status, body=body, headers=headers)
        with suppress(ConnectionError):
            await stream.end(b"data: %b\n\n" % body)
        return stream.response

    def settle(self, stream: Stream) -> None:
        """Counts a stream, in one outcome, and writes its line in the log."""
        events, first = stream.relay.events, stream.first_event
        total = stream.loop.time() - stream.started
        self.metrics.outcomes[stream.outcome] += 1
        self.metrics.events += events
        if first is not None:
            self.metrics.first_chunk.observe(first)
        if stream.outcome != "rejected":
            self.metrics.duration.observe(total)
        line = f"id={stream.id} outcome={stream.outcome} status={stream.status or '-'} "
        line += f"events={events} first={'-' if first is None else f'{first:.3f}s'} "
        line += f"total={total:.3f}s"
        self.log(line + (f" cause={stream.cause!r}" if stream.cause else ""))

    # -- start and end

    async def start(self) -> str:
        """Listens; returns the address. Raises BadSetting where it cannot."""
        settings, tls = self.settings, server_tls(self.settings)
        self.upstream = Upstream(settings, self.proxy, self.secrets)
        server = web.Server(
            self.handle,
            handler_cancellation=True,  # else a silent upstream outlives its reader
            auto_decompress=False,  # else 60 KB become 60 MB
            access_log=None,
            keepalive_timeout=75,
        )
        self.runner = web.ServerRunner(server, shutdown_timeout=0.2)
        await self.runner.setup()
        shared = settings.reuse_port or None
        self.site = web.TCPSite(
            self.runner,
            settings.host,
            settings.port,
            ssl_context=tls,
            reuse_port=shared,
            backlog=1024,
        )
        try:
            await self.site.start()
        except (OSError, ValueError) as error:
            await self.stop()
            raise BadSetting(
                f"CHATSTREAM_HOST={settings.host} CHATSTREAM_PORT={settings.port}: cannot listen "
                f"there ({describe(error)}); the host must be this machine's, the port a free one"
            ) from None
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return f"http{'s' if tls else ''}://{host}:{self.runner.addresses[0][1]}"

    async def drain(self) -> None:
        """Ends without cutting an answer, if the drain time allows it."""
        self.draining = True  # 1. no new connections, no new streams
        await self.site.stop()
        for stream in self.arriving:
            stream.stop(Failure("server_draining", headers=RETRY_SOON))
        await self.wait_for_streams(self.settings.drain_seconds)  # 2. running ones go on
        for stream in self.live:  # 3. those left are told
            stream.stop(Failure("server_draining", outcome="drained", headers=RETRY_SOON))
        await self.wait_for_streams(1.0)
        for stream in self.live:  # 4. those that do not even read that are dropped
            stream.drop_client()
        await self.wait_for_streams(0.1)
        await self.stop()

    async def wait_for_streams(self, seconds: float) -> None:
        if tasks := [each.task for each in self.arriving | self.live if each.task]:
            await asyncio.wait(tasks, timeout=seconds)

    async def stop(self) -> None:
        await self.upstream.session.close()
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

Open *Wire* to see each line as it arrives.
"""


def demo_event(choices: list[Chat], **more: Any) -> bytes:
    chunk = {"id": "chatcmpl-demo", "object": "chat.completion.chunk", "choices": choices, **more}
    return b"data: %b\n\n" % encode_json(chunk).encode()


def demo_error(message: str, code: str, kind: str = "server_error") -> Chat:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def demo_words(model: str, question: str, silence: float) -> AsyncIterator[bytes]:
    """The events of an answer, at the pace of a model."""
    quoted = question[:2000].replace("\n", "\n> ")
    words = re.findall(r"\s*\S+\s*", DEMO_ANSWER.replace("{question}", quoted))
    fails = model in ("demo-cut-off", "demo-error")
    if model == "demo-slow-start":
        await asyncio.sleep(silence)
    yield demo_event([{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    for word in words[: len(words) // 2] if fails else words:
        yield demo_event([{"index": 0, "delta": {"content": word}, "finish_reason": None}])
        await asyncio.sleep(0.02)
    if model == "demo-error":
        error = demo_error("The demo model ran out of memory.", "out_of_memory")
        yield b"data: %b\n\n" % encode_json(error).encode()
    elif not fails:
        yield demo_event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
        yield demo_event([], usage={"completion_tokens": len(words)})
        yield DONE


async def demo_upstream(request: web.BaseRequest, silence: float) -> web.StreamResponse:
    try:
        chat = parse_object(b"".join([piece async for piece in request.content.iter_any()]))
        question = chat["messages"][-1].get("content")
    except (ValueError, LookupError):  # from somebody else than chatstream
        return web.json_response(demo_error("This is no chat.", "invalid_request"), status=400)
    if chat["model"] == "demo-rate-limit":
        told = ("The demo takes no request just now.", "rate_limit_exceeded", "rate_limit_error")
        error = demo_error(*told)
        return web.json_response(error, status=429, headers={"Retry-After": "5"})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    asked = question if isinstance(question, str) else "(something that is no text)"
    async for event in demo_words(chat["model"], asked, silence):
        await response.write(event)
    return response


@asynccontextmanager
async def with_demo(settings: Settings) -> AsyncIterator[Settings]:
    """The settings; if they name no upstream, with a demo upstream on a loopback port."""
    if settings.api_key or settings.base_url:
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
    demo = settings.model == DEMO_MODELS
    upstream = "the demo; OPENAI_API_KEY or OPENAI_BASE_URL leaves it" if demo else ""
    return (
        f"chatstream listens on {address}\n"
        f"  upstream: {upstream or settings.base_url or OPENAI_URL}\n"
        f"  models:   {', '.join(settings.model)}\n"
        "  to stop:  Ctrl+C"
    )


async def serve(chosen: Settings) -> None:
    """Runs until the first SIGINT or SIGTERM, then drains; a second one ends it at once."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    signals: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) > 1:
            os._exit(1)
        loop.call_soon_threadsafe(stopping.set)

    async with with_demo(chosen) as settings:
        proxy = environment_proxy(settings.base_url or OPENAI_URL) if settings is chosen else None
        server = Chatstream(settings, proxy)
        address = await server.start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)  # on Windows the loop has no add_signal_handler
        print(start_line(address, settings), flush=True)
        await stopping.wait()
        print(f"draining for up to {settings.drain_seconds:g} s; Ctrl+C ends it now", flush=True)
        await server.drain()


def is_our_fault(record: logging.LogRecord) -> bool:
    """Malformed HTTP is answered by aiohttp itself, and no reason for a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, aiohttp.http_exceptions.HttpProcessingError)


def main() -> int:
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
