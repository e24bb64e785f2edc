# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.2,<4"]
# ///
"""chatstream: a streaming chat server in one file beside its page, to run, read and copy from.

    pip install "aiohttp>=3.14.2,<4" && python chatstream.py   # then open http://localhost:8080

The way of one token, from the upstream (any OpenAI-compatible model server) to the client:

    upstream ──bytes──> EventParser ──events──> Relay ──`data: {…}↵↵`──> client
        ^               lines, any split        what may go out              │
        └───────── abort: the client left, the time is up, we shut down ─────┘

Read it from the top: bytes become events, events become what may go out, `chat` is a stream's
life, `handle` its end. The rest is what a server adds; a name from there says what it does.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import errno
import gc
import hashlib
import hmac
import io
import json
import logging
import os
import re
import select
import signal
import socket
import ssl
import sys
import time
import urllib.request
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import Field, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

# ---- Server-sent events ------------------------------------------------------------------
# Bytes in, events out. Needs dataclass, field and Iterator, no more: copy it where you like.

BOM = b"\xef\xbb\xbf"  # byte order mark, in UTF-8: may open the stream, and no field's name


@dataclass(slots=True)
class EventParser:
    """Server-sent events from bytes in any pieces (WHATWG HTML standard, section 9.2.6)."""

    limit: int  # bytes of data in one event
    begun: bytearray = field(default_factory=bytearray)  # the line that has no end yet
    after_cr: bool = False  # the last piece ended in CR: a LF now would be its other half
    name: bytes = b""
    data: bytearray = field(default_factory=bytearray)  # each line with a LF
    stray: bool = False  # a line of no known field came: is this an event stream at all?

    def feed(self, piece: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yields the events that this piece completes: name (b"" unless an `event:` line gave one)
        and data. Raises OverflowError for a longer one than the limit, after the good ones."""
        for line in self.lines(piece):
            if not line:  # a blank line ends the event
                name, data = self.name, bytes(self.data)[:-1]
                self.name, self.data = b"", bytearray()
                if data.strip():
                    yield name, data
                continue
            key, _, value = line.removeprefix(BOM).partition(b":")  # b'data: {"choices":[…]}'
            if key == b"data":
                self.data += value.removeprefix(b" ") + b"\n"
            elif key == b"event":
                self.name = value.removeprefix(b" ")
            elif key not in (b"", b"id", b"retry"):  # b"": a comment
                self.stray = True
            if len(self.data) > self.limit + 1:  # with its last LF
                raise OverflowError
        if len(self.begun) > self.limit + len("data: "):
            raise OverflowError

    def lines(self, piece: bytes) -> list[bytes]:
        """The lines that this piece completes; keeps the rest for the next one."""
        text = piece.removeprefix(b"\n") if self.after_cr else piece
        self.after_cr = piece.endswith(b"\r") if piece else self.after_cr
        # Of bytes: LF, CR or both end a line; no character is cut, and U+2028 is text.
        *lines, rest = (text + b".").splitlines()  # with the dot, there is always a rest
        if lines and self.begun:
            lines[0] = bytes(self.begun) + lines[0]
            self.begun.clear()
        self.begun += rest[:-1]
        if self.begun.startswith(b":"):  # a comment of any length: drop it as it comes
            del self.begun[1:]
        return lines


# ---- The relay's rules -------------------------------------------------------------------
# Chunks (JSON with `choices`), heartbeats, then [DONE] or one error go out: more breaks clients.

NO_JSON = "no JSON object"  # a cause; `close` asks for it

# Parsing costs most. `check` spares it a chunk that differs from a good one in its text alone, if
# that is plain (no quote, backslash, control or non-ASCII byte: it can neither end its string nor
# be malformed). Such a chunk is good JSON, too, with the same keys.
TEXT = re.compile(rb'"content": ?"[^"\\\x00-\x1f\x80-\xff]*"')


@dataclass(slots=True)
class Relay:
    """An upstream's bytes in, in any pieces; the client's events out. It is over when `done`,
    the answer being whole, or at a `failure`; what came before that has been given out."""

    parser: EventParser
    heard: int = 0  # events that came, those dropped too
    events: int = 0  # chunks given out
    finished: bool = False  # a `finish_reason` came: the end may follow without [DONE]
    done: bool = False
    failure: Failure | None = None  # an exception with a code of ERRORS
    around: tuple[bytes, ...] = (b"", b"")  # what stood around a good chunk's plain text

    def feed(self, piece: bytes) -> bytes:
        """What this piece lets out, each event as b"data: PAYLOAD↵↵". An empty one ends it."""
        if not piece:
            return self.close()
        out: list[bytes] = []
        try:
            for name, data in self.parser.feed(piece):
                self.heard += 1
                if payload := self.check(name, data):
                    out += (b"data: ", payload, b"\n\n")
                if self.done:
                    break
        except Failure as failure:
            self.failure = failure
        except OverflowError:
            self.failure = Failure("event_too_large")
        except (ValueError, RecursionError):
            self.failure = Failure("upstream_invalid", cause=NO_JSON)
        return b"".join(out)

    def check(self, name: bytes, data: bytes) -> bytes:
        """An event's payload as it goes out, or b"". Raises Failure, ValueError, RecursionError."""
        before, after = self.around
        is_like_that = before and data.startswith(before) and data.endswith(after) and not name
        if is_like_that and TEXT.fullmatch(data, len(before), len(data) - len(after)):
            self.events += 1
            return data
        if data.strip() == b"[DONE]":  # the whole payload, never a token that contains it
            if not self.events:
                raise Failure("empty_stream")
            self.done = True
            return b"[DONE]"
        chunk = {"error": True} if name == b"error" else decode_json(data)
        if not isinstance(chunk, dict):
            raise ValueError
        if chunk.get("error") or chunk.get("object") == "error":
            raise reported(data, "upstream_error", cause="an error in the stream")
        choices = chunk.get("choices")
        if not isinstance(choices, list):  # {"type": "ping"}: life, but no chunk
            return b""
        for choice in choices:
            if isinstance(choice, dict):
                self.finished = self.finished or bool(choice.get("finish_reason"))
                if "message" in choice and "delta" not in choice:  # it came in one piece
                    choice["delta"] = choice.pop("message")
                    chunk["object"] = "chat.completion.chunk"
                    data, self.finished = encode_json(chunk).encode(), True
        if b"\n" not in data and (found := TEXT.search(data)):
            self.around = data[: found.start()], data[found.end() :]
        self.events += 1
        return data.replace(b"\n", b" ")  # in JSON a bare LF is only space

    def close(self, cut: bool = False) -> bytes:
        """What goes out now that the bytes have ended: in good order, or `cut` off. Here alone
        it is judged whether that was the end of an answer."""
        out = b"" if cut else self.feed(b"\n\n")  # the last event may lack both line ends
        half = self.failure and self.failure.cause == NO_JSON  # cut in two, it seems
        if self.done or (self.failure and not half):
            return out  # that last event has said it all
        if cut or half or (self.events and not self.finished):
            self.failure = Failure("stream_truncated")
        elif self.events:  # whole, though nobody said [DONE]: we do
            self.done, out = True, out + b"data: [DONE]\n\n"
        else:  # what came, if anything did, was never a chunk
            came = self.parser.stray or self.heard
            self.failure = Failure("upstream_invalid" if came else "empty_stream")
        return out


# ---- One stream, from the request to the last byte ---------------------------------------

COMMON_HEADERS = {"Server": "chatstream", "X-Content-Type-Options": "nosniff"}
STREAM_HEADERS = COMMON_HEADERS | {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # else nginx holds the whole answer back
}
# aiohttp keeps names as objects of its own: made once here, not 1 KB of them for each stream.
KEPT_HEADERS = list(web.StreamResponse(headers=STREAM_HEADERS).headers.items())


@dataclass(eq=False, slots=True)
class Stream:
    """A request on its way: what its handler, its clock, the drain and the log share."""

    request: web.BaseRequest
    transport: Any  # asyncio's, to the client
    relay: Relay
    id: str
    started: float = field(default_factory=time.monotonic)
    task: Any = field(default_factory=asyncio.current_task)  # its handler's, which makes this
    clock: Iterator[bool] | None = None  # see `clock`; None: nothing is limited
    active: bool = False  # the request's body is here
    response: web.StreamResponse | None = None  # ours, once its status is 200
    writer: Any = None  # of its body
    written: int = 0  # bytes
    first_event: float = 0.0  # seconds until it came; 0: not yet
    ended: bool = False  # the kernel has taken the last bytes
    failure: Failure | None = None  # why there is no whole answer

    async def open(self) -> Any:
        """The point of no return: from here on the status is 200."""
        headers = [*KEPT_HEADERS, ("X-Request-Id", self.id)]
        if self.request.version >= (1, 1):
            self.response = web.Response(headers=headers)  # its head goes with the first bytes
            self.response.enable_chunked_encoding()
        else:
            self.response = web.StreamResponse(headers=headers)
            self.response.force_close()  # HTTP/1.0: only that ends a body
        self.writer = await self.response.prepare(self.request)
        return self.writer

    async def write(self, data: bytes) -> None:
        """Waits while the client is slow; meanwhile `pass_on` reads no more: back-pressure."""
        writer = self.writer or await self.open()
        self.written += len(data)
        if len(data) < 2**15 and not self.transport.get_write_buffer_size():
            await writer.write(data)  # below asyncio's mark of 64 KB: it never waits
        else:  # `stop` may cancel us, but not aiohttp's wait, or it would cancel the one in `end`
            await asyncio.shield(writer.write(data))

    async def end(self, last: bytes) -> Any:
        """The last bytes. Returns when the kernel has taken them all (TLS may still hold some):
        until then the stream counts as running."""
        writer = self.writer or await self.open()
        self.written += len(last)
        self.transport.set_write_buffer_limits(0)  # write_eof() waits until it holds no more
        await writer.write_eof(last)
        self.transport.set_write_buffer_limits()
        self.ended = True
        return self.response  # aiohttp wants it, and finds it ended

    def stop(self, failure: Failure) -> None:
        """Ends its handler, if that goes on, as a closed tab does, but with something to tell."""
        if not self.failure and not self.relay.done:
            self.failure = failure
            self.task.cancel()


async def chat(server: Chatstream, stream: Stream) -> Any:
    """Check the request; ask the upstream; relay what it says, and always let it go; end. Raises
    Failure; at any `await` CancelledError: from aiohttp when it loses the client, else from
    `Stream.stop`. The upstream is then aborted: by aiohttp while we ask, later by `closing`."""
    settings = server.settings
    if len(server.streams) >= server.max_streams:
        raise Failure("too_many_streams")
    server.streams.add(stream)  # before its body, which takes memory; `settle` takes it out
    stream.clock = clock(stream, settings)
    # A larger buffer in the kernel refills so seldom that a slow client would look dead.
    stream.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
    body = check_chat(await read_body(stream, settings.max_body_bytes), settings.model)
    stream.active = True
    with closing(await ask(server, stream, "/chat/completions", body)) as answer:
        del body  # a long conversation need not stay in memory while its answer streams
        last = await pass_on(stream, answer)
    return await stream.end(last)


async def pass_on(stream: Stream, answer: aiohttp.ClientResponse) -> bytes:
    """Relays each event the moment its last byte is in; returns the last bytes. Raises Failure.
    The status waits for one, or a heartbeat of `watch`: what fails before gets an honest one."""
    relay, read = stream.relay, answer.content.readany
    if answer.content_type == "application/json":  # an answer in one piece
        read = partial(read_as_event, answer.content, relay.parser.limit)
    while not relay.failure:
        try:
            out = relay.feed(await read())
        except BROKEN:
            out = relay.close(cut=True)
        if out and not stream.first_event:
            stream.first_event = time.monotonic() - stream.started
        if relay.done:
            return out
        if out:
            await stream.write(out)  # not in the `try`: its errors are the client's
        del out  # a stream that waits for the next token holds nothing
    raise relay.failure


def clock(stream: Stream, settings: Settings) -> Iterator[bool]:
    """A stream's three silences: the first two end it, at the third it gives True, for a heartbeat.
    Each step is a look, by `Chatstream.watch`: a deadline at every read and write costs more."""
    taken = heard = told = 0
    taken_at = heard_at = told_at = stream.started
    while True:
        now, unsent = time.monotonic(), stream.transport.get_write_buffer_size()
        # 1. How long has the client taken nothing, though bytes wait, or owed us its body?
        if stream.active and (stream.written - unsent > taken or not unsent):
            taken, taken_at = stream.written - unsent, now
        if now - taken_at >= settings.write_seconds and stream.active:
            stream.transport.abort()  # aiohttp now cancels the handler, as for a closed tab
        elif now - taken_at >= settings.write_seconds:  # since it started: for the whole body
            stream.stop(Failure("request_timeout"))
        # 2. How long has no event come from the upstream, though it is its turn?
        not_its_turn = unsent or not stream.active
        if stream.relay.heard > heard or not_its_turn:
            heard, heard_at = stream.relay.heard, now
        if now - heard_at >= settings.idle_seconds:
            stream.stop(Failure("upstream_timeout", cause="no event in CHATSTREAM_IDLE_SECONDS"))
        # 3. How long has the client been told nothing, though there is more to come?
        if stream.relay.events > told or not_its_turn or stream.relay.done or stream.failure:
            told, told_at = stream.relay.events, now
        is_due = now - told_at >= settings.heartbeat_seconds
        told_at = now if is_due else told_at
        yield is_due


async def handle(server: Chatstream, request: web.BaseRequest) -> web.StreamResponse:
    """One request, from its head to its end, whatever that is."""
    sent = re.fullmatch(r"[\w.-]{1,128}", request.headers.get("X-Request-Id", ""), re.ASCII)
    request_id = sent[0] if sent else os.urandom(12).hex()
    relay = Relay(EventParser(server.settings.max_event_bytes))
    stream = Stream(request, request.transport, relay, request_id)
    server.requests.add(stream)
    try:
        response: web.StreamResponse = await route(server, request)(server, stream)
    except asyncio.CancelledError:
        if not stream.failure:  # the client has left: there is nobody to tell
            raise
        response = await tell(server, stream, stream.failure)
    except ConnectionError:  # it has left, as we saw while writing
        response = stream.response or web.Response()
    except Failure as failure:
        response = await tell(server, stream, failure)
    except Exception as error:
        logging.getLogger("chatstream").exception("a bug in chatstream")
        response = await tell(server, stream, Failure("internal_error", cause=repr(error)))
    finally:
        server.settle(stream)
    if not response.prepared:
        response.headers.update(COMMON_HEADERS | {"X-Request-Id": stream.id})
        if server.draining or request.version < (1, 1):
            response.force_close()
    return response


async def tell(server: Chatstream, stream: Stream, failure: Failure) -> web.StreamResponse:
    """Here alone a failure becomes an answer: a status if there is one to choose, or an event."""
    stream.failure = failure
    body = failure.body(stream.id, server.secrets)
    if not stream.response:
        headers = {"Content-Type": "application/json"} | failure.headers
        return web.Response(status=failure.status, body=body, headers=headers)
    with suppress(ConnectionError):
        await stream.end(b"data: %b\n\n" % body)
    return stream.response


# ---- Errors ------------------------------------------------------------------------------
# Raise early, convert once: what a client is to hear is a Failure, and `tell` alone tells it.

ERRORS = {  # code: (status, outcome in the metrics, message)
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


class Failure(Exception):
    """Why a request has no whole answer: a code of ERRORS, and what departs from its row
    (status, outcome, type, code, param, headers). `cause` is for the log."""

    def __init__(self, code: str, message: str = "", /, cause: str = "", **departs: Any) -> None:
        super().__init__(f"{code} {cause}".strip())
        self.status, self.outcome, told = ERRORS[code]
        self.code, self.message, self.cause = code, message or told, cause
        self.param: str | None = None
        self.headers = {"Retry-After": "1"} if self.status == 503 else {}
        vars(self).update(departs)
        self.type = departs.get("type") or TYPES.get(self.status, "invalid_request_error")

    def body(self, request_id: str, secrets: list[str]) -> bytes:
        """`{"error": {"message": "…", "type": "…", "param": null, "code": "…", …}}`, in which
        none of the secrets stands, even if the upstream quoted one."""
        error = {name: getattr(self, name) for name in ("message", "type", "param", "code")}
        for secret in secrets:
            error = {name: text and text.replace(secret, "***") for name, text in error.items()}
        error |= {"message": error["message"][:500], "request_id": request_id}
        return json.dumps({"error": error}).encode()


def reported(body: bytes, code: str, **departs: Any) -> Failure:
    """The Failure that an upstream reports, in any of its dialects."""
    told: Any = None
    error: dict[str, Any] = {}
    with suppress(ValueError, RecursionError):
        told = decode_json(body)
    match told[0] if isinstance(told, list) and told else told:
        case {"error": dict() as error} | ({"message": _} as error):  # OpenAI; vLLM
            pass
        case {"detail": [{"msg": text}, *_]} | {"detail": text} | {"error": text} | str(text):
            error = {"message": text}  # FastAPI; Ollama, LM Studio
    for name in ("type", "code", "param"):
        if isinstance(error.get(name), str) and 0 < len(error[name]) <= 64:
            departs[name] = error[name]
    message, markup = error.get("message"), r"(?i)<(!doctype|html|head|body)\b|Traceback \(most"
    if not isinstance(message, str) or re.search(markup, message):
        message = ""
    return Failure(code, message, **departs)


# ---- The request -------------------------------------------------------------------------
# What we do not know passes, so that parameters that upstreams add next year work.

# JSON as RFC 8259 has it: for NaN and Infinity, which Python would read, int() raises ValueError.
JSON = json.JSONDecoder(parse_constant=int)
encode_json = json.JSONEncoder(allow_nan=False).encode


def decode_json(data: bytes) -> Any:
    """Raises ValueError, also for bad UTF-8, an integer of 4,301 digits; RecursionError if deep."""
    text = data.strip(b" \t\r\n").decode()
    value, end = JSON.raw_decode(text)  # decode() costs a third more
    if end < len(text):
        raise ValueError
    return value


def check_chat(data: bytes, allowed: tuple[str, ...]) -> bytes:
    """The body to send on for the body received: encoded anew from what was checked, so that
    a repeated key cannot slip a model past the check. Raises Failure."""
    try:
        asked = decode_json(data)
        if not isinstance(asked, dict):
            raise Failure("invalid_request")
        if asked.get("stream") not in (None, True):
            raise Failure("stream_required")
        messages = asked.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Failure("invalid_messages")
        for index, message in enumerate(messages):
            if not is_message(message):
                raise Failure("invalid_messages", f"messages[{index}]: bad role or content.")
        model = allowed[0] if asked.get("model") is None else asked["model"]
        if not isinstance(model, str) or model == "*":
            raise Failure("invalid_request", "`model` is required; GET /v1/models lists them.")
        if model not in allowed and "*" not in allowed:
            raise Failure("model_not_found")
        return encode_json(asked | {"stream": True, "model": model}).encode()
    except (ValueError, RecursionError):  # no UTF-8, no JSON, 1e999, nested 100,000 deep
        raise Failure("invalid_json") from None


def is_message(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else 0  # 0: refused
    parts = content if isinstance(content, list) else []
    good = isinstance(content, str | list | None) and all(isinstance(part, dict) for part in parts)
    return good and message.get("role") in ("system", "developer", "user", "assistant", "tool")


async def read_whole(content: aiohttp.StreamReader, limit: int) -> bytes:
    """A body, up to the limit and a little more."""
    body = bytearray()
    while len(body) <= limit and (piece := await content.readany()):
        body += piece
    return bytes(body)


async def read_body(stream: Stream, limit: int) -> bytes:
    """The request's body. Raises Failure; how long it may take, the clock knows."""
    if (stream.request.content_length or 0) > limit:
        raise Failure("body_too_large")
    if stream.request.headers.get("Expect", "").lower() == "100-continue":
        stream.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # aiohttp's server does not
    try:
        body = await read_whole(stream.request.content, limit)
    except (web.RequestPayloadError, aiohttp.http_exceptions.HttpProcessingError):
        raise Failure("invalid_request", "The request body's encoding is broken.") from None
    if len(body) > limit:
        raise Failure("body_too_large")
    return body


# ---- The upstream ------------------------------------------------------------------------

OPENAI_URL = "https://api.openai.com/v1"
BROKEN = (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError)
NO_FILES = (errno.EMFILE, errno.ENFILE)


class UpstreamAnswer(aiohttp.ClientResponse):
    """One that is let go at once, its head here or not: tokens cost money, and goodbyes time."""

    def close(self) -> None:
        if self.connection:  # else it has been read to the end
            if self.connection.transport:
                self.connection.transport.abort()
            super().close()


def environment_proxy(url: str) -> str | None:
    """Found once, at the start: aiohttp's trust_env looks for each request, and reads .netrc."""
    parts, proxies = urlsplit(url), urllib.request.getproxies()
    if is_loopback(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not re.match("https?://", proxy):
        raise BadSetting("the environment names a proxy that is no http:// URL; see no_proxy")
    return proxy


def open_session(settings: Settings, url: str) -> aiohttp.ClientSession:
    """Our connections to the upstream."""
    headers = {"Accept": "text/event-stream", "Content-Type": "application/json"}
    headers["Accept-Encoding"] = "identity"  # a compressed stream comes in bursts
    if settings.api_key:
        headers["Authorization"] = f"Bearer {settings.api_key}"
    return aiohttp.ClientSession(
        proxy=environment_proxy(url),
        headers=web.StreamResponse(headers=headers).headers.items(),  # as in KEPT_HEADERS
        # Else the 101st stream waits; and many servers close after 5 s, when a POST may be lost.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
        timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_seconds),
        cookie_jar=aiohttp.DummyCookieJar(),  # else one person's cookie goes to the next
        response_class=UpstreamAnswer,
        read_bufsize=2**13,  # so much waits, and one read more, while a client is slow
    )


async def ask(server: Chatstream, stream: Stream, path: str, body: bytes = b"") -> Any:
    """The answer, if it is a good one; close it, come what may. Raises Failure."""
    method, url, headers = "POST" if body else "GET", server.upstream, {"X-Request-Id": stream.id}
    try:  # no redirects: the key would travel along
        answer = await server.session.request(
            method, url + path, data=body or None, headers=headers, allow_redirects=False
        )
    except BROKEN as error:
        code = "upstream_unreachable"
        if isinstance(error, aiohttp.ServerTimeoutError):
            code = "upstream_timeout"
        elif isinstance(error, OSError) and error.errno in NO_FILES:
            code = "too_many_streams"
        elif type(error) is aiohttp.ClientResponseError:  # what came is no HTTP
            code = "upstream_invalid"
        raise Failure(code, cause=f"{type(error).__name__}: {error}") from None
    if 200 <= answer.status < 300 and answer.content_type != "text/html":
        return answer
    stream.clock = None  # from now on no heartbeat can make it a 200
    with closing(answer):
        raise await refusal(answer)


async def refusal(answer: aiohttp.ClientResponse) -> Failure:
    """What a bad status means: the client's fault is told as it came, ours is a 502."""
    status, cause, body = answer.status, f"HTTP {answer.status} {answer.content_type}", b""
    if status in (401, 403):
        return Failure("upstream_auth", cause=f"{cause}: is OPENAI_API_KEY right?")
    if not 400 <= status < 500:
        return Failure("upstream_error", cause=cause)
    with suppress(TimeoutError, *BROKEN):  # its body is worth a moment, no more
        async with asyncio.timeout(2):
            body = await read_whole(answer.content, 2**16)
    told = {name: value for name, value in answer.headers.items() if re.fullmatch("[ -~]*", value)}
    kept = {name: told[name] for name in told if re.match("(?i)retry-after$|x-ratelimit-", name)}
    return reported(body, "upstream_rejected", status=status, headers=kept, cause=cause)


async def read_as_event(content: aiohttp.StreamReader, limit: int) -> bytes:
    """An answer in one piece as a stream of one event; b"" when it has been read."""
    body = (await read_whole(content, limit)).removeprefix(BOM)
    return b"data: %b\n\n" % re.sub(rb"[\r\n]", b" ", body) if body else b""


# ---- Who gets in -------------------------------------------------------------------------
# A page on another origin, or one whose name was rebound to this machine, must not spend the
# key. Browsers tell of both in headers that no page can change, and ask before JSON goes out.


def is_loopback(host: str) -> bool:
    return bool(re.fullmatch(r"localhost|127(\.\d{1,3}){3}|::1", host))


def route(server: Chatstream, request: web.BaseRequest) -> Callable[..., Any]:
    """The handler of a request that may come in. Raises Failure."""
    path, headers, host = request.path, request.headers, request.headers.get("Host", "").lower()
    guarded = path in ("/", "/stream") or path.startswith("/v1/")
    if guarded and server.hosts and not server.hosts & {host, host.rpartition(":")[0]}:
        raise Failure("forbidden_host")
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin", f"://{host}").lower()
    is_ours = site in ("same-origin", "none") if site else origin.partition("://")[2] == host
    if guarded and request.method == "POST" and not is_ours:
        raise Failure("forbidden_origin")
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


# ---- Settings ----------------------------------------------------------------------------
# One dataclass: the variables, the flags and --help are read off it. A new setting is one line.


class BadSetting(Exception):
    """The set-up cannot work, or is not safe: one line for stderr, exit status 2."""


PORT = r"(6553[0-5]|655[0-2]\d|65[0-4]\d\d|6[0-4]\d{3}|[1-5]?\d{1,4})"
HTTP_URL = rf"(?i:https?)://(\[[0-9a-fA-F:.]+\]|[\w-]+(\.[\w-]+)*\.?)(:{PORT})?(/[^\s?#@]*)?"
FORMS = {  # of a value: how it is written, and in words
    "text": (".+", "a name or address"),
    "names": (r"[\s,]*[^\s,].*", "names, separated by commas"),
    "secret": ("[!-~]+", "visible ASCII, since it travels in a header"),
    "url": (HTTP_URL, "a URL like http://localhost:11434/v1, without password, ? and #"),
    "port": (PORT, "a whole number up to 65535"),
    "count": (r"0*[1-9]\d{0,8}", "a whole number above 0, of up to 9 digits"),
    "time": (r"(?=.*[1-9])\d{1,9}(\.\d{1,9})?", "a number of seconds above 0"),
    "wait": (r"\d{1,9}(\.\d{1,9})?", "a number of seconds, which may be 0"),
    "flag": ("(?i:true|1|false|0)", "true or false"),
}


def setting(default: Any, form: str, what: str) -> Any:
    """A field: its default, a key of FORMS, its line in --help. A secret stays out of the repr."""
    return field(default=default, repr=form != "secret", metadata={"form": form, "what": what})


@dataclass(frozen=True)
class Settings:
    """All that can be set. Raises BadSetting where the set-up would not be safe."""

    api_key: str = setting("", "secret", "the upstream's key; without it or a URL: the demo")
    base_url: str = setting("", "url", f"any OpenAI-compatible upstream; if unset {OPENAI_URL}")
    model: tuple[str, ...] = setting(("gpt-4o-mini",), "names", "models, default first; * = any")
    host: str = setting("127.0.0.1", "text", "address to listen on; a public one needs a token")
    port: int = setting(8080, "port", "port; 0 = any free one")
    token: str = setting("", "secret", "access token that clients must send")
    allowed_hosts: tuple[str, ...] = setting((), "names", "further Host names served")
    max_streams: int = setting(1000, "count", "streams at once; one more gets 503")
    max_body_bytes: int = setting(1048576, "count", "longest request body")
    max_event_bytes: int = setting(1048576, "count", "longest upstream event: bounds the memory")
    connect_seconds: float = setting(10.0, "time", "longest time to connect to the upstream")
    idle_seconds: float = setting(300.0, "time", "longest silence of an upstream that thinks")
    write_seconds: float = setting(30.0, "time", "longest wait for a client, or for its body")
    heartbeat_seconds: float = setting(10.0, "time", "how often a silent stream gets a comment")
    drain_seconds: float = setting(30.0, "wait", "how long a shutdown waits for streams")
    tls_cert: str = setting("", "text", "PEM file of a certificate: serve HTTPS")
    tls_key: str = setting("", "text", "PEM file of the certificate's key")
    reuse_port: bool = setting(False, "flag", "let processes share the port, one per core")

    def __post_init__(self) -> None:
        if not self.token and not is_loopback(self.host):
            raise BadSetting(f"CHATSTREAM_HOST={self.host!r}: set CHATSTREAM_TOKEN, or 127.0.0.1")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise BadSetting("CHATSTREAM_TLS_CERT and CHATSTREAM_TLS_KEY: set both or neither")


def variable(name: str) -> str:
    """A field's environment variable: `port` -> CHATSTREAM_PORT, `model` -> OPENAI_MODEL."""
    return ("OPENAI_" if name in ("api_key", "base_url", "model") else "CHATSTREAM_") + name.upper()


def read_settings(environ: Mapping[str, str], arguments: list[str]) -> Settings:
    """Settings from flags, else variables, else defaults. Raises BadSetting."""
    what = "A flag beats its variable. Secrets have no flag: OPENAI_API_KEY, CHATSTREAM_TOKEN."
    parser = argparse.ArgumentParser(description=what, allow_abbrev=False)
    for each in fields(Settings):
        if each.repr:
            default = ",".join(each.default) if isinstance(each.default, tuple) else each.default
            told = f"{each.metadata['what']} [{variable(each.name)}={default}]"
            flag = "--" + each.name.replace("_", "-")
            alone = "true" if each.default is False else "\n"  # no form has a line end
            parser.add_argument(flag, metavar="VALUE", help=told, nargs="?", const=alone)
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:  # its value may be a secret
        raise BadSetting(f"no such flag: {unknown[0].partition('=')[0]}; --help lists the flags")
    values = {}
    for each in fields(Settings):  # a variable that is set but empty counts as unset
        text = getattr(flags, each.name, None) or environ.get(variable(each.name), "").strip()
        if text:
            values[each.name] = convert(each, text)
    return Settings(**values)


def convert(each: Field[Any], text: str) -> Any:
    """A field's value for its text. Raises BadSetting, which says what is allowed."""
    kind: Any = type(each.default)
    form, allowed = FORMS[each.metadata["form"]]
    if not re.fullmatch(form, text):
        shown = repr(text) if each.repr and "@" not in text else "(not shown)"
        raise BadSetting(f"{variable(each.name)}={shown} must be {allowed}")
    if kind is tuple:
        return tuple(name.strip() for name in text.split(",") if name.strip())
    return text.lower() in ("true", "1") if kind is bool else kind(text)


# ---- The server --------------------------------------------------------------------------


async def listen(handler: Any, host: str, port: int, **how: Any) -> web.ServerRunner:
    """aiohttp's low-level server, listening. Raises OSError or ValueError where it cannot."""
    # Cancelled, else a silent upstream outlives its reader; inflated, 60 KB become 60 MB.
    server = web.Server(handler, handler_cancellation=True, auto_decompress=False, access_log=None)
    runner = web.ServerRunner(server, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, host, port, **how).start()
    return runner


def streams_for_files(wanted: int) -> int:
    """How many streams the open files allow, two for each, after raising their limit."""
    with suppress(ImportError):  # Windows has no such limit
        import resource  # noqa: PLC0415

        files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            files = hard
        allowed = max(1, (files - 64) // 2)
        if allowed < wanted and files != resource.RLIM_INFINITY:
            log(f"{files} open files: {allowed} streams; for {wanted}, ulimit -n {2 * wanted + 64}")
            return allowed
    return wanted


def page_headers(html: bytes, https: bool) -> dict[str, str]:
    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
    policy += "form-action 'none'; frame-ancestors 'none'; "
    policy += "require-trusted-types-for 'script'; trusted-types 'none'"
    # The hashes of script and style are taken from the file: the policy cannot drift from it.
    for tag, code in re.findall(rb"<(script|style)>(.*?)</\1>", html, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(code).digest()).decode()
        policy += f"; {tag.decode()}-src 'sha256-{digest}'"
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "Permissions-Policy": "camera=(), geolocation=(), microphone=(), midi=(), usb=()",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(html).hexdigest()[:32]}"',
    }
    return headers | ({"Strict-Transport-Security": "max-age=31536000"} if https else {})


class Histogram:
    """Seconds: 0.01 s doubling to 327.68 s (OpenTelemetry's buckets for GenAI, and two more)."""

    def __init__(self) -> None:
        self.bounds = [0.01 * 2**power for power in range(16)]
        self.counts, self.sum = [0] * 17, 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def samples(self) -> dict[str, float]:
        names = [f'_bucket{{le="{bound}"}}' for bound in [*self.bounds, "+Inf"]]
        below = {name: sum(self.counts[: i + 1]) for i, name in enumerate(names)}
        return below | {"_sum": self.sum, "_count": sum(self.counts)}


class Chatstream:
    """The server: `start()` it, and `drain()` it in the end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.html = Path(__file__).resolve().with_name("index.html").read_bytes()
        self.page_headers = page_headers(self.html, bool(settings.tls_cert))
        addresses = re.findall(r"//([^/]+:\d+)", settings.base_url)
        self.secrets = [*addresses, *(w for w in (settings.api_key, settings.token) if len(w) > 8)]
        self.hosts = {name.lower() for name in settings.allowed_hosts}
        if is_loopback(settings.host):
            self.hosts |= {"localhost", "127.0.0.1", "[::1]", settings.host}
        self.max_streams = streams_for_files(settings.max_streams)
        self.requests: set[Stream] = set()  # all in flight
        self.streams: set[Stream] = set()  # of those, the ones that count as streams
        self.draining = False
        others = [outcome for _, outcome, _ in ERRORS.values()]
        self.outcomes = dict.fromkeys(["completed", "client_gone", "drained", *others], 0)
        self.events, self.first_chunk, self.duration = 0, Histogram(), Histogram()

    async def start(self) -> str:
        """Listens; returns the address. Raises BadSetting where it cannot."""
        settings, tls = self.settings, None
        self.upstream = (settings.base_url or OPENAI_URL).rstrip("/")
        self.session = open_session(settings, self.upstream)
        try:
            if settings.tls_cert:
                tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                tls.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
            how = {"ssl_context": tls, "reuse_port": settings.reuse_port or None}
            self.runner = await listen(partial(handle, self), settings.host, settings.port, **how)
            self.watcher = asyncio.create_task(self.watch())
        except (OSError, ValueError) as error:
            await self.session.close()
            names = ("host", "port", "tls_cert", "tls_key")
            told = " ".join(f"{variable(name)}={getattr(settings, name)}" for name in names)
            raise BadSetting(f"{told}: {error}; take a free port, PEM without a password") from None
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return f"http{'s' if tls else ''}://{host}:{self.runner.addresses[0][1]}"

    async def watch(self) -> None:
        """Looks at the clock of each stream."""
        settings = self.settings
        least = min(settings.idle_seconds, settings.write_seconds, settings.heartbeat_seconds)
        while True:
            await asyncio.sleep(max(0.01, min(1.0, least / 10)))
            for stream in list(self.streams):
                if stream.clock and next(stream.clock):
                    with suppress(ConnectionError):
                        await stream.write(b": keep-alive\n\n")

    def settle(self, stream: Stream) -> None:
        """A request has ended: counts it, in one outcome, and writes its line in the log."""
        stream.clock = None
        self.requests.discard(stream)
        self.streams.discard(stream)
        failure, events, first = stream.failure, stream.relay.events, stream.first_event
        outcome = failure.outcome if failure else "completed" if stream.ended else "client_gone"
        total = time.monotonic() - stream.started
        is_chat = stream.request.method == "POST" and stream.request.path in CHAT_PATHS
        if is_chat:
            self.outcomes[outcome] += 1
            self.events += events
            if first:
                self.first_chunk.observe(first)
            if outcome != "rejected":
                self.duration.observe(total)
        if is_chat or (failure and failure.cause):
            status = 200 if stream.response else failure.status if failure else "-"
            cause = f" cause={str(failure)!r}" if failure else ""
            times = f"first={f'{first:.3f}s' if first else '-'} total={total:.3f}s"
            log(f"id={stream.id} outcome={outcome} status={status} events={events} {times}{cause}")

    async def drain(self) -> None:
        """Ends without cutting an answer, if the drain time allows it."""
        self.draining = True  # 1. no new connections, no new streams
        for site in list(self.runner.sites):
            await site.stop()
        for stream in self.streams:
            if not stream.active:  # its body is still to come
                stream.stop(Failure("server_draining"))
        if self.requests:  # 2. running ones go on
            await asyncio.wait([s.task for s in self.requests], timeout=self.settings.drain_seconds)
        for stream in self.requests:  # 3. those left are told
            stream.stop(Failure("server_draining", outcome="drained"))
        if self.requests:
            await asyncio.wait([s.task for s in self.requests], timeout=1)
        for stream in self.requests:  # 4. or dropped
            stream.transport.abort()
        await self.runner.cleanup()
        await self.session.close()
        self.watcher.cancel()

    async def page(self, stream: Stream) -> web.StreamResponse:
        had = stream.request.headers.get("If-None-Match", "")
        if had == "*" or self.page_headers["ETag"] in had:
            return web.Response(status=304, headers=self.page_headers)
        return web.Response(body=self.html, headers=self.page_headers)

    async def models(self, stream: Stream) -> web.StreamResponse:
        names = [name for name in self.settings.model if name != "*"]
        if "*" in self.settings.model:
            try:
                async with asyncio.timeout(self.settings.connect_seconds):
                    with closing(await ask(self, stream, "/models")) as answer:
                        listed = decode_json(await read_whole(answer.content, 2**22))
                names += [each["id"] for each in listed["data"] if each["id"] not in names]
            except TimeoutError:
                raise Failure("upstream_timeout") from None
            except (KeyError, TypeError, ValueError, RecursionError, *BROKEN):
                raise Failure("upstream_invalid", "The model server lists no models.") from None
        data = [{"id": name, "object": "model"} for name in names]
        return web.json_response({"object": "list", "data": data})

    async def probe(self, stream: Stream) -> web.StreamResponse:
        if self.draining and stream.request.path == "/readyz":
            raise Failure("server_draining")
        return web.json_response({"status": "ok"})

    async def metrics(self, stream: Stream) -> web.StreamResponse:
        """Prometheus' text format, version 0.0.4. No label comes from a client."""
        active = sum(each.active for each in self.streams)
        outcomes = {f'{{outcome="{name}"}}': count for name, count in self.outcomes.items()}
        first, whole = self.first_chunk.samples(), self.duration.samples()
        genai = "gen_ai_client_operation"  # OpenTelemetry's name
        lines = []
        for name, kind, what, samples in (
            ("chatstream_active_streams", "gauge", "Streams running now.", {"": active}),
            ("chatstream_draining", "gauge", "1 while shutting down.", {"": int(self.draining)}),
            ("chatstream_max_streams", "gauge", "Most streams at once.", {"": self.max_streams}),
            ("chatstream_streams_total", "counter", "Requests, by how they ended.", outcomes),
            ("chatstream_events_total", "counter", "Chunks relayed.", {"": self.events}),
            (f"{genai}_time_to_first_chunk_seconds", "histogram", "Until the first chunk.", first),
            (f"{genai}_duration_seconds", "histogram", "Until the end of the answer.", whole),
        ):
            lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{suffix} {value}" for suffix, value in samples.items()]
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body="\n".join([*lines, ""]).encode(), headers={"Content-Type": kind})


CHAT_PATHS = ("/stream", "/v1/chat/completions")
ROUTES: dict[str, tuple[str, Callable[..., Any]]] = {  # `route` says which are guarded
    **dict.fromkeys(CHAT_PATHS, ("POST", chat)),
    "/": ("GET", Chatstream.page),
    "/v1/models": ("GET", Chatstream.models),
    "/healthz": ("GET", Chatstream.probe),  # 200 as long as the process lives
    "/readyz": ("GET", Chatstream.probe),  # 503 once draining
    "/metrics": ("GET", Chatstream.metrics),
}


# ---- The demo ----------------------------------------------------------------------------
# An upstream of our own, for a start with no key. Its models show what goes wrong in real life.

DEMO_MODELS = ("demo", "demo-slow-start", "demo-cut-off", "demo-error", "demo-rate-limit")
DEMO_ANSWER = """\
**Hello from the demo**, which is no model, but part of `chatstream.py`; the others show what goes \
wrong in real life. To leave it, set `OPENAI_API_KEY`, or the address of any model server:
```sh
OPENAI_BASE_URL=http://localhost:11434/v1 OPENAI_MODEL=llama3.2 python chatstream.py
```
> {question}
"""


async def demo_upstream(settings: Settings, request: web.BaseRequest) -> web.StreamResponse:
    """Answers at the pace of a model, and fails as models do."""
    body = decode_json(await request.content.read())
    model, asked = body["model"], str(body["messages"][-1].get("content"))[:2000]
    if model == "demo-rate-limit":
        error = {"message": "The demo takes no request just now.", "code": "rate_limit_exceeded"}
        return web.json_response({"error": error}, status=429, headers={"Retry-After": "5"})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await asyncio.sleep(1.5 * settings.heartbeat_seconds if model == "demo-slow-start" else 0)
    words = re.findall(r"\s*\S+\s*", DEMO_ANSWER.replace("{question}", asked.replace("\n", "\n> ")))
    deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in words), {}]
    if model in ("demo-cut-off", "demo-error"):
        del deltas[len(deltas) // 2 :]
    for delta in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
        chunk = {"id": "chatcmpl-demo", "object": "chat.completion.chunk", "choices": [choice]}
        await response.write(b"data: %b\n\n" % encode_json(chunk).encode())
        await asyncio.sleep(0.02)
    if model == "demo-error":
        error = {"message": "The demo model ran out of memory.", "code": "out_of_memory"}
        await response.write(b"data: %b\n\n" % encode_json({"error": error}).encode())
    elif model != "demo-cut-off":
        await response.write(b"data: [DONE]\n\n")
    return response


# ---- Start and stop ----------------------------------------------------------------------


class Output(io.TextIOBase):
    """In place of stdout or stderr: what cannot be written is dropped. A pipe that nobody reads
    would stop us, and O_NONBLOCK, which would help, is in common with others at the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.text, self.poll = stream, list[str](), select.poll()
        self.poll.register(stream, select.POLLOUT)

    def write(self, text: str) -> int:
        self.text.append(text)
        return len(text)

    def flush(self) -> None:
        data = "".join(self.text).encode(self.stream.encoding, "backslashreplace")
        self.text.clear()
        with suppress(OSError):
            for start in range(0, len(data), select.PIPE_BUF):  # so much fits in without a wait
                if self.poll.poll(0):
                    os.write(self.stream.fileno(), data[start : start + select.PIPE_BUF])


def log(line: str) -> None:  # `logging` would cost a twelfth of all that a short stream does
    if not getattr(sys.stderr, "text", ""):  # one write for all lines of 50 ms
        asyncio.get_running_loop().call_later(0.05, sys.stderr.flush)
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


class Quiet:
    """A log filter: no traceback for malformed HTTP; a lack of files at most once a second."""

    told_at = 0

    def __call__(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, OSError) and error.errno in NO_FILES:
            before, self.told_at = self.told_at, int(record.created)
            return self.told_at > before
        return not isinstance(error, aiohttp.http_exceptions.HttpProcessingError)


async def serve(settings: Settings) -> None:
    """Runs until the first SIGINT or SIGTERM, then drains; a second one ends it at once."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()

    def on_signal(*_: object) -> None:
        if stopping.is_set():
            sys.stderr.flush()  # `log` may have left some lines
            os._exit(1)
        loop.call_soon_threadsafe(stopping.set)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)  # on Windows the loop has no add_signal_handler
    upstream = settings.base_url or OPENAI_URL
    async with AsyncExitStack() as in_the_end:
        if not (settings.api_key or settings.base_url):
            demo = await listen(partial(demo_upstream, settings), "127.0.0.1", 0)
            in_the_end.push_async_callback(demo.cleanup)
            url = f"http://127.0.0.1:{demo.addresses[0][1]}/v1"
            settings = replace(settings, base_url=url, model=DEMO_MODELS)
            upstream = "the demo; OPENAI_API_KEY or OPENAI_BASE_URL leaves it"
        server = Chatstream(settings)
        address = await server.start()
        in_the_end.push_async_callback(server.drain)
        print(f"chatstream listens on {address}\n  upstream: {upstream}")
        print(f"  models:   {', '.join(settings.model)}\n  to stop:  Ctrl+C", flush=True)
        gc.set_threshold(10_000)  # seldom: in a full pass over a thousand streams tokens wait
        await stopping.wait()
        print(f"draining for up to {settings.drain_seconds:g} s; Ctrl+C ends it", flush=True)


def main() -> None:
    for name in ("stdout", "stderr"):  # one that was closed is None
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        setattr(sys, name, Output(stream) if hasattr(select, "poll") else stream)  # no Windows
    for name in ("aiohttp.server", "asyncio"):
        logging.getLogger(name).addFilter(Quiet())
    try:
        asyncio.run(serve(read_settings(os.environ, sys.argv[1:])))
    except (BadSetting, OSError, ValueError) as error:
        sys.stderr.write(f"chatstream: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
