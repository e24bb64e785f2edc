# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.2,<4"]
# ///
"""chatstream: a streaming chat server in one file (and its page, index.html).

    pip install "aiohttp>=3.14.2,<4"
    python chatstream.py               # then open http://localhost:8080

The path of a token, from the upstream (any OpenAI-compatible server) to the client:

    upstream ──bytes──> EventParser ──events──> Relay ──`data: {…}↵↵`──> client
        ^               finds events            checks them          │
        └──── aborted: the client left, time is up, we shut down ────┘

Read it from the top. `EventParser` turns bytes into events, `Relay` decides what goes
out, `chat` is the life of one stream, `enforce_limits` ends it when one side is silent
for too long, and `handle` is the entry point that aiohttp calls. The rest
supports them.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import errno
import gc
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import ssl
import sys
import time
import urllib.request
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

logger = logging.getLogger("chatstream")

# ---- Server-sent events --------------------------------------------------------------
# Bytes in, events out. `EventParser` needs only `BOM` and `Iterator`: copy it freely.

BOM = b"\xef\xbb\xbf"  # the byte order mark, in UTF-8


class EventParser:
    """Reads server-sent events from bytes that may be split anywhere.

    Follows the WHATWG HTML standard, section 9.2.6, except where real servers and
    clients do not: see `feed`, `close` and `read_field`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes of data in one event
        self.partial_line = bytearray()
        self.after_cr = False
        self.event_type = b""
        self.data = bytearray()  # of the event so far, with an LF after each line

    def feed(self, piece: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yields the type (b"" if there is none) and the data of each complete event.

        A generator: it reads the piece only while you iterate. Raises OverflowError if
        an event exceeds the limit, after yielding the ones before it.
        """
        for line in self.complete_lines(piece):
            if line:
                self.read_field(line)
                continue
            # An empty line ends the event.
            event_type = self.event_type
            data = bytes(self.data[:-1])
            self.event_type = b""
            self.data.clear()
            # Unlike in the standard, blank data is no event: no client can parse it.
            if data.strip():
                yield event_type, data
        # An incomplete line is limited, too. Its field name, at most `error: `, is not data.
        if len(self.partial_line) > self.limit + len("error: "):
            raise OverflowError

    def close(self) -> Iterator[tuple[bytes, bytes]]:
        """Like `feed`, for the end of the body. Many servers omit the last empty line."""
        # The first LF ends the last line; the second one ends the event.
        return self.feed(b"\n\n")

    def complete_lines(self, piece: bytes) -> list[bytes]:
        """Returns the lines that this piece completes. Keeps an incomplete last line."""
        if not piece:
            return []
        # A CR has already ended its line. An LF after it is the second half of a CRLF.
        if self.after_cr:
            piece = piece.removeprefix(b"\n")
        self.after_cr = piece.endswith(b"\r")
        # bytes.splitlines splits only at LF, CR and CRLF. str.splitlines would also
        # split at U+2028, which is text.
        lines = piece.splitlines()
        rest = b""
        if piece and not piece.endswith((b"\n", b"\r")):
            rest = lines.pop()  # an incomplete line
        if lines and self.partial_line:
            lines[0] = bytes(self.partial_line) + lines[0]
            self.partial_line.clear()
        if rest:
            self.partial_line += rest
            # A comment may exceed the limit. Nobody reads it, so it is not kept.
            if self.partial_line.startswith(b":"):
                del self.partial_line[1:]
        return lines

    def read_field(self, line: bytes) -> None:
        # b'data: {"choices":[…]}'. Only the first line can start with a BOM; it is
        # harmless to remove it everywhere.
        name, _, value = line.removeprefix(BOM).partition(b":")
        value = value.removeprefix(b" ")
        if name == b"error":  # llama.cpp until 2025
            self.event_type = b"error"
        if name in (b"data", b"error"):
            self.data += value + b"\n"
            if len(self.data) > self.limit + len("\n"):
                raise OverflowError
        elif name == b"event":
            self.event_type = value


# ---- Errors --------------------------------------------------------------------------
# Raise early, convert once: whatever goes wrong becomes a Failure, and only
# `send_failure` turns it into a response.

# fmt: off
ERRORS = {  # code: (HTTP status, outcome in the metrics, message)
    "invalid_json": (400, "rejected", "The request body is not valid JSON."),
    "invalid_request": (400, "rejected", "The request body must be a JSON object."),
    "invalid_messages": (400, "rejected", "`messages` must be a non-empty list of objects."),
    "stream_required": (400, "rejected", "This path always streams: leave out `stream`."),
    "invalid_token": (401, "rejected", "The access token is missing or wrong."),
    "forbidden_host": (403, "rejected", "This host name is not in CHATSTREAM_ALLOWED_HOSTS."),
    "forbidden_origin": (403, "rejected", "Requests from other web pages are not allowed."),
    "not_found": (404, "rejected", "There is nothing at this path."),
    "model_not_found": (404, "rejected", "This model is not available; see GET /v1/models."),
    "method_not_allowed": (405, "rejected", "This path does not support this method."),
    "request_timeout": (408, "rejected", "The request body did not arrive in time."),
    "body_too_large": (413, "rejected", "The request body is too large."),
    "unsupported_media_type": (415, "rejected", "Send uncompressed `application/json`."),
    "internal_error": (500, "failed", "Something went wrong in this server."),
    "upstream_unreachable": (502, "upstream_error", "The model server cannot be reached."),
    "upstream_auth": (502, "upstream_error", "The model server rejected this server's key."),
    "upstream_error": (502, "upstream_error", "The model server failed."),
    "upstream_invalid": (502, "upstream_error", "The model server's answer cannot be read."),
    "event_too_large": (502, "upstream_error", "The model server's answer is too large."),
    "empty_stream": (502, "upstream_error", "The model server sent an empty answer."),
    "stream_truncated": (502, "truncated", "The model server's answer was cut off."),
    # The status is replaced by the upstream's own.
    "upstream_rejected": (400, "upstream_error", "The model server refused the request."),
    "too_many_streams": (503, "rejected", "Too many answers are being streamed right now."),
    "server_draining": (503, "rejected", "This server is shutting down."),
    "upstream_timeout": (504, "timeout", "The model server did not answer in time."),
}
# fmt: on
ERROR_TYPES = {  # HTTP status: `type` of the error; for all others "invalid_request_error"
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "upstream_error",
    503: "server_error",
    504: "upstream_error",
}


@dataclass(eq=False)  # like other exceptions, it equals only itself
class Failure(Exception):
    """Why a request gets no complete answer.

    The defaults of `status`, `outcome` and `message` are in ERRORS.
    """

    code: str  # a key of ERRORS; `describe` may replace it with the upstream's code
    message: str = ""  # for the client
    cause: str = ""  # for the log
    body: bytes = b""  # what the upstream sent
    status: int = 0
    outcome: str = ""
    type: str = field(init=False)
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        status, outcome, message = ERRORS[self.code]
        self.status = self.status or status
        self.outcome = self.outcome or outcome
        self.message = self.message or message
        self.type = ERROR_TYPES.get(self.status, "invalid_request_error")
        if self.status == 503:
            self.headers["Retry-After"] = "1"


class MalformedEvent(Failure):
    """An event of the upstream is not a JSON object. Perhaps it was cut off."""


# ---- JSON ----------------------------------------------------------------------------


def refuse_constant(name: str) -> None:
    """Python accepts NaN and Infinity, which are not JSON (RFC 8259)."""
    raise ValueError(name)


JSON_DECODER = json.JSONDecoder(parse_constant=refuse_constant)

# Raised for bytes that are not JSON in UTF-8, for nesting that is too deep and, when encoding,
# for a number like 1e999, which Python reads as infinity.
NOT_JSON = (ValueError, RecursionError)


def encode_json(value: object) -> bytes:
    """Raises NOT_JSON."""
    return json.dumps(value, allow_nan=False).encode()


def decode_json(data: bytes) -> Any:
    """Raises NOT_JSON."""
    return JSON_DECODER.decode(data.decode())


# ---- What goes out -------------------------------------------------------------------
# Chunks (JSON objects with `choices`) and heartbeats, then [DONE] or one error. Anything
# else breaks clients.

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": keep-alive\n\n"
MAX_CHOICES = 128  # as in OpenAI's API


class Relay:
    """Turns the body of an upstream's answer into the events for the client.

    `feed` and `close` append them to `out`, each as b"data: PAYLOAD\\n\\n". They may raise
    Failure after appending some. The caller empties `out`, and sends DONE once the relay is `done`.
    """

    def __init__(self, parser: EventParser) -> None:
        self.parser = parser
        self.out: list[bytes] = []
        self.body_start = b""  # up to 2,000 bytes, without leading white space
        self.is_document = False  # the body is one JSON document, not a stream
        self.events_received = 0
        self.events_sent = 0
        self.choices: dict[int, bool] = {}  # index: whether it has a `finish_reason`
        self.done = False  # the answer is complete

    @property
    def all_finished(self) -> bool:
        """Every choice has a `finish_reason`: the body may end without [DONE]."""
        return bool(self.choices) and all(self.choices.values())

    def feed(self, piece: bytes) -> None:
        # Until an event has been sent, the body may be a document.
        if not self.events_sent:
            piece = self.read_start(piece)
        self.relay_events(self.parser.feed(piece))

    def read_start(self, piece: bytes) -> bytes:
        """Finds out what kind of body it is. Returns what the parser should read."""
        prefix = b""
        if not self.body_start:
            piece = piece.lstrip(BOM + b" \t\r\n")
            # The first byte decides: Content-Type is often wrong.
            if piece.startswith(b"<"):
                raise Failure("upstream_error", cause="an HTML page", body=piece)
            if piece.startswith((b"{", b"[")):
                self.is_document = True
                # To the parser, the whole document is one event.
                prefix = b"data: "
        self.body_start = (self.body_start + piece)[:2000]
        if self.is_document:
            # A line end would end the `data` field. A tab means the same in JSON, and is
            # just as invalid inside a string.
            piece = piece.replace(b"\r", b"\t").replace(b"\n", b"\t")
        return prefix + piece

    def close(self, error: Exception | None = None) -> None:
        """At the end of the body. `error` is what broke the connection.

        Decides whether an answer without [DONE] is complete.
        """
        try:
            self.relay_events(self.parser.close())
        except MalformedEvent as failure:
            # Without its empty line, a malformed event was cut off. A document never has
            # one: look at its text.
            if not self.is_document or looks_cut_off(failure.body):
                raise truncation(error) from None
            raise
        if self.done:
            return
        # A document may lack a `finish_reason`: that it could be parsed is enough, unless
        # the connection broke.
        if self.all_finished or (self.is_document and self.choices and not error):
            self.done = True
            return
        if error or self.events_sent:
            raise truncation(error)
        # A body of nothing but comments counts as empty.
        if re.search(rb"(?m)^[^:\r\n]", self.body_start):
            cause = "no chunk in the body"
            raise Failure("upstream_invalid", cause=cause, body=self.body_start)
        raise Failure("empty_stream")

    def relay_events(self, events: Iterable[tuple[bytes, bytes]]) -> None:
        try:
            for event_type, data in events:
                self.events_received += 1
                if event_type == b"error":
                    raise reported_error(data)
                payload = self.check_event(data)
                if self.done:
                    break
                if payload:
                    self.events_sent += 1
                    self.out.append(b"data: %b\n\n" % payload)
        except OverflowError:
            raise Failure("event_too_large") from None
        except NOT_JSON:
            cause = "not a JSON object"
            raise MalformedEvent("upstream_invalid", cause=cause, body=data) from None

    def check_event(self, data: bytes) -> bytes:
        """Returns the payload to send, or b"" if no client needs this event.

        Raises Failure if the stream cannot go on, NOT_JSON if the event is malformed.
        """
        # The whole payload must be [DONE]: a token may contain this text.
        if data.strip() == b"[DONE]":
            if not self.events_sent:
                raise Failure("empty_stream")
            self.done = True
            return b""
        chunk = decode_json(data)
        if error_in(chunk):
            raise reported_error(data)
        if chunk is None:  # `data: null`, which some servers send as a heartbeat
            return b""
        if not isinstance(chunk, dict):
            raise ValueError("not an object")
        # A line end would end the `data` field. In JSON, a space means the same.
        return self.check_chunk(chunk, data).replace(b"\n", b" ")

    def check_chunk(self, chunk: dict[str, Any], data: bytes) -> bytes:
        choices = chunk.get("choices")
        # A document without choices is not an answer, even if it has `usage`.
        if self.is_document and not choices:
            return b""
        if not isinstance(choices, list):
            if not chunk.get("usage"):  # {"type": "ping"}
                return b""
            return encode_json(chunk | {"choices": []})
        changed = False
        for choice in choices:
            if not isinstance(choice, dict):
                continue
            index = choice.get("index")
            # Choices without an index cannot be told apart: they count as one.
            if not isinstance(index, int):
                index = 0
            # Of a whole answer, or repeated at the end of a stream.
            if "message" in choice:
                message_to_delta(choice, is_repetition=index in self.choices)
                changed = True
            self.choices.setdefault(index, False)
            if len(self.choices) > MAX_CHOICES:
                raise Failure("upstream_invalid", cause="too many choices")
            if choice.get("finish_reason"):
                self.choices[index] = True
        if not changed:
            return data
        return encode_json(chunk | {"object": "chat.completion.chunk"})


# ---- One stream, from the request to the last byte -----------------------------------

COMMON_HEADERS = {"Server": "chatstream", "X-Content-Type-Options": "nosniff"}
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    # Otherwise, nginx buffers the whole answer.
    "X-Accel-Buffering": "no",
}

# What aiohttp raises if the connection to the upstream fails. RuntimeError: it was lost
# before we began to read.
UPSTREAM_ERRORS = (aiohttp.ClientError, HttpProcessingError, OSError, RuntimeError)


class Exchange:
    """A request and its answer."""

    def __init__(
        self, server: Chatstream, request: web.BaseRequest, transport: asyncio.Transport
    ) -> None:
        self.server = server
        self.request = request
        # To the client. `request.transport` is None once the client has left.
        self.transport = transport
        self.task = asyncio.current_task()  # runs the handler
        self.id = request_id(request)
        self.started = time.monotonic()

        # Our response. Its headers are sent just before its first byte.
        self.response = web.StreamResponse(headers=STREAM_HEADERS)
        # How it ends is decided: no heartbeat and no other failure may follow.
        self.is_ending = False
        self.is_sent = False  # the kernel has taken all of it
        self.failure: Failure | None = None
        self.client_stall = Stall()  # how long the client has taken nothing

        # For a chat completion
        self.relay: Relay | None = None  # None until the request's body is here
        self.upstream_answer: aiohttp.ClientResponse | None = None
        self.may_be_billed = False  # by the upstream
        self.is_event_stream = False  # our response; otherwise, it is JSON
        # Kept, so that the task is not garbage-collected.
        self.heartbeat: asyncio.Task[None] | None = None
        self.first_event_seconds = 0.0  # 0: none yet
        self.upstream_stall = Stall()  # how long the upstream has sent no event
        self.output_stall = Stall()  # how long we have written nothing

    async def begin(self) -> None:
        """Sends the status and the headers. After that, they cannot change."""
        self.response.headers.update(COMMON_HEADERS | {"X-Request-Id": self.id})
        # Closes the connection afterwards. In HTTP/1.0, that is what ends a body.
        if self.server.draining or self.request.version < (1, 1):
            self.response.force_close()
        # `prepare` does not suspend, so nothing can be written before the headers.
        await self.response.prepare(self.request)

    async def write(self, data: bytes) -> None:
        """Writes events. Every 64 KB, aiohttp waits until the kernel has taken everything.

        While we wait, we do not read from the upstream, so its sends have to wait, too:
        back-pressure.
        """
        if not self.response.prepared:
            await self.begin()
        await self.response.write(data)

    async def finish(self, last: bytes = b"") -> None:
        """Sends the end of the response.

        Returns when the kernel has taken all of it. Until then, the exchange counts as
        running.
        """
        self.is_ending = True
        if not self.response.prepared:
            await self.begin()
        await self.response.write_eof(last)
        self.is_sent = True

    async def send(self, response: web.Response) -> None:
        """Sends a response that is not a stream."""
        self.response = response
        await self.finish()

    def stop(self, failure: Failure) -> None:
        """Ends the exchange with a failure. Called by the time limits and by `drain`."""
        if self.is_ending:
            return
        self.is_ending = True
        self.failure = failure
        # If the upstream has answered, `close` makes our next read from it fail. The task
        # must not be cancelled then: it may be waiting for a slow client. aiohttp has one
        # future per connection for such waits. Once it is cancelled, the next wait is
        # cancelled, too, and in that one we send the failure.
        if self.upstream_answer:
            self.upstream_answer.close()
        elif self.task:
            self.task.cancel()


async def chat(exchange: Exchange) -> None:
    """The life of one chat completion, streamed or not.

    Raises Failure. CancelledError may be raised at any `await`: by aiohttp as soon as
    the client has left (see `handler_cancellation` in `listen`), or by `Exchange.stop`
    before the upstream has answered.
    """
    server = exchange.server
    settings = server.settings
    # Counted before its body is read, so that bodies cannot fill the memory. `handle`
    # removes it.
    if len(server.streams) >= server.max_streams:
        raise Failure("too_many_streams")
    server.streams.add(exchange)
    body = await read_request(exchange, settings)
    # A `Relay` with a shortcut: the same results, for less CPU time.
    relay = FastRelay(EventParser(settings.max_event_bytes))
    exchange.relay = relay
    always_stream = exchange.request.path == "/stream"
    checked_body, is_stream = check_request(body, settings.model, always_stream)
    exchange.is_event_stream = is_stream
    answer = await open_upstream(exchange, "/chat/completions", checked_body)
    # The answer may take minutes: do not keep the request's body for so long.
    del body, checked_body
    # The key line: however this block ends, `UpstreamAnswer.close` aborts the connection,
    # unless the answer has been read to the end. Unread tokens cost money.
    with closing(answer):
        if exchange.is_event_stream:
            await relay_answer(exchange, relay, answer)
            # If the body ends within a moment, the connection can be reused.
            with suppress(TimeoutError, *UPSTREAM_ERRORS):
                async with asyncio.timeout(0.05):
                    await answer.content.wait_eof()
        else:
            body, document = await read_document(answer, settings.max_event_bytes)
            if not isinstance(document, dict):
                cause = "not a JSON object"
                raise Failure("upstream_invalid", cause=cause, body=body)
            await exchange.send(web.json_response(body=body))


async def relay_answer(
    exchange: Exchange, relay: Relay, answer: aiohttp.ClientResponse
) -> None:
    """Relays each event as soon as it is complete. Raises Failure.

    The status waits for the first event or heartbeat: an earlier failure gets its own
    HTTP status.
    """
    while not relay.done:
        piece, error = await read_piece(answer.content)
        try:
            if piece:
                relay.feed(piece)
            else:
                relay.close(error)
        finally:
            # Also after a failure: the events before it are part of the answer.
            out = b"".join(relay.out)
            relay.out.clear()
            if out and not exchange.first_event_seconds:
                exchange.first_event_seconds = time.monotonic() - exchange.started
            if relay.done:
                # The answer is complete, even if `stop` has been called.
                exchange.failure = None
                await exchange.finish(out + DONE)
            elif out:
                await exchange.write(out)


async def read_piece(content: aiohttp.StreamReader) -> tuple[bytes, Exception | None]:
    """Returns the next bytes, or b"" at the end of the body.

    If the connection breaks, returns b"" and the exception.
    """
    try:
        return await content.readany(), None
    except UPSTREAM_ERRORS as error:
        # aiohttp shares some exceptions between all answers. The traceback of such an
        # exception would grow with each answer, and keep all those answers in memory.
        return b"", error.with_traceback(None)


class UpstreamAnswer(aiohttp.ClientResponse):
    """Closes by aborting the connection: unread tokens cost money.

    Otherwise, the upstream may notice late: an ordinary close first sends what is
    buffered, and over TLS a closing alert. aiohttp also calls `close` if we are cancelled
    before the headers arrive.
    """

    def close(self) -> None:
        # Once it has been read to its end, it no longer has a connection.
        if self.connection and self.connection.transport:
            self.connection.transport.abort()
        super().close()


# ---- Time limits ---------------------------------------------------------------------
# Every exchange is checked about once a second, or more often if a limit is short. A
# timer for each read and each write would cost more.

SECONDS_AFTER_FINISH = 5  # of silence after the last `finish_reason`


class Stall:
    """Measures how long we have been waiting for a value to grow."""

    def __init__(self) -> None:
        self.value = -1  # the first value counts as grown
        self.since = time.monotonic()

    def update(self, value: int, is_waiting: bool) -> float:
        """Returns the seconds that we have waited."""
        now = time.monotonic()
        if value > self.value or not is_waiting:
            self.since = now
        self.value = value
        return now - self.since


def enforce_limits(exchange: Exchange, settings: Settings) -> None:
    """Ends an exchange that is too slow on either side, or whose upstream is lost.

    Sends a heartbeat if the stream has been quiet for too long.
    """
    unsent = unsent_bytes(exchange.transport)
    # aiohttp's count, with headers and framing.
    bytes_written = exchange.request.writer.output_size
    bytes_taken = bytes_written - unsent
    stalled = exchange.client_stall.update(bytes_taken, is_waiting=unsent > 0)
    if stalled >= settings.write_seconds:
        # aiohttp then cancels the handler, as it does for a closed tab.
        exchange.transport.abort()

    relay = exchange.relay  # only a chat completion has one
    if not relay or exchange.is_ending:
        return
    # Until the client has taken everything, the upstream is not to blame. For an answer
    # that is not streamed, no events are counted: it must arrive within the limit.
    client_has_all = not unsent
    silent = exchange.upstream_stall.update(relay.events_received, client_has_all)
    if silent >= settings.idle_seconds and not relay.all_finished:
        cause = "silent for CHATSTREAM_IDLE_SECONDS"
        exchange.stop(Failure("upstream_timeout", cause=cause))
    upstream = exchange.upstream_answer
    if upstream and not unsent:
        # After broken chunked encoding, aiohttp closes the connection, but goes on waiting.
        is_lost = upstream.connection and upstream.connection.closed
        # Some upstreams leave the connection open after their last event.
        is_over = relay.all_finished and silent >= SECONDS_AFTER_FINISH
        if is_lost or is_over:
            # Our read from it fails. `Relay.close` then decides.
            upstream.close()

    quiet = exchange.output_stall.update(bytes_written, client_has_all)
    if exchange.is_event_stream and quiet >= settings.heartbeat_seconds:
        # A task of its own: its wait for a slow client must not hold up the other
        # exchanges.
        exchange.heartbeat = asyncio.create_task(send_heartbeat(exchange))


async def send_heartbeat(exchange: Exchange) -> None:
    # Since this task was created, the stream may have ended, or the upstream may have
    # sent an error, for which our response is JSON.
    if exchange.is_ending or not exchange.is_event_stream:
        return
    with suppress(ConnectionError):  # the client has left
        await exchange.write(HEARTBEAT)


def unsent_bytes(transport: asyncio.Transport) -> int:
    # asyncio's TLS transport raises AttributeError once it is closed.
    with suppress(AttributeError):
        return transport.get_write_buffer_size()
    return 0


async def watch(server: Chatstream) -> None:
    """Enforces the limits of all exchanges while the server runs."""
    settings = server.settings
    shortest_limit = min(
        settings.idle_seconds, settings.write_seconds, settings.heartbeat_seconds
    )
    while True:
        await asyncio.sleep(max(0.01, min(1.0, shortest_limit / 10)))
        check_exchanges(server)


def check_exchanges(server: Chatstream) -> None:
    """A function of its own, so that `watch` keeps no exchange alive while it sleeps."""
    for exchange in server.exchanges:
        try:
            enforce_limits(exchange, server.settings)
        # A bug in one exchange must not stop the checks of the others.
        except Exception as error:
            logger.exception("a bug in chatstream")
            exchange.stop(Failure("internal_error", cause=repr(error)))


# ---- The entry point -----------------------------------------------------------------


async def handle(server: Chatstream, request: web.BaseRequest) -> web.StreamResponse:
    """Called by aiohttp for each request, which begins and ends here.

    `route` finds its handler in ROUTES.
    """
    if not request.transport:
        return web.Response()  # the client has already left
    exchange = Exchange(server, request, request.transport)
    server.exchanges.add(exchange)
    limit_unsent_bytes(request.transport)
    try:
        handler = route(server, request)
        await handler(exchange)
    except Failure as failure:
        # A failure set by `stop` is the cause. This one is only its effect.
        await send_failure(exchange, exchange.failure or failure)
    except asyncio.CancelledError:
        if not exchange.failure:  # the client has left
            raise
        await send_failure(exchange, exchange.failure)
    except ConnectionError:
        pass  # the client left while we were writing
    except Exception as error:
        logger.exception("a bug in chatstream")
        await send_failure(exchange, Failure("internal_error", cause=repr(error)))
    finally:
        server.exchanges.discard(exchange)
        server.streams.discard(exchange)
        count_and_log(exchange)
    # aiohttp does not send a response twice.
    return exchange.response


async def send_failure(exchange: Exchange, failure: Failure) -> None:
    """Sends a failure: as an HTTP status, or as the last event if 200 has been sent."""
    exchange.failure = failure
    if exchange.transport.is_closing():
        return  # the client has left
    redact = exchange.server.redact
    error = {
        "message": redact(failure.message)[:500],
        "type": redact(failure.type),
        "param": failure.param and redact(failure.param),
        "code": redact(failure.code),
        "request_id": exchange.id,
    }
    body = encode_json({"error": error})
    last = b""
    if exchange.response.prepared:
        last = b"data: %b\n\n" % body
    else:
        exchange.response = web.json_response(
            body=body, status=failure.status, headers=failure.headers
        )
        if exchange.may_be_billed:
            # By default, OpenAI's clients retry a 5xx twice, and you pay each time.
            exchange.response.headers["X-Should-Retry"] = "false"
    with suppress(ConnectionError):
        await exchange.finish(last)


def limit_unsent_bytes(transport: asyncio.Transport) -> None:
    """Keeps the send buffers of asyncio and the kernel small."""
    if transport.is_closing():
        return
    # aiohttp waits every 64 KB and in `write_eof`, until the buffer is down to a quarter of
    # `high`, here 0. So `write_eof` returns when all is sent. With a limit of 0, asyncio's
    # TLS transport would wait on an empty buffer. (Over TLS, this is the buffer of the TLS
    # layer. What the socket has not taken yet, 64 KB or more, cannot be seen, and counts
    # as sent.)
    transport.set_write_buffer_limits(high=1)
    # Otherwise, the kernel takes data in such large steps that a slow client looks dead.
    # AttributeError: not every system has this option.
    with suppress(AttributeError, OSError):
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 4096)


async def listen(
    handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    host: str,
    port: int,
    tls: ssl.SSLContext | None = None,
    reuse_port: bool = False,
) -> web.ServerRunner:
    """Starts aiohttp's low-level server. Raises OSError if it cannot listen."""
    server = web.Server(
        handler,
        # Cancels the handler as soon as the client leaves. Otherwise, a closed tab
        # is noticed only at the next write.
        handler_cancellation=True,
        # A request of 60 KB could inflate to 60 MB.
        auto_decompress=False,
        # Header fields of up to 64 KB: on localhost, browsers send the cookies of every port.
        max_field_size=2**16,
        max_line_size=2**16,
        # Seconds until an idle connection, or an unfinished request head, is closed.
        keepalive_timeout=60,
        access_log=None,
    )
    # In seconds. Our streams have ended by then (see `drain`). Only those of the demo's
    # upstream need it.
    runner = web.ServerRunner(server, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, host, port, ssl_context=tls, reuse_port=reuse_port)
    await site.start()
    return runner


# ---- A shortcut ----------------------------------------------------------------------
# Skip this at first: `chat` would work the same with a plain `Relay`. But without the
# shortcut, an event in a burst costs twice the CPU time, and one that arrives alone costs
# a sixth more.

# A text of printable ASCII, without the quote and the backslash, which JSON escapes. It
# is also found in `reasoning_content`.
TOKEN_TEXT = re.compile(rb'content": ?"[ !#-\[\]-~]*"')


class FastRelay(Relay):
    """Does not decode a chunk that differs from the last decoded one only in its text.

    Replacing one plain text with another keeps the JSON valid, and `Relay` never looks at
    the text.
    """

    template = b""  # the last decoded chunk, without its text

    def check_event(self, data: bytes) -> bytes:
        without_text = TOKEN_TEXT.sub(b'content":""', data)
        if without_text == self.template:
            return data
        payload = super().check_event(data)
        # If this payload had to be changed, so must one with another text.
        self.template = without_text if payload == data else b""
        return payload


# ---- The request ---------------------------------------------------------------------
# Unknown parameters are passed on: OpenAI keeps adding new ones.


def request_id(request: web.BaseRequest) -> str:
    """The client's own id if it is sane, else a new UUID."""
    sent = request.headers.get("X-Request-Id", "")
    is_sane = re.fullmatch(r"[A-Za-z0-9._-]{1,128}", sent)
    return sent if is_sane else str(uuid.uuid4())


async def read_body(reader: aiohttp.StreamReader, limit: int) -> bytes:
    """Reads a body, but at most `limit` + 1 bytes. The caller checks the length."""
    try:
        return await reader.readexactly(limit + 1)
    except asyncio.IncompleteReadError as error:
        return error.partial  # the whole body


async def read_request(exchange: Exchange, settings: Settings) -> bytes:
    """Returns the body of the request. Raises Failure."""
    request = exchange.request
    if (request.content_length or 0) > settings.max_body_bytes:
        raise Failure("body_too_large")
    expects = request.headers.get("Expect", "").lower()
    if expects == "100-continue" and request.version >= (1, 1):
        # aiohttp's low-level server leaves this to us.
        exchange.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        # For the whole body: sending a byte a second is not enough.
        async with asyncio.timeout(settings.write_seconds):
            body = await read_body(request.content, settings.max_body_bytes)
    except TimeoutError:
        raise Failure("request_timeout") from None
    except (web.RequestPayloadError, HttpProcessingError):
        message = "The request body is malformed."
        raise Failure("invalid_request", message) from None
    if len(body) > settings.max_body_bytes:
        raise Failure("body_too_large")
    return body


def check_request(
    body: bytes, models: tuple[str, ...], always_stream: bool
) -> tuple[bytes, bool]:
    """Returns the request to send upstream, and whether it asks for a stream.

    Raises Failure.
    """
    try:
        parameters = decode_json(body)
    except NOT_JSON:
        raise Failure("invalid_json") from None
    if not isinstance(parameters, dict):
        raise Failure("invalid_request")
    if not is_list_of_objects(parameters.get("messages")):
        raise Failure("invalid_messages")
    for name in ("stream", "model"):
        if parameters.get(name) is None:  # null counts as absent
            parameters.pop(name, None)
    parameters.setdefault("model", models[0])
    if always_stream:
        parameters.setdefault("stream", True)
    stream = parameters.get("stream", False)
    if not isinstance(stream, bool):
        raise Failure("invalid_request", "`stream` must be true or false.")
    if always_stream and not stream:
        raise Failure("stream_required")
    model = parameters["model"]
    # With "*" first, there is no default model.
    if not isinstance(model, str) or model == "*":
        message = "`model` is required; GET /v1/models lists them."
        raise Failure("invalid_request", message)
    if model not in models and "*" not in models:
        raise Failure("model_not_found")
    try:
        # Encoding it again drops duplicate keys, so no second `model` slips past the check.
        return encode_json(parameters), stream
    except NOT_JSON:
        raise Failure("invalid_json") from None


def is_list_of_objects(value: object) -> bool:
    """True if it is a list with at least one element, all of them JSON objects."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(element, dict) for element in value)


# ---- The upstream --------------------------------------------------------------------

OPENAI_URL = "https://api.openai.com/v1"
UUID = r"(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"

# After these errors, we know that the upstream never saw the request.
NOT_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,
)


def open_session(settings: Settings, proxy: str | None) -> aiohttp.ClientSession:
    """Our connections to the upstream."""
    connector = aiohttp.TCPConnector(
        # With aiohttp's limit, the 101st stream would wait.
        limit=0,
        # Many servers close an idle connection after 5 s, and a request that is sent
        # at that moment is lost.
        keepalive_timeout=4,
    )
    return aiohttp.ClientSession(
        connector=connector,
        proxy=proxy,
        timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_seconds),
        # One user's cookie must not be sent with another user's request.
        cookie_jar=aiohttp.DummyCookieJar(),
        response_class=UpstreamAnswer,
        # Inflated, 29 KB of gzip can be millions of events, which block the loop for 20 s.
        auto_decompress=False,
        # While a client is slow, aiohttp buffers up to twice this many bytes for it. Over
        # TLS, what does not fit is lost if the upstream closes the connection.
        read_bufsize=2**17,
        max_field_size=2**16,
    )


def upstream_headers(exchange: Exchange) -> dict[str, str]:
    """Sent with each request: a session's headers would also go to a proxy."""
    headers = {
        "Content-Type": "application/json",
        # Some servers require both.
        "Accept": "text/event-stream, application/json",
        # A compressed stream arrives in bursts.
        "Accept-Encoding": "identity",
    }
    api_key = exchange.server.settings.api_key
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    # llama-cpp-python refuses every request whose id is not a UUID.
    if re.fullmatch(UUID, exchange.id):
        headers["X-Request-Id"] = exchange.id
    return headers


async def open_upstream(
    exchange: Exchange, path: str, body: bytes | None = None
) -> aiohttp.ClientResponse:
    """Sends a request. Returns a successful answer, which the caller closes.

    Raises Failure. A failed POST is never retried: you might pay twice.
    """
    server = exchange.server
    exchange.may_be_billed = body is not None
    try:
        answer = await server.session.request(
            "GET" if body is None else "POST",
            server.upstream_url + path,
            data=body,
            headers=upstream_headers(exchange),
            # A redirect would send the conversation to another server.
            allow_redirects=False,
        )
    except UPSTREAM_ERRORS as error:
        if isinstance(error, NOT_SENT):
            exchange.may_be_billed = False
        raise connection_failure(error) from None
    exchange.upstream_answer = answer
    if 200 <= answer.status < 300:
        encoding = answer.headers.get("Content-Encoding", "").lower()
        if encoding in ("", "identity", "none"):
            return answer
        answer.close()
        raise Failure("upstream_invalid", cause="a compressed answer")
    # Our response will be an error: no heartbeat may send a 200 now.
    exchange.is_event_stream = False
    if 400 <= answer.status < 500:
        exchange.may_be_billed = False
    with closing(answer):
        raise await status_failure(answer)


def connection_failure(error: Exception) -> Failure:
    code = "upstream_unreachable"
    reason = str(error)
    if isinstance(error, aiohttp.ServerTimeoutError):
        code = "upstream_timeout"
    elif isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        code = "too_many_streams"
    elif isinstance(error, aiohttp.ClientResponseError):
        # The text of a proxy's error contains its URL, with the password. A parser's
        # message quotes what was received, mostly from its second line on.
        reason = f"{error.status} " + error.message.partition("\n")[0]
        if not isinstance(error, aiohttp.ClientHttpProxyError):
            code = "upstream_invalid"  # the upstream does not speak HTTP
    return Failure(code, cause=f"{type(error).__name__}: {reason}")


async def status_failure(answer: aiohttp.ClientResponse) -> Failure:
    """Turns an error status into a Failure. Most 4xx keep the upstream's message."""
    status = answer.status
    body = b""
    # The body says why, but is not worth a long wait.
    try:
        async with asyncio.timeout(2):
            body = await read_body(answer.content, 2**16)
    except (TimeoutError, *UPSTREAM_ERRORS) as error:
        error.with_traceback(None)  # see `read_piece`
    if status == 401:
        return Failure("upstream_auth", cause="is OPENAI_API_KEY right?", body=body)
    if status == 407:  # from a proxy
        return Failure("upstream_unreachable", body=body)
    if not 400 <= status < 500:
        return Failure("upstream_error", body=body)
    failure = Failure("upstream_rejected", body=body, status=status)
    for name, value in answer.headers.items():
        is_rate_limit = re.fullmatch(r"(?i)retry-after(-ms)?|x-ratelimit-.+", name)
        if is_rate_limit and value.isascii() and value.isprintable():
            failure.headers[name] = value
    return describe(failure)


async def read_document(
    answer: aiohttp.ClientResponse, limit: int
) -> tuple[bytes, Any]:
    """Reads an answer that is not streamed. Returns its body, as bytes and decoded.

    Raises Failure.
    """
    try:
        body = await read_body(answer.content, limit)
    except UPSTREAM_ERRORS as error:
        raise truncation(error.with_traceback(None)) from None
    if len(body) > limit:
        raise Failure("event_too_large")
    document = body.removeprefix(BOM)
    try:
        decoded = decode_json(document)
    except NOT_JSON:
        raise Failure("upstream_invalid", cause="not JSON", body=body) from None
    if error_in(decoded):
        raise reported_error(document)
    return body, decoded


# ---- The upstreams' dialects ---------------------------------------------------------
# Where they differ from OpenAI: errors with a 2xx status, whole messages, and so on.


def message_to_delta(choice: dict[str, Any], is_repetition: bool) -> None:
    """Replaces the `message` of a whole answer with a `delta`, as in a stream."""
    message = choice.pop("message")
    # If deltas came before it, the message only repeats them.
    if is_repetition:
        message = {}
    choice["delta"] = choice.get("delta") or message
    calls: Any = message.get("tool_calls") if isinstance(message, dict) else None
    if is_list_of_objects(calls):
        for index, call in enumerate(calls):
            call.setdefault("index", index)


def looks_cut_off(document: bytes) -> bool:
    """Guesses whether this JSON document is cut off."""
    has_end = document.rstrip().endswith((b"}", b"]"))
    return not has_end or document.count(b"{") > document.count(b"}")


def truncation(error: Exception | None) -> Failure:
    cause = repr(error) if error else "the body ended too early"
    return Failure("stream_truncated", cause=cause)


def error_in(document: object) -> dict[str, Any] | None:
    """The object that describes an error, in any upstream's dialect, or None."""
    if isinstance(document, list) and document:  # as Google's servers send it
        document = document[0]
    if not isinstance(document, dict):
        return None
    parts = [document]
    choices = document.get("choices")
    if isinstance(choices, list):
        parts += choices
    for part in parts:
        error = part.get("error") if isinstance(part, dict) else None
        if error:
            # It may also be a string, or a flag beside the message.
            return error if isinstance(error, dict) else part
    return document if document.get("object") == "error" else None


def reported_error(data: bytes) -> Failure:
    """An error that the upstream reported after a 2xx status."""
    return describe(Failure("upstream_error", body=data))


# HTML and tracebacks are for the log, not for the user.
HTML_OR_TRACEBACK = re.compile(r"(?i)<(!doctype|html|head|body)\b|Traceback \(most")


def describe(failure: Failure) -> Failure:
    """Fills in the error details from an upstream's body, in any known dialect."""
    try:
        document = decode_json(failure.body)
    except NOT_JSON:
        return failure
    details = error_in(document) or document
    message = message_in(details) or message_in(document)
    if message and not HTML_OR_TRACEBACK.search(message):
        failure.message = message
    if isinstance(details, dict):
        for name in ("type", "code", "param"):
            value = details.get(name)
            if isinstance(value, str) and 0 < len(value) <= 64:
                setattr(failure, name, value)
    return failure


MESSAGE_KEYS = ("message", "msg", "detail", "error", "errors")


def message_in(details: Any) -> str:
    """The message text: {"error": {"message": text}}, {"detail": [{"msg": text}]} …"""
    for _ in range(8):  # nested, but not endlessly
        if isinstance(details, list) and details:
            details = details[0]
        elif isinstance(details, dict):
            values = (details.get(key) for key in MESSAGE_KEYS)
            details = next(filter(None, values), "")
    return details if isinstance(details, str) else ""


# ---- Who gets in ---------------------------------------------------------------------
# A page on another origin, or one whose name was rebound to this machine, must not
# use the key. Browsers reveal both in headers that no page can change.


def is_loopback(host: str) -> bool:
    return bool(re.fullmatch(r"localhost|127(\.\d{1,3}){3}|::1", host))


def route(server: Chatstream, request: web.BaseRequest) -> Handler:
    """Returns the handler if the request is allowed. Raises Failure."""
    path = request.path
    is_guarded = path not in OPEN_PATHS
    is_post = request.method == "POST"
    if is_guarded and not is_known_host(request, server.hosts):
        raise Failure("forbidden_host")
    if is_guarded and is_post and not is_same_origin(request):
        raise Failure("forbidden_origin")
    handler = ROUTES.get(path)
    if not handler:
        raise Failure("not_found")
    methods = ["POST"] if handler is chat else ["GET", "HEAD"]
    if request.method not in methods:
        raise Failure("method_not_allowed", headers={"Allow": ", ".join(methods)})
    # This makes /readyz answer 503, too.
    if server.draining and path not in ("/healthz", "/metrics"):
        raise Failure("server_draining")
    if is_post and not is_plain_json(request):
        raise Failure("unsupported_media_type")
    # The page loads without the token, and asks for it.
    needs_token = is_guarded and path != "/"
    if needs_token and not has_token(request, server.settings.token):
        raise Failure("invalid_token", headers={"WWW-Authenticate": "Bearer"})
    return handler


def is_known_host(request: web.BaseRequest, hosts: set[str]) -> bool:
    """`hosts` are the names that we serve, in lower case. If empty, we serve all."""
    if not hosts:
        return True
    host = request.headers.get("Host", "").lower()
    name = re.sub(r":\d{1,5}$", "", host)
    return host in hosts or name in hosts


def is_same_origin(request: web.BaseRequest) -> bool:
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("Origin")
    if origin is None:
        return True  # not a browser
    host = request.headers.get("Host", "")
    return origin.partition("://")[2].lower() == host.lower()


def is_plain_json(request: web.BaseRequest) -> bool:
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    return encoding == "identity" and request.content_type == "application/json"


def has_token(request: web.BaseRequest, token: str) -> bool:
    if not token:
        return True
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    given = sent.strip().encode(errors="surrogateescape")
    # In constant time: how long it takes must not show how much of the token is right.
    is_same = hmac.compare_digest(given, token.encode())
    return is_same and scheme.lower() == "bearer"


# ---- The server ----------------------------------------------------------------------


class Chatstream:
    """The server: `await start()` first, `await drain()` last."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.upstream_url = settings.base_url or OPENAI_URL
        self.proxy = environment_proxy(self.upstream_url)
        proxy_password = unquote(urlsplit(self.proxy or "").password or "")
        # Keys of up to 8 characters are not masked: they could occur in any message.
        keys = (settings.api_key, settings.token, proxy_password)
        self.secrets = [key for key in keys if len(key) > 8]
        self.hosts = set(settings.allowed_hosts)
        if is_loopback(settings.host):
            self.hosts |= {"localhost", "127.0.0.1", "[::1]", settings.host}
        self.max_streams = streams_for_files(settings.max_streams)
        page = Path(__file__).resolve().with_name("index.html")
        # Read as text, so that CRLF becomes LF: browsers compute the hashes from LF.
        self.html = page.read_text(encoding="utf-8").encode()
        self.page_headers = page_headers(self.html)
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.events_sent = 0
        self.first_chunk = Histogram()
        self.duration = Histogram()
        self.created = int(time.time())
        self.exchanges: set[Exchange] = set()  # all requests in flight
        self.streams: set[Exchange] = set()  # the chat completions among them
        self.draining = False

    async def start(self) -> str:
        """Listens, and returns the address. Raises BadSetting if it cannot."""
        settings = self.settings
        tls = load_certificate(settings) if settings.tls_cert else None
        handler = partial(handle, self)
        try:
            self.runner = await listen(
                handler, settings.host, settings.port, tls, settings.reuse_port
            )
        # ValueError: on Windows, a port cannot be shared.
        except (OSError, ValueError) as error:
            message = f"cannot listen on CHATSTREAM_HOST={settings.host}: {error}"
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                message = (
                    f"CHATSTREAM_PORT={settings.port} is in use; 0 picks a free one"
                )
            raise BadSetting(message) from None
        self.session = open_session(settings, self.proxy)
        self.watcher = asyncio.create_task(watch(self))
        [site] = self.runner.sites
        return site.name

    def redact(self, text: str) -> str:
        """Masks our secrets, which an upstream or a proxy may have quoted."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    async def drain(self) -> None:
        """Shuts down without cutting off an answer, if the drain time allows it."""
        # 1. Take no new connections, and answer new requests with 503.
        self.draining = True
        for site in self.runner.sites:
            await site.stop()
        wait = self.settings.drain_seconds
        logger.info(f"draining for up to {wait:g} s; Ctrl+C exits at once")
        # A request whose body has not arrived counts as new.
        for exchange in self.streams:
            if not exchange.relay:
                exchange.stop(Failure("server_draining"))
        # 2. Let running ones finish.
        await self.wait_for_exchanges(wait)
        # 3. Send the rest an error.
        for exchange in self.exchanges:
            exchange.stop(Failure("server_draining", outcome="drained"))
        await self.wait_for_exchanges(1)
        # 4. Abort what is left, including answers whose last bytes were on their way.
        for exchange in self.exchanges:
            drained = Failure("server_draining", outcome="drained")
            exchange.failure = exchange.failure or drained
            exchange.transport.abort()
        await self.runner.cleanup()
        await self.session.close()
        self.watcher.cancel()

    async def wait_for_exchanges(self, seconds: float) -> None:
        tasks = [exchange.task for exchange in self.exchanges if exchange.task]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)


async def show_page(exchange: Exchange) -> None:
    server = exchange.server
    response = web.Response(body=server.html, headers=server.page_headers)
    await exchange.send(response)


def page_headers(html: bytes) -> dict[str, str]:
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    # The hashes are computed from the file, so that the policy always fits the page.
    for tag, code in re.findall(rb"<(script|style)>(.*?)</\1>", html, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(code).digest()).decode()
        policy += f"; {tag.decode()}-src 'sha256-{digest}'"
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "Permissions-Policy": "camera=(), geolocation=(), microphone=(), usb=()",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }


MAX_MODELS_BYTES = 2**22


async def list_models(exchange: Exchange) -> None:
    """The allowed models, in OpenAI's format. With `*`, also the upstream's."""
    server = exchange.server
    ids = [name for name in server.settings.model if name != "*"]
    if "*" in server.settings.model:
        ids += await upstream_models(exchange)
    # Strict clients need all of these fields, and some upstreams omit them.
    common = {"object": "model", "created": server.created, "owned_by": "upstream"}
    models = [{"id": name, **common} for name in dict.fromkeys(ids)]
    body = encode_json({"object": "list", "data": models})
    headers = {"Cache-Control": "no-store"}
    await exchange.send(web.json_response(body=body, headers=headers))


async def upstream_models(exchange: Exchange) -> list[str]:
    """Returns the ids of the upstream's models. Raises Failure."""
    try:
        async with asyncio.timeout(exchange.server.settings.connect_seconds):
            answer = await open_upstream(exchange, "/models")
            with closing(answer):
                body, listed = await read_document(answer, MAX_MODELS_BYTES)
    except TimeoutError:
        cause = "no list of models within CHATSTREAM_CONNECT_SECONDS"
        raise Failure("upstream_timeout", cause=cause) from None
    if isinstance(listed, dict):
        listed = listed.get("data")
    if not isinstance(listed, list):
        message = "The model server sent no list of models."
        raise Failure("upstream_invalid", message, body=body)
    ids = [entry.get("id") for entry in listed if isinstance(entry, dict)]
    return [name for name in ids if name and isinstance(name, str)]


async def show_health(exchange: Exchange) -> None:
    await exchange.send(web.json_response({"status": "ok"}))


# ---- The log and the metrics ---------------------------------------------------------

OUTCOMES = (
    "completed",
    "client_gone",
    "upstream_error",
    "truncated",
    "timeout",
    "drained",
    "rejected",
    "failed",
)


# In seconds, doubling. OpenTelemetry's for GenAI end at 81.92; the last two are ours.
BUCKETS = [0.01 * 2**power for power in range(16)]


class Histogram:
    """Counts the values up to each bound, and keeps the sum of all values."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(BUCKETS, 0)
        self.count = 0
        self.sum = 0.0

    def observe(self, value: float) -> None:
        for bound in BUCKETS:
            # In Prometheus, each bucket includes the smaller ones.
            if value <= bound:
                self.counts[bound] += 1
        self.count += 1
        self.sum += value

    def samples(self, name: str) -> str:
        lines = [
            f'{name}_bucket{{le="{bound}"}} {count}'
            for bound, count in self.counts.items()
        ]
        lines.append(f'{name}_bucket{{le="+Inf"}} {self.count}')
        lines.append(f"{name}_sum {self.sum}")
        lines.append(f"{name}_count {self.count}")
        return "\n".join(lines)


def count_and_log(exchange: Exchange) -> None:
    """Counts and logs a chat completion. Logs others only if they fail."""
    failure = exchange.failure
    if failure:
        outcome = failure.outcome
    elif exchange.is_sent:
        outcome = "completed"
    else:
        outcome = "client_gone"
    request = exchange.request
    events = exchange.relay.events_sent if exchange.relay else 0
    total_seconds = time.monotonic() - exchange.started
    is_chat = request.method == "POST" and ROUTES.get(request.path) is chat
    if is_chat:
        server = exchange.server
        server.outcomes[outcome] += 1
        server.events_sent += events
        if exchange.first_event_seconds:
            server.first_chunk.observe(exchange.first_event_seconds)
        if outcome != "rejected":
            server.duration.observe(total_seconds)

    if is_chat or (failure and failure.outcome != "rejected"):
        status = exchange.response.status if exchange.response.prepared else "-"
        cause = cause_of(exchange, failure) if failure else ""
        logger.info(
            f"id={exchange.id} outcome={outcome} status={status} events={events} "
            f"first={exchange.first_event_seconds:.3f}s total={total_seconds:.3f}s "
            # `repr` keeps it on one line and escapes control characters.
            f"cause={cause!r}"
        )


def cause_of(exchange: Exchange, failure: Failure) -> str:
    """Describes a failure for the log, without our secrets."""
    redact = exchange.server.redact
    cause = f"{failure.code}: {exchange.request.path}"
    if exchange.upstream_answer:
        cause += f": upstream HTTP {exchange.upstream_answer.status}"
    if failure.cause:
        cause += f": {failure.cause}"
    cause = redact(cause)
    if failure.body:
        body = failure.body[:2000].decode(errors="backslashreplace")
        # Masked before it is cut to 300: half a key would not be recognised.
        cause += f": {redact(body)[:300]}"
    return cause


# These two names are OpenTelemetry's.
FIRST_CHUNK = "gen_ai_client_operation_time_to_first_chunk_seconds"
DURATION = "gen_ai_client_operation_duration_seconds"


async def show_metrics(exchange: Exchange) -> None:
    """Prometheus' text format, version 0.0.4. No label comes from a client."""
    server = exchange.server
    active = sum(bool(stream.relay) for stream in server.streams)
    outcomes = "\n".join(
        f'chatstream_streams_total{{outcome="{outcome}"}} {count}'
        for outcome, count in server.outcomes.items()
    )
    text = f"""\
# HELP chatstream_active_streams Streams running now.
# TYPE chatstream_active_streams gauge
chatstream_active_streams {active}
# HELP chatstream_draining 1 while shutting down.
# TYPE chatstream_draining gauge
chatstream_draining {server.draining:d}
# HELP chatstream_max_streams Stream limit.
# TYPE chatstream_max_streams gauge
chatstream_max_streams {server.max_streams}
# HELP chatstream_streams_total Chat completions by outcome.
# TYPE chatstream_streams_total counter
{outcomes}
# HELP chatstream_events_total Chunks sent.
# TYPE chatstream_events_total counter
chatstream_events_total {server.events_sent}
# HELP {FIRST_CHUNK} Seconds until the first chunk.
# TYPE {FIRST_CHUNK} histogram
{server.first_chunk.samples(FIRST_CHUNK)}
# HELP {DURATION} Seconds until the end of the answer.
# TYPE {DURATION} histogram
{server.duration.samples(DURATION)}
"""
    headers = {
        "Content-Type": "text/plain; version=0.0.4; charset=utf-8",
        "Cache-Control": "no-store",
    }
    response = web.Response(body=text.encode(), headers=headers)
    await exchange.send(response)


# ---- The routes ----------------------------------------------------------------------

# A handler sends its response itself.
Handler = Callable[[Exchange], Awaitable[None]]
ROUTES: dict[str, Handler] = {  # `chat` takes POST, the others GET and HEAD
    "/": show_page,
    "/stream": chat,
    "/v1/chat/completions": chat,
    "/v1/models": list_models,
    "/healthz": show_health,
    "/readyz": show_health,
    "/metrics": show_metrics,
}
OPEN_PATHS = ("/healthz", "/readyz", "/metrics")  # `route` guards all others


# ---- Settings ------------------------------------------------------------------------
# A setting is a field of Settings and, unless it is a secret, a line in SETTINGS.


class BadSetting(argparse.ArgumentTypeError):
    """The server cannot start with these settings; the message says why.

    argparse shows the message of an ArgumentTypeError as it is.
    """


class Settings(argparse.Namespace):
    api_key: str
    base_url: str
    model: tuple[str, ...]  # the allowed ones; the first is the default
    host: str
    port: int
    token: str
    allowed_hosts: tuple[str, ...]
    max_streams: int
    max_body_bytes: int
    max_event_bytes: int
    connect_seconds: float
    idle_seconds: float
    write_seconds: float
    heartbeat_seconds: float
    drain_seconds: float
    tls_cert: str
    tls_key: str
    reuse_port: bool


def read_settings(environ: Mapping[str, str], arguments: list[str]) -> Settings:
    """Reads flags, else variables, else defaults. A bad value exits with status 2."""
    parser = argparse.ArgumentParser(
        description="A streaming chat server.",
        epilog="Secrets have a variable but no flag: OPENAI_API_KEY, CHATSTREAM_TOKEN.",
        allow_abbrev=False,
    )
    for variable, default, convert, meaning in SETTINGS:
        is_switch = convert is true_or_false
        parser.add_argument(
            "--" + field_name(variable).replace("_", "-"),
            # argparse converts a string default as it converts the value of a flag.
            default=environ.get(variable, "").strip() or default,
            type=convert,
            metavar="VALUE",
            help=f"{meaning} [{variable}={default}]",
            # --reuse-port needs no value.
            nargs="?" if is_switch else None,
            const="true" if is_switch else None,
        )
    settings, unknown = parser.parse_known_args(arguments, Settings())
    if unknown:  # shown without its value, which may be a secret
        parser.error(f"unknown argument: {unknown[0].partition('=')[0]}")
    for variable in ("OPENAI_API_KEY", "CHATSTREAM_TOKEN"):
        secret = environ.get(variable, "").strip()
        if not re.fullmatch("[!-~]*", secret):
            parser.error(f"{variable} must be printable ASCII without spaces")
        setattr(settings, field_name(variable), secret)
    if not settings.token and not is_loopback(settings.host):
        host = f"CHATSTREAM_HOST={settings.host}"
        parser.error(f"{host} lets other machines connect: set CHATSTREAM_TOKEN")
    if bool(settings.tls_cert) != bool(settings.tls_key):
        parser.error("CHATSTREAM_TLS_CERT and CHATSTREAM_TLS_KEY: set both or neither")
    return settings


def field_name(variable: str) -> str:
    """CHATSTREAM_MAX_STREAMS -> max_streams, as argparse names --max-streams."""
    return variable.partition("_")[2].lower()


# The functions below convert a value. argparse shows the name of one that raises
# ValueError: "invalid port_number value: 'x'".


def positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def port_number(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError
    return port


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:  # also refuses nan
        raise ValueError
    return value


def positive_seconds(text: str) -> float:
    value = seconds(text)
    if value == 0:
        raise ValueError
    return value


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "1", "false", "0"):
        raise ValueError
    return text.lower() in ("true", "1")


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def model_names(text: str) -> tuple[str, ...]:
    if not names(text):
        raise ValueError
    return names(text)


HOST = r"(\[[0-9A-Fa-f:.]+\]|[\w.-]*\w\.?)(:\d{1,5})?"  # with an optional port


def host_names(text: str) -> tuple[str, ...]:
    found = names(text.lower())
    for name in found:
        if not re.fullmatch(HOST, name, re.ASCII):
            raise BadSetting(f"{name!r} must look like chat.example.com")
    return found


def base_url(text: str) -> str:
    """Returns the URL without a slash at its end."""
    url = text.rstrip("/")
    if "@" in url:  # not shown: it may contain a password
        raise BadSetting("the URL must not contain @ (no user, no password)")
    if url.endswith("/chat/completions"):
        raise BadSetting(f"{url!r}: leave out /chat/completions")
    if text and not is_http_url(url):
        form = "http://localhost:11434/v1, without query or fragment"
        raise BadSetting(f"{url!r} must look like {form}")
    return url


def is_http_url(url: str) -> bool:
    """True for http(s) and a valid host. A user, a port and a path are optional."""
    if not re.fullmatch(rf"(?i)https?://([^/?#\s]+@)?{HOST}(/[^@?#\s]*)?", url):
        return False
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if ":" in host:
            ipaddress.IPv6Address(host)
        host.encode("idna")  # refuses a label of more than 63 letters
        return parts.port != 0
    except ValueError:
        return False


# fmt: off
SETTINGS: list[tuple[str, str, Callable[[str], object], str]] = [
    ("OPENAI_BASE_URL", "", base_url, "model server; empty = OpenAI (no key: the demo)"),
    ("OPENAI_MODEL", "gpt-4o-mini", model_names, "models, the default first; * = any"),
    ("CHATSTREAM_HOST", "127.0.0.1", str, "address to listen on"),
    ("CHATSTREAM_PORT", "8080", port_number, "port; 0 = any free one"),
    ("CHATSTREAM_ALLOWED_HOSTS", "", host_names, "Host names to accept"),
    ("CHATSTREAM_MAX_STREAMS", "1000", positive_integer, "streams at once"),
    ("CHATSTREAM_MAX_BODY_BYTES", "1048576", positive_integer, "largest request body"),
    ("CHATSTREAM_MAX_EVENT_BYTES", "1048576", positive_integer, "largest event"),
    ("CHATSTREAM_CONNECT_SECONDS", "5", positive_seconds, "connect timeout"),
    ("CHATSTREAM_IDLE_SECONDS", "300", positive_seconds, "longest wait for an event"),
    ("CHATSTREAM_WRITE_SECONDS", "30", positive_seconds, "longest wait for a client"),
    ("CHATSTREAM_HEARTBEAT_SECONDS", "10", positive_seconds, "heartbeat interval"),
    ("CHATSTREAM_DRAIN_SECONDS", "30", seconds, "longest wait at shutdown"),
    ("CHATSTREAM_TLS_CERT", "", str, "PEM file of a certificate, for HTTPS"),
    ("CHATSTREAM_TLS_KEY", "", str, "PEM file of the certificate's key"),
    ("CHATSTREAM_REUSE_PORT", "false", true_or_false, "let processes share the port"),
]
# fmt: on


def environment_proxy(url: str) -> str | None:
    """The proxy for the upstream. Raises BadSetting if it cannot work.

    Read once: aiohttp's `trust_env` would look it up for each request, and read .netrc.
    """
    parts = urlsplit(url)
    if is_loopback(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy:
        return None
    if not is_http_url(proxy) or ":" in unquote(urlsplit(proxy).username or ""):
        # The message does not show the URL, which may have a password.
        raise BadSetting(
            f"the environment's proxy for {parts.scheme} must look like http://host:3128, "
            "with no colon in the user name; NO_PROXY bypasses it"
        )
    return proxy


def load_certificate(settings: Settings) -> ssl.SSLContext:
    """Raises BadSetting."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # Given a password, even an empty one, OpenSSL does not prompt for one.
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (OSError, ValueError) as error:
        raise BadSetting(
            f"CHATSTREAM_TLS_CERT={settings.tls_cert}, "
            f"CHATSTREAM_TLS_KEY={settings.tls_key}: must be a PEM certificate "
            f"and its key, without a password: {error}"
        ) from None
    return context


def streams_for_files(wanted: int) -> int:
    """Raises the limit on open files. Returns how many streams it allows.

    A stream takes two: the connections to its client and its upstream.
    """
    try:
        import resource  # noqa: PLC0415
    except ImportError:  # Windows has no such limit
        return wanted
    needed = 2 * wanted + 64
    limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    # First what we need: macOS reports no hard limit, but refuses to go that far.
    for raised in (max(limit, needed), hard_limit):
        with suppress(ValueError, OSError, OverflowError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard_limit))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit >= needed:
        return wanted
    allowed = max(1, (limit - 64) // 2)
    logger.warning(
        f"the limit of {limit} open files allows only {allowed} streams; "
        f"for {wanted}, run: ulimit -n {needed}"
    )
    return allowed


# ---- The demo ------------------------------------------------------------------------
# A built-in upstream, to try the server without a key. Its models show what goes wrong
# in practice.

DEMO_MODELS = (
    "demo",
    "demo-slow-start",
    "demo-cut-off",
    "demo-error",
    "demo-rate-limit",
)
DEMO_ANSWER = """\
This is the **built-in demo**: there is no model behind it. You asked:

> {question}

Here is how each word of this answer reaches your screen:

1. The *upstream* (a model server) generates a token and sends it as a server-sent event.
2. `chatstream.py` checks the event and passes it on at once.
3. This page parses it and draws the new text.

| When | then |
|---|---|
| you press **Stop** | the request is aborted, and you stop paying |
| the upstream crashes | you see that the answer is incomplete |
| the server shuts down | running answers may finish first |

Press **Wire** to see the events themselves. To use a real model, set `OPENAI_API_KEY`
or the address of any model server:

```sh
# Ollama, for example
OPENAI_BASE_URL=http://localhost:11434/v1 OPENAI_MODEL=llama3.2 python chatstream.py
```
"""


async def demo_upstream(
    settings: Settings, request: web.BaseRequest
) -> web.StreamResponse:
    """A small OpenAI-compatible server that imitates a model's pace and failures."""
    try:
        body = decode_json(await request.content.read())
        model = body["model"]
        question = last_question(body["messages"])
    except (*NOT_JSON, LookupError, TypeError, AttributeError):
        error = {"message": "Not a chat completion."}
        return web.json_response({"error": error}, status=400)
    if model == "demo-rate-limit":
        error = {"message": "The demo is rate-limited right now."}
        headers = {"Retry-After": "5"}
        return web.json_response({"error": error}, status=429, headers=headers)
    answer = DEMO_ANSWER.replace("{question}", question[:2000].replace("\n", "\n> "))
    common = {"id": "chatcmpl-demo", "created": int(time.time()), "model": model}
    if not body.get("stream"):
        return web.json_response(common | whole_answer(question, answer))

    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    if model == "demo-slow-start":
        await asyncio.sleep(1.5 * settings.heartbeat_seconds)

    async def send(**fields: object) -> None:
        chunk = common | {"object": "chat.completion.chunk"} | fields
        await response.write(b"data: %b\n\n" % encode_json(chunk))
        await asyncio.sleep(0.02)

    for delta in demo_deltas(model, answer):
        await send(choices=[{"index": 0, "delta": delta, "finish_reason": None}])
    if model == "demo-error":
        await send(error={"message": "The demo is out of memory."})
    elif model != "demo-cut-off":
        await send(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
        await response.write(DONE)
    return response


def demo_deltas(model: str, answer: str) -> list[dict[str, str]]:
    """The delta of each chunk. Some models stop halfway."""
    deltas = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word} for word in re.findall(r"\s*\S+\s*", answer)]
    if model in ("demo-cut-off", "demo-error"):
        del deltas[len(deltas) // 2 :]
    return deltas


def whole_answer(question: str, answer: str) -> dict[str, object]:
    message = {"role": "assistant", "content": answer}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    # Some clients need `usage`. Here, a word counts as a token.
    prompt_tokens = len(question.split())
    completion_tokens = len(answer.split())
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return {"object": "chat.completion", "choices": [choice], "usage": usage}


def last_question(messages: Any) -> str:
    """The text of the user's last message. "Continue" adds an assistant message."""
    questions = [message for message in messages if message.get("role") == "user"]
    content = questions[-1]["content"]
    # `content` is text, or a list of parts, some with text.
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content)


# ---- Start and stop ------------------------------------------------------------------


async def serve(settings: Settings) -> None:
    """Runs until the first SIGINT or SIGTERM, then drains."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(on_loop_error)
    stopping = asyncio.Event()
    handle_signals(lambda: loop.call_soon_threadsafe(stopping.set))
    async with AsyncExitStack() as stack:
        upstream = settings.base_url or OPENAI_URL
        if not settings.api_key and not settings.base_url:
            demo = await listen(partial(demo_upstream, settings), "127.0.0.1", 0)
            stack.push_async_callback(demo.cleanup)
            settings.base_url = f"http://127.0.0.1:{demo.addresses[0][1]}/v1"
            settings.model = DEMO_MODELS
            upstream = "the demo, until you set OPENAI_API_KEY or OPENAI_BASE_URL"
        server = Chatstream(settings)
        address = await server.start()
        # A closed or broken stdout must not stop the server or its drain.
        with suppress(OSError, ValueError):
            print(
                f"chatstream listens on {address}\n"
                f"  upstream: {upstream}\n"
                f"  models:   {', '.join(settings.model)}\n"
                "  to stop:  Ctrl+C",
                flush=True,
            )
        await stopping.wait()
        await server.drain()
    # A normal exit would wait for pending DNS lookups, and a broken stdout would change
    # the exit status.
    os._exit(0)


def handle_signals(stop: Callable[[], object]) -> None:
    """The first SIGINT or SIGTERM calls `stop`. A second one ends the process at once."""
    first_signal = 0.0

    def on_signal(*_: object) -> None:
        nonlocal first_signal
        now = time.monotonic()
        if not first_signal:
            first_signal = now
            stop()
        # `timeout` and `npm run` repeat a Ctrl+C that we have already received.
        elif now - first_signal > 0.5:
            os._exit(1)

    # On Windows, the loop has no add_signal_handler.
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # asyncio would log a traceback for each connection that it cannot accept because too
    # many files are open, and, on Windows, for each one that the other side resets.
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    # A closed or broken stderr must not stop the server either.
    logging.raiseExceptions = False
    # aiohttp would log a traceback for each malformed request. We log our own bugs.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    # With 1,000 streams, a full garbage collection stops every stream for 0.1 s. A higher
    # threshold (the default is 700 new objects, or 2,000 in newer Pythons) makes collections rarer.
    gc.set_threshold(10_000)
    settings = read_settings(os.environ, sys.argv[1:])
    try:
        asyncio.run(serve(settings))
    except BadSetting as error:
        print(f"chatstream: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
