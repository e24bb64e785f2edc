# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.2,<4"]
# ///
"""chatstream: a streaming chat server in one file beside its page, to run, read and copy from.

    pip install "aiohttp>=3.14.2,<4" && python chatstream.py   # then open http://localhost:8080

The path of a token, from the upstream (any OpenAI-compatible model server) to the client:

    upstream ──bytes──> EventParser ──events──> Relay ──`data: {…}↵↵`──> client
        ^               lines, any split        what may go out              │
        └──────── aborted: the client left, the time is up, we shut down ────┘

Read it from the top. `EventParser` turns bytes into events, `Relay` decides what goes out, `chat`
is the life of one stream, `enforce_limits` ends it when somebody is silent for too long, and
`handle` is the entry point that aiohttp calls. The rest is what every server needs.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import errno
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
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

# ---- Server-sent events ------------------------------------------------------------------
# Bytes in, events out. This class needs nothing else from this file: copy it where you like.

BOM = b"\xef\xbb\xbf"  # the byte order mark, in UTF-8


class EventParser:
    """Reads server-sent events from bytes that may be split anywhere.

    The format: WHATWG HTML standard, section 9.2.6.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes of data in one event
        self.partial_line = bytearray()
        self.after_cr = False
        self.event_type = b""
        self.data_lines: list[bytes] = []
        self.data_size = 0
        self.saw_unknown_field = False

    def feed(self, piece: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yields the type (b"" unless it was named) and the data of each event completed.

        Raises OverflowError if an event exceeds the limit, after yielding the ones before it.
        """
        for line in self.complete_lines(piece):
            if line:
                self.read_field(line)
                continue
            data = b"\n".join(self.data_lines)
            event_type = self.event_type
            self.event_type = b""
            self.data_lines = []
            self.data_size = 0
            if data.strip():
                yield event_type, data
        if len(self.partial_line) > self.limit + len("data: "):
            raise OverflowError

    def close(self) -> Iterator[tuple[bytes, bytes]]:
        """Like `feed`, at the end of the body: the last event may lack its blank line."""
        return self.feed(b"\n\n")

    def complete_lines(self, piece: bytes) -> list[bytes]:
        """Returns the lines that this piece completes, and keeps the rest for the next one."""
        if not piece:
            return []
        # A CR has ended its line already. An LF after it is the second half of a CRLF.
        if self.after_cr and piece.startswith(b"\n"):
            piece = piece[1:]
        self.after_cr = piece.endswith(b"\r")
        # bytes.splitlines splits only at LF, CR and CRLF. str.splitlines would also split at
        # U+2028, which is text.
        lines = piece.splitlines()
        rest = b""
        if lines and not piece.endswith((b"\r", b"\n")):
            rest = lines.pop()
        if lines:
            lines[0] = bytes(self.partial_line) + lines[0]
            self.partial_line.clear()
        self.partial_line += rest
        # A comment may be of any length. Nobody reads it, so it need not fill the memory.
        if self.partial_line.startswith(b":"):
            del self.partial_line[1:]
        return lines

    def read_field(self, line: bytes) -> None:
        # b'data: {"choices":[…]}'. A BOM may open the stream; no field's name begins with one.
        name, _, value = line.removeprefix(BOM).partition(b":")
        if name == b"event":
            self.event_type = value.removeprefix(b" ")
        if name == b"error":  # llama.cpp until 2025
            self.event_type = b"error"
        if name in (b"data", b"error"):
            self.data_lines.append(value.removeprefix(b" "))
            self.data_size += len(self.data_lines[-1])
        elif name not in (b"", b"event", b"id", b"retry"):  # b"": a comment
            self.saw_unknown_field = True
        if self.data_size + len(self.data_lines) - 1 > self.limit:
            raise OverflowError


# ---- Errors ------------------------------------------------------------------------------
# Raise early, convert once: whatever goes wrong is raised as a Failure, and only `send_failure`
# turns it into an answer.

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
    "stream_truncated": (502, "truncated", "The model server broke off its answer."),
    "upstream_rejected": (400, "upstream_error", "The model server refused the request."),
    "too_many_streams": (503, "rejected", "Too many answers are being streamed right now."),
    "server_draining": (503, "rejected", "This server is shutting down."),
    "upstream_timeout": (504, "timeout", "The model server did not answer in time."),
}
TYPES = {  # HTTP status: `type` of the error; for all others "invalid_request_error"
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "upstream_error",
    503: "server_error",
    504: "upstream_error",
}


class Failure(Exception):
    """Why a request gets no complete answer. `code` is a key of ERRORS; `cause` is for the log."""

    def __init__(
        self,
        code: str,
        message: str = "",
        cause: str = "",
        status: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code}: {cause}" if cause else code)
        default_status, self.outcome, default_message = ERRORS[code]
        self.code = code
        self.message = message or default_message
        self.cause = cause
        self.status = status or default_status
        self.headers = dict(headers or {})
        if self.status == 503:
            self.headers.setdefault("Retry-After", "1")
        self.type = TYPES.get(self.status, "invalid_request_error")
        self.param: str | None = None

    def body(self, request_id: str, redact: Callable[[str], str]) -> dict[str, object]:
        """OpenAI's form of an error, and the id under which the log has the cause."""
        error = {
            "message": redact(self.message)[:500],
            "type": redact(self.type),
            "param": redact(self.param) if self.param else None,
            "code": redact(self.code),
            "request_id": request_id,
        }
        return {"error": error}


def failure_from(body: bytes, failure: Failure) -> Failure:
    """Fills in what an upstream's body says of its error, in any of the known dialects."""
    try:
        document = decode_json(body)
    except (ValueError, RecursionError):
        return failure
    if isinstance(document, list) and document:
        document = document[0]
    message = message_in(document)
    # A page or a traceback is for the log, not for the reader.
    if message and not re.search(r"(?i)<(!doctype|html|head|body)\b|Traceback \(most", message):
        failure.message = message
    if not isinstance(document, dict):
        return failure
    details = document.get("error")
    if not isinstance(details, dict):
        details = document
    for name in ("type", "code", "param"):
        value = details.get(name)
        if isinstance(value, str) and 0 < len(value) <= 64:
            setattr(failure, name, value)
    return failure


ERROR_KEYS = ("error", "errors", "message", "msg", "detail", "choices")


def message_in(document: object) -> str:
    """The text for people: {"error": {"message": text}}, {"detail": [{"msg": text}]} and so on."""
    while isinstance(document, dict | list):
        if isinstance(document, list):
            document = document[0] if document else ""
        else:
            texts = (document.get(key) for key in ERROR_KEYS)
            document = next(filter(None, texts), "")
    return document if isinstance(document, str) else ""


def excerpt(body: bytes) -> str:
    """As much of an upstream's body as the log shows."""
    return body[:300].decode(errors="backslashreplace")


# ---- JSON --------------------------------------------------------------------------------

WHITE_SPACE = b" \t\r\n"


def refuse_constant(name: str) -> None:
    """Python reads NaN and Infinity, which are not JSON (RFC 8259)."""
    raise ValueError(name)


JSON_DECODER = json.JSONDecoder(parse_constant=refuse_constant)
encode_json = json.JSONEncoder(allow_nan=False).encode


def decode_json(data: bytes) -> Any:
    """Raises ValueError for anything but JSON in UTF-8, RecursionError if nested too deeply."""
    return JSON_DECODER.decode(data.decode())


# ---- What goes out -----------------------------------------------------------------------
# Chunks (JSON objects with `choices`), heartbeats, then [DONE] or one error. Anything else
# breaks some client.

DONE = b"data: [DONE]\n\n"


class Relay:
    """Turns the body of an upstream's answer into the events for the client.

    Ends with `done` (the answer is complete) or a `failure`.
    """

    def __init__(self, parser: EventParser) -> None:
        self.parser = parser
        self.first_byte = b""
        self.document = bytearray()  # a body that is no stream, but one JSON document
        self.events_received = 0
        self.events_sent = 0
        self.choices: set[str] = set()
        self.finished_choices: set[str] = set()
        self.malformed = False
        self.done = False
        self.failure: Failure | None = None

    @property
    def all_finished(self) -> bool:
        """Every choice has its `finish_reason`: the end may follow without [DONE]."""
        return bool(self.choices) and self.choices == self.finished_choices

    def feed(self, piece: bytes) -> bytes:
        """Returns what this piece lets out, each event as b"data: PAYLOAD\\n\\n"."""
        # The first byte says what kind of body this is: Content-Type is often wrong.
        if not self.first_byte:
            self.first_byte = piece.lstrip(BOM + WHITE_SPACE)[:1]
        if self.first_byte == b"<":
            self.failure = Failure("upstream_error", cause=f"a page: {excerpt(piece)}")
            return b""
        if self.first_byte not in (b"{", b"["):
            return self.relay_events(self.parser.feed(piece))
        self.document += piece
        if len(self.document) > self.parser.limit:
            self.failure = Failure("event_too_large")
        return b""

    def close(self, error: Exception | None = None) -> bytes:
        """Like `feed`, at the end of the body. `error` is what broke the connection, if it broke.

        The only place that decides whether the answer is complete.
        """
        if self.document:
            document = bytes(self.document).strip(BOM + WHITE_SPACE)
            out = self.relay_events([(b"", document)])
            is_cut = self.malformed and is_half(document)
            is_complete = self.events_sent > 0 and not error
        else:
            # Without its blank line, a malformed last event was cut in two.
            out = self.relay_events(self.parser.close())
            is_cut = self.malformed
            is_complete = False
        if self.done:
            return out
        if is_cut:
            self.failure = truncation(error)
        elif self.failure:
            return out
        elif is_complete or self.all_finished:
            self.done = True
            return out + DONE
        elif error or self.events_sent:
            self.failure = truncation(error)
        elif self.events_received or self.parser.saw_unknown_field:
            self.failure = Failure("upstream_invalid", cause="the body has no chunk")
        else:
            self.failure = Failure("empty_stream")
        return out

    def relay_events(self, events: Iterable[tuple[bytes, bytes]]) -> bytes:
        out = []
        data = b""
        try:
            for event_type, data in events:
                self.events_received += 1
                payload = self.check_event(event_type, data)
                if payload:
                    out.append(b"data: %b\n\n" % payload)
                if self.done:
                    break
        except Failure as failure:
            self.failure = failure
        except OverflowError:
            self.failure = Failure("event_too_large")
        except (ValueError, RecursionError):
            self.malformed = True
            self.failure = Failure("upstream_invalid", cause=f"not a JSON object: {excerpt(data)}")
        return b"".join(out)

    def check_event(self, event_type: bytes, data: bytes) -> bytes:
        """Returns the payload to send; empty if this event is of no use to a client.

        Raises Failure for an error in the stream; ValueError or RecursionError if malformed.
        """
        # The whole payload must be [DONE]: a token may contain this text.
        if data.strip() == b"[DONE]":
            if not self.events_sent:
                raise Failure("empty_stream")
            self.done = True
            return b"[DONE]"
        if event_type == b"error":
            raise error_in_stream(data)
        chunk = decode_json(data)
        if has_error(chunk):
            raise error_in_stream(data)
        if chunk is None:  # `data: null`, which some servers send as a sign of life
            return b""
        if not isinstance(chunk, dict):
            raise ValueError("not an object")
        payload = self.check_chunk(chunk, data)
        if payload:
            self.events_sent += 1
        # Inside JSON, a line end is white space.
        return payload.replace(b"\n", b" ")

    def check_chunk(self, chunk: dict[str, Any], data: bytes) -> bytes:
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            if not chunk.get("usage"):  # {"type": "ping"}
                return b""
            return encode_json(chunk | {"choices": []}).encode()
        changed = False
        for choice in choices:
            if not isinstance(choice, dict):
                continue
            index = repr(choice.get("index"))
            if "message" in choice:
                replace_message(choice, is_repetition=index in self.choices)
                changed = True
            self.choices.add(index)
            if choice.get("finish_reason"):
                self.finished_choices.add(index)
        if not changed:
            return data
        return encode_json(chunk | {"object": "chat.completion.chunk"}).encode()


def replace_message(choice: dict[str, Any], is_repetition: bool) -> None:
    """Gives a choice of a whole answer, which has a `message`, a `delta` as in a stream."""
    message = choice.pop("message")
    if "delta" in choice:
        return
    # After deltas, a message only repeats what they said.
    choice["delta"] = {} if is_repetition else message
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if isinstance(calls, list):
        for index, call in enumerate(calls):
            if isinstance(call, dict):
                call.setdefault("index", index)


def is_half(document: bytes) -> bool:
    """Was it cut off? Then it opens more objects than it closes."""
    return document.count(b"{") > document.count(b"}")


def truncation(error: Exception | None) -> Failure:
    return Failure("stream_truncated", cause=repr(error) if error else "the body ended too early")


def has_error(document: object) -> bool:
    """Is it an error, in one of the upstreams' dialects?"""
    if isinstance(document, list) and document:
        document = document[0]
    if not isinstance(document, dict):
        return False
    if document.get("error") or document.get("object") == "error":
        return True
    choices = document.get("choices")
    if not isinstance(choices, list):
        return False
    return any(isinstance(choice, dict) and choice.get("error") for choice in choices)


def error_in_stream(data: bytes) -> Failure:
    """What an upstream reports after it has answered with a good status."""
    return failure_from(data, Failure("upstream_error", cause=f"in the stream: {excerpt(data)}"))


def check_completion(body: bytes) -> None:
    """Checks an answer that is not streamed. Raises Failure."""
    try:
        completion = decode_json(body.strip(BOM + WHITE_SPACE))
    except (ValueError, RecursionError):
        completion = None
    if has_error(completion):
        raise error_in_stream(body)
    if not isinstance(completion, dict):
        code = "stream_truncated" if is_half(body) else "upstream_invalid"
        raise Failure(code, cause=f"not a JSON object: {excerpt(body)}")


# ---- One stream, from the request to the last byte ---------------------------------------

COMMON_HEADERS = {"Server": "chatstream", "X-Content-Type-Options": "nosniff"}
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    # Otherwise nginx holds the whole answer back.
    "X-Accel-Buffering": "no",
}
HEARTBEAT = b": keep-alive\n\n"

# What aiohttp raises when the connection to the upstream fails.
UPSTREAM_ERRORS = (aiohttp.ClientError, HttpProcessingError, OSError)


class Exchange:
    """A request and its answer: what the handler, the time limits, the drain and the log share."""

    def __init__(self, request: web.BaseRequest, transport: asyncio.Transport) -> None:
        self.request = request
        self.transport = transport  # to the client
        self.task = asyncio.current_task()  # runs the handler
        self.id = request_id(request)
        self.started = time.monotonic()
        self.stream: Stream | None = None
        self.response: web.StreamResponse | None = None  # the event stream, once it has begun
        self.bytes_written = 0
        self.is_writing = False
        self.is_ending = False  # the last bytes have been written, or soon will be
        self.fully_sent = False  # and the client's system has taken them
        self.may_be_paid = False  # the upstream may charge for this request
        self.upstream_status = 0
        self.failure: Failure | None = None
        self.client_stall = Stall()

    async def begin_stream(self) -> web.StreamResponse:
        """The point of no return: from here on the status is 200."""
        headers = COMMON_HEADERS | STREAM_HEADERS | {"X-Request-Id": self.id}
        self.response = web.StreamResponse(headers=headers)
        if self.request.version < (1, 1):
            self.response.force_close()  # in HTTP/1.0, only that ends a body
        await self.response.prepare(self.request)
        return self.response

    async def write(self, data: bytes) -> None:
        """Waits while the client is slow. Meanwhile nobody reads from the upstream, which has to
        wait, too: back-pressure."""
        response = self.response or await self.begin_stream()
        self.bytes_written += len(data)
        self.is_writing = True
        await response.write(data)
        self.is_writing = False
        if self.failure:
            raise self.failure

    async def finish(self, response: web.StreamResponse, last: bytes = b"") -> web.StreamResponse:
        """Ends the answer. Returns when the client's system has taken all of it: until then, this
        exchange counts as running."""
        self.is_ending = True
        await response.prepare(self.request)  # does nothing if it has begun
        self.bytes_written += len(last)
        # write_eof() waits only while more is left than this limit. A TLS transport that is
        # closing would fail here.
        if not self.transport.is_closing():
            self.transport.set_write_buffer_limits(high=0)
        await response.write_eof(last)
        if not self.transport.is_closing():
            self.transport.set_write_buffer_limits()
        self.fully_sent = True
        return response

    def status(self) -> int | str:
        """The HTTP status, for the log."""
        if self.response or not self.failure:
            return 200 if self.response or self.fully_sent else "-"
        return self.failure.status

    def stop(self, failure: Failure) -> None:
        """Ends the exchange with a failure to report to the client."""
        if self.failure or self.is_ending:
            return
        self.failure = failure
        # Cancelling aiohttp's wait for a slow client would break its next wait, too. So `write`
        # raises the failure itself when its wait is over.
        if self.task and not self.is_writing:
            self.task.cancel()


class Stream:
    """A chat completion on its way: what the time limits and the metrics look at."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.body_received = False
        self.upstream: aiohttp.ClientResponse | None = None
        self.takes_heartbeats = False
        self.first_event_seconds = 0.0  # 0: there was none yet
        self.upstream_stall = Stall()
        self.write_stall = Stall()


async def chat(server: Chatstream, exchange: Exchange) -> web.StreamResponse:
    """The life of one stream.

    Raises Failure. CancelledError may be raised at any `await`: by aiohttp as soon as the client
    has left (see `handler_cancellation` in `listen`), or by `Exchange.stop`.
    """
    stream = server.admit(exchange)
    answer = await ask_upstream(server, exchange, stream)
    # The key line: however this block is left, the connection to the upstream is aborted, unless
    # the answer has been read to its end. A model that nobody reads still costs money.
    with closing(answer):
        stream.upstream = answer
        if not stream.takes_heartbeats:
            body = await read_completion(answer, stream.relay.parser.limit)
            return await exchange.finish(server.json_response(exchange, body))
        last = await relay_answer(exchange, stream, answer)
        if not answer.content.at_eof():
            exchange.is_ending = True
            await exchange.write(last)
            last = b""
            await read_end(answer)
    response = exchange.response or await exchange.begin_stream()
    return await exchange.finish(response, last)


async def ask_upstream(
    server: Chatstream, exchange: Exchange, stream: Stream
) -> aiohttp.ClientResponse:
    """Reads and checks the request, and sends it to the upstream. Raises Failure."""
    body = await read_request(exchange, server.settings)
    always_stream = exchange.request.path == "/stream"
    completion = check_request(body, server.settings.model, always_stream)
    stream.body_received = True
    stream.takes_heartbeats = completion.get("stream") is True
    return await open_upstream(server, exchange, "/chat/completions", completion)


async def relay_answer(exchange: Exchange, stream: Stream, answer: aiohttp.ClientResponse) -> bytes:
    """Relays each event the moment its last byte is in. Returns the last bytes. Raises Failure.

    The status waits for the first event: what fails before gets an HTTP status of its own.
    """
    relay = stream.relay
    while not relay.failure:
        try:
            piece = await answer.content.readany()
        # RuntimeError is what aiohttp raises if the connection was lost before we came to read.
        except (*UPSTREAM_ERRORS, RuntimeError) as error:
            out = relay.close(error)
        else:
            out = relay.feed(piece) if piece else relay.close()
        if out and not stream.first_event_seconds:
            stream.first_event_seconds = time.monotonic() - exchange.started
        if relay.done:
            return out
        if out:
            await exchange.write(out)
    raise relay.failure


async def read_end(answer: aiohttp.ClientResponse) -> None:
    """Waits a moment for the end of the body: then the connection can be used again."""
    with suppress(TimeoutError, RuntimeError, *UPSTREAM_ERRORS):
        async with asyncio.timeout(0.05):
            while await answer.content.readany():
                pass


class UpstreamAnswer(aiohttp.ClientResponse):
    """Closes by aborting the connection: waiting for a polite goodbye would cost tokens.

    aiohttp calls `close` itself if we are cancelled before the answer's head has arrived.
    """

    def close(self) -> None:
        # No connection: the answer has been read to its end.
        if self.connection and self.connection.transport:
            self.connection.transport.abort()
        super().close()


# ---- Time limits -------------------------------------------------------------------------
# Every stream is looked at a few times a second. A timer for each read and write would cost more.


class Stall:
    """Measures for how long a value has not changed while we were waiting for it to change."""

    def __init__(self) -> None:
        self.value = 0
        self.since = time.monotonic()

    def seconds(self, value: int, is_waiting: bool) -> float:
        now = time.monotonic()
        if value != self.value or not is_waiting:
            self.value = value
            self.since = now
        return now - self.since


def enforce_limits(exchange: Exchange, settings: Settings) -> bool:
    """Ends an exchange if its client or its upstream is silent for too long.

    Returns True when a heartbeat is due.
    """
    unsent = exchange.transport.get_write_buffer_size()
    bytes_taken = exchange.bytes_written - unsent
    stalled = exchange.client_stall.seconds(bytes_taken, is_waiting=unsent > 0)
    if stalled >= settings.write_seconds:
        exchange.transport.abort()  # aiohttp cancels the handler, as it does for a closed tab
        return False

    stream = exchange.stream
    if not stream or exchange.is_ending:
        return False
    # While the client has not taken everything, the upstream is not to blame.
    upstreams_turn = stream.body_received and not unsent
    silent = stream.upstream_stall.seconds(stream.relay.events_received, upstreams_turn)
    if silent >= settings.idle_seconds:
        exchange.stop(Failure("upstream_timeout", cause="silent for CHATSTREAM_IDLE_SECONDS"))
    # aiohttp does not always tell the reader that the connection was lost.
    connection = stream.upstream.connection if stream.upstream else None
    is_lost = connection is not None and connection.closed
    is_over = stream.relay.all_finished and silent >= SECONDS_AFTER_FINISH
    if stream.upstream and upstreams_turn and (is_lost or is_over):
        stream.upstream.close()  # ends the read in `relay_answer`

    quiet = stream.write_stall.seconds(exchange.bytes_written, upstreams_turn)
    return stream.takes_heartbeats and not exchange.failure and quiet >= settings.heartbeat_seconds


# Some upstreams leave the connection open after they have said everything.
SECONDS_AFTER_FINISH = 5


async def watch(server: Chatstream) -> None:
    """Calls `enforce_limits` for all exchanges, as long as the server runs."""
    settings = server.settings
    shortest = min(settings.idle_seconds, settings.write_seconds, settings.heartbeat_seconds)
    while True:
        await asyncio.sleep(max(0.01, min(1.0, shortest / 10)))
        for exchange in list(server.exchanges):
            try:
                if enforce_limits(exchange, settings):
                    await exchange.write(HEARTBEAT)
            except ConnectionError:
                pass  # the client has left, and aiohttp cancels the handler
            except Exception as error:  # must not end the limits of all the others
                logger.exception("a bug in chatstream")
                exchange.stop(Failure("internal_error", cause=repr(error)))


# ---- The entry point ---------------------------------------------------------------------


async def handle(server: Chatstream, request: web.BaseRequest) -> web.StreamResponse:
    """Called by aiohttp for each request. Every request ends here, whatever happens to it."""
    if request.transport is None:
        return web.Response()  # the client has left already
    exchange = Exchange(request, request.transport)
    server.exchanges.add(exchange)
    limit_unsent_bytes(exchange.transport)
    try:
        handler = route(server, request)
        return await handler(server, exchange)
    except Failure as failure:
        return await send_failure(server, exchange, failure)
    except asyncio.CancelledError:
        if not exchange.failure:  # the client has left
            raise
        return await send_failure(server, exchange, exchange.failure)
    except ConnectionError:  # the client has left while we were writing
        return exchange.response or web.Response()
    except Exception as error:
        logger.exception("a bug in chatstream")
        bug = Failure("internal_error", cause=repr(error))
        return await send_failure(server, exchange, bug)
    finally:
        server.exchanges.discard(exchange)
        server.count_and_log(exchange)


async def send_failure(
    server: Chatstream, exchange: Exchange, failure: Failure
) -> web.StreamResponse:
    """Sends a failure: with an HTTP status, or as the last event if 200 has been sent."""
    exchange.failure = failure
    error = failure.body(exchange.id, server.redact)
    response: web.StreamResponse
    last = b""
    if exchange.response:
        response = exchange.response
        last = b"data: %b\n\n" % encode_json(error).encode()
    else:
        if exchange.may_be_paid:
            # OpenAI's clients otherwise repeat a 5xx twice, and each time is paid for.
            failure.headers["X-Should-Retry"] = "false"
        body = encode_json(error).encode()
        response = server.json_response(exchange, body, failure.status, failure.headers)
    with suppress(ConnectionError):
        await exchange.finish(response, last)
    return response


def limit_unsent_bytes(transport: asyncio.Transport) -> None:
    """Lets the kernel keep little that it has not sent yet. Otherwise it takes more in such large
    steps that a slow client looks as if it took nothing."""
    connection = transport.get_extra_info("socket")
    if connection and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        with suppress(OSError):
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
        # Cancels the handler when the client leaves. Without it, a closed tab would reach the
        # model only with the next write.
        handler_cancellation=True,
        # Inflated, 60 KB of a request can become 60 MB.
        auto_decompress=False,
        # A browser on localhost sends the cookies of all ports.
        max_field_size=2**16,
        max_line_size=2**16,
        # Seconds until an idle connection, or half a request head, is closed.
        keepalive_timeout=60,
        access_log=None,
    )
    runner = web.ServerRunner(server, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, host, port, ssl_context=tls, reuse_port=reuse_port or None)
    try:
        await site.start()
    except OSError:
        await runner.cleanup()
        raise
    return runner


# ---- The request -------------------------------------------------------------------------
# Unknown parameters pass, so that those that OpenAI adds next year work.


def request_id(request: web.BaseRequest) -> str:
    """The client's own id, if it is a sane one, or a new UUID."""
    sent = request.headers.get("X-Request-Id", "")
    if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", sent):
        return sent
    return str(uuid.uuid4())


async def read_body(reader: aiohttp.StreamReader, limit: int) -> bytes:
    """Reads a body to its end, but stops as soon as it is longer than the limit."""
    body = bytearray()
    while len(body) <= limit:
        piece = await reader.readany()
        if not piece:
            break
        body += piece
    return bytes(body)


async def read_request(exchange: Exchange, settings: Settings) -> bytes:
    """Returns the request's body. Raises Failure."""
    request = exchange.request
    if (request.content_length or 0) > settings.max_body_bytes:
        raise Failure("body_too_large")
    expects = request.headers.get("Expect", "").lower()
    if expects == "100-continue" and request.version >= (1, 1):
        # aiohttp's low-level server leaves this to us.
        exchange.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        async with asyncio.timeout(settings.write_seconds):
            body = await read_body(request.content, settings.max_body_bytes)
    except TimeoutError:
        raise Failure("request_timeout") from None
    except (web.RequestPayloadError, HttpProcessingError):
        raise Failure("invalid_request", "The request body's encoding is broken.") from None
    if len(body) > settings.max_body_bytes:
        raise Failure("body_too_large")
    return body


def check_request(body: bytes, models: tuple[str, ...], always_stream: bool) -> dict[str, Any]:
    """Returns the checked request. It is sent on encoded anew, so that a key that is repeated in
    the body cannot slip another model past the check. Raises Failure."""
    try:
        completion = decode_json(body)
        encode_json(completion)  # refuses numbers like 1e999
    except (ValueError, RecursionError):
        raise Failure("invalid_json") from None
    if not isinstance(completion, dict):
        raise Failure("invalid_request")
    messages = completion.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Failure("invalid_messages")
    if not all(isinstance(message, dict) for message in messages):
        raise Failure("invalid_messages")
    check_stream(completion, always_stream)
    check_model(completion, models)
    return completion


def check_stream(completion: dict[str, Any], always_stream: bool) -> None:
    if completion.get("stream") is None:
        completion.pop("stream", None)
        if always_stream:
            completion["stream"] = True
    stream = completion.get("stream", False)
    if not isinstance(stream, bool):
        raise Failure("invalid_request", "`stream` must be true or false.")
    if always_stream and not stream:
        raise Failure("stream_required")


def check_model(completion: dict[str, Any], models: tuple[str, ...]) -> None:
    if completion.get("model") is None:
        completion["model"] = models[0]
    model = completion["model"]
    if not isinstance(model, str) or model == "*":
        raise Failure("invalid_request", "`model` is required; GET /v1/models lists them.")
    if model not in models and "*" not in models:
        raise Failure("model_not_found")


# ---- The upstream ------------------------------------------------------------------------

OPENAI_URL = "https://api.openai.com/v1"
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)

# With these errors, the request has not been sent, and costs nothing.
NEVER_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,
)


def open_session(settings: Settings, proxy: str | None) -> aiohttp.ClientSession:
    """Our connections to the upstream."""
    headers = {
        "Content-Type": "application/json",
        # Some servers refuse the one without the other.
        "Accept": "text/event-stream, application/json",
        # A compressed stream arrives in bursts.
        "Accept-Encoding": "identity",
    }
    if settings.api_key:
        headers["Authorization"] = f"Bearer {settings.api_key}"
    # No limit, or the 101st stream would wait. Many servers close an idle connection after 5 s,
    # and a request that is sent just then is lost.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
    return aiohttp.ClientSession(
        connector=connector,
        proxy=proxy,
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_seconds),
        # One person's cookie must not go out with the next person's request.
        cookie_jar=aiohttp.DummyCookieJar(),
        response_class=UpstreamAnswer,
        # 29 KB of gzip can keep the loop busy for 20 s.
        auto_decompress=False,
        # Bytes that may wait, for each stream, while its client is slow.
        read_bufsize=2**13,
        max_field_size=2**16,
        max_line_size=2**16,
    )


async def open_upstream(
    server: Chatstream, exchange: Exchange, path: str, completion: dict[str, Any] | None = None
) -> aiohttp.ClientResponse:
    """Sends a request. Returns the answer if it is a good one; the caller closes it.

    Raises Failure. A failed request is never repeated: it might be paid for twice.
    """
    headers = {}
    # llama-cpp-python refuses every request whose id is no UUID.
    if is_uuid(exchange.id):
        headers["X-Request-Id"] = exchange.id
    exchange.may_be_paid = completion is not None
    try:
        answer = await server.session.request(
            "POST" if completion else "GET",
            server.upstream_url + path,
            data=encode_json(completion).encode() if completion else None,
            headers=headers,
            # The key would travel along.
            allow_redirects=False,
        )
    except UPSTREAM_ERRORS as error:
        if isinstance(error, NEVER_SENT):
            exchange.may_be_paid = False
        raise connection_failure(error) from None
    exchange.upstream_status = answer.status
    is_compressed = answer.headers.get("Content-Encoding", "identity").lower() != "identity"
    if 200 <= answer.status < 300 and not is_compressed:
        return answer
    if exchange.stream:
        exchange.stream.takes_heartbeats = False  # a heartbeat would make the status 200
    if 400 <= answer.status < 500:
        exchange.may_be_paid = False
    with closing(answer):
        if is_compressed:
            raise Failure("upstream_invalid", cause="a compressed answer")
        raise await status_failure(answer)


def is_uuid(text: str) -> bool:
    with suppress(ValueError):
        return str(uuid.UUID(text)) == text.lower()
    return False


def connection_failure(error: Exception) -> Failure:
    code = "upstream_unreachable"
    if isinstance(error, aiohttp.ServerTimeoutError):
        code = "upstream_timeout"
    elif isinstance(error, OSError) and error.errno in OUT_OF_FILES:
        code = "too_many_streams"
    elif isinstance(error, aiohttp.ClientHttpProxyError):
        code = "upstream_unreachable"
    elif isinstance(error, aiohttp.ClientResponseError):
        code = "upstream_invalid"  # it does not speak HTTP
    return Failure(code, cause=f"{type(error).__name__}: {error}")


async def status_failure(answer: aiohttp.ClientResponse) -> Failure:
    """What a bad status means: the client's fault is reported as it came, ours is a 502."""
    status = answer.status
    body = b""
    # The body has the reason, but is not worth a long wait.
    with suppress(TimeoutError, *UPSTREAM_ERRORS):
        async with asyncio.timeout(2):
            body = await read_body(answer.content, 2**16)
    cause = excerpt(body)
    if status == 401:
        return Failure("upstream_auth", cause=f"{cause} (is OPENAI_API_KEY right?)")
    if status == 407:
        return Failure("upstream_unreachable", cause=f"{cause} (a proxy's refusal)")
    if not 400 <= status < 500:
        return Failure("upstream_error", cause=cause)
    headers = {}
    for name, value in answer.headers.items():
        is_limit = re.fullmatch("(?i)retry-after|retry-after-ms|x-ratelimit-[a-z-]+", name)
        if is_limit and value.isascii() and value.isprintable():
            headers[name] = value
    failure = Failure("upstream_rejected", cause=cause, status=status, headers=headers)
    return failure_from(body, failure)


async def read_completion(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """Returns the body of an answer that is not streamed. Raises Failure."""
    try:
        body = await read_body(answer.content, limit)
    except (*UPSTREAM_ERRORS, RuntimeError) as error:
        raise truncation(error) from None
    if len(body) > limit:
        raise Failure("event_too_large")
    check_completion(body)
    return body


# ---- Who gets in -------------------------------------------------------------------------
# A page on another origin, or one whose name was rebound to this machine, must not spend the
# key. Browsers reveal both in headers that no page can change.


def is_loopback(host: str) -> bool:
    return bool(re.fullmatch(r"localhost|127(\.\d{1,3}){3}|::1", host))


def route(server: Chatstream, request: web.BaseRequest) -> Handler:
    """Returns the handler of a request that may come in. Raises Failure."""
    path = request.path
    is_guarded = path in ("/", "/stream") or path.startswith("/v1/")
    is_post = request.method == "POST"
    if is_guarded and not is_known_host(request, server.hosts):
        raise Failure("forbidden_host")
    if is_guarded and is_post and not is_same_origin(request):
        raise Failure("forbidden_origin")
    if path not in ROUTES:
        raise Failure("not_found")
    methods, handler = ROUTES[path]
    if request.method not in methods:
        raise Failure("method_not_allowed", headers={"Allow": ", ".join(methods)})
    if is_guarded and server.draining:
        raise Failure("server_draining")
    if is_post and not is_plain_json(request):
        raise Failure("unsupported_media_type")
    if is_guarded and path != "/" and not has_token(request, server.settings.token):
        raise Failure("invalid_token", headers={"WWW-Authenticate": "Bearer"})
    return handler


def is_known_host(request: web.BaseRequest, hosts: set[str]) -> bool:
    """`hosts` are the names we serve, in lower case; without any, we serve all."""
    host = request.headers.get("Host", "").lower()
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:@/\s]+)(:\d{1,5})?", host)
    return not hosts or (match is not None and not hosts.isdisjoint((host, match[1])))


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
    # Its time does not depend on where the two differ.
    is_same = hmac.compare_digest(sent.strip().encode(errors="surrogateescape"), token.encode())
    return is_same and scheme.lower() == "bearer"


# ---- Settings ----------------------------------------------------------------------------
# A setting is a field of Settings and a line in `read_settings`.


class BadSetting(Exception):
    """The server cannot start with these settings: a message for whoever starts it."""


@dataclass(frozen=True)
class Settings:
    api_key: str
    base_url: str
    model: tuple[str, ...]
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
    """Settings from flags, else variables, else defaults. A bad one ends the program, status 2."""
    parser = argparse.ArgumentParser(
        description="A streaming chat server.",
        epilog="Secrets have no flag, only a variable: OPENAI_API_KEY, CHATSTREAM_TOKEN.",
        allow_abbrev=False,
    )

    def add(
        variable: str, default: str, convert: Callable[[str], object], meaning: str, **more: Any
    ) -> None:
        name = variable.partition("_")[2].lower()
        parser.add_argument(
            "--" + name.replace("_", "-"),
            # argparse converts a default that is a string like a value from the command line.
            default=environ.get(variable, "").strip() or default,
            type=convert,
            metavar="VALUE",
            help=f"{meaning} [{variable}={default}]",
            **more,
        )

    add("OPENAI_BASE_URL", "", base_url, f"any OpenAI-compatible upstream (else {OPENAI_URL})")
    add("OPENAI_MODEL", "gpt-4o-mini", names, "models, the first is the default; * = any")
    add("CHATSTREAM_HOST", "127.0.0.1", str, "address to listen on; a public one needs a token")
    add("CHATSTREAM_PORT", "8080", port_number, "port; 0 = any free one")
    add("CHATSTREAM_ALLOWED_HOSTS", "", host_names, "further Host names served")
    add("CHATSTREAM_MAX_STREAMS", "1000", count, "streams at once; one more gets 503")
    add("CHATSTREAM_MAX_BODY_BYTES", "1048576", count, "longest request body")
    add("CHATSTREAM_MAX_EVENT_BYTES", "1048576", count, "longest upstream event or whole answer")
    add("CHATSTREAM_CONNECT_SECONDS", "5", seconds, "time to connect to the upstream")
    add("CHATSTREAM_IDLE_SECONDS", "300", seconds, "longest time without an event")
    add("CHATSTREAM_WRITE_SECONDS", "30", seconds, "longest wait for a client, or for its body")
    add("CHATSTREAM_HEARTBEAT_SECONDS", "10", seconds, "a silent stream gets a comment this often")
    add("CHATSTREAM_DRAIN_SECONDS", "30", seconds_or_zero, "how long a shutdown waits for streams")
    add("CHATSTREAM_TLS_CERT", "", str, "PEM file of a certificate: serve HTTPS")
    add("CHATSTREAM_TLS_KEY", "", str, "PEM file of the certificate's key")
    reuse = "let processes share the port, one for each core"
    add("CHATSTREAM_REUSE_PORT", "false", boolean, reuse, nargs="?", const=True)

    values, unknown = parser.parse_known_args(arguments)
    if unknown:  # without its value, which may be a secret
        parser.error(f"unknown argument: {unknown[0].partition('=')[0]}")
    for variable, name in (("OPENAI_API_KEY", "api_key"), ("CHATSTREAM_TOKEN", "token")):
        secret = environ.get(variable, "").strip()
        if not re.fullmatch("[!-~]*", secret):
            parser.error(f"{variable} must be visible ASCII, since it travels in a header")
        setattr(values, name, secret)
    if not is_loopback(values.host) and not values.token:
        parser.error(
            f"CHATSTREAM_HOST={values.host} is not this machine alone: set CHATSTREAM_TOKEN"
        )
    if bool(values.tls_cert) != bool(values.tls_key):
        parser.error("CHATSTREAM_TLS_CERT and CHATSTREAM_TLS_KEY: set both or neither")
    return Settings(**vars(values))


def count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999999999")
    return int(text)


def port_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 65535")
    return int(text)


def seconds_or_zero(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, like 30 or 0.5")
    return float(text)


def seconds(text: str) -> float:
    if seconds_or_zero(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return float(text)


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "false", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1")


def split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def names(text: str) -> tuple[str, ...]:
    if not split(text):
        raise argparse.ArgumentTypeError(f"{text!r} has no name; separate names by commas")
    return split(text)


def host_names(text: str) -> tuple[str, ...]:
    for name in split(text):
        if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:[0-9]{1,5})?", name):
            raise argparse.ArgumentTypeError(f"{name!r} is not a host name like chat.example.org")
    return tuple(name.lower() for name in split(text))


def base_url(text: str) -> str:
    """Without the slash at its end. May be empty: not set."""
    shown = "(not shown)" if "@" in text else repr(text)
    if text and not is_http_url(text):
        raise argparse.ArgumentTypeError(
            f"{shown} is not a URL like http://localhost:11434/v1, without password, ? and #"
        )
    url = text.rstrip("/")
    if url.endswith("/chat/completions"):
        raise argparse.ArgumentTypeError(f"{shown}: leave out /chat/completions at the end")
    return url


def is_http_url(text: str) -> bool:
    """An address without a user, a query or a fragment, whose host can exist."""
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        if ":" in host:
            ipaddress.IPv6Address(host)
        else:
            host.encode("idna")
            if not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", host):
                return False
        if parts.port == 0:
            return False
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and not re.search(r"[@?#\s]", text)


def environment_proxy(url: str) -> str | None:
    """Returns the proxy for the upstream. Raises BadSetting if it cannot work.

    Looked up once: aiohttp's `trust_env` does it for each request, and reads .netrc.
    """
    parts = urlsplit(url)
    if is_loopback(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy:
        return None
    try:
        proxy_parts = urlsplit(proxy)
        works = proxy_parts.scheme in ("http", "https") and bool(proxy_parts.hostname)
        works = works and proxy_parts.port != 0 and ":" not in unquote(proxy_parts.username or "")
    except ValueError:
        works = False
    if not works:
        # Its value may have a password.
        raise BadSetting(
            f"the proxy for {parts.scheme} in the environment is not a URL like http://host:3128, "
            "with no colon in the user name; NO_PROXY leaves it out"
        )
    return proxy


# ---- The server --------------------------------------------------------------------------

logger = logging.getLogger("chatstream")


def streams_for_files(wanted: int) -> int:
    """Raises the limit of open files. Returns how many streams it allows, two files for each."""
    try:
        import resource  # noqa: PLC0415
    except ImportError:  # Windows has no such limit
        return wanted
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        files = most
    allowed = max(1, (files - 64) // 2)
    if files == resource.RLIM_INFINITY or allowed >= wanted:
        return wanted
    needed = 2 * wanted + 64
    logger.warning("%d open files allow %d streams: ulimit -n %d", files, allowed, needed)
    return allowed


def page_headers(html: bytes) -> dict[str, str]:
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    # Hashes computed from the file itself: the policy always fits the page.
    for tag, code in re.findall(rb"<(script|style)>(.*?)</\1>", html, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(code).digest()).decode()
        policy.append(f"{tag.decode()}-src 'sha256-{digest}'")
    return {
        "Content-Security-Policy": "; ".join(policy),
        "Permissions-Policy": "camera=(), geolocation=(), microphone=(), midi=(), usb=()",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }


class Histogram:
    """Seconds, in the buckets that OpenTelemetry has for GenAI (0.01 s doubling to 81.92 s), and
    two more."""

    BOUNDS = tuple(0.01 * 2**power for power in range(16))

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.BOUNDS, value)] += 1
        self.sum += value

    def samples(self) -> dict[str, float]:
        samples: dict[str, float] = {}
        total = 0
        for bound, number in zip([*self.BOUNDS, "+Inf"], self.counts, strict=True):
            total += number
            samples[f'_bucket{{le="{bound}"}}'] = total
        return samples | {"_sum": self.sum, "_count": total}


class Chatstream:
    """The server: `await start()`, and in the end `await drain()`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.upstream_url = settings.base_url or OPENAI_URL
        self.proxy = environment_proxy(self.upstream_url)
        self.html = Path(__file__).resolve().with_name("index.html").read_bytes()
        self.page_headers = page_headers(self.html)
        self.secrets = [text for text in (settings.api_key, settings.token) if len(text) > 8]
        if self.proxy and "@" in self.proxy:
            self.secrets.append(urlsplit(self.proxy).netloc.rpartition("@")[0])
        self.hosts = set(settings.allowed_hosts)
        if is_loopback(settings.host):
            self.hosts |= {"localhost", "127.0.0.1", "[::1]", settings.host}
        self.max_streams = streams_for_files(settings.max_streams)
        self.exchanges: set[Exchange] = set()  # all requests in flight
        self.streams: set[Exchange] = set()  # the chat completions among them
        self.draining = False
        self.started = int(time.time())
        self.outcomes = dict.fromkeys(["completed", "client_gone", "drained"], 0)
        for _, outcome, _ in ERRORS.values():
            self.outcomes[outcome] = 0
        self.events_sent = 0
        self.first_chunk_seconds = Histogram()
        self.duration_seconds = Histogram()

    async def start(self) -> str:
        """Listens, and returns the address. Raises BadSetting if it cannot."""
        settings = self.settings
        tls = load_certificate(settings) if settings.tls_cert else None
        try:
            self.runner = await listen(
                partial(handle, self), settings.host, settings.port, tls, settings.reuse_port
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BadSetting(
                    f"CHATSTREAM_PORT={settings.port} is already in use; 0 takes any free port"
                ) from None
            raise BadSetting(
                f"cannot listen at CHATSTREAM_HOST={settings.host}, "
                f"CHATSTREAM_PORT={settings.port}: {error}"
            ) from None
        self.session = open_session(settings, self.proxy)
        self.watcher = asyncio.create_task(watch(self))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return f"http{'s' if tls else ''}://{host}:{self.runner.addresses[0][1]}"

    async def drain(self) -> None:
        """Shuts down without cutting off an answer, if the drain time allows it."""
        # 1. Take no new connections and no new requests.
        self.draining = True
        for site in list(self.runner.sites):
            await site.stop()
        for exchange in self.streams:
            if exchange.stream and not exchange.stream.body_received:
                exchange.stop(Failure("server_draining"))
        # 2. Let the running ones end.
        await self.wait_for_exchanges(self.settings.drain_seconds)
        # 3. Tell those that are left.
        for exchange in self.exchanges:
            failure = Failure("server_draining")
            failure.outcome = "drained"
            exchange.stop(failure)
        await self.wait_for_exchanges(1)
        # 4. Drop those that do not take it.
        for exchange in self.exchanges:
            exchange.transport.abort()
        await self.runner.cleanup()
        await self.session.close()
        self.watcher.cancel()

    async def wait_for_exchanges(self, seconds: float) -> None:
        tasks = [exchange.task for exchange in self.exchanges if exchange.task]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    def admit(self, exchange: Exchange) -> Stream:
        """Counts a chat completion, before its body, which takes memory. Raises Failure."""
        if len(self.streams) >= self.max_streams:
            raise Failure("too_many_streams")
        exchange.stream = Stream(Relay(EventParser(self.settings.max_event_bytes)))
        self.streams.add(exchange)
        return exchange.stream

    def redact(self, text: str) -> str:
        """Blots out our secrets, in case an upstream quotes them."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def response(
        self,
        exchange: Exchange,
        body: bytes,
        content_type: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> web.Response:
        all_headers = COMMON_HEADERS | {"X-Request-Id": exchange.id, "Content-Type": content_type}
        all_headers |= headers or {}
        response = web.Response(body=body, status=status, headers=all_headers)
        if self.draining or exchange.request.version < (1, 1):
            response.force_close()
        return response

    def json_response(
        self,
        exchange: Exchange,
        body: bytes,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> web.Response:
        return self.response(exchange, body, "application/json", status, headers)

    def count_and_log(self, exchange: Exchange) -> None:
        """Counts an exchange that has ended, in one outcome, and writes its line in the log."""
        self.streams.discard(exchange)
        failure = exchange.failure
        stream = exchange.stream
        total_seconds = time.monotonic() - exchange.started
        events = stream.relay.events_sent if stream else 0
        first_seconds = stream.first_event_seconds if stream else 0.0
        if failure:
            outcome = failure.outcome
        elif exchange.fully_sent:
            outcome = "completed"
        else:
            outcome = "client_gone"

        is_chat = exchange.request.method == "POST" and exchange.request.path in CHAT_PATHS
        if is_chat:
            self.outcomes[outcome] += 1
            self.events_sent += events
            if first_seconds:
                self.first_chunk_seconds.observe(first_seconds)
            if outcome != "rejected":
                self.duration_seconds.observe(total_seconds)
        if is_chat or (failure and failure.cause):
            logger.info(
                "id=%s outcome=%s status=%s events=%d first=%.3fs total=%.3fs cause=%s",
                exchange.id,
                outcome,
                exchange.status(),
                events,
                first_seconds,
                total_seconds,
                self.describe_cause(exchange),
            )

    def describe_cause(self, exchange: Exchange) -> str:
        """One line, in which control characters are escaped."""
        failure = exchange.failure
        if not failure:
            return "-"
        upstream = f" upstream HTTP {exchange.upstream_status}" if exchange.upstream_status else ""
        text = f"{failure.code}: {exchange.request.path}{upstream}: {failure.cause}"
        return repr(self.redact(text))

    async def page(self, exchange: Exchange) -> web.StreamResponse:
        kind = "text/html; charset=utf-8"
        response = self.response(exchange, self.html, kind, headers=self.page_headers)
        return await exchange.finish(response)

    async def models(self, exchange: Exchange) -> web.StreamResponse:
        """The allowed models, in OpenAI's form; with `*`, the upstream's, too."""
        models: dict[str, dict[str, Any]] = {}
        for name in self.settings.model:
            models[name] = {"id": name, "object": "model"}
        if models.pop("*", None):
            for entry in await self.upstream_models(exchange):
                listed = entry.get("id") if isinstance(entry, dict) else None
                if isinstance(listed, str) and listed:
                    models.setdefault(listed, {"object": "model"} | entry)
        for model in models.values():
            if not isinstance(model.get("created"), int):
                model["created"] = self.started
            if not isinstance(model.get("owned_by"), str):
                model["owned_by"] = "chatstream"
        body = encode_json({"object": "list", "data": list(models.values())}).encode()
        headers = {"Cache-Control": "no-store"}
        return await exchange.finish(self.json_response(exchange, body, headers=headers))

    async def upstream_models(self, exchange: Exchange) -> list[Any]:
        """Raises Failure."""
        try:
            async with asyncio.timeout(self.settings.connect_seconds):
                answer = await open_upstream(self, exchange, "/models")
                with closing(answer):
                    body = await read_body(answer.content, MAX_MODELS_BYTES)
        except TimeoutError:
            raise Failure("upstream_timeout") from None
        except (*UPSTREAM_ERRORS, RuntimeError) as error:
            raise truncation(error) from None
        if len(body) > MAX_MODELS_BYTES:
            raise Failure("event_too_large")
        try:
            listed = decode_json(body)
        except (ValueError, RecursionError):
            listed = None
        if isinstance(listed, dict):
            listed = listed.get("data")
        if not isinstance(listed, list):
            cause = f"no list: {excerpt(body)}"
            raise Failure("upstream_invalid", "The model server lists no models.", cause)
        return listed

    async def probe(self, exchange: Exchange) -> web.StreamResponse:
        if self.draining and exchange.request.path == "/readyz":
            raise Failure("server_draining")
        return await exchange.finish(self.json_response(exchange, b'{"status": "ok"}'))

    async def metrics(self, exchange: Exchange) -> web.StreamResponse:
        """Prometheus' text format, version 0.0.4. No label comes from a client."""
        active = sum(1 for each in self.streams if each.stream and each.stream.body_received)
        outcomes = {f'{{outcome="{name}"}}': count for name, count in self.outcomes.items()}
        genai = "gen_ai_client_operation"  # OpenTelemetry's name
        lines: list[str] = []

        def add(name: str, kind: str, meaning: str, samples: Mapping[str, float]) -> None:
            lines.append(f"# HELP {name} {meaning}")
            lines.append(f"# TYPE {name} {kind}")
            lines.extend(f"{name}{suffix} {value}" for suffix, value in samples.items())

        add("chatstream_active_streams", "gauge", "Streams running now.", {"": active})
        add("chatstream_draining", "gauge", "1 while shutting down.", {"": int(self.draining)})
        add("chatstream_max_streams", "gauge", "Most streams at once.", {"": self.max_streams})
        add("chatstream_streams_total", "counter", "Requests, by how they ended.", outcomes)
        add("chatstream_events_total", "counter", "Chunks relayed.", {"": self.events_sent})
        first = self.first_chunk_seconds.samples()
        name = f"{genai}_time_to_first_chunk_seconds"
        add(name, "histogram", "Time to the first chunk.", first)
        duration = self.duration_seconds.samples()
        add(f"{genai}_duration_seconds", "histogram", "Time to the end of the answer.", duration)
        kind = "text/plain; version=0.0.4; charset=utf-8"
        body = "\n".join([*lines, ""]).encode()
        headers = {"Cache-Control": "no-store"}
        return await exchange.finish(self.response(exchange, body, kind, headers=headers))


def load_certificate(settings: Settings) -> ssl.SSLContext:
    """Raises BadSetting."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # With an empty password, OpenSSL does not ask for one at the terminal.
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (OSError, ValueError) as error:
        raise BadSetting(
            f"cannot read CHATSTREAM_TLS_CERT={settings.tls_cert} and "
            f"CHATSTREAM_TLS_KEY={settings.tls_key}, which must be PEM without a password: {error}"
        ) from None
    return context


MAX_MODELS_BYTES = 2**22
CHAT_PATHS = ("/stream", "/v1/chat/completions")

Handler = Callable[[Chatstream, Exchange], Awaitable[web.StreamResponse]]
ROUTES: dict[str, tuple[tuple[str, ...], Handler]] = {  # `route` says which are guarded
    "/": (("GET", "HEAD"), Chatstream.page),
    "/stream": (("POST",), chat),
    "/v1/chat/completions": (("POST",), chat),
    "/v1/models": (("GET", "HEAD"), Chatstream.models),
    "/healthz": (("GET", "HEAD"), Chatstream.probe),
    "/readyz": (("GET", "HEAD"), Chatstream.probe),
    "/metrics": (("GET", "HEAD"), Chatstream.metrics),
}


# ---- The demo ----------------------------------------------------------------------------
# An upstream of our own, for a start without a key. Its models show what goes wrong in real life.

DEMO_MODELS = ("demo", "demo-slow-start", "demo-cut-off", "demo-error", "demo-rate-limit")
DEMO_ANSWER = """\
This is the **built-in demo**: there is no model behind it. You asked:

> {question}

Here is how each word of this answer gets to your screen:

1. The *upstream* (a model server) generates a token and sends it as one server-sent event.
2. `chatstream.py` checks the event and passes it on at once.
3. This page parses it, and draws the text that is new.

| If | then |
|---|---|
| you press **Stop** | the upstream is cut off, and you stop paying |
| the upstream breaks off | you see that the answer is not complete |
| the server shuts down | running answers may finish first |

Press **Wire** to see the events themselves. To use a real model, set `OPENAI_API_KEY`, or the \
address of any model server:

```sh
# Ollama, for example
OPENAI_BASE_URL=http://localhost:11434/v1 OPENAI_MODEL=llama3.2 python chatstream.py
```
"""


async def demo_upstream(settings: Settings, request: web.BaseRequest) -> web.StreamResponse:
    """A small OpenAI-compatible server that answers at the pace of a model, and fails as one."""
    try:
        body = decode_json(await request.content.read())
        model = body["model"]
        content = body["messages"][-1].get("content")
        is_stream = body.get("stream")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return web.json_response({"error": {"message": "Not a chat completion."}}, status=400)
    if model == "demo-rate-limit":
        error = {"message": "The demo takes no requests right now.", "code": "rate_limit_exceeded"}
        return web.json_response({"error": error}, status=429, headers={"Retry-After": "5"})
    question = text_of(content)[:2000].replace("\n", "\n> ")
    answer = DEMO_ANSWER.replace("{question}", question)
    if not is_stream:
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response(demo_object("chat.completion", model, choice))

    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    if model == "demo-slow-start":
        await asyncio.sleep(1.5 * settings.heartbeat_seconds)
    deltas = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word} for word in re.findall(r"\s*\S+\s*", answer)]
    if model in ("demo-cut-off", "demo-error"):
        del deltas[len(deltas) // 2 :]
    else:
        deltas.append({})
    for delta in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
        await send_event(response, demo_object("chat.completion.chunk", model, choice))
        await asyncio.sleep(0.02)
    if model == "demo-error":
        error = {"message": "The demo model ran out of memory.", "code": "out_of_memory"}
        await send_event(response, {"error": error})
    elif model != "demo-cut-off":
        await response.write(DONE)
    return response


def text_of(content: object) -> str:
    """A message's content is a text, or a list of parts, of which some have a text."""
    if isinstance(content, list):
        return " ".join(text_of(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def demo_object(kind: str, model: str, choice: Mapping[str, object]) -> dict[str, object]:
    return {
        "id": "chatcmpl-demo",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
    }


async def send_event(response: web.StreamResponse, payload: Mapping[str, object]) -> None:
    await response.write(b"data: %b\n\n" % encode_json(payload).encode())


# ---- Start and stop ----------------------------------------------------------------------

SECOND_KEY_PRESS = 0.5  # seconds after the first signal


async def serve(settings: Settings) -> None:
    """Runs until the first SIGINT or SIGTERM, then drains. A second one ends it at once."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    first_signal = 0.0

    def on_signal(*_: object) -> None:
        nonlocal first_signal
        now = time.monotonic()
        if not first_signal:
            first_signal = now
            loop.call_soon_threadsafe(stopping.set)
        # `timeout` or `npm run` pass a Ctrl+C on that we have received as well.
        elif now - first_signal > SECOND_KEY_PRESS:
            os._exit(1)

    # The loop's own add_signal_handler does not exist on Windows.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    loop.set_exception_handler(on_loop_error)
    async with AsyncExitStack() as stack:
        upstream = settings.base_url or OPENAI_URL
        if not settings.api_key and not settings.base_url:
            demo = await listen(partial(demo_upstream, settings), "127.0.0.1", 0)
            stack.push_async_callback(demo.cleanup)
            url = f"http://127.0.0.1:{demo.addresses[0][1]}/v1"
            settings = replace(settings, base_url=url, model=DEMO_MODELS)
            upstream = "the demo; set OPENAI_API_KEY or OPENAI_BASE_URL to leave it"
        server = Chatstream(settings)
        address = await server.start()
        stack.push_async_callback(server.drain)
        announce(f"chatstream listens on {address}")
        announce(f"  upstream: {upstream}")
        announce(f"  models:   {', '.join(settings.model)}")
        announce("  to stop:  Ctrl+C")
        await stopping.wait()
        announce(f"draining for up to {settings.drain_seconds:g} s; Ctrl+C ends it at once")


def announce(line: str) -> None:
    """Prints a line. A closed or broken stdout must not stop the server, or its drain."""
    with suppress(OSError, ValueError):
        print(line, flush=True)


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Without files left, asyncio reports each connection that it cannot accept: thousands."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
        return
    loop.default_exception_handler(context)


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    logging.raiseExceptions = False  # a closed or broken stderr must not stop the server
    # aiohttp logs a traceback for each malformed request. Our own errors never get to it.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    settings = read_settings(os.environ, sys.argv[1:])
    try:
        asyncio.run(serve(settings))
    except BadSetting as error:
        print(f"chatstream: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
