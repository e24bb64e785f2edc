# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.2,<4"]
# ///
"""chatstream: a streaming chat server in one file, to run, to read and to copy from.

    pip install "aiohttp>=3.14.2,<4" && python chatstream.py   # then open http://localhost:8080

The way of one token, from the upstream (any OpenAI-compatible model server) to the client:

    upstream ──bytes──> EventParser ──events──> Relay ──`data: {…}\\n\\n`──> client
        ^               lines, any split        what may go out              │
        └───────── abort: the client left, the time is up, we shut down ─────┘

Read it from the top. Bytes become events, events become what may go out, and `chat` is a whole
stream's life in four sentences; `handle` tells how it ended. Whoever stops there has understood
streaming. What follows is what a server adds around it, and needs no order.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import errno
import hashlib
import hmac
import io
import ipaddress
import json
import logging
import os
import re
import select
import signal
import ssl
import sys
import time
import urllib.request
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import Field, dataclass, field, fields, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

Chat = dict[str, Any]  # a chat-completions request, or a chunk of an answer: parsed JSON


# ---- Server-sent events ------------------------------------------------------------------
# Bytes in, events out. Needs nothing else of this file: copy it where you like.


class Event(NamedTuple):
    name: bytes  # b"" unless an `event:` line gave one
    data: bytes  # the `data:` lines, joined by b"\n"


class EventTooLarge(Exception):
    """The event under way is longer than the parser's limit."""


BOM = b"\xef\xbb\xbf"  # byte order mark, in UTF-8


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
        for line in self.lines(piece):
            if line:
                self.take(line)
                continue
            name, data = self.name, self.data  # a blank line ends the event
            self.name, self.data, self.size = b"", [], 0
            if any(data):
                yield Event(name, b"\n".join(data))
        if len(self.partial) > self.limit + len("data: "):
            raise EventTooLarge

    def lines(self, piece: bytes) -> list[bytes]:
        """The lines that this piece completes; keeps the rest for the next one."""
        if self.after_cr and piece.startswith(b"\n"):
            piece = piece[1:]
        self.after_cr = piece.endswith(b"\r")
        # On bytes, splitlines() ends a line at LF, CRLF and CR, as the standard does. On str
        # it would end one at U+2028 too, which is text.
        lines = piece.splitlines()
        rest = lines.pop() if lines and not piece.endswith((b"\n", b"\r")) else b""
        if lines and self.partial:
            lines[0] = bytes(self.partial) + lines[0]
            self.partial.clear()
        if lines and self.at_start:
            self.at_start = False
            lines[0] = lines[0].removeprefix(BOM)
        self.partial += rest
        if self.partial.startswith(b":"):  # a comment may be of any length: drop it as it comes
            del self.partial[1:]
        return lines

    def take(self, line: bytes) -> None:
        """One line that is not blank: b'data: {"choices":[…]}', b": a comment", …"""
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"error":
            self.name, name = name, b"data"
        if name == b"data":
            self.size += len(value) + 1  # with its line end: an empty line takes memory too
            if self.size > self.limit + 1:
                raise EventTooLarge
            self.data.append(value)
        elif name == b"event":
            self.name = value
        elif name not in (b"", b"id", b"retry"):  # b"": a comment
            self.stray = True


# ---- The relay's rules -------------------------------------------------------------------
# What may go out: chunks, one error, [DONE]. Anything else breaks some client. No I/O here.

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": keep-alive\n\n"


@dataclass(slots=True)
class Relay:
    """An upstream's bytes in, the client's bytes out, both in any pieces.

    It is over when `done`, the answer being whole, or when there is a `failure`; what came
    before the failure has then been given out."""

    limit: int  # of an event's bytes
    heard: int = 0  # events that came, those dropped too
    events: int = 0  # chunks given out
    finished: bool = False  # a `finish_reason` came: the end may follow without [DONE]
    done: bool = False
    failure: Failure | None = None
    parser: EventParser = field(init=False)

    def __post_init__(self) -> None:
        self.parser = EventParser(self.limit)

    def feed(self, piece: bytes) -> bytes:
        """What goes out now that this piece has come: each event as b"data: PAYLOAD\\n\\n"."""
        out = []
        try:
            for event in self.parser.feed(piece):
                self.heard += 1
                out.append(self.check(event))
                if self.done:
                    break
        except EventTooLarge:
            self.failure = Failure("event_too_large")
        except (ValueError, RecursionError) as error:
            self.failure = Failure("upstream_invalid", cause=f"no JSON object: {error}")
        except Failure as failure:
            self.failure = failure
        return b"".join(out)

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
            raise reported(data, "upstream_error", cause="an error event")
        chunk = parse_object(data)
        if chunk.get("error") or chunk.get("object") == "error":
            raise reported(data, "upstream_error", cause="an error in the stream")
        choices = chunk.get("choices")
        if not isinstance(choices, list):  # {"type": "ping"}: life, but no chunk
            return b""
        for choice in choices:
            if isinstance(choice, dict):
                self.finished = self.finished or bool(choice.get("finish_reason"))
                if "message" in choice and "delta" not in choice:  # a whole completion
                    choice["delta"] = choice.pop("message")
                    chunk["object"] = "chat.completion.chunk"
                    data, self.finished = encode_json(chunk).encode(), True
        self.events += 1
        return b"data: %b\n\n" % data.replace(b"\n", b" ")  # between two tokens of JSON

    def close(self, cut: bool = False) -> bytes:
        """What goes out now that the bytes have ended: in good order, or `cut` off. Here alone
        it is said whether that was the end of an answer."""
        out = b"" if cut else self.feed(b"\n\n")  # the last event may lack its blank line
        inside = self.failure and self.failure.code == "upstream_invalid"  # a payload cut in two
        if self.done or (self.failure and not inside):
            return out
        if cut or inside or (self.events and not self.finished):
            self.failure = Failure("stream_truncated")
        elif self.events:
            self.done = True
            return out + DONE
        else:
            junk = self.parser.stray or self.heard
            self.failure = Failure("upstream_invalid" if junk else "empty_stream")
        return out


# ---- One stream, from the request to the last byte ---------------------------------------

COMMON_HEADERS = {"Server": "chatstream", "X-Content-Type-Options": "nosniff"}
STREAM_HEADERS = COMMON_HEADERS | {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # else nginx holds the whole answer back
}


@dataclass(eq=False, slots=True)
class Stream:
    """A request on its way: what its handler, its watcher, the drain and the log share."""

    request: web.BaseRequest
    relay: Relay
    id: str
    started: float
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)  # its handler's
    watcher: asyncio.Task[None] | None = None
    active: bool = False  # its body is here
    ending: bool = False  # its last bytes are on their way
    answer: aiohttp.ClientResponse | None = None  # the upstream's
    response: web.StreamResponse | None = None  # ours, once its status is 200
    written: int = 0  # bytes
    verdict: Failure | None = None  # from stop()
    first_event: float = 0.0  # seconds until it came; 0: not yet
    status: int = 0
    outcome: str = "client_gone"  # unless somebody says otherwise
    cause: str = ""

    async def open(self) -> web.StreamResponse:
        """The point of no return: from here on the status is 200."""
        if self.response is None:
            self.status = 200
            self.response = web.StreamResponse(headers=STREAM_HEADERS | {"X-Request-Id": self.id})
            if self.request.version < (1, 1):
                self.response.force_close()  # without chunks only that ends a body
            await self.response.prepare(self.request)
        return self.response

    async def write(self, data: bytes) -> None:
        """Waits while the client is slow, and with us waits the upstream: back-pressure."""
        response = self.response or await self.open()
        self.written += len(data)
        if len(data) < 2**15 and not self.waiting():  # asyncio makes nobody wait below 2**16
            await response.write(data)
        else:  # shielded, since a wait of aiohttp's that was cancelled could never be taken up
            await asyncio.shield(response.write(data))

    async def end(self, last: bytes) -> None:
        """The last bytes. Returns when the client has taken them all, so that the limits, the
        gauge and the drain know of the stream until then."""
        self.ending = True  # no heartbeat may follow
        self.written += len(last)
        response = await self.open()
        if transport := self.request.transport:
            transport.set_write_buffer_limits(0)  # write_eof() waits until it holds no more
            await response.write_eof(last)
            transport.set_write_buffer_limits()

    def waiting(self) -> int:
        """Bytes that wait for the client."""
        transport = self.request.transport
        return transport.get_write_buffer_size() if transport else 0

    def stop(self, failure: Failure) -> None:
        """Ends `chat` from outside, as a closed tab does, but with something to tell."""
        if self.task and not self.verdict and not self.ending:
            self.verdict = failure
            self.task.cancel()

    def drop_client(self) -> None:
        """Who takes nothing has gone: aiohttp now cancels the handler, as for a closed tab."""
        if self.request.transport:
            self.request.transport.abort()

    def let_upstream_go(self) -> None:
        """At once, since tokens cost money: close() over TLS would wait for a goodbye."""
        if self.answer and self.answer.connection:  # else its body has been read to the end
            if self.answer.connection.transport:
                self.answer.connection.transport.abort()
            self.answer.close()


async def chat(server: Chatstream, stream: Stream) -> web.StreamResponse | None:
    """Check the request; ask the upstream; relay what it says; let it go, come what may.

    Raises Failure, and CancelledError when the client has left or after `Stream.stop`."""
    settings = server.settings
    if len(server.streams) >= server.max_streams:
        raise Failure("too_many_streams")
    server.streams.add(stream)  # before its body, which takes memory
    stream.watcher = asyncio.create_task(watch(stream, settings))
    body = await read_body(stream.request, settings.max_body_bytes)
    body = check_chat(body, settings.model)
    stream.active = True
    try:
        answer = await server.upstream.ask(stream, "/chat/completions", body)
        del body  # a long conversation need not stay in memory while its answer streams
        last = await pass_on(stream, answer)
    finally:
        stream.let_upstream_go()
    await stream.end(last)
    stream.outcome = "completed"
    return stream.response


async def pass_on(stream: Stream, answer: aiohttp.ClientResponse) -> bytes:
    """Relays each event the moment its last byte is in; returns the last one. Raises Failure.
    Until the first there is no status: what fails before it gets an honest one."""
    relay, read = stream.relay, answer.content.readany
    if answer.content_type == "application/json":  # an answer in one piece
        read = lambda: read_as_event(answer, relay.parser.limit)  # noqa: E731
    while not relay.failure:
        try:
            piece = await read()
            out = relay.feed(piece) if piece else relay.close()
        except BROKEN:
            out = relay.close(cut=True)
        if out and not stream.first_event:
            stream.first_event = time.monotonic() - stream.started
        if relay.done:
            return out
        if out:
            await stream.write(out)
    raise relay.failure


async def watch(stream: Stream, settings: Settings) -> None:
    """Runs beside a stream: heartbeats while the upstream is silent, an end when it or the
    client is silent for too long. It looks now and then at what has moved, because a deadline
    set anew at every read and write would cost more than they do."""
    limits = (settings.idle_seconds, settings.write_seconds, settings.heartbeat_seconds)
    look_seconds = max(0.01, min(1.0, min(limits) / 10))
    heard = sent = taken = 0
    heard_at = sent_at = taken_at = time.monotonic()
    while True:
        await asyncio.sleep(look_seconds)
        now, waiting = time.monotonic(), stream.waiting()
        if stream.written - waiting > taken or not waiting:
            taken, taken_at = stream.written - waiting, now
        if stream.relay.heard > heard or waiting:  # while the client is slow the upstream waits
            heard, heard_at = stream.relay.heard, now
        if stream.relay.events > sent or waiting:
            sent, sent_at = stream.relay.events, now
        is_refusal = stream.answer and not stream.answer.ok  # its status is ours to tell
        if not stream.active:
            heard_at = sent_at = now
            if now - stream.started >= settings.write_seconds:
                stream.stop(Failure("request_timeout"))
        elif now - taken_at >= settings.write_seconds:
            stream.drop_client()
        elif now - heard_at >= settings.idle_seconds:
            stream.stop(Failure("upstream_timeout", cause="no event in CHATSTREAM_IDLE_SECONDS"))
        elif now - sent_at >= settings.heartbeat_seconds and not (is_refusal or stream.ending):
            sent_at = now
            with suppress(ConnectionError):
                await stream.write(HEARTBEAT)


async def handle(server: Chatstream, request: web.BaseRequest) -> web.StreamResponse:
    """Every request comes and ends here: the one place where a failure becomes an answer."""
    wanted, relay = request.headers.get("X-Request-Id", ""), Relay(server.settings.max_event_bytes)
    stream_id = wanted if re.fullmatch(r"[\w.-]{1,128}", wanted, re.ASCII) else os.urandom(12).hex()
    stream = Stream(request, relay, stream_id, time.monotonic())
    server.requests.add(stream)
    response: web.StreamResponse | None = None
    try:
        response = await route(server, request)(server, stream)
    except asyncio.CancelledError:
        if not (stream.task and stream.verdict):  # the client has left: there is nobody to tell
            raise
        stream.task.uncancel()
        response = await fail(server, stream, stream.verdict)
    except ConnectionError:  # the client has left, seen while writing
        response = stream.response
    except Failure as failure:
        response = await fail(server, stream, failure)
    except Exception as error:
        logging.getLogger("chatstream").exception("a bug in chatstream")
        response = await fail(server, stream, Failure("internal_error", cause=repr(error)))
    finally:
        server.settle(stream)
    response = response or web.Response()
    if not response.prepared:
        response.headers.update(COMMON_HEADERS | {"X-Request-Id": stream.id})
        response.headers.setdefault("Cache-Control", "no-store")
        if server.draining or request.version < (1, 1):
            response.force_close()
    return response


async def fail(server: Chatstream, stream: Stream, failure: Failure) -> web.StreamResponse:
    """Tells the client: by a status while there is one to choose, else by a last event, after
    which there is no [DONE]."""
    stream.outcome, stream.cause = failure.outcome, f"{failure.code} {failure.cause}".strip()
    body = failure.body(stream.id, server.secrets)
    if stream.response is None:
        stream.status = failure.status
        headers = {"Content-Type": "application/json"} | failure.headers
        if failure.status == 503:
            headers["Retry-After"] = "1"
        return web.Response(status=failure.status, body=body, headers=headers)
    with suppress(ConnectionError):
        await stream.end(b"data: %b\n\n" % body)
    return stream.response


# ---- Errors ------------------------------------------------------------------------------
# Raise early, convert once: all that goes wrong is a Failure, and `fail` alone tells it.

ERRORS = {
    # code: (status, outcome in the metrics, message)
    "invalid_json": (400, "rejected", "The body is no JSON (RFC 8259, integers to 4,300 digits)."),
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
    "internal_error": (500, "failed", "Something went wrong in this server."),
    "upstream_unreachable": (502, "upstream_error", "The model server cannot be reached."),
    "upstream_auth": (502, "upstream_error", "The model server refuses this server's key."),
    "upstream_error": (502, "upstream_error", "The model server failed."),
    "upstream_invalid": (502, "upstream_error", "The model server's answer cannot be read."),
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
MARKUP = re.compile(r"<(?:!doctype|html|head|body)\b|Traceback \(most recent", re.IGNORECASE)


class Failure(Exception):
    """Why a request has no complete answer: a code of ERRORS, and what departs from its row
    (status, outcome, type, code, param, headers). `cause` is for the log alone."""

    def __init__(self, code: str, message: str = "", /, cause: str = "", **departs: Any) -> None:
        super().__init__(code)
        self.status, self.outcome, told = ERRORS[code]
        self.code, self.message, self.cause = code, message or told, cause
        self.param: str | None = None
        self.headers: dict[str, str] = {}
        vars(self).update({name: value for name, value in departs.items() if value})
        self.type = departs.get("type") or TYPES.get(self.status, "invalid_request_error")

    def body(self, request_id: str, secrets: list[str]) -> bytes:
        """`{"error": {"message": "…", "type": "…", "param": null, "code": "…", …}}`, in which
        no secret stands, even if the upstream quoted one."""
        error = {name: getattr(self, name) for name in ("message", "type", "param", "code")}
        for secret in secrets:
            error = {name: text and text.replace(secret, "***") for name, text in error.items()}
        error |= {"message": error["message"][:500], "request_id": request_id}
        return json.dumps({"error": error}).encode()


def reported(body: bytes, code: str, **departs: Any) -> Failure:
    """The Failure that an upstream reports, in any of its dialects: {"error": {…}},
    {"error": "…"}, {"object": "error", "message": …}, [{"error": {…}}], {"detail": …}."""
    error = None
    with suppress(ValueError, RecursionError):
        error = parse_json(body)
    if isinstance(error, list) and error:
        error = error[0]
    if isinstance(error, dict):
        inner = error.get("error")
        error = inner if isinstance(inner, dict) or (inner and "message" not in error) else error
    if not isinstance(error, dict):
        error = {"message": error}
    for name in ("type", "code", "param"):
        if isinstance(error.get(name), str) and len(error[name]) <= 64:
            departs[name] = error[name]
    message = error.get("message") or error.get("detail")
    if isinstance(message, list) and message and isinstance(message[0], dict):
        message = message[0].get("msg")  # FastAPI: {"detail": [{"loc": …, "msg": …}]}
    if not isinstance(message, str) or MARKUP.search(message):
        message = ""
    return Failure(code, message, **departs)


# ---- The request -------------------------------------------------------------------------
# What a client sends, checked. What we do not know passes, so that parameters that upstreams
# add next year work.

ROLES = ("system", "developer", "user", "assistant", "tool")

# Python reads NaN and Infinity, which RFC 8259 does not have: int("NaN") raises ValueError.
decode_json = json.JSONDecoder(parse_constant=int).raw_decode
encode_json = json.JSONEncoder(allow_nan=False).encode


def parse_json(data: bytes) -> Any:
    """JSON as RFC 8259 has it, white space around it allowed. Raises ValueError for anything
    else, bad UTF-8 and integers above 4,300 digits too, and RecursionError for deep nesting."""
    text = data.decode().strip(" \t\r\n")
    value, end = decode_json(text)
    if end != len(text):
        raise ValueError("more than one value")
    return value


def parse_object(data: bytes) -> Chat:
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def check_chat(data: bytes, allowed: tuple[str, ...]) -> bytes:
    """The body to send on for the body received: encoded anew from what was checked, so that
    a repeated key cannot slip a model past the check. Raises Failure."""
    try:
        chat = parse_json(data)
        if not isinstance(chat, dict):
            raise Failure("invalid_request")
        if chat.get("stream") not in (None, True):
            raise Failure("stream_required")
        check_messages(chat.get("messages"))
        chat |= {"stream": True, "model": choose_model(chat.get("model"), allowed)}
        return encode_json(chat).encode()
    except (ValueError, RecursionError):  # no UTF-8, no JSON, 1e999, nested 100,000 deep
        raise Failure("invalid_json") from None


def check_messages(messages: Any) -> None:
    """Raises Failure for what are no chat messages; never quotes them."""
    if not isinstance(messages, list) or not messages:
        raise Failure("invalid_messages")
    for index, message in enumerate(messages):
        role, content = None, None
        if isinstance(message, dict):
            role, content = message.get("role"), message.get("content")
        parts = content if isinstance(content, list) else []
        good = isinstance(content, str | list | None) and all(isinstance(p, dict) for p in parts)
        if role not in ROLES or not good:
            told = f"a role out of {', '.join(ROLES)}, and as content text, parts or null"
            raise Failure("invalid_messages", f"messages[{index}] needs {told}.")


def choose_model(asked: Any, allowed: tuple[str, ...]) -> str:
    if asked is None and allowed[0] == "*":
        raise Failure("invalid_request", "`model` is required; GET /v1/models lists them.")
    asked = allowed[0] if asked is None else asked
    if not isinstance(asked, str):
        raise Failure("invalid_request", "`model` must be a string.")
    if asked not in allowed and "*" not in allowed:
        raise Failure("model_not_found")
    return asked


async def read_body(request: web.BaseRequest, limit: int) -> bytes:
    """The request's body. Raises Failure; how long it may take, `watch` knows."""
    waits = request.headers.get("Expect", "").lower() == "100-continue"
    if waits and request.transport and (request.content_length or 0) <= limit:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # aiohttp's server does not
    body, size = bytearray(), request.content_length or 0
    try:
        while size <= limit and (piece := await request.content.readany()):
            body += piece
            size = max(size, len(body))
    except (web.RequestPayloadError, aiohttp.http_exceptions.HttpProcessingError):
        raise Failure("invalid_request", "The request body's encoding is broken.") from None
    if size > limit:
        raise Failure("body_too_large")
    return bytes(body)


# ---- The upstream ------------------------------------------------------------------------

OPENAI_URL = "https://api.openai.com/v1"
BROKEN = (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError)
NO_FILES = (errno.EMFILE, errno.ENFILE)


class UpstreamAnswer(aiohttp.ClientResponse):
    """An answer that can be let go even before its head has come: until then nobody but
    aiohttp has the connection, and it would say goodbye over TLS to a peer that is mute."""

    async def start(self, connection: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        try:
            return await super().start(connection)
        except BaseException:
            if connection.transport:
                connection.transport.abort()
            raise


async def read_whole(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """A body that is no stream, up to the limit. Raises one of BROKEN if it breaks off."""
    body = bytearray()
    while len(body) <= limit and (piece := await answer.content.readany()):
        body += piece
    return bytes(body)


async def read_as_event(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """An answer in one piece as a stream of one event; b"" when it has been read."""
    body = (await read_whole(answer, limit)).removeprefix(BOM)
    return b"data: %b\n\n" % re.sub(rb"[\r\n]", b" ", body) if body else b""


def environment_proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL. Found once, at the start: aiohttp's
    trust_env would look anew for every request, and read passwords from .netrc besides."""
    parts, proxies = urlsplit(url), urllib.request.getproxies()
    if is_loopback(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not re.match("https?://", proxy):
        raise BadSetting("the environment names a proxy that is no http:// URL; see no_proxy")
    return proxy


class Upstream:
    """The model server, and our connections to it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = settings.base_url or OPENAI_URL
        self.proxy = environment_proxy(self.url)
        headers = {
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",  # a compressed stream comes in bursts
            "Content-Type": "application/json",
        }
        if settings.api_key:
            headers["Authorization"] = f"Bearer {settings.api_key}"
        self.session = aiohttp.ClientSession(
            # By default the 101st stream waits. Many servers close an idle connection after
            # 5 s, and aiohttp sends no POST twice: so we must be the first to close it.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
            timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_seconds),
            cookie_jar=aiohttp.DummyCookieJar(),  # else one person's cookie goes to the next
            headers=headers,
            response_class=UpstreamAnswer,
        )

    async def ask(
        self, stream: Stream, path: str, body: bytes | None = None
    ) -> aiohttp.ClientResponse:
        """The answer to a GET, or to a POST of a body, if it is a good one. Raises Failure."""
        try:
            answer = stream.answer = await self.session.request(
                "POST" if body else "GET",
                self.url + path,
                data=body,
                headers={"X-Request-Id": stream.id},
                proxy=self.proxy,
                allow_redirects=False,  # the key would travel along
            )
        except aiohttp.ServerTimeoutError:
            raise Failure("upstream_timeout", cause="connecting took too long") from None
        except BROKEN as error:
            code = "upstream_unreachable"
            if isinstance(error, OSError) and error.errno in NO_FILES:
                code = "too_many_streams"
            elif type(error) is aiohttp.ClientResponseError:  # what came is no HTTP
                code = "upstream_invalid"
            raise Failure(code, cause=f"{type(error).__name__}: {error}") from None
        kind = answer.headers.get("Content-Type", "text/event-stream").lower()
        if not 200 <= answer.status < 300:
            raise await self.refusal(answer)
        if kind.startswith("text/html"):
            raise Failure("upstream_error", cause="an HTML page")
        if not kind.startswith(("text/event-stream", "application/json")):
            raise Failure("upstream_invalid", cause="neither an event stream nor JSON")
        return answer

    async def refusal(self, answer: aiohttp.ClientResponse) -> Failure:
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
        body = b""
        with suppress(TimeoutError, *BROKEN):  # its body is worth a moment, no more
            async with asyncio.timeout(2):
                body = await read_whole(answer, self.settings.max_event_bytes)
        return reported(body, "upstream_rejected", status=status, headers=kept, cause=cause)


# ---- Who gets in -------------------------------------------------------------------------
# A page on another origin, or one whose name was rebound to this machine's address, must not
# be able to spend the key. Browsers tell of both in headers that no page can change, and ask
# before they send JSON from elsewhere.


def is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def host_name(authority: str) -> str:
    """`LocalHost:8080` -> `localhost`, `[::1]:8080` -> `[::1]`."""
    return re.sub(r":\d*$", "", authority.lower())


def check_origin(request: web.BaseRequest, hosts: set[str]) -> None:
    """Raises Failure for a Host that is not ours and for a POST from another origin."""
    host = request.headers.get("Host", "").lower()
    if hosts and host_name(host) not in hosts:
        raise Failure("forbidden_host")
    origin = request.headers.get("Origin")
    same = origin is None or origin.partition("://")[2].lower() == host
    site = request.headers.get("Sec-Fetch-Site")  # only old browsers do not send it
    if request.method == "POST" and not (site in ("same-origin", "none") if site else same):
        raise Failure("forbidden_origin")


def route(server: Chatstream, request: web.BaseRequest) -> Handler:
    """The handler of a request that may come in. Raises Failure."""
    path, headers = request.path, request.headers
    guarded = path in ("/", "/stream") or path.startswith("/v1/")
    if guarded:
        check_origin(request, server.hosts)
    if path not in ROUTES:
        raise Failure("not_found")
    method, handler = ROUTES[path]
    allowed = ("GET", "HEAD") if method == "GET" else (method,)
    if request.method not in allowed:
        raise Failure("method_not_allowed", headers={"Allow": ", ".join(allowed)})
    if guarded and server.draining:
        raise Failure("server_draining")
    is_plain = headers.get("Content-Encoding", "identity").lower() == "identity"
    if method == "POST" and not (is_plain and request.content_type == "application/json"):
        raise Failure("unsupported_media_type")
    if guarded and path != "/" and (token := server.settings.token):
        scheme, _, sent = headers.get("Authorization", "").partition(" ")
        # compare_digest takes a time that does not tell where the two differ
        same = hmac.compare_digest(sent.strip().encode(errors="surrogateescape"), token.encode())
        if not (same and scheme.lower() == "bearer"):
            raise Failure("invalid_token", headers={"WWW-Authenticate": "Bearer"})
    return handler


# ---- The routes --------------------------------------------------------------------------

PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), "
    "midi=(), payment=(), usb=()",
}


def page_policy(html: str) -> str:
    """Only the script and the style that stand in the file may run: their hashes are taken
    from it, so that the policy cannot drift from the page."""
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    )
    for tag, code in re.findall(r"<(script|style)>(.*?)</\1>", html, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    return policy


async def page(server: Chatstream, stream: Stream) -> web.StreamResponse:
    tags = [tag.value for tag in stream.request.if_none_match or ()]
    if "*" in tags or server.page_headers["ETag"].strip('"') in tags:
        return web.Response(status=304, headers=server.page_headers)
    return web.Response(body=server.page, headers=server.page_headers)


async def models(server: Chatstream, stream: Stream) -> web.StreamResponse:
    """`{"object": "list", "data": [{"id": "…", "object": "model"}]}`"""
    names = dict.fromkeys(server.settings.model)  # in their order, each once
    if "*" in names:
        del names["*"]
        names |= await listed_models(server, stream)
    data = [{"id": name, "object": "model"} for name in names]
    return web.json_response({"object": "list", "data": data})


async def listed_models(server: Chatstream, stream: Stream) -> dict[str, None]:
    """The names that the upstream lists. Raises Failure."""
    try:
        async with asyncio.timeout(server.settings.connect_seconds):
            answer = await server.upstream.ask(stream, "/models")
            listed = parse_object(await read_whole(answer, server.settings.max_event_bytes))
        return {each["id"]: None for each in listed["data"] if isinstance(each["id"], str)}
    except TimeoutError:
        raise Failure("upstream_timeout") from None
    except (ValueError, RecursionError, KeyError, TypeError, *BROKEN):
        raise Failure("upstream_invalid", "The model server lists no models.") from None
    finally:
        stream.let_upstream_go()


async def probe(server: Chatstream, stream: Stream) -> web.StreamResponse:
    if server.draining and stream.request.path == "/readyz":
        raise Failure("server_draining")
    return web.json_response({"status": "ok"})


async def metrics(server: Chatstream, stream: Stream) -> web.StreamResponse:
    kind = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    return web.Response(body=server.metrics.text(server).encode(), headers=kind)


Handler = Callable[["Chatstream", Stream], Awaitable[web.StreamResponse | None]]
ROUTES: dict[str, tuple[str, Handler]] = {
    "/": ("GET", page),
    "/stream": ("POST", chat),
    "/v1/chat/completions": ("POST", chat),
    "/v1/models": ("GET", models),
    "/healthz": ("GET", probe),  # 200 as long as the process lives
    "/readyz": ("GET", probe),  # 503 once draining
    "/metrics": ("GET", metrics),
}


# ---- What can be watched -----------------------------------------------------------------

OUTCOMES = "completed client_gone upstream_error truncated timeout drained rejected failed"
BUCKETS = [0.01 * 2**power for power in range(16)]  # OpenTelemetry GenAI: 0.01 s … 327.68 s


class Histogram:
    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)  # the last one is above all buckets
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(BUCKETS, value)] += 1
        self.sum += value

    def samples(self) -> dict[str, float]:
        below = accumulate(self.counts)
        out = {f'_bucket{{le="{each}"}}': next(below) for each in (*BUCKETS, "+Inf")}
        return out | {"_sum": self.sum, "_count": sum(self.counts)}


class Metrics:
    """Counters since the start. No label comes from a client, so none is unbounded."""

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(OUTCOMES.split(), 0)
        self.events = 0
        self.first_chunk, self.duration = Histogram(), Histogram()

    def text(self, server: Chatstream) -> str:
        """Prometheus' text format, version 0.0.4."""
        active = sum(each.active for each in server.streams)
        outcomes = {f'{{outcome="{name}"}}': n for name, n in self.outcomes.items()}
        first, whole = self.first_chunk.samples(), self.duration.samples()
        genai = "gen_ai_client_operation"  # OpenTelemetry's name
        lines = []
        for name, kind, what, samples in (
            ("chatstream_active_streams", "gauge", "Streams running now.", {"": active}),
            ("chatstream_draining", "gauge", "1 while shutting down.", {"": +server.draining}),
            ("chatstream_max_streams", "gauge", "Most streams at once.", {"": server.max_streams}),
            ("chatstream_streams_total", "counter", "Requests, by how they ended.", outcomes),
            ("chatstream_events_total", "counter", "Chunks relayed.", {"": self.events}),
            (f"{genai}_time_to_first_chunk_seconds", "histogram", "Until the first chunk.", first),
            (f"{genai}_duration_seconds", "histogram", "Until the end of the answer.", whole),
        ):
            lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{suffix} {value}" for suffix, value in samples.items()]
        return "\n".join(lines) + "\n"


class Output(io.TextIOBase):
    """Takes the place of stdout or stderr. What cannot be written is dropped: whoever reads it
    may have gone, the disk may be full, and a pipe that nobody reads would stop us. O_NONBLOCK
    would do, but the terminal has it in common with us."""

    def __init__(self, stream: TextIO | None) -> None:
        self.coding = stream.encoding if stream else "ascii"
        self.target = stream.fileno() if stream else -1
        self.poll = select.poll()
        if stream:
            self.poll.register(stream, select.POLLOUT)

    def write(self, text: str) -> int:
        data = text.encode(self.coding, errors="backslashreplace")
        with suppress(OSError):
            for start in range(0, len(data), select.PIPE_BUF):  # so much fits in without a wait
                if self.poll.poll(0):
                    os.write(self.target, data[start : start + select.PIPE_BUF])
        return len(text)


def log(line: str) -> None:
    """On stderr; `logging` would cost a twelfth of all that a short stream does."""
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


# ---- Settings ----------------------------------------------------------------------------
# One dataclass, from which the environment variables, the flags and --help are read off: a
# new setting is one new line.


class BadSetting(Exception):
    """The set-up cannot work, or is not safe: one line for stderr, exit status 2."""


TINY = sys.float_info.min  # the least number of seconds above 0


def setting(
    default: Any, what: str, least: float = 0, most: float = 10**9, repr: bool = True
) -> Any:
    """A field of Settings, and a line for --help. The type of the default is the field's."""
    about = {"what": what, "least": least, "most": most}
    return field(default=default, repr=repr, metadata=about)


@dataclass(frozen=True)
class Settings:
    """All that can be set. Secrets have no flag (anybody on the machine can read those) and
    no place in the `repr`. Raises BadSetting where the set-up would not be safe."""

    api_key: str = setting(
        "", "the upstream's key; with neither it nor a URL: the demo", repr=False
    )
    base_url: str = setting("", f"any OpenAI-compatible upstream; if unset {OPENAI_URL}")
    model: tuple[str, ...] = setting(("gpt-4o-mini",), "models allowed, default first; * = any")
    host: str = setting("127.0.0.1", "address to listen on; a public one needs a token")
    port: int = setting(8080, "port; 0 = any free one", most=65535)
    token: str = setting("", "access token that clients must send", repr=False)
    allowed_hosts: tuple[str, ...] = setting((), "further Host names served")
    max_streams: int = setting(1000, "streams at once; one more gets 503", least=1)
    max_body_bytes: int = setting(1048576, "longest request body", least=1)
    max_event_bytes: int = setting(1048576, "longest upstream event: bounds the memory", least=1)
    connect_seconds: float = setting(10.0, "longest time to connect to the upstream", TINY)
    idle_seconds: float = setting(300.0, "longest silence of an upstream that thinks", TINY)
    write_seconds: float = setting(30.0, "longest time a client may take nothing", TINY)
    heartbeat_seconds: float = setting(10.0, "how often a silent stream gets a comment", TINY)
    drain_seconds: float = setting(30.0, "how long a shutdown waits for streams")
    tls_cert: str = setting("", "PEM file of a certificate: serve HTTPS")
    tls_key: str = setting("", "PEM file of the certificate's key")
    reuse_port: bool = setting(False, "let processes share the port, one per core")

    def __post_init__(self) -> None:
        if not self.token and not is_loopback(self.host):
            raise BadSetting(
                f"CHATSTREAM_HOST={self.host!r} without CHATSTREAM_TOKEN lets everybody there "
                "spend your key: set CHATSTREAM_TOKEN, or listen on 127.0.0.1"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise BadSetting("CHATSTREAM_TLS_CERT and CHATSTREAM_TLS_KEY: set both or neither")


def variable(name: str) -> str:
    """A field's environment variable: `port` -> CHATSTREAM_PORT, `model` -> OPENAI_MODEL."""
    prefix = "OPENAI" if name in ("api_key", "base_url", "model") else "CHATSTREAM"
    return f"{prefix}_{name.upper()}"


def convert(each: Field[Any], text: str) -> Any:
    """A field's value for its text. Raises ValueError, which says what is allowed."""
    kind: Any = type(each.default)
    if not each.repr and not re.fullmatch(r"[!-~]+", text):
        raise ValueError("visible ASCII characters, since it travels in a header")
    if each.name == "base_url":
        check_url(text)
        return text.rstrip("/")
    if kind is str:
        return text
    if kind is tuple:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        if not names:
            raise ValueError("one name or more, comma-separated")
        return names
    if kind is bool:
        if text.lower() not in ("true", "1", "false", "0"):
            raise ValueError("true or false")
        return text.lower() in ("true", "1")
    least, most = each.metadata["least"], each.metadata["most"]
    with suppress(ValueError):
        if least <= kind(text) <= most:
            return kind(text)
    what = "a whole number" if kind is int else "a number of seconds"
    raise ValueError(f"{what} {'above 0' if 0 < least < 1 else f'from {least}'}, up to {most}")


def check_url(text: str) -> None:
    with suppress(ValueError):
        url = urlsplit(text)
        str(url.hostname).encode("idna")  # raises for no name that could be looked up
        is_http = url.scheme in ("http", "https") and url.hostname and url.port != 0
        if is_http and not re.search(r"[\s?#@]", text):
            return
    raise ValueError("an http(s) URL such as http://localhost:11434/v1, no password, ? or #")


def read_settings(environ: Mapping[str, str], arguments: list[str]) -> Settings:
    """Settings from flags, else variables, else defaults. Raises BadSetting."""
    what = "Streams OpenAI-compatible completions to a chat page. A flag beats its variable."
    parser = argparse.ArgumentParser("chatstream.py", description=what, allow_abbrev=False)
    parser.epilog = "Secrets have a variable and no flag: OPENAI_API_KEY, CHATSTREAM_TOKEN."
    for each in fields(Settings):
        if each.repr:
            default = ",".join(each.default) if isinstance(each.default, tuple) else each.default
            told = f"{each.metadata['what']} [{variable(each.name)}={default}]"
            flag = "--" + each.name.replace("_", "-")  # alone, as in --reuse-port, it means true
            parser.add_argument(flag, metavar="VALUE", help=told, nargs="?", const="true")
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:  # its value may be a secret
        raise BadSetting(f"no such flag: {unknown[0].partition('=')[0]}; --help lists the flags")
    values = {}
    for each in fields(Settings):
        name, text = variable(each.name), getattr(flags, each.name, None)
        if text is None:
            text = environ.get(name, "").strip()
            if not text:  # set but empty counts as unset: compose files write `X: ${X}`
                continue
        try:
            values[each.name] = convert(each, text)
        except ValueError as error:
            shown = repr(text) if each.repr and "@" not in text else "(not shown)"
            raise BadSetting(f"{name}={shown} must be {error}") from None
    return Settings(**values)


# ---- The server --------------------------------------------------------------------------


async def listen(
    handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    host: str,
    port: int,
    **how: Any,
) -> web.ServerRunner:
    """aiohttp's low-level server, listening. Raises OSError or ValueError where it cannot."""
    server = web.Server(
        handler,
        handler_cancellation=True,  # else a silent upstream outlives its reader
        auto_decompress=False,  # else 60 KB become 60 MB
        access_log=None,
    )
    runner = web.ServerRunner(server, shutdown_timeout=0.2)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, **how).start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner


def streams_for_files(wanted: int) -> int:
    """How many streams the open files allow, two for each, after raising their limit."""
    try:
        import resource  # noqa: PLC0415 - Windows has none, and no such limit
    except ImportError:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    allowed = max(1, (soft - 64) // 2) if soft != resource.RLIM_INFINITY else wanted
    if allowed < wanted:
        log(f"{soft} open files allow {allowed} streams; {wanted} need ulimit -n {2 * wanted + 64}")
    return min(allowed, wanted)


class Chatstream:
    """The server: `start()` it, and `drain()` it in the end."""

    def __init__(self, settings: Settings) -> None:
        try:
            html = Path(__file__).resolve().with_name("index.html").read_text(encoding="utf-8")
        except (OSError, ValueError):
            raise BadSetting("index.html must lie beside chatstream.py, in UTF-8") from None
        self.settings, self.page = settings, html.encode()
        etag = f'"{hashlib.sha256(self.page).hexdigest()[:32]}"'
        self.page_headers = {"ETag": etag, "Content-Security-Policy": page_policy(html)}
        self.page_headers |= PAGE_HEADERS
        if settings.tls_cert:
            self.page_headers["Strict-Transport-Security"] = "max-age=31536000"
        url = urlsplit(settings.base_url or OPENAI_URL)
        words = (settings.api_key, settings.token, url.netloc if url.port else "")
        self.secrets = [word for word in words if len(word) > 8]
        self.hosts = {host_name(name) for name in settings.allowed_hosts}
        if is_loopback(settings.host):
            self.hosts |= {"localhost", "127.0.0.1", "[::1]", settings.host}
        self.metrics = Metrics()
        self.max_streams = streams_for_files(settings.max_streams)
        self.requests: set[Stream] = set()  # all in flight
        self.streams: set[Stream] = set()  # of those, the ones that count as streams
        self.draining = False

    async def start(self) -> str:
        """Listens; returns the address. Raises BadSetting where it cannot."""
        settings, tls = self.settings, None
        self.upstream = Upstream(settings)
        try:
            if settings.tls_cert:
                tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                tls.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
            how = {"ssl_context": tls, "reuse_port": settings.reuse_port or None}
            handler = partial(handle, self)
            self.runner = await listen(handler, settings.host, settings.port, **how)
        except (OSError, ValueError) as error:
            await self.upstream.session.close()
            names = ("host", "port", "tls_cert", "tls_key")
            told = " ".join(f"{variable(name)}={getattr(settings, name)}" for name in names)
            raise BadSetting(
                f"{told}: cannot listen there ({error}); the host must be this machine's, the port "
                "free, and certificate and key PEM files that belong together, without a password"
            ) from None
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return f"http{'s' if tls else ''}://{host}:{self.runner.addresses[0][1]}"

    def settle(self, stream: Stream) -> None:
        """A request has ended: counts it, in one outcome, and writes its line in the log."""
        if stream.watcher:
            stream.watcher.cancel()
        self.requests.discard(stream)
        self.streams.discard(stream)
        cause = f" cause={stream.cause!r}" if stream.cause else ""
        if stream.request.method != "POST" or ROUTES.get(stream.request.path, "")[0] != "POST":
            if " " in stream.cause:  # there is more to tell than the code
                log(f"id={stream.id} status={stream.status}{cause}")
            return
        events, first = stream.relay.events, stream.first_event
        total = time.monotonic() - stream.started
        self.metrics.outcomes[stream.outcome] += 1
        self.metrics.events += events
        if first:
            self.metrics.first_chunk.observe(first)
        if stream.outcome != "rejected":
            self.metrics.duration.observe(total)
        log(
            f"id={stream.id} outcome={stream.outcome} status={stream.status or '-'} "
            f"events={events} first={f'{first:.3f}s' if first else '-'} total={total:.3f}s{cause}"
        )

    async def drain(self) -> None:
        """Ends without cutting an answer, if the drain time allows it."""
        self.draining = True  # 1. no new connections, no new streams
        for site in list(self.runner.sites):
            await site.stop()
        for stream in self.streams:
            if not stream.active:
                stream.stop(Failure("server_draining"))
        await self.wait_for_requests(self.settings.drain_seconds)  # 2. running ones go on
        for stream in self.requests:  # 3. those left are told
            stream.stop(Failure("server_draining", outcome="drained"))
        await self.wait_for_requests(1.0)
        for stream in self.requests:  # 4. those that do not even read that are dropped
            stream.drop_client()
        await self.wait_for_requests(0.1)
        await self.upstream.session.close()
        await self.runner.cleanup()

    async def wait_for_requests(self, seconds: float) -> None:
        if tasks := [each.task for each in self.requests if each.task]:
            await asyncio.wait(tasks, timeout=seconds)


# ---- The demo ----------------------------------------------------------------------------
# A small OpenAI-compatible upstream of our own, for a start with no key: the same code path,
# no network. Its models show what goes wrong in real life.

DEMO_MODELS = ("demo", "demo-slow-start", "demo-cut-off", "demo-error", "demo-rate-limit")
DEMO_ANSWER = """\
# Hello from the demo

This is **not a model**, but a small upstream inside `chatstream.py` that answers word by word,
as a model does. You asked:

> {question}

To leave the demo, set `OPENAI_API_KEY` for OpenAI, or the address of any compatible server:

```sh
OPENAI_BASE_URL=http://localhost:11434/v1 OPENAI_MODEL=llama3.2 python chatstream.py
```

| model here | what it shows |
| --- | --- |
| `demo-slow-start` | silence, and the heartbeats in it |
| `demo-cut-off` | an answer that breaks off |
| `demo-error` | an error half-way |
| `demo-rate-limit` | 429 with `Retry-After` |
"""


def demo_event(delta: Chat, finish_reason: str | None = None, **more: Any) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    chunk = {"id": "chatcmpl-demo", "object": "chat.completion.chunk", "choices": choices, **more}
    return b"data: %b\n\n" % encode_json(chunk).encode()


async def demo_events(model: str, question: str, silence: float) -> AsyncIterator[bytes]:
    """The events of an answer, at the pace of a model."""
    quoted = question[:2000].replace("\n", "\n> ")
    words = re.findall(r"\s*\S+\s*", DEMO_ANSWER.replace("{question}", quoted))
    fails = model in ("demo-cut-off", "demo-error")
    await asyncio.sleep(silence if model == "demo-slow-start" else 0)
    yield demo_event({"role": "assistant", "content": ""})
    for word in words[: len(words) // 2] if fails else words:
        yield demo_event({"content": word})
        await asyncio.sleep(0.02)
    if model == "demo-error":
        error = {"message": "The demo model ran out of memory.", "code": "out_of_memory"}
        yield demo_event({}, error=error)
    elif not fails:
        yield demo_event({}, "stop", usage={"completion_tokens": len(words)}) + DONE


async def demo_upstream(silence: float, request: web.BaseRequest) -> web.StreamResponse:
    chat = parse_object(await request.content.read())
    if chat["model"] == "demo-rate-limit":
        error = {"message": "The demo takes no request just now.", "code": "rate_limit_exceeded"}
        return web.json_response({"error": error}, status=429, headers={"Retry-After": "5"})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    asked = chat["messages"][-1].get("content")
    question = asked if isinstance(asked, str) else "(something that is no text)"
    async for event in demo_events(chat["model"], question, silence):
        await response.write(event)
    return response


@asynccontextmanager
async def with_demo(settings: Settings) -> AsyncIterator[Settings]:
    """The settings; if they name no upstream, with a demo upstream on a loopback port."""
    if settings.api_key or settings.base_url:
        yield settings
        return
    silence = 1.5 * settings.heartbeat_seconds
    runner = await listen(partial(demo_upstream, silence), "127.0.0.1", 0)
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        yield replace(settings, base_url=url, model=DEMO_MODELS)
    finally:
        await runner.cleanup()


# ---- Start and stop ----------------------------------------------------------------------


async def serve(chosen: Settings) -> None:
    """Runs until the first SIGINT or SIGTERM, then drains; a second one ends it at once."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()

    def on_signal(*_: object) -> None:
        if stopping.is_set():
            os._exit(1)
        loop.call_soon_threadsafe(stopping.set)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)  # on Windows the loop has no add_signal_handler
    async with with_demo(chosen) as settings:
        server = Chatstream(settings)
        address = await server.start()
        upstream = settings.base_url or OPENAI_URL
        if settings is not chosen:
            upstream = "the demo; OPENAI_API_KEY or OPENAI_BASE_URL leaves it"
        try:
            sys.stdout.write(f"chatstream listens on {address}\n  upstream: {upstream}\n")
            sys.stdout.write(f"  models:   {', '.join(settings.model)}\n  to stop:  Ctrl+C\n")
            await stopping.wait()
            sys.stdout.write(f"draining for up to {settings.drain_seconds:g} s; Ctrl+C ends it\n")
        finally:
            await server.drain()


@dataclass
class Quiet:
    """A filter for the logs of aiohttp and asyncio. Malformed HTTP is answered, and no reason
    for a traceback. That no file is left for a connection is told at most once a second."""

    told_at: float = 0.0

    def __call__(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, OSError) and error.errno in NO_FILES:
            is_due, self.told_at = record.created - self.told_at >= 1, record.created
            return is_due
        return not isinstance(error, aiohttp.http_exceptions.HttpProcessingError)


def main() -> int:
    if hasattr(select, "poll"):  # not on Windows
        sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    for name in ("aiohttp.server", "asyncio"):
        logging.getLogger(name).addFilter(Quiet())
    try:
        asyncio.run(serve(read_settings(os.environ, sys.argv[1:])))
    except BadSetting as error:
        sys.stderr.write(f"chatstream: {error}\n")
        return 2
    except KeyboardInterrupt:  # before there was anything to drain
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
