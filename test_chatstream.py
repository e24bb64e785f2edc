"""What chatstream promises, each promise a test: the real server, a real scripted upstream,
real sockets, and a real browser for the page. Read the docstrings from top to bottom.

    python -m unittest                  # all of it; needs nothing but aiohttp (and Chromium)
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import errno
import gc
import importlib.util
import io
import itertools
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import unittest
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import aiohttp

import chatstream
from chatstream import (
    Chatstream,
    Relay,
    Settings,
)

HERE = Path(__file__).parent
logging.getLogger("aiohttp.server").addFilter(chatstream.Quiet())
chatstream.log = lambda line: None  # its lines are read where the program runs by itself
logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each slow step
PATIENCE = 10.0 * float(os.environ.get("CHATSTREAM_TEST_PATIENCE", "1"))  # seconds, then: red
DONE = b"data: [DONE]\n\n"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
JSON = {"Content-Type": "application/json"}


# ---- A scripted upstream -----------------------------------------------------------------
# A reply is a coroutine function that gets a Call and says, byte by byte, what to answer.


class Call(asyncio.Protocol):
    """A connection to the upstream: the request that came, and the means to answer it."""

    def __init__(self, up: Upstream) -> None:
        self.up = up
        self.buffer = b""
        self.gone = asyncio.Event()  # the other side has closed the connection
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport
        self.up.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        self.writable.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, blank, rest = self.buffer.partition(b"\r\n\r\n")
        self.request_line, *lines = head.decode().split("\r\n")
        self.headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        length = int(self.headers.get("content-length", 0))
        if blank and len(rest) >= length:
            self.raw_body, self.buffer = rest[:length], rest[length:]
            self.up.calls.append(self)
            self.up.spawn(self.answer())

    @property
    def body(self) -> Any:
        return json.loads(self.raw_body)

    async def answer(self) -> None:
        self.chunked = False
        with suppress(ConnectionError):
            await self.up.reply(self)
            if self.chunked:
                await self.raw(b"0\r\n\r\n")

    async def raw(self, data: bytes) -> None:
        """These bytes, as they are; waits while the other side does not read."""
        if self.gone.is_set():
            raise ConnectionResetError
        self.transport.write(data)
        await self.writable.wait()

    async def start(
        self, status: int = 200, content_type: str = "text/event-stream", **headers: str
    ) -> None:
        """The head of a chunked answer; `retry_after="5"` makes a header `retry-after: 5`."""
        lines = [f"HTTP/1.1 {status} X", "Transfer-Encoding: chunked"]
        lines += [f"Content-Type: {content_type}"] if content_type else []
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.chunked = True
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def send(self, data: bytes) -> None:
        if data:
            await self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def cut(self) -> None:
        """No end of the body, no goodbye."""
        self.chunked = False
        self.transport.abort()


Reply = Callable[[Call], Awaitable[None]]


class Upstream:
    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.url = ""
        self.calls: list[Call] = []
        self.connections = 0
        self.tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


@asynccontextmanager
async def upstream(reply: Reply, tls: ssl.SSLContext | None = None) -> AsyncIterator[Upstream]:
    up = Upstream(reply)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Call(up), "127.0.0.1", 0, ssl=tls)
    host = "localhost" if tls else "127.0.0.1"
    up.url = f"http{'s' if tls else ''}://{host}:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield up
    finally:
        server.close()
        for task in up.tasks:
            task.cancel()
        for call in up.calls:
            call.transport.abort()


def chunk(**fields: Any) -> bytes:
    """One event of a stream of chunks."""
    return b"data: %b\n\n" % json.dumps(fields, ensure_ascii=False).encode()


def delta(finish_reason: str | None = None, **fields: Any) -> bytes:
    return chunk(choices=[{"index": 0, "delta": fields, "finish_reason": finish_reason}])


def says(*pieces: str, finish: str | None = "stop", usage: Any = None) -> Reply:
    """A reply that streams these pieces of text, and ends as it should."""

    async def reply(call: Call) -> None:
        await call.start()
        for piece in pieces:
            await call.send(delta(content=piece))
        await call.send(delta(finish))
        if usage:
            await call.send(chunk(choices=[], usage=usage))
        await call.send(DONE)

    return reply


def sends(*pieces: bytes, status: int = 200, content_type: str = "text/event-stream") -> Reply:
    """A reply of these bytes, each piece in a read of its own."""

    async def reply(call: Call) -> None:
        await call.start(status, content_type)
        for piece in pieces:
            await call.send(piece)
            await asyncio.sleep(0)

    return reply


async def silent(call: Call) -> None:
    """A reply that never comes."""
    await call.gone.wait()


async def stalls(call: Call) -> None:
    """A reply that begins, and then says nothing more."""
    await call.start()
    await call.send(delta(content="Once"))
    await call.gone.wait()


# ---- The real server, and a client -------------------------------------------------------


@asynccontextmanager
async def serving(up: Upstream | None = None, **settings: Any) -> AsyncIterator[str]:
    """The server in this process, in front of an upstream; gives its address."""
    if up:
        settings["base_url"] = up.url
    settings = dict[str, Any](port=0, drain_seconds=0.0, model=("m",)) | settings
    server = Chatstream(Settings(**settings))
    try:
        yield await server.start()
    finally:
        await server.drain()


class Answer:
    """What a client got."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status, self.headers, self.body = response.status, response.headers, body

    @property
    def payloads(self) -> list[bytes]:
        """The payloads of the events, after a look at the framing of each."""
        assert self.body.endswith(b"\n\n"), self.body
        blocks = self.body.removesuffix(b"\n\n").split(b"\n\n")
        events = [block for block in blocks if block != b": keep-alive"]
        assert all(e.startswith(b"data: ") and b"\n" not in e for e in events), self.body
        return [event.removeprefix(b"data: ") for event in events]

    @property
    def error(self) -> Any:
        """The one error: the body's, or the last event's."""
        if self.headers["Content-Type"] == "application/json":
            return json.loads(self.body)["error"]
        return json.loads(self.payloads[-1])["error"]


class Case(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self) -> None:
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        self.client = aiohttp.ClientSession(timeout=timeout)
        self.addAsyncCleanup(self.client.close)
        self.loop_errors: list[Any] = []
        handler = lambda _, context: self.loop_errors.append(context)  # noqa: E731
        asyncio.get_running_loop().set_exception_handler(handler)

    async def asyncTearDown(self) -> None:
        """Nothing went wrong behind the back of a test."""
        self.assertEqual(self.loop_errors, [])

    async def ask(self, url: str, body: Any = HELLO, **headers: str) -> Answer:
        """POST /stream with this body (bytes as they are) and these headers besides."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = JSON | {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client.post(url + "/stream", data=data, headers=sent) as response:
            return Answer(response, await response.read())

    async def ask_through(self, reply: Reply, body: Any = HELLO, **settings: Any) -> Answer:
        """The answer to one request, with an upstream that replies so."""
        async with upstream(reply) as up, serving(up, **settings) as url:
            return await self.ask(url, body)

    def post(self, url: str) -> Any:
        """The same, as a context in which the answer is still running."""
        return self.client.post(url + "/stream", json=HELLO)

    async def raw(self, url: str, data: bytes) -> bytes:
        """What the server answers to these bytes, until it closes or nothing more comes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
        writer.write(data)
        answer = b""
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while more := await reader.read(65536):
                    answer += more
        writer.close()
        return answer

    async def metrics(self, url: str) -> dict[str, float]:
        async with self.client.get(url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    async def eventually(self, true: Callable[[], Any], what: str = "the condition") -> Any:
        async with asyncio.timeout(PATIENCE):
            while not (found := true()):
                await asyncio.sleep(0.002)
        return found


# ---- The program, as people start it -----------------------------------------------------

# Made for these tests, for localhost, for a hundred years; it guards nothing.
PEM_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgEXnsR/5BHXO0ZCDr
zbFiIlHKEUJDtj+CcEOUyKqr/UahRANCAATqbRcwJ5GdwbOoq6zc+pyfdy8qjVmN
WkyiL1vmATogUvO5wpbBahphDySW+QoilLnSeKJQLRehQ64xOy0EdbzM
-----END PRIVATE KEY-----
"""
PEM_CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUJUIi28uz8ApqqH7Jysz2V1zFjf4wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMjE5MjIwOFoYDzIxMjYxMDI5
MTkyMjA4WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATqbRcwJ5GdwbOoq6zc+pyfdy8qjVmNWkyiL1vmATogUvO5wpbBahph
DySW+QoilLnSeKJQLRehQ64xOy0EdbzMo28wbTAdBgNVHQ4EFgQUKo+6HZoLvax1
aIVBoHQuE7u+E48wHwYDVR0jBBgwFoAUKo+6HZoLvax1aIVBoHQuE7u+E48wDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgBizQ8+JvVItOa2404CrUyMrVo4gqtLMRd325bFtjoy8CIA4G
evmuo2XGp6Wc9LHq3iU+WBgPBgxeGgoXqtxu4GAk
-----END CERTIFICATE-----
"""
CLIENT_TLS = ssl.create_default_context(cadata=PEM_CERTIFICATE)


@contextmanager
def certificate() -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        cert, key = Path(folder, "cert.pem"), Path(folder, "key.pem")
        cert.write_text(PEM_CERTIFICATE)
        key.write_text(PEM_KEY)
        yield str(cert), str(key)


class Program:
    """`python chatstream.py` as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, log: IO[bytes]) -> None:
        self.process = process
        self.log = log  # a file: a pipe that nobody reads would stop the program
        self.url = self.out = self.err = ""

    def memory(self) -> int:
        """Bytes that are resident."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def end(self, number: int | None = None) -> int:
        """Waits for the end, after a signal if one is given; the exit status."""
        if number is not None:
            self.process.send_signal(number)
        out, _ = await asyncio.wait_for(self.process.communicate(), PATIENCE)
        self.log.seek(0)
        self.out, self.err = self.out + out.decode(), self.log.read().decode()
        assert self.process.returncode is not None
        return self.process.returncode


def clean_environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "CHATSTREAM_"))}
    return kept | {"PYTHONDEVMODE": "1", "CHATSTREAM_PORT": "0"} | variables


@asynccontextmanager
async def running(command: list[str], environment: dict[str, str]) -> AsyncIterator[Program]:
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            cwd=HERE,
            env=clean_environment(**environment),
            stdout=subprocess.PIPE,
            stderr=log,
        )
        run = Program(process, log)
        assert process.stdout
        try:
            run.out = (await asyncio.wait_for(process.stdout.readline(), PATIENCE)).decode()
            run.url = run.out.rpartition(" ")[2].strip()
            yield run
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()


def program(*arguments: str, **environment: str) -> AbstractAsyncContextManager[Program]:
    return running(["chatstream.py", *arguments], environment)


# ---- The relay: any framing in, one framing out ------------------------------------------

TEXT = "Grüße 👩‍👩‍👧 你好 \u2028\u2029\x85 data: [DONE]"
HELLO_CHUNK = json.dumps({"choices": [{"delta": {"content": TEXT}}]}, ensure_ascii=False).encode()
STOP_CHUNK = b'{"choices":[{"delta":{},"finish_reason":"stop"}]}'
TAIL = b"data: " + STOP_CHUNK + b"\n\ndata: [DONE]\n\n"
GOOD = b"data: " + HELLO_CHUNK + b"\n\n" + TAIL


def framed(*payloads: bytes) -> bytes:
    return b"".join(b"data: %b\n\n" % payload for payload in payloads)


WHOLE = framed(HELLO_CHUNK, STOP_CHUNK, b"[DONE]")
NO_TEXT = b'{"choices":[{"delta":{"role":"assistant","content":null}}]}'
EMPTY_FINISH = b'{"choices":[{"delta":{"content":"a"},"finish_reason":""}]}'
FILTER = b'{"choices":[],"prompt_filter_results":[{"x":1}]}'
USAGE = b'{"choices":[],"usage":{"total_tokens":3}}'
LIST_CONTENT = b'{"choices":[{"delta":{"content":[{"type":"thinking","thinking":[]}]}}]}'
COMPLETION = (
    b'{"object":"chat.completion","choices":[{"index":0,"message":{"content":"Hi"},'
    b'"finish_reason":"stop"}]}'
)
AS_CHUNK = (
    b'{"object": "chat.completion.chunk", "choices": [{"index": 0, "finish_reason": "stop", '
    b'"delta": {"content": "Hi"}}]}'
)

GOOD_STREAMS = {  # name: (what the upstream sends, what goes out)
    "LF": (GOOD, WHOLE),
    "CRLF": (GOOD.replace(b"\n", b"\r\n"), WHOLE),
    "CR": (GOOD.replace(b"\n", b"\r"), WHOLE),
    "mixed line ends": (GOOD.replace(b"\n\n", b"\r\n\n", 1), WHOLE),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, WHOLE),
    "no space after the colon (openai-python#559)": (
        b"\n".join(line.replace(b"data: ", b"data:", 1) for line in GOOD.split(b"\n")),
        WHOLE,
    ),
    "comments (OpenRouter, DeepSeek)": (b": OPENROUTER PROCESSING\n\n:\n\n: ping\n" + GOOD, WHOLE),
    "id, event and retry lines": (b"id: 7\nretry: 10\nevent: message\n" + GOOD, WHOLE),
    "unknown fields": (b"foo: bar\nfoo\n" + GOOD, WHOLE),
    "an event without data": (b"event: ping\n\ndata:\n\ndata\n\n" + GOOD, WHOLE),
    "payloads that are no chunk": (framed(b"{}", b'{"type":"ping"}') + GOOD, WHOLE),
    "several data lines": (
        b'data: {"choices":\ndata: [{"delta":{}}]}\n\n' + TAIL,
        framed(b'{"choices": [{"delta":{}}]}', STOP_CHUNK, b"[DONE]"),
    ),
    "several data lines ended by CRLF": (
        b'data: {"choices":\r\ndata: [{"delta":{}}]}\r\n\r\n' + TAIL,
        framed(b'{"choices": [{"delta":{}}]}', STOP_CHUNK, b"[DONE]"),
    ),
    "several data lines, twice": (
        b'data: {"choices":[\ndata: ],"content":"a"}\n\n' * 2 + TAIL,
        framed(b'{"choices":[ ],"content":"a"}') * 2 + TAIL,
    ),
    "white space around": (
        b"data:   " + STOP_CHUNK + b"\t\n\ndata:  [DONE] \n\n",
        framed(b"  " + STOP_CHUNK + b"\t", b"[DONE]"),
    ),
    "Azure's filter first, usage last": (
        framed(FILTER, STOP_CHUNK, USAGE, b"[DONE]"),
        framed(FILTER, STOP_CHUNK, USAGE, b"[DONE]"),
    ),
    "null, empty and list contents": (
        framed(NO_TEXT, EMPTY_FINISH, LIST_CONTENT) + TAIL,
        framed(NO_TEXT, EMPTY_FINISH, LIST_CONTENT) + TAIL,
    ),
    "never a finish_reason, but [DONE]": (
        framed(EMPTY_FINISH, b"[DONE]"),
        framed(EMPTY_FINISH, b"[DONE]"),
    ),
    "finish_reason, then the end": (GOOD.removesuffix(DONE), WHOLE),
    "[DONE] without its blank line": (GOOD[:-1], WHOLE),
    "[DONE] without its newline": (GOOD[:-2], WHOLE),
    "the last chunk without its newline": (GOOD.removesuffix(b"\n\n" + DONE), WHOLE),
    "text after [DONE]": (GOOD + framed(HELLO_CHUNK), WHOLE),
    "a null error beside choices": (
        framed(b'{"choices":[{}],"error":null}') + TAIL,
        framed(b'{"choices":[{}],"error":null}') + TAIL,
    ),
    "a long comment": (b":" + b"x" * 250_000 + b"\n" + GOOD, WHOLE),
    "a whole completion as an event": (framed(COMPLETION) + DONE, framed(AS_CHUNK) + DONE),
}

LOUD = b'{"error":{"message":"Overloaded","type":"overloaded_error","code":"busy"}}'
BAD_STREAMS = {  # name: (what the upstream sends, the error's code and message)
    "an error object": (framed(LOUD), "busy", "Overloaded"),
    "an error text (LM Studio)": (framed(b'{"error":"Oh no"}'), "upstream_error", "Oh no"),
    "object: error (vLLM)": (
        framed(b'{"object":"error","message":"Oh no","code":400}'),
        "upstream_error",
        "Oh no",
    ),
    "an error beside a message": (
        framed(b'{"error":{"message":"In"},"message":"Out"}'),
        "upstream_error",
        "In",
    ),
    "an error beside choices": (
        framed(b'{"choices":[{}],"error":{"message":"Oh no"}}'),
        "upstream_error",
        "Oh no",
    ),
    "event: error": (b"event: error\n" + framed(LOUD), "busy", "Overloaded"),
    "event: error with a bare message": (
        b'event: error\ndata: {"message":"Oh no"}\n\n',
        "upstream_error",
        "Oh no",
    ),
    "event: error that is no JSON": (b"event: error\ndata: Oh no\n\n", "upstream_error", "failed"),
    "error: as a field (llama.cpp)": (
        b'error: {"code":400,"message":"Oh no"}\n\n' + DONE,
        "upstream_error",
        "Oh no",
    ),
    "no JSON": (framed(b"nonsense"), "upstream_invalid", ""),
    "a JSON list": (framed(b"[1]"), "upstream_invalid", ""),
    "two JSON objects": (framed(b"{}{}"), "upstream_invalid", ""),
    "NaN": (framed(b'{"choices":[NaN]}'), "upstream_invalid", ""),
    "bad UTF-8": (framed(b'{"choices":["\xff"]}'), "upstream_invalid", ""),
    "deep nesting": (framed(b"[" * 100_000), "upstream_invalid", ""),
    "a newline inside a JSON string": (
        b'data: {"choices":[{"x":"a\ndata: b"}]}\n\n',
        "upstream_invalid",
        "",
    ),
    "two bad ones that complete each other": (
        framed(b'{"choices":[]},{"choices":[{}', b"{}]}"),
        "upstream_invalid",
        "",
    ),
    "too large an event": (framed(b'{"choices":["%b"]}' % (b"x" * 200_000)), "event_too_large", ""),
    "too long a line": (b"data:" + b"x" * 200_000, "event_too_large", ""),
    "empty lines without end": (b"data:\n" * 200_000, "event_too_large", ""),
    "too many lines": (b"data: x\n" * 200_000, "event_too_large", ""),
    "nothing": (b"", "empty_stream", ""),
    "comments alone": (b": ping\n\n" * 3, "empty_stream", ""),
    "nothing but [DONE]": (DONE, "empty_stream", ""),
    "no event stream": (b"Hello, world\n", "upstream_invalid", ""),
    "JSON without data: (a stray line)": (b'{"choices":3}', "upstream_invalid", ""),
    "an end inside a payload": (b'data: {"choices":[{', "stream_truncated", ""),
}
MANY_BYTES = 100_000  # longer ones are not fed byte by byte


def splits(body: bytes) -> Iterator[list[int]]:
    """Whole; byte by byte; cut in two at each offset: inside UTF-8 and inside CRLF too."""
    yield []
    yield [len(body) // 2]
    if len(body) < MANY_BYTES:
        yield list(range(1, len(body)))
        yield from ([offset] for offset in range(1, len(body)))


class Quirks(unittest.TestCase):
    """What upstreams really send (the sources stand in the names), cut in every way."""

    def feed(self, body: bytes, cuts: list[int], cut: bool = False) -> tuple[bytes, Relay]:
        relay, out = Relay(100_000), b""
        bounds = [0, *cuts, len(body)]
        for start, end in itertools.pairwise(bounds):
            if start < end and not (relay.done or relay.failure):
                out += relay.feed(body[start:end])
        if not (relay.done or relay.failure):
            out += relay.close(cut)
        return out, relay

    def test_good_streams(self) -> None:
        """Whatever the framing, out goes `data: PAYLOAD`, byte for byte, then [DONE]."""
        for name, (body, expected) in GOOD_STREAMS.items():
            for cuts in splits(body):
                with self.subTest(name, cuts=cuts[:1]):
                    out, relay = self.feed(body, cuts)
                    self.assertEqual(out, expected)
                    self.assertTrue(relay.done)
                    self.assertIsNone(relay.failure)

    def test_bad_streams(self) -> None:
        """Whatever the dialect of the error, it is told, and what came before it goes out."""
        for name, (body, code, message) in BAD_STREAMS.items():
            good = framed(HELLO_CHUNK) if code != "empty_stream" else b""
            for cuts in splits(good + body):
                with self.subTest(name, cuts=cuts[:1]):
                    out, relay = self.feed(good + body, cuts)
                    self.assertEqual(out, good)
                    self.assertFalse(relay.done)
                    assert relay.failure
                    stray = code == "upstream_invalid" and body[:1] in (b"H", b"{")
                    self.assertEqual(relay.failure.code, "stream_truncated" if stray else code)
                    self.assertIn(message, relay.failure.message)

    def test_alone(self) -> None:
        """The same errors, when nothing came before them."""
        for name, (body, code, _) in BAD_STREAMS.items():
            with self.subTest(name):
                out, relay = self.feed(body, [])
                self.assertEqual((out, relay.failure and relay.failure.code), (b"", code))

    def test_truncation_at_every_byte(self) -> None:
        """An answer that ends anywhere before its finish_reason is never a whole one."""
        for length in range(len(framed(HELLO_CHUNK)), GOOD.index(STOP_CHUNK) + len(STOP_CHUNK) - 1):
            for cut in (True, False):
                _, relay = self.feed(GOOD[:length], [], cut)
                self.assertEqual(relay.failure and relay.failure.code, "stream_truncated")

    def test_long_event_in_small_pieces(self) -> None:
        """An event just within the limit passes, and costs time in proportion to its length."""
        payload = b'{"choices":["%b"]}' % (b"x" * (100_000 - len(b'{"choices":[""]}')))
        out, relay = self.feed(framed(payload) + TAIL, list(range(1, 100_000)))
        self.assertTrue(relay.done)
        self.assertTrue(out.startswith(framed(payload)))
        _, relay = self.feed(framed(payload[:-3] + b'x"]}'), [])
        self.assertEqual(relay.failure and relay.failure.code, "event_too_large")


class Transcripts(Case):
    """What servers that nobody here wrote really sent, through the whole of chatstream."""

    async def test_replay(self) -> None:
        """Each of them ends as its text says: whole, or with the error that it is."""
        folder = os.environ.get("CHATSTREAM_TRANSCRIPTS", "")
        if not folder:
            self.skipTest("CHATSTREAM_TRANSCRIPTS names no folder of transcripts")
        for path in sorted(Path(folder).glob("*.sse")):
            head, _, body = path.read_bytes().partition(b"\r\n\r\n")
            status = int(head[9:12] or 0)
            kind = b"".join(re.findall(rb"(?im)^content-type: ([^\r\n]+)", head)).decode()
            with self.subTest(path.stem):
                answer = await self.ask_through(
                    sends(body, status=status or 502, content_type=kind)
                )
                self.judge(answer, status, body)

    def judge(self, answer: Answer, status: int, body: bytes) -> None:
        if status in (401, 403) or status >= 500 or not status:
            self.assertEqual(answer.status, 502)
        elif status >= 400:
            self.assertEqual(answer.status, status)
            said = json.loads(body)
            said = said["error"] if isinstance(said["error"], dict) else said
            self.assertEqual(answer.error["message"], said["message"][:500])
        elif b'"chat.completion"' in body:
            self.assertEqual(answer.payloads[-1], b"[DONE]")
        elif b"data: [DONE]" in body and b'"error"' not in body and b"$\n" not in body:
            sent = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
            good = list(itertools.takewhile(is_json, sent))
            self.assertEqual(answer.payloads[: len(good)], good)
            if len(good) == len(sent) - 1:
                self.assertEqual(answer.payloads, sent)
            else:
                self.assertEqual(answer.error["code"], "upstream_invalid")
        else:
            self.assertNotIn(b"[DONE]", answer.body)
            self.assertEqual(answer.error["type"], answer.error["type"])


def is_json(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


# ---- An honest status --------------------------------------------------------------------


def fails(
    status: int, body: bytes, content_type: str = "application/json", **headers: str
) -> Reply:
    async def reply(call: Call) -> None:
        await call.start(status, content_type, **headers)
        await call.send(body)

    return reply


LEAKY = "Key sk-secret at http://10.1.2.3:80/x and /home/me/app.py failed"
REFUSALS = {  # name: (the upstream's answer, then status, code, type, part of the message here)
    "400 (llama.cpp)": (
        fails(400, b'{"error":{"code":400,"message":"Too long","type":"exceed_context"}}'),
        (400, "upstream_rejected", "exceed_context", "Too long"),
    ),
    "422 (FastAPI)": (
        fails(422, b'{"detail":"Bad thing"}'),
        (422, "upstream_rejected", "invalid_request_error", "Bad thing"),
    ),
    "404 with a code": (
        fails(404, b'{"error":{"message":"No","code":"model_not_found","param":"model"}}'),
        (404, "model_not_found", "invalid_request_error", "No"),
    ),
    "400 in a list (Gemini)": (
        fails(400, b'[{"error":{"code":400,"message":"Bad","status":"X"}}]'),
        (400, "upstream_rejected", "invalid_request_error", "Bad"),
    ),
    "429 as a text (Scaleway)": (
        fails(429, b'{"error":"INSUFFICIENT QUOTA"}'),
        (429, "upstream_rejected", "rate_limit_error", "INSUFFICIENT QUOTA"),
    ),
    "429 out of credit": (
        fails(429, b'{"error":{"message":"Pay","code":"insufficient_quota"}}'),
        (429, "insufficient_quota", "rate_limit_error", "Pay"),
    ),
    "404 in HTML": (
        fails(404, b"<html>nginx</html>", "text/html"),
        (404, "upstream_rejected", "invalid_request_error", "refused"),
    ),
    "a message in HTML": (
        fails(400, b'{"error":{"message":"<html><body>x"}}'),
        (400, "upstream_rejected", "invalid_request_error", "refused"),
    ),
    "a traceback": (
        fails(400, b'{"error":"Traceback (most recent call last): x"}'),
        (400, "upstream_rejected", "invalid_request_error", "refused"),
    ),
    "a message that is no text": (
        fails(400, b'{"error":{"message":{"a":1},"type":7,"code":[]}}'),
        (400, "upstream_rejected", "invalid_request_error", "refused"),
    ),
    "secrets in the message": (
        fails(400, json.dumps({"error": {"message": LEAKY}}).encode()),
        (
            400,
            "upstream_rejected",
            "invalid_request_error",
            "Key *** at http://10.1.2.3:80/x and /home/me/app.py failed",
        ),
    ),
    "a very long message": (
        fails(400, json.dumps({"error": "y" * 5000}).encode()),
        (400, "upstream_rejected", "invalid_request_error", "y" * 500),
    ),
    "401": (fails(401, b"{}"), (502, "upstream_auth", "upstream_error", "key")),
    "403": (fails(403, b"{}"), (502, "upstream_auth", "upstream_error", "key")),
    "500": (fails(500, b'{"error":"x"}'), (502, "upstream_error", "upstream_error", "failed")),
    "524": (fails(524, b"<html>"), (502, "upstream_error", "upstream_error", "failed")),
    "a redirect": (
        fails(307, b"", location="http://127.0.0.1:9/"),
        (502, "upstream_error", "upstream_error", "failed"),
    ),
    "an HTML page": (
        fails(200, b"<html>", "text/html"),
        (502, "upstream_error", "upstream_error", "failed"),
    ),
    "another type": (
        fails(200, b"hello", "text/plain"),
        (502, "upstream_invalid", "upstream_error", "cannot be read"),
    ),
    "200 with an error": (fails(200, LOUD), (502, "busy", "overloaded_error", "Overloaded")),
    "200 with bad JSON": (fails(200, b"{bad"), (502, "upstream_invalid", "upstream_error", "")),
    "200 with nothing": (sends(), (502, "empty_stream", "upstream_error", "empty")),
    "an error as the first event": (
        sends(framed(LOUD)),
        (502, "busy", "overloaded_error", "Overloaded"),
    ),
    "half a payload": (sends(b'data: {"cho'), (502, "stream_truncated", "upstream_error", "broke")),
}


async def dies(call: Call) -> None:
    await call.cut()


async def half_a_head(call: Call) -> None:
    await call.raw(b"HTTP/1.1 200 OK\r\nContent-")
    call.transport.close()


async def half_a_head_and_reset(call: Call) -> None:
    await call.raw(b"H")
    await asyncio.sleep(0.05)
    await call.cut()


class Status(Case):
    async def test_before_the_first_event(self) -> None:
        """What fails before the first event has a real status, and a message for people."""
        for name, (reply, (status, code, kind, message)) in REFUSALS.items():
            with self.subTest(name):
                answer = await self.ask_through(reply, api_key="sk-secret")
                self.assertEqual(answer.status, status)
                error = answer.error
                self.assertEqual((error["code"], error["type"]), (code, kind))
                self.assertIn(message, error["message"])
                self.assertLessEqual(len(error["message"]), 500)
                self.assertEqual(error["request_id"], answer.headers["X-Request-Id"])
                self.assertEqual(list(error), ["message", "type", "param", "code", "request_id"])
                self.assertNotIn(b"sk-secret", answer.body)

    async def test_in_one_piece(self) -> None:
        """A whole completion in JSON goes out as one chunk and [DONE]; other JSON does not."""
        for body, sent in {
            COMPLETION: [AS_CHUNK, b"[DONE]"],
            b'\xef\xbb\xbf\r\n{"choices":[\r\n{"message":{}}]\r\n}': [
                b'{"choices": [{"delta": {}}], "object": "chat.completion.chunk"}',
                b"[DONE]",
            ],
            b'{"choices":[{"delta":{"content":"a"}},{"message":{"content":"b"}}]}': [
                b'{"choices": [{"delta": {"content": "a"}}, {"delta": {"content": "b"}}], '
                b'"object": "chat.completion.chunk"}',
                b"[DONE]",
            ],
        }.items():
            answer = await self.ask_through(sends(body, content_type="application/json"))
            self.assertEqual(answer.payloads, sent)
        answer = await self.ask_through(sends(b'{"choices":3}', content_type="application/json"))
        self.assertEqual(answer.error["code"], "upstream_invalid")

    async def test_kept(self) -> None:
        """Of another 4xx the param, Retry-After and the rate limits are passed on."""
        body = b'{"error":{"message":"No","param":"n"}}'
        reply = fails(429, body, retry_after="7", x_ratelimit_limit="60", set_cookie="a=b")
        answer = await self.ask_through(reply)
        self.assertEqual(answer.error["param"], "n")
        self.assertEqual(answer.headers["Retry-After"], "7")
        self.assertEqual(answer.headers["x-ratelimit-limit"], "60")
        self.assertNotIn("Set-Cookie", answer.headers)

    async def test_in_band(self) -> None:
        """After the first event it is an event, the last one, without [DONE]."""
        answer = await self.ask_through(sends(framed(HELLO_CHUNK), framed(LOUD), DONE))
        self.assertEqual(answer.status, 200)
        self.assertEqual(answer.payloads[0], HELLO_CHUNK)
        self.assertEqual(answer.error["code"], "busy")
        self.assertEqual(answer.error["request_id"], answer.headers["X-Request-Id"])
        self.assertEqual(len(answer.payloads), 2)

    async def test_unreachable(self) -> None:
        """No upstream, or one that hangs up before a byte: 502 upstream_unreachable."""
        async with serving(base_url="http://127.0.0.1:1/v1") as url:
            self.assertEqual((await self.ask(url)).error["code"], "upstream_unreachable")
        for reply in (dies, half_a_head):
            answer = await self.ask_through(reply)
            self.assertEqual((answer.status, answer.error["code"]), (502, "upstream_unreachable"))

    async def test_cut(self) -> None:
        """A connection that dies in mid-stream is told, with the part kept."""

        async def reply(call: Call) -> None:
            await call.start()
            await call.send(framed(HELLO_CHUNK))
            await asyncio.sleep(0.05)
            await call.cut()

        answer = await self.ask_through(reply)
        self.assertEqual(answer.payloads[0], HELLO_CHUNK)
        self.assertEqual(answer.error["code"], "stream_truncated")

    async def test_first_event_goes_out_at_once(self) -> None:
        """Each event goes out the moment its last byte is in, not when the next one comes."""
        go = asyncio.Event()

        async def reply(call: Call) -> None:
            await call.start()
            await call.send(b'data: {"choices":[]}\r')
            await call.send(b"\r")
            await go.wait()

        async with upstream(reply) as up, serving(up) as url, self.post(url) as response:
            data = await response.content.readuntil(b"\n\n")
            self.assertEqual(data, b'data: {"choices":[]}\n\n')
            go.set()

    async def test_heartbeats(self) -> None:
        """A silent stream gets comments, and its status is 200 from then on."""

        async def reply(call: Call) -> None:
            await asyncio.sleep(0.25)
            await call.start(500)

        answer = await self.ask_through(reply, heartbeat_seconds=0.1)
        self.assertEqual(answer.status, 200)
        self.assertTrue(answer.body.startswith(b": keep-alive\n\n: keep-alive\n\n"))
        self.assertLess(answer.body.count(b": keep-alive"), 4, "one a heartbeat, not one a look")
        self.assertEqual(answer.error["code"], "upstream_error")

    async def test_headers(self) -> None:
        """Streams carry what keeps proxies from holding them back; no banner; an id."""
        async with upstream(says("Hi")) as up, serving(up) as url:
            answer = await self.ask(url, X_Request_Id="abc.1-2_3")
            self.assertEqual(answer.headers["Content-Type"], "text/event-stream; charset=utf-8")
            self.assertEqual(answer.headers["Cache-Control"], "no-cache, no-transform")
            self.assertEqual(answer.headers["X-Accel-Buffering"], "no")
            self.assertEqual(answer.headers["X-Content-Type-Options"], "nosniff")
            self.assertEqual(answer.headers["X-Request-Id"], "abc.1-2_3")
            self.assertEqual(answer.headers["Server"], "chatstream")
            for bad in ("a b", "x" * 129, "<b>", ""):
                self.assertNotEqual(
                    (await self.ask(url, X_Request_Id=bad)).headers["X-Request-Id"], bad
                )


# ---- What the upstream is asked ----------------------------------------------------------


class Asking(Case):
    async def test_request(self) -> None:
        """The upstream gets the key, the request id and the body; nothing else of the client."""
        async with upstream(says("Hi")) as up, serving(up, api_key="sk-1") as url:
            body = HELLO | {"model": None, "temperature": 0.5, "next_year": {"x": [1]}}
            await self.ask(url, body, Cookie="a=b", X_Request_Id="i", Authorization="Bearer no")
            call = up.calls[0]
        self.assertEqual(call.request_line, "POST /v1/chat/completions HTTP/1.1")
        self.assertEqual(call.body, body | {"model": "m", "stream": True})
        self.assertEqual(call.headers["authorization"], "Bearer sk-1")
        self.assertEqual(call.headers["accept"], "text/event-stream")
        self.assertEqual(call.headers["accept-encoding"], "identity")
        self.assertEqual(call.headers["x-request-id"], "i")
        self.assertNotIn("cookie", call.headers)

    async def test_without_a_key(self) -> None:
        """No key: no Authorization header. And no cookie of an upstream is kept."""
        async with upstream(fails(200, LOUD, set_cookie="a=b")) as up:
            up.url = up.url.replace("127.0.0.1", "localhost")  # cookies need a name
            async with serving(up) as url:
                await self.ask(url)
                await self.ask(url)
            self.assertEqual(len(up.calls), 2)
            for call in up.calls:
                self.assertNotIn("authorization", call.headers)
                self.assertNotIn("cookie", call.headers)

    async def test_repeated_key(self) -> None:
        """What is sent on is what was checked: a second `model` cannot slip past."""
        async with upstream(says("Hi")) as up, serving(up) as url:
            body = b'{"model":"m","messages":[{"role":"user"}],"model":"gpt-9","stream":true}'
            self.assertEqual((await self.ask(url, body)).status, 404)
            body = b'{"model":"gpt-9","messages":[{"role":"user"}],"model":"m"}'
            await self.ask(url, body)
            self.assertNotIn(b"gpt-9", up.calls[0].raw_body)

    async def test_any_model(self) -> None:
        """With `*` any model may be asked for, and the list is the upstream's."""

        async def reply(call: Call) -> None:
            if call.request_line.startswith("GET /v1/models "):
                return await fails(200, b'{"data":[{"id":"a","x":1},{"id":"m"}]}')(call)
            return await says("Hi")(call)

        async with upstream(reply) as up, serving(up, model=("m", "*"), api_key="k") as url:
            await self.ask(url, HELLO | {"model": "any"})
            self.assertEqual(up.calls[0].body["model"], "any")
            async with self.client.get(url + "/v1/models") as response:
                listed = await response.json()
            names = [{"id": "m", "object": "model"}, {"id": "a", "object": "model"}]
            self.assertEqual(listed, {"object": "list", "data": names})
            self.assertEqual(up.calls[1].headers["authorization"], "Bearer k")
        async with upstream(reply) as up, serving(up, model=("*",)) as url:
            answer = await self.ask(url)
            self.assertEqual((answer.status, up.calls), (400, []))
            self.assertIn("GET /v1/models lists them", answer.error["message"])

    async def test_done_lets_go(self) -> None:
        """After [DONE] the upstream is let go, even if it holds the socket open."""

        async def holds(call: Call) -> None:
            await call.start()
            await call.send(GOOD)
            await call.gone.wait()

        async with upstream(holds) as up, serving(up) as url:
            self.assertEqual((await self.ask(url)).payloads[-1], b"[DONE]")
            await asyncio.wait_for(up.calls[0].gone.wait(), PATIENCE)

    async def test_redirect_is_not_followed(self) -> None:
        """A redirect would carry the key to wherever it points."""
        async with upstream(says("Hi")) as other:
            await self.ask_through(fails(302, b"", location=other.url), api_key="sk-1")
            self.assertEqual(other.calls, [])

    async def test_proxy(self) -> None:
        """The proxy of the environment is used, except where no_proxy says so."""
        async with upstream(says("Hi")) as proxy:
            address = proxy.url.removesuffix("/v1")
            with mock_environment(http_proxy=address, no_proxy="127.0.0.1"):
                async with serving(base_url="http://upstream.invalid/v1") as url:
                    await self.ask(url)
                await self.ask_through(says("Hi"))
        lines = [call.request_line for call in proxy.calls]
        self.assertEqual(lines, ["POST http://upstream.invalid/v1/chat/completions HTTP/1.1"])


@contextmanager
def mock_environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


# ---- Time: cancellation, back-pressure, limits -------------------------------------------


class Time(Case):
    async def test_client_leaves(self) -> None:
        """The client goes, and 50 ms later the upstream's connection is gone: before the
        first token, during heartbeats, in mid-stream."""
        for name, reply, beat in (
            ("before the first token", silent, 10.0),
            ("during heartbeats", silent, 0.01),
            ("in mid-stream", stalls, 10.0),
        ):
            with self.subTest(name):
                async with upstream(reply) as up, serving(up, heartbeat_seconds=beat) as url:
                    took = await self.leave(up, url, wait_for_bytes=beat < 1 or reply is stalls)
                    self.assertLess(took, 0.05)
                    metrics = await self.metrics(url)
                    self.assertEqual(metrics['chatstream_streams_total{outcome="client_gone"}'], 1)
                    self.assertEqual(metrics["chatstream_active_streams"], 0)

    async def leave(self, up: Upstream, url: str, wait_for_bytes: bool) -> float:
        """Asks, leaves in the middle, and gives the seconds until the upstream saw it."""
        tls = CLIENT_TLS if url.startswith("https") else None
        address = urlsplit(url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port, ssl=tls)
        body = json.dumps(HELLO).encode()
        writer.write(
            b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await self.eventually(lambda: up.calls)
        if wait_for_bytes:
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        writer.transport.abort()
        left = time.monotonic()
        await asyncio.wait_for(up.calls[-1].gone.wait(), PATIENCE)
        return time.monotonic() - left

    async def test_client_leaves_over_tls(self) -> None:
        """The same over TLS on both sides, also with an upstream that has gone mute."""
        with certificate() as (cert, key):
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(cert, key)
            for reply in (silent, stalls):
                async with upstream(reply, context) as up:
                    env = {"OPENAI_BASE_URL": up.url, "SSL_CERT_FILE": cert}
                    tls = {"CHATSTREAM_TLS_CERT": cert, "CHATSTREAM_TLS_KEY": key}
                    async with program(**env, **tls) as run:
                        self.assertTrue(run.url.startswith("https://"))
                        took = await self.leave(up, run.url, wait_for_bytes=reply is stalls)
                        self.assertLess(took, 0.05)

    @unittest.skipUnless(hasattr(socket, "TCP_INFO"), "TCP_INFO is Linux's")
    async def test_mute_upstream_over_tls(self) -> None:
        """An upstream that reads nothing any more, so that it would never say goodbye, is let
        go all the same: before the head of its answer, and in mid-stream."""

        async def mute(call: Call) -> None:
            call.transport.pause_reading()
            await asyncio.Event().wait()

        async def begins_and_is_mute(call: Call) -> None:
            await call.start()
            await call.send(delta(content="Once"))
            await mute(call)

        def is_closed() -> bool:
            sock = up.calls[0].transport.get_extra_info("socket")
            state: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
            return state != b"\x01"  # no longer ESTABLISHED

        with certificate() as (cert, key):
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(cert, key)
            for reply in (mute, begins_and_is_mute):
                async with upstream(reply, context) as up:
                    env = {"OPENAI_BASE_URL": up.url, "SSL_CERT_FILE": cert}
                    async with program(**env) as run:
                        ask = asyncio.ensure_future(self.ask(run.url))
                        await self.eventually(lambda: up.calls)
                        await asyncio.sleep(0.1)
                        self.assertFalse(is_closed())
                        ask.cancel()
                        started = time.monotonic()
                        await self.eventually(is_closed)
                        self.assertLess(time.monotonic() - started, 0.5)

    async def test_many_at_once(self) -> None:
        """The 101st stream does not wait for the first hundred."""
        async with upstream(stalls) as up, serving(up) as url:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as client:
                asks = [client.post(url + "/stream", json=HELLO) for _ in range(120)]
                answers = await asyncio.gather(*asks)
                self.assertEqual(len(up.calls), 120)
                self.assertEqual((await self.metrics(url))["chatstream_active_streams"], 120)
                for answer in answers:
                    answer.close()

    async def test_unknown_certificate(self) -> None:
        """An upstream whose certificate nobody vouches for is not spoken to."""
        with certificate() as (cert, key):
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(cert, key)
            async with upstream(says("Hi"), context) as up, serving(up) as url:
                self.assertEqual((await self.ask(url)).error["code"], "upstream_unreachable")
                self.assertEqual(up.calls, [])
        self.loop_errors.clear()  # of the upstream's side of the handshake

    async def test_idle(self) -> None:
        """Comments do not count as life: without a data event it is a timeout."""

        async def comments(call: Call) -> None:
            await call.start()
            while not call.gone.is_set():
                await call.send(b": ping\n\n")
                await asyncio.sleep(0.02)

        for reply in (comments, silent):
            answer = await self.ask_through(reply, idle_seconds=0.3)
            self.assertEqual((answer.status, answer.error["code"]), (504, "upstream_timeout"))
        answer = await self.ask_through(stalls, idle_seconds=0.3)
        self.assertEqual(answer.error["code"], "upstream_timeout")

    async def test_long_streams_live(self) -> None:
        """As long as events come, no limit ends a stream; dropped ones count as life too."""

        async def long(call: Call) -> None:
            await call.start()
            for number in range(12):
                await asyncio.sleep(0.05)
                await call.send(b"data: {}\n\n" if number % 2 else framed(HELLO_CHUNK))
            await call.send(TAIL)

        answer = await self.ask_through(long, idle_seconds=0.3, write_seconds=0.3)
        self.assertEqual(answer.payloads[-1], b"[DONE]")

    async def test_connect_limit(self) -> None:
        """An upstream that does not even connect is a timeout, 504."""
        with socket.socket() as full:  # a listener whose queue is full answers no SYN
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            address = full.getsockname()
            with socket.socket() as first, socket.socket() as second:
                for each in (first, second):
                    each.setblocking(False)
                    each.connect_ex(address)
                base = f"http://127.0.0.1:{address[1]}/v1"
                async with serving(base_url=base, connect_seconds=0.3) as url:
                    answer = await self.ask(url)
        self.assertEqual((answer.status, answer.error["code"]), (504, "upstream_timeout"))

    @asynccontextmanager
    async def slow_client(self, reply: Reply, **settings: Any) -> AsyncIterator[Any]:
        """A client that has asked and reads nothing, with small buffers in between; gives the
        address, the client's reader, and the upstream."""
        settings = dict[str, Any](port=0, drain_seconds=0.0) | settings
        async with upstream(reply) as up:
            server = Chatstream(Settings(base_url=up.url, **settings))
            url = await server.start()
            listener: Any = next(iter(server.runner.sites))
            listener._server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", urlsplit(url).port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
            body = json.dumps(HELLO).encode()
            head = "POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            try:
                yield url, reader, up
            finally:
                writer.transport.abort()
                await server.drain()

    async def test_the_tail_belongs_to_the_stream(self) -> None:
        """A stream runs until the client has taken its last byte: the limits and the drain
        know of it, also when the upstream has long been let go."""
        reply = sends(framed(b'{"choices":["%b"]}' % (b"x" * 50_000)) + TAIL)
        async with self.slow_client(reply) as (url, reader, up):
            await self.eventually(lambda: up.calls and not up.tasks)
            await asyncio.sleep(0.2)
            metrics = await self.metrics(url)
            self.assertEqual(metrics["chatstream_active_streams"], 1)
            self.assertEqual(metrics['chatstream_streams_total{outcome="completed"}'], 0)
            await self.read_until(reader, b"[DONE]")
        async with self.slow_client(reply, write_seconds=0.4) as (url, reader, up):
            await self.until_outcome(url, "client_gone")

    async def read_until(self, reader: asyncio.StreamReader, end: bytes) -> bytes:
        data = b""
        async with asyncio.timeout(PATIENCE):
            while end not in data:
                data += await reader.read(4096)
        return data

    async def test_nothing_after_the_end(self) -> None:
        """No heartbeat follows the last byte, however late a client takes it: on a connection
        that is kept alive it would be taken for the next answer."""
        reply = sends(framed(b'{"choices":["%b"]}' % (b"x" * 40_000)) + TAIL)

        async def read_late() -> bytes:
            async with self.slow_client(reply, heartbeat_seconds=0.1) as (_, reader, up):
                await self.eventually(lambda: up.calls and not up.tasks)
                await asyncio.sleep(0.2)
                data = await self.read_until(reader, b"0\r\n\r\n")
                with suppress(TimeoutError):
                    data += await asyncio.wait_for(reader.read(100), 0.2)
                return data

        for data in await asyncio.gather(*(read_late() for _ in range(40))):
            self.assertTrue(data.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"), data[-80:])

    async def until_outcome(self, url: str, outcome: str) -> None:
        async with asyncio.timeout(PATIENCE):
            name = f'chatstream_streams_total{{outcome="{outcome}"}}'
            while not (await self.metrics(url))[name]:
                await asyncio.sleep(0.02)

    async def test_slow_tokens_for_a_stalled_client(self) -> None:
        """New tokens do not count as reading: the write limit ends it all the same."""

        async def trickles(call: Call) -> None:
            await call.start()
            while not call.gone.is_set():
                await call.send(framed(b'{"choices":["%b"]}' % (b"x" * 4000)))
                await asyncio.sleep(0.1)

        async with self.slow_client(trickles, write_seconds=0.8) as (url, _, _):
            started = time.monotonic()
            await self.until_outcome(url, "client_gone")
            self.assertLess(time.monotonic() - started, 2.5)

    async def test_back_pressure(self) -> None:
        """200 MB for a client that reads nothing: the process does not grow, the upstream
        waits, and the write limit ends it."""
        sent = 0

        async def floods(call: Call) -> None:
            nonlocal sent
            await call.start()
            block = framed(b'{"choices":["%b"]}' % (b"x" * 10_000)) * 10
            while sent < 200_000_000:
                await call.send(block)
                sent += len(block)

        async with upstream(floods) as up:
            env = {"OPENAI_BASE_URL": up.url, "CHATSTREAM_WRITE_SECONDS": "1"}
            async with program(**env) as run:
                await self.ask(run.url, b"{}")  # what grows at a first request has grown
                before = run.memory()
                async with self.post(run.url):
                    started = time.monotonic()
                    await asyncio.wait_for(up.calls[0].gone.wait(), PATIENCE)
                    self.assertGreater(time.monotonic() - started, 0.9)
                    self.assertLess(run.memory() - before, 10_000_000)
                self.assertLess(sent, 100_000_000)
                metrics = await self.metrics(run.url)
                self.assertEqual(metrics['chatstream_streams_total{outcome="client_gone"}'], 1)


# ---- Who gets in, and what they may send -------------------------------------------------

BODIES = {  # name: (the body, then status and code)
    "no JSON": (b"{", 400, "invalid_json"),
    "nothing": (b"", 400, "invalid_json"),
    "bad UTF-8": (b'{"messages":[{"role":"user","content":"\xff"}]}', 400, "invalid_json"),
    "UTF-16": (json.dumps(HELLO).encode("utf-16"), 400, "invalid_json"),
    "NaN": (b'{"messages":[{"role":"user"}],"x":NaN}', 400, "invalid_json"),
    "an infinite number": (b'{"messages":[{"role":"user"}],"x":1e999}', 400, "invalid_json"),
    "a number of 5,000 digits": (b'{"x":%b}' % (b"1" * 5000), 400, "invalid_json"),
    "deep nesting": (b"[" * 100_000, 400, "invalid_json"),
    "deep nesting inside": (
        b'{"messages":[{"role":"user"}],"x":%b%b}' % (b"[" * 50_000, b"]" * 50_000),
        400,
        "invalid_json",
    ),
    "a list": (b"[]", 400, "invalid_request"),
    "no messages": (b"{}", 400, "invalid_messages"),
    "null messages": (b'{"messages":null}', 400, "invalid_messages"),
    "empty messages": (b'{"messages":[]}', 400, "invalid_messages"),
    "messages of another type": (b'{"messages":{"role":"user"}}', 400, "invalid_messages"),
    "a message of another type": (b'{"messages":["hi"]}', 400, "invalid_messages"),
    "no role": (b'{"messages":[{"content":"hi"}]}', 400, "invalid_messages"),
    "an unknown role": (b'{"messages":[{"role":"root"}]}', 400, "invalid_messages"),
    "a role of another type": (b'{"messages":[{"role":["user"]}]}', 400, "invalid_messages"),
    "content of another type": (
        b'{"messages":[{"role":"user","content":7}]}',
        400,
        "invalid_messages",
    ),
    "parts of another type": (
        b'{"messages":[{"role":"user","content":["x"]}]}',
        400,
        "invalid_messages",
    ),
    "no stream wanted": (
        b'{"messages":[{"role":"user"}],"stream":false}',
        400,
        "stream_required",
    ),
    "a model of another type": (
        b'{"messages":[{"role":"user"}],"model":["m"]}',
        400,
        "invalid_request",
    ),
    "another model": (b'{"messages":[{"role":"user"}],"model":"n"}', 404, "model_not_found"),
    "too long": (b"x" * 10_001, 413, "body_too_large"),
}

PAGE_ELSEWHERE = "http://evil.example"
VISITORS = {  # name: (method and path, headers, then status and code)
    "a rebound name": ("GET /", {"Host": "evil.example"}, 403, "forbidden_host"),
    "a rebound name with a port": ("GET /", {"Host": "evil.example:80"}, 403, "forbidden_host"),
    "a rebound name for the models": (
        "GET /v1/models",
        {"Host": "evil.example"},
        403,
        "forbidden_host",
    ),
    "localhost": ("GET /", {"Host": "LocalHost:1234"}, 200, ""),
    "IPv6": ("GET /", {"Host": "[::1]:8080"}, 200, ""),
    "an allowed host": ("GET /", {"Host": "Chat.Example:443"}, 200, ""),
    "probes by any name": ("GET /healthz", {"Host": "10.0.0.7:8080"}, 200, ""),
    "metrics by any name": ("GET /metrics", {"Host": "10.0.0.7:8080"}, 200, ""),
    "another origin": ("POST /stream", {"Origin": PAGE_ELSEWHERE}, 403, "forbidden_origin"),
    "a null origin": ("POST /stream", {"Origin": "null"}, 403, "forbidden_origin"),
    "another port": ("POST /stream", {"Origin": "http://localhost:1"}, 403, "forbidden_origin"),
    "its own origin": (
        "POST /stream",
        {"Host": "localhost:80", "Origin": "http://localhost:80"},
        400,
        "invalid_json",
    ),
    "cross-site": ("POST /stream", {"Sec-Fetch-Site": "cross-site"}, 403, "forbidden_origin"),
    "same-site is not same-origin": (
        "POST /v1/chat/completions",
        {"Sec-Fetch-Site": "same-site"},
        403,
        "forbidden_origin",
    ),
    "the page": ("POST /stream", {"Sec-Fetch-Site": "same-origin"}, 400, "invalid_json"),
    "a program with Sec-Fetch-Mode": (
        "POST /stream",
        {"Sec-Fetch-Mode": "cors"},
        400,
        "invalid_json",
    ),
    "a form": (
        "POST /stream",
        {"Content-Type": "text/plain"},
        415,
        "unsupported_media_type",
    ),
    "a charset": (
        "POST /stream",
        {"Content-Type": "application/json; charset=utf-8"},
        400,
        "invalid_json",
    ),
    "a compressed body": (
        "POST /stream",
        {"Content-Encoding": "gzip"},
        415,
        "unsupported_media_type",
    ),
    "an unknown path": ("GET /nothing", {}, 404, "not_found"),
    "a path below": ("GET /v1/models/m", {}, 404, "not_found"),
    "GET of a stream": ("GET /stream", {}, 405, "method_not_allowed"),
    "POST of the page": ("POST /", {}, 405, "method_not_allowed"),
    "DELETE": ("DELETE /healthz", {}, 405, "method_not_allowed"),
}


class Access(Case):
    async def test_bodies(self) -> None:
        """Every bad body gets its error, and costs nothing: the upstream is not asked."""
        async with upstream(says("Hi")) as up, serving(up, max_body_bytes=10_000) as url:
            async with serving(up) as roomy:
                for name, (body, status, code) in BODIES.items():
                    with self.subTest(name):
                        long = status == 400 and len(body) > 10_000
                        answer = await self.ask(roomy if long else url, body)
                        self.assertEqual((answer.status, answer.error["code"]), (status, code))
                        self.assertIsNone(answer.error["param"])
            metrics = await self.metrics(url)
            self.assertEqual(up.calls, [])
        self.assertGreater(metrics['chatstream_streams_total{outcome="rejected"}'], 20)

    async def test_good_bodies(self) -> None:
        """All that OpenAI's API knows, and all that it may add, passes."""
        messages = [
            {"role": "developer", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "tool_call_id": "1", "content": "\U0001f600 \ud83d"},
        ]
        async with upstream(says("Hi")) as up, serving(up) as url:
            for stream in (True, None):
                body = {"messages": messages, "stream": stream, "n": 2, "model": "m"}
                self.assertEqual((await self.ask(url, body)).status, 200)
                self.assertEqual(up.calls[-1].body, body | {"stream": True})

    async def test_visitors(self) -> None:
        """A page elsewhere, or a rebound name, cannot spend the key."""
        async with serving(allowed_hosts=("chat.example",)) as url:
            for name, (request, headers, status, code) in VISITORS.items():
                with self.subTest(name):
                    method, _, path = request.partition(" ")
                    sent = (JSON if method == "POST" else {}) | headers
                    async with self.client.request(method, url + path, headers=sent) as response:
                        self.assertEqual(response.status, status)
                        self.assertTrue(response.headers["X-Request-Id"])
                        if code:
                            self.assertEqual((await response.json())["error"]["code"], code)
                        if status == 405:
                            allow = "POST" if path == "/stream" else "GET, HEAD"
                            self.assertEqual(response.headers["Allow"], allow)

    async def test_bound_elsewhere(self) -> None:
        """Bound to all addresses every host is served, or the allowed ones if there are any."""
        for allowed, status in (((), 200), (("chat.example",), 403)):
            async with serving(host="0.0.0.0", token="t", allowed_hosts=allowed) as url:
                address = url.replace("0.0.0.0", "127.0.0.1")
                async with self.client.get(address, headers={"Host": "other"}) as response:
                    self.assertEqual(response.status, status)

    async def test_token(self) -> None:
        """With a token set, POST and the models need it; the page itself does not."""
        async with upstream(says("Hi")) as up, serving(up, token="tök".encode().hex()) as url:
            right = "Bearer " + "tök".encode().hex()
            for sent, status in (
                (None, 401),
                ("", 401),
                ("Bearer ", 401),
                ("Bearer no", 401),
                (right.removeprefix("Bearer "), 401),
                ("Basic " + right[7:], 401),
                ("Bearer t\u00f6k", 401),
                (right, 200),
                (right.replace("Bearer", "bearer"), 200),
            ):
                headers = {} if sent is None else {"Authorization": sent}
                answer = await self.ask(url, **headers)
                self.assertEqual(answer.status, status, sent)
                async with self.client.get(url + "/v1/models", headers=headers) as response:
                    self.assertEqual(response.status, status)
                if status == 401:
                    self.assertEqual(answer.error["code"], "invalid_token")
                    self.assertEqual(answer.error["type"], "authentication_error")
                    self.assertEqual(answer.headers["WWW-Authenticate"], "Bearer")
            async with self.client.get(url) as response:
                self.assertEqual(response.status, 200)

    async def test_slow_bodies(self) -> None:
        """A body that does not arrive in time is a 408; a broken one is a 400."""
        head = b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        async with serving(base_url="http://127.0.0.1:1/v1", write_seconds=0.2) as url:
            answer = await self.raw(url, head + b"Content-Length: 9\r\n\r\n{")
            self.assertIn(b"408 ", answer.partition(b"\r\n")[0])
            self.assertIn(b"request_timeout", answer)
            answer = await self.raw(url, head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
            self.assertIn(b" 400 ", answer.partition(b"\r\n")[0])
            self.assertNotIn(b"Traceback", answer)
            huge = (
                b"Transfer-Encoding: chunked\r\n\r\n" + b"100000\r\n%b\r\n" % (b"x" * 0x100000) * 2
            )
            answer = await self.raw(url, head + huge)
            self.assertIn(b"body_too_large", answer)

    async def test_expect(self) -> None:
        """`Expect: 100-continue` is honoured: curl waits a second for it."""
        async with serving(base_url="http://127.0.0.1:1/v1") as url:
            answer = await self.raw(
                url,
                b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
            )
        self.assertTrue(answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 "), answer)

    async def test_too_many(self) -> None:
        """One stream above the limit gets 503 with Retry-After, and does not count as active."""
        async with upstream(stalls) as up, serving(up, max_streams=1) as url:
            async with self.post(url) as response:
                await response.content.readuntil(b"\n\n")
                answer = await self.ask(url)
                self.assertEqual((answer.status, answer.error["code"]), (503, "too_many_streams"))
                self.assertEqual(answer.headers["Retry-After"], "1")
                self.assertEqual((await self.metrics(url))["chatstream_active_streams"], 1)

    async def test_head(self) -> None:
        """HEAD works wherever GET does."""
        async with serving() as url:
            for path in ("/", "/v1/models", "/healthz", "/readyz", "/metrics"):
                async with self.client.head(url + path) as response:
                    self.assertEqual((response.status, await response.read()), (200, b""), path)

    async def test_page(self) -> None:
        """The page comes with its policy, an ETag, and 304 for who has it."""
        async with serving() as url:
            async with self.client.get(url) as response:
                policy = response.headers["Content-Security-Policy"]
                self.assertEqual(await response.read(), (HERE / "index.html").read_bytes())
                tag = response.headers["ETag"]
            for directive in (
                "default-src 'none'",
                "connect-src 'self'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
                "require-trusted-types-for 'script'",
                "trusted-types 'none'",
            ):
                self.assertIn(directive, policy.split("; "))
            self.assertRegex(policy, r"script-src 'sha256-[\w+/=]{44}'; style-src 'sha256-")
            self.assertNotIn("unsafe", policy)
            for sent, status in ((tag, 304), (f'W/{tag}, "x"', 304), ("*", 304), ('"x"', 200)):
                async with self.client.get(url, headers={"If-None-Match": sent}) as response:
                    self.assertEqual(response.status, status, sent)
                    self.assertEqual(response.headers["ETag"], tag)
                    self.assertNotIn("Strict-Transport-Security", response.headers)

    async def test_https(self) -> None:
        """With a certificate it speaks HTTPS, and says that it will go on to."""
        with certificate() as (cert, key):
            async with serving(tls_cert=cert, tls_key=key) as url:
                self.assertTrue(url.startswith("https://"))
                async with self.client.get(url, ssl=CLIENT_TLS) as response:
                    self.assertIn("max-age", response.headers["Strict-Transport-Security"])


# ---- What can be watched -----------------------------------------------------------------


class Watching(Case):
    async def test_outcomes(self) -> None:
        """Every POST to the stream routes is counted in exactly one outcome, and none stays
        active."""
        rows: list[tuple[Reply, str]] = [
            (says("Hi"), "completed"),
            (fails(400, b"{}"), "upstream_error"),
            (fails(500, b"{}"), "upstream_error"),
            (sends(framed(LOUD)), "upstream_error"),
            (sends(framed(HELLO_CHUNK), framed(LOUD)), "upstream_error"),
            (sends(framed(b"x")), "upstream_error"),
            (sends(), "upstream_error"),
            (fails(400, b'{"error":{"code":"upstream_timeout"}}'), "upstream_error"),
            (sends(framed(HELLO_CHUNK)), "truncated"),
            (dies, "upstream_error"),
            (silent, "timeout"),
            (stalls, "timeout"),
        ]
        async with upstream(silent) as up, serving(up, idle_seconds=0.2) as url:
            counted = dict.fromkeys(chatstream.OUTCOMES.split(), 0)
            for reply, outcome in rows:
                up.reply = reply
                await self.ask(url)
                counted[outcome] += 1
            for body in (b"{", b"{}"):
                await self.ask(url, body)
            await self.ask(url, Host="evil.example")
            counted["rejected"] += 3
            async with self.client.get(url + "/stream"), self.client.post(url + "/nothing"):
                pass
            metrics = await self.metrics(url)
        for outcome, number in counted.items():
            name = f'chatstream_streams_total{{outcome="{outcome}"}}'
            self.assertEqual(metrics[name], number, outcome)
        self.assertEqual(metrics["chatstream_active_streams"], 0)
        self.assertEqual(metrics["chatstream_events_total"], 2 + 3)
        durations = metrics["gen_ai_client_operation_duration_seconds_count"]
        self.assertEqual(durations, len(rows), "what we refused has no duration")

    async def test_metrics_text(self) -> None:
        """Each metric has its help and its type; the histograms have the GenAI buckets."""
        async with upstream(says("Hi")) as up, serving(up) as url:
            await self.ask(url)
            async with self.client.get(url + "/metrics") as response:
                text = await response.text()
                self.assertIn("text/plain; version=0.0.4", response.headers["Content-Type"])
        for name in (
            "chatstream_active_streams gauge",
            "chatstream_draining gauge",
            "chatstream_max_streams gauge",
            "chatstream_streams_total counter",
            "chatstream_events_total counter",
            "gen_ai_client_operation_time_to_first_chunk_seconds histogram",
            "gen_ai_client_operation_duration_seconds histogram",
        ):
            self.assertIn(f"# TYPE {name}\n", text)
            self.assertIn(f"# HELP {name.split()[0]} ", text)
        name = "gen_ai_client_operation_duration_seconds"
        bounds = re.findall(name + r'_bucket\{le="([^"]+)"\} 1\n', text)
        self.assertEqual(bounds[-4:], ["81.92", "163.84", "327.68", "+Inf"])
        self.assertIn('_bucket{le="0.01"}', text)
        self.assertEqual(text.count("_bucket{"), 2 * 17)

    async def test_no_secret_gets_out(self) -> None:
        """Key, token and message text stand in no answer, no log line, no metric, no repr and
        no process list; nor does the upstream's address in an answer."""
        secrets = ["sk-secret-1", "token-secret-2", "PRIVATE TEXT"]
        body = json.dumps({"messages": [{"role": "user", "content": secrets[2]}]}).encode()
        leaky = json.dumps({"error": {"message": f"{LEAKY} {secrets[:2]}"}}).encode()
        replies = (fails(400, leaky), sends(framed(leaky)), fails(500, leaky), dies, says("Hi"))
        env = {"OPENAI_API_KEY": secrets[0], "CHATSTREAM_TOKEN": secrets[1]}
        seen = []
        async with upstream(says("Hi")) as up:
            async with program(OPENAI_BASE_URL=up.url, OPENAI_MODEL="m", **env) as run:
                for reply in replies:
                    up.reply = reply
                    for text in (body, body[:-1], b'{"messages":[{"role":"PRIVATE TEXT"}]}'):
                        for token in (secrets[1], "no"):
                            answer = await self.ask(run.url, text, Authorization=f"Bearer {token}")
                            seen.append(answer.body.decode())
                malformed = await self.raw(run.url, b"GET / HTTP/9\r\nPRIVATE TEXT\r\n\r\n")
                seen.append(malformed.decode())
                async with self.client.get(run.url + "/metrics") as response:
                    seen.append(await response.text())
                seen.append(
                    Path(f"/proc/{run.process.pid}/cmdline").read_text().partition(".py")[2]
                )
                self.assertEqual(await run.end(signal.SIGTERM), 0)
                seen.append(run.err)
        self.assertNotIn("Traceback", run.err)
        self.assertEqual(len(run.err.splitlines()), 30, run.err)
        settings = Settings(api_key=secrets[0], token=secrets[1])
        seen.append(repr(settings))
        for secret in secrets:
            for place in seen:
                self.assertNotIn(secret, place)

    async def test_log_line(self) -> None:
        """One line a stream: id, outcome, status, events, and how long."""
        async with upstream(says("Hi")) as up, program(OPENAI_BASE_URL=up.url) as run:
            await self.ask(run.url, X_Request_Id="my-id")
            await run.end(signal.SIGTERM)
        (line,) = run.err.splitlines()
        pattern = r"id=my-id outcome=completed status=200 events=2 first=0\.\d+s total=0\.\d+s$"
        self.assertRegex(line, pattern)

    async def test_nothing_is_left_behind(self) -> None:
        """3,000 streams, whole, failed and left, leave memory and files where they were."""
        async with upstream(says("Hi")) as up, program(OPENAI_BASE_URL=up.url) as run:
            replies = (says("Hi"), fails(400, b"{}"), sends(framed(HELLO_CHUNK)), says("Hi"))

            async def some(number: int) -> None:
                for turn in range(number):
                    up.reply = replies[turn % 4]
                    await self.ask(run.url)

            await asyncio.gather(*(some(50) for _ in range(10)))
            memory, files = run.memory(), run.files()
            await asyncio.gather(*(some(300) for _ in range(10)))
            self.assertLess(run.memory() - memory, 3_000_000)
            self.assertLessEqual(run.files(), files + 2)
            await run.end(signal.SIGTERM)
            self.assertNotIn("Warning", run.err)


# ---- Start and stop ----------------------------------------------------------------------

REFUSED = {  # name: (environment, arguments, what the one line names)
    "a port of letters": ({"CHATSTREAM_PORT": "x"}, [], ["CHATSTREAM_PORT", "'x'", "65535"]),
    "a port too high": ({"CHATSTREAM_PORT": "65536"}, [], ["CHATSTREAM_PORT", "65535"]),
    "a negative number": ({"CHATSTREAM_MAX_STREAMS": "-1"}, [], ["MAX_STREAMS", "from 1"]),
    "zero seconds": ({"CHATSTREAM_IDLE_SECONDS": "0"}, [], ["IDLE_SECONDS", "above 0"]),
    "no number": ({"CHATSTREAM_IDLE_SECONDS": "nan"}, [], ["IDLE_SECONDS", "above 0"]),
    "infinity": ({"CHATSTREAM_IDLE_SECONDS": "inf"}, [], ["IDLE_SECONDS", "above 0"]),
    "a negative drain": ({"CHATSTREAM_DRAIN_SECONDS": "-1"}, [], ["DRAIN_SECONDS", "'-1'"]),
    "no switch": ({"CHATSTREAM_REUSE_PORT": "maybe"}, [], ["REUSE_PORT", "true or false"]),
    "no models": ({"OPENAI_MODEL": " , "}, [], ["OPENAI_MODEL", "comma-separated"]),
    "an ftp URL": ({"OPENAI_BASE_URL": "ftp://x/"}, [], ["OPENAI_BASE_URL", "http"]),
    "no URL": ({"OPENAI_BASE_URL": "localhost"}, [], ["OPENAI_BASE_URL", "http"]),
    "no host name": ({"OPENAI_BASE_URL": "http://-..-/v1"}, [], ["OPENAI_BASE_URL"]),
    "a bad port in the URL": ({"OPENAI_BASE_URL": "http://x:99999/"}, [], ["OPENAI_BASE_URL"]),
    "a key with a line end": ({"OPENAI_API_KEY": "sk\n1"}, [], ["OPENAI_API_KEY", "not shown"]),
    "a bad flag": ({}, ["--port", "y"], ["CHATSTREAM_PORT", "'y'"]),
    "an unknown flag": ({}, ["--colour", "y"], ["--colour", "--help"]),
    "a secret flag": ({}, ["--token", "s3cret"], ["--token;"]),
    "an open proxy": ({"CHATSTREAM_HOST": "0.0.0.0"}, [], ["CHATSTREAM_TOKEN", "127.0.0.1"]),
    "half of TLS": ({"CHATSTREAM_TLS_CERT": "x"}, [], ["CHATSTREAM_TLS_KEY"]),
    "no such certificate": (
        {"CHATSTREAM_TLS_CERT": "/none", "CHATSTREAM_TLS_KEY": "/none"},
        [],
        ["CHATSTREAM_TLS_CERT"],
    ),
    "an address of another machine": (
        {"CHATSTREAM_HOST": "192.0.2.1", "CHATSTREAM_TOKEN": "t"},
        [],
        ["CHATSTREAM_HOST"],
    ),
}


class Start(Case):
    async def refused(self, environment: dict[str, str], arguments: list[str]) -> str:
        async with program(*arguments, **{"PYTHONDEVMODE": "", **environment}) as run:
            status = await run.end()
            self.assertEqual((status, run.out), (2, ""), run.err)
            self.assertEqual(len(run.err.splitlines()), 1, run.err)
            return run.err

    async def test_refused(self) -> None:
        """A bad or dangerous set-up stops the start with one line that shows the way out."""

        async def check(name: str, env: dict[str, str], args: list[str], told: list[str]) -> None:
            line = await self.refused(env, args)
            for each in told:
                self.assertIn(each, line, name)

        rows = list(REFUSED.items())
        for start in range(0, len(rows), 4):  # four processes at once
            batch = rows[start : start + 4]
            await asyncio.gather(*(check(name, *row) for name, row in batch))

    async def test_port_in_use(self) -> None:
        """The same when the port is taken."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            line = await self.refused({"CHATSTREAM_PORT": port}, [])
        self.assertIn(port, line)
        self.assertIn("CHATSTREAM_PORT", line)

    def test_flags_beat_variables(self) -> None:
        """A flag beats its variable; an empty variable is none; numbers keep their fraction."""
        env = {"CHATSTREAM_PORT": "1", "CHATSTREAM_MAX_STREAMS": "", "OPENAI_MODEL": "a, b"}
        args = ["--port", "2", "--idle-seconds", "0.5", "--drain-seconds", "0", "--reuse-port"]
        settings = chatstream.read_settings(env, args)
        self.assertEqual((settings.port, settings.max_streams), (2, 1000))
        self.assertEqual((settings.idle_seconds, settings.drain_seconds), (0.5, 0.0))
        self.assertEqual((settings.model, settings.reuse_port), (("a", "b"), True))

    async def test_help(self) -> None:
        """--help names every variable."""
        async with program("--help") as run:
            self.assertEqual(await run.end(), 0)
        for field in dataclasses.fields(Settings):
            self.assertIn(chatstream.variable(field.name), run.out)

    async def test_shared_port(self) -> None:
        """With CHATSTREAM_REUSE_PORT several processes listen on one port."""
        async with program("--reuse-port") as one:
            port = one.url.rpartition(":")[2]
            async with program("--reuse-port", CHATSTREAM_PORT=port) as two:
                self.assertEqual(one.url, two.url)

    async def test_demo(self) -> None:
        """With no key it answers by itself, in Markdown, with what was asked, and its models
        show what goes wrong."""
        async with program("--heartbeat-seconds", "0.2") as run:
            async with self.client.get(run.url + "/v1/models") as response:
                names = [each["id"] for each in (await response.json())["data"]]
            self.assertEqual(tuple(names), chatstream.DEMO_MODELS)
            tasks = [self.ask(run.url, HELLO | {"model": name}) for name in names]
            whole, slow, cut, error, limit = await asyncio.gather(*tasks)
            chunks = [json.loads(each)["choices"] for each in whole.payloads[:-1]]
            text = "".join(each[0]["delta"].get("content", "") for each in chunks if each)
            self.assertIn("demo", text)
            self.assertIn("> Hello", text)
            self.assertIn("OPENAI_API_KEY", text)
            self.assertEqual(whole.payloads[-1], b"[DONE]")
            self.assertTrue(slow.body.startswith(b": keep-alive\n\n"))
            self.assertEqual(slow.payloads[-1], b"[DONE]")
            self.assertEqual(cut.error["code"], "stream_truncated")
            self.assertEqual((error.status, error.error["code"]), (200, "out_of_memory"))
            self.assertEqual((limit.status, limit.headers["Retry-After"]), (429, "5"))
            await run.end(signal.SIGTERM)
            self.assertIn("the demo", run.out)


class Drain(Case):
    async def test_idle(self) -> None:
        """With no stream running, SIGTERM and SIGINT end it within a second, with status 0,
        also with a keep-alive connection and a half-sent body."""
        for number in (signal.SIGTERM, signal.SIGINT):
            async with program(OPENAI_BASE_URL="http://127.0.0.1:1/v1") as run:
                await self.metrics(run.url)
                address = ("127.0.0.1", urlsplit(run.url).port)
                reader, writer = await asyncio.open_connection(*address)
                writer.write(b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
                writer.write(b"Content-Type: application/json\r\n\r\n{")
                await asyncio.sleep(0.1)
                started = time.monotonic()
                self.assertEqual(await run.end(number), 0)
                self.assertLess(time.monotonic() - started, 1)
                self.assertNotIn("Traceback", run.err)
                self.assertIn(b" 503 ", await reader.readline())
                self.assertIn("outcome=rejected status=503", run.err)
                writer.close()

    async def test_running_streams_go_on(self) -> None:
        """Streams that run are finished; meanwhile new ones are refused, and nobody can
        connect."""
        go = asyncio.Event()

        async def waits(call: Call) -> None:
            await call.start()
            await call.send(framed(HELLO_CHUNK))
            await go.wait()
            await call.send(TAIL)

        # Not in development mode, where asyncio tells of a connection that comes while it closes.
        env = {"PYTHONDEVMODE": ""}
        async with upstream(waits) as up, program(OPENAI_BASE_URL=up.url, **env) as run:
            async with self.client.get(run.url + "/readyz") as response:  # and stays open
                self.assertEqual(response.status, 200)
            async with self.post(run.url) as response:
                await response.content.readuntil(b"\n\n")
                await asyncio.gather(*(self.metrics(run.url) for _ in range(8)))
                run.process.send_signal(signal.SIGTERM)
                await self.until_closed(run.url)
                for path, status in (
                    ("/readyz", 503),
                    ("/healthz", 200),
                    ("/", 503),
                    ("/v1/models", 503),
                ):
                    async with self.client.get(run.url + path) as probe:
                        self.assertEqual(probe.status, status)
                        self.assertEqual(probe.headers["Connection"], "close")
                answer = await self.ask(run.url)
                self.assertEqual((answer.status, answer.error["code"]), (503, "server_draining"))
                self.assertEqual(answer.headers["Connection"], "close")
                self.assertIn("Retry-After", answer.headers)
                go.set()
                self.assertTrue((await response.read()).endswith(DONE))
            self.assertEqual(await run.end(), 0)
            self.assertNotIn("Traceback", run.err)

    async def until_closed(self, url: str) -> None:
        async with asyncio.timeout(PATIENCE):
            with suppress(OSError):
                while True:
                    _, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
                    writer.close()
                    await asyncio.sleep(0.01)

    async def test_deadline(self) -> None:
        """Those left at the deadline are told: in-band, or by 503 if nothing was sent yet; a
        stalled reader holds nobody up."""

        async def flood(call: Call) -> None:
            await call.start()
            while not call.gone.is_set():
                await call.send(framed(HELLO_CHUNK) * 500)

        async def mixed(call: Call) -> None:
            await {"a": silent, "b": stalls, "c": flood}[call.body["model"]](call)

        env = {"OPENAI_MODEL": "a,b,c", "CHATSTREAM_DRAIN_SECONDS": "0.5"}
        async with upstream(mixed) as up, program(OPENAI_BASE_URL=up.url, **env) as run:
            body = json.dumps(HELLO | {"model": "c"})
            stalled = self.client.post(run.url + "/stream", data=body, headers=JSON)
            slow = self.client.post(run.url + "/stream", data=body, headers=JSON)
            async with stalled, slow as slow_answer:
                asks = [self.ask(run.url, HELLO | {"model": model}) for model in "ab"]
                tasks = [asyncio.ensure_future(each) for each in asks]
                await self.eventually(lambda: len(up.calls) == 4)
                started = time.monotonic()
                end = asyncio.ensure_future(run.end(signal.SIGTERM))
                await asyncio.sleep(1)  # after the deadline it reads on
                last = (await slow_answer.read())[-300:]
                self.assertEqual(await end, 0)
                self.assertLess(time.monotonic() - started, 2.5)
                silent_one, begun = await asyncio.gather(*tasks)
        self.assertIn(b'"code": "server_draining"', last)
        self.assertEqual((silent_one.status, silent_one.error["code"]), (503, "server_draining"))
        self.assertEqual((begun.status, begun.error["code"]), (200, "server_draining"))
        self.assertEqual(run.err.count("outcome=drained"), 4)
        self.assertNotIn("ResourceWarning", run.err)
        self.assertNotIn("Traceback", run.err)

    async def test_second_signal(self) -> None:
        """A second signal ends it at once, with status 1."""
        async with upstream(stalls) as up, program(OPENAI_BASE_URL=up.url) as run:
            async with self.post(run.url) as response:
                await response.content.readuntil(b"\n\n")
                run.process.send_signal(signal.SIGINT)
                await self.until_closed(run.url)
                started = time.monotonic()
                self.assertEqual(await run.end(signal.SIGINT), 1)
                self.assertLess(time.monotonic() - started, 0.5)

    async def test_without_loop_signal_handlers(self) -> None:
        """It drains on a loop without signal handlers too, as Windows has it."""
        code = (
            "import asyncio, sys, chatstream\n"
            "def refuse(*_): raise NotImplementedError\n"
            "asyncio.SelectorEventLoop.add_signal_handler = refuse\n"
            "sys.exit(chatstream.main())"
        )
        async with running(["-c", code], {}) as run:
            self.assertEqual(await run.end(signal.SIGINT), 0)
            self.assertNotIn("Traceback", run.err)


# ---- What a hard look found --------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


ENCRYPTED_KEY = """-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAiAP1+rM55x/QICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEAQIEEBxehlN2Doy6CVk9YrLXpoMEgZAJ
P+qjrOfzXY9cF9REp3LdoHfPzDqMvIzFFaYZSEPFMKdJXmvdTV3WwPE4jMTCrh5k
Z9m3zUCucyYv4NgwnuE6OPgqM461jjBVx8thgPgxmnZzpIDkkNKoMadZBgA2INpF
OO9c4IYBfr/+E9S//fa/Jw8dcvfu1jHpe8bF/pXfKUOLp7MYYmlJTNORg2xuK9o=
-----END ENCRYPTED PRIVATE KEY-----
"""


class HardLook(Case):
    """Nothing hangs on stdout, on file limits or on a broken peer."""

    @asynccontextmanager
    async def shell(
        self,
        line: str,
        up: Upstream,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        /,
        **environment: str,
    ) -> AsyncIterator[Program]:
        """A shell that runs this line, PROGRAM in it being chatstream on a port of our choice."""
        port = free_port()
        env = clean_environment(OPENAI_BASE_URL=up.url, CHATSTREAM_PORT=str(port), **environment)
        line = line.replace("PROGRAM", f"exec {shlex.quote(sys.executable)} chatstream.py")
        process = await asyncio.create_subprocess_shell(
            line, cwd=HERE, env=env, stdout=stdout, stderr=stderr
        )
        run = Program(process, io.BytesIO())
        run.url = f"http://127.0.0.1:{port}"
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    with suppress(aiohttp.ClientError):
                        await (await self.client.get(run.url + "/healthz")).read()
                        break
                    await asyncio.sleep(0.02)
            yield run
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    async def test_broken_outputs(self) -> None:
        """Whatever becomes of stdout and stderr, a shutdown still waits for its streams."""
        go = asyncio.Event()

        async def reply(call: Call) -> None:
            await call.start()
            await call.send(delta(content="Once"))
            await go.wait()
            await call.send(TAIL)

        for redirect in (">/dev/full 2>/dev/full", "1>&- 2>&-", "2>&-"):
            go.clear()
            async with upstream(reply) as up:
                env = {"PYTHONIOENCODING": "ascii", "OPENAI_MODEL": "模型"}
                async with self.shell(f"PROGRAM {redirect}", up, **env) as run:
                    async with self.post(run.url) as response:
                        await response.content.readany()
                        run.process.send_signal(signal.SIGTERM)
                        await asyncio.sleep(0.1)
                        go.set()
                        self.assertTrue((await response.read()).endswith(DONE), redirect)
                    out, _ = await asyncio.wait_for(run.process.communicate(), PATIENCE)
                    self.assertEqual(run.process.returncode, 0, redirect)
                    self.assertNotIn(b"outcome=", out, "log lines are no output")

    async def test_outputs_that_nobody_reads(self) -> None:
        """A pipe whose reader has gone or sleeps: lines are dropped, and it drains all the same."""
        gone, stdout = os.pipe()
        os.close(gone)  # as `| head -1` does
        asleep, stderr = os.pipe()
        async with upstream(says("Hi")) as up:
            async with self.shell("PROGRAM", up, stdout, stderr) as run:
                for _ in range(30):  # 64 KB fill a pipe
                    asks = (self.ask(run.url, b"{", X_Request_Id="x" * 128) for _ in range(20))
                    await asyncio.gather(*asks)
                self.assertEqual((await self.ask(run.url)).payloads[-1], b"[DONE]")
                run.process.send_signal(signal.SIGTERM)
                self.assertEqual(await asyncio.wait_for(run.process.wait(), PATIENCE), 0)
        for each in (stdout, asleep, stderr):
            os.close(each)

    async def test_open_files(self) -> None:
        """With few open files fewer streams are admitted, one line says so, and those that are
        run; asyncio does not fill the log."""
        async with upstream(stalls) as up:
            async with self.shell("ulimit -n 104; PROGRAM", up) as run:
                metrics = await self.metrics(run.url)
                self.assertEqual(metrics["chatstream_max_streams"], 20)
                connector = aiohttp.TCPConnector(limit=0)
                async with aiohttp.ClientSession(connector=connector) as client:
                    asks = [client.post(run.url + "/stream", json=HELLO) for _ in range(30)]
                    answers = await asyncio.gather(*asks)
                    statuses = sorted(answer.status for answer in answers)
                    self.assertEqual(statuses, [200] * 20 + [503] * 10)
                    for answer in answers:
                        answer.close()
                run.process.send_signal(signal.SIGTERM)
                _, log = await asyncio.wait_for(run.process.communicate(), PATIENCE)
        self.assertIn(b"104 open files allow 20 streams; 1000 need ulimit -n 2064", log)
        self.assertNotIn(b"Traceback", log)

    async def test_no_files_for_the_upstream(self) -> None:
        """It is not the model server's fault, and not told or counted as such."""
        async with upstream(says("Hi")) as up:
            async with self.shell("ulimit -n 72; PROGRAM", up) as run:
                address = ("127.0.0.1", urlsplit(run.url).port or 0)
                others = []
                while len(os.listdir(f"/proc/{run.process.pid}/fd")) < 72:
                    others.append(socket.create_connection(address))
                    await asyncio.sleep(0.005)
                answer = await self.ask(run.url)  # on the connection that is open
                self.assertEqual((answer.status, answer.error["code"]), (503, "too_many_streams"))
                for each in others:
                    each.close()
                await asyncio.sleep(1.2)  # asyncio pauses its accepting for a second
                metrics = await self.metrics(run.url)
                self.assertEqual(metrics['chatstream_streams_total{outcome="rejected"}'], 1)
                run.process.send_signal(signal.SIGTERM)
                _, log = await asyncio.wait_for(run.process.communicate(), PATIENCE)
        self.assertLess(log.count(b"out of system resource"), 4)

    def test_quiet(self) -> None:
        """Of a connection without an open file asyncio tells once a second at the most."""
        quiet, made = chatstream.Quiet(), logging.makeLogRecord
        info = (OSError, OSError(errno.EMFILE, "x"), None)
        told = [quiet(made({"exc_info": info, "created": t})) for t in (5.0, 5.1, 5.9, 7.0)]
        self.assertEqual(told, [True, False, False, True])
        self.assertTrue(quiet(made({"created": 7.1})))

    async def test_http_1_0(self) -> None:
        """A client of HTTP/1.0 gets an answer that ends with the connection, whatever it asks."""
        body = json.dumps(HELLO).encode()
        head = b"POST /stream HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n"
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        paced = sends(framed(HELLO_CHUNK), TAIL)
        async with upstream(paced) as up, serving(up) as url:
            for data in (head + body, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"):
                reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
                writer.write(data)
                answer = await asyncio.wait_for(reader.read(), PATIENCE)
                self.assertIn(b"200 OK", answer)
                writer.close()

    async def test_models_in_flight(self) -> None:
        """A shutdown waits for a list of models that is being asked for."""
        go = asyncio.Event()

        async def reply(call: Call) -> None:
            await go.wait()
            await fails(200, b'{"data":[{"id":"a"}]}')(call)

        async with upstream(reply) as up:
            async with program(OPENAI_BASE_URL=up.url, OPENAI_MODEL="*") as run:
                listing = asyncio.ensure_future(self.client.get(run.url + "/v1/models"))
                await self.eventually(lambda: up.calls)
                run.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.1)
                go.set()
                response = await listing
                self.assertEqual((await response.json())["data"][0]["id"], "a")
                self.assertEqual(await run.end(), 0)
        self.assertNotIn("Traceback", run.err)

    async def test_bodies_that_never_arrive(self) -> None:
        """They count against the limit of streams, but not as active ones."""
        head = b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += b"Content-Length: 10\r\n\r\n{"
        async with serving(base_url="http://127.0.0.1:1/v1", max_streams=2) as url:
            writers = []
            for _ in range(2):
                _, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
                writer.write(head)
                writers.append(writer)
            await asyncio.sleep(0.1)
            self.assertEqual((await self.ask(url)).error["code"], "too_many_streams")
            self.assertEqual((await self.metrics(url))["chatstream_active_streams"], 0)
            for writer in writers:
                writer.close()

    async def test_bytes_in_headers(self) -> None:
        """Bytes that are no ASCII do no harm: neither in a token nor in an upstream's header."""
        head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\r\n\r\n"
        async with serving(base_url="http://127.0.0.1:1/v1", token="t") as url:
            self.assertIn(b" 401 ", await self.raw(url, head))

        async def reply(call: Call) -> None:
            await call.raw(b"HTTP/1.1 429 X\r\nx-ratelimit-x: \xff\r\nContent-Length: 0\r\n\r\n")

        answer = await self.ask_through(reply)
        self.assertEqual(answer.status, 429)
        self.assertNotIn("x-ratelimit-x", answer.headers)

    async def test_the_first_verdict_stays(self) -> None:
        """A stream that is stopped for one reason is not told another."""

        async def stopped_twice() -> Any:
            stream = chatstream.Stream(Any, chatstream.Relay(1), "id", 0.0)  # type: ignore[arg-type]
            for code in ("upstream_timeout", "server_draining"):
                stream.stop(chatstream.Failure(code))
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(PATIENCE)
            return stream.verdict and stream.verdict.code

        self.assertEqual(await asyncio.create_task(stopped_twice()), "upstream_timeout")

    async def test_encrypted_key(self) -> None:
        """A key with a password is refused; nobody is asked for it."""
        with certificate() as (cert, key):
            Path(key).write_text(ENCRYPTED_KEY)
            env = {"CHATSTREAM_TLS_CERT": cert, "CHATSTREAM_TLS_KEY": key}
            async with running(["chatstream.py"], env) as run:
                self.assertEqual(await run.end(), 2)
            self.assertIn("without a password", run.err)

    async def test_messages_for_people(self) -> None:
        """Key, token and the upstream's own host:port are blotted out, and nothing else is."""
        rows = {
            "retry in 10.24 seconds": "retry in 10.24 seconds",
            "no model at /v1/chat/completions": "no model at /v1/chat/completions",
            "see HOST": "see ***",
            "key key-12345 and x": "key *** and x",
        }
        for said, told in rows.items():
            async with upstream(silent) as up:
                message = said.replace("HOST", urlsplit(up.url).netloc)
                up.reply = fails(400, json.dumps({"error": {"message": message}}).encode())
                async with serving(up, api_key="key-12345", token="x") as url:
                    answer = await self.ask(url, Authorization="Bearer x")
                self.assertEqual(answer.error["message"], told)
        detail = b'{"detail":[{"loc":["body"],"msg":"Field required"}]}'
        answer = await self.ask_through(fails(422, detail))
        self.assertEqual(answer.error["message"], "Field required")

    async def test_refusal_whose_body_stalls(self) -> None:
        """It is told with its status and headers, soon, and no heartbeat makes it a 200."""

        async def reply(call: Call) -> None:
            await call.start(429, "application/json", retry_after="7")
            await call.send(b"{")
            await call.gone.wait()

        answer = await self.ask_through(reply, heartbeat_seconds=0.1)
        self.assertEqual((answer.status, answer.headers["Retry-After"]), (429, "7"))
        self.assertEqual(answer.error["message"], "The model server refused the request.")

    def test_loopback_has_no_proxy(self) -> None:
        """Whatever no_proxy says, what is asked of a model on this machine stays on it."""
        with mock_environment(http_proxy="http://127.0.0.1:9", no_proxy="example.com"):
            for host in ("localhost:1", "127.0.0.9", "[::1]:8", "example.com"):
                self.assertIsNone(chatstream.environment_proxy(f"http://{host}/v1"))
            proxy = chatstream.environment_proxy("http://elsewhere.example/v1")
            self.assertEqual(proxy, "http://127.0.0.1:9")

    async def test_where_the_page_lies(self) -> None:
        """Started through a link it finds its page; a page that is no UTF-8 is one line."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "link.py").symlink_to(HERE / "chatstream.py")
            async with running([str(Path(folder, "link.py"))], {}) as run:
                self.assertEqual(await run.end(signal.SIGTERM), 0)
            shutil.copy(HERE / "chatstream.py", folder)
            Path(folder, "index.html").write_bytes(b"\xff")
            async with running([str(Path(folder, "chatstream.py"))], {}) as run:
                self.assertEqual(await run.end(), 2)
            self.assertEqual(len(run.err.splitlines()), 1, run.err)

    async def test_off_the_main_thread(self) -> None:
        """There are no signals to be had there: it fails at once, and leaves nothing open."""
        settings = Settings(port=0)
        with self.assertRaises(ValueError), warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            await asyncio.to_thread(asyncio.run, chatstream.serve(settings))
            gc.collect()

    async def test_long_integers(self) -> None:
        """Python reads no integer above 4,300 digits: refused, in words that are true."""
        digits = b"1" * 5000
        async with upstream(sends(framed(b'{"choices":[],"n":%b}' % digits))) as up:
            async with serving(up) as url:
                answer = await self.ask(url, b'{"messages":[{"role":"user"}],"n":%b}' % digits)
                self.assertEqual(answer.error["code"], "invalid_json")
                self.assertIn("integers to 4,300 digits", answer.error["message"])
                self.assertEqual((await self.ask(url)).error["code"], "upstream_invalid")

    async def test_leaving_the_demo(self) -> None:
        """Who stops the demo's answer leaves no traceback in the log."""
        async with program() as run:
            async with self.post(run.url) as response:
                await response.content.readany()
            metrics: dict[str, float] = {}
            while not metrics.get('chatstream_streams_total{outcome="client_gone"}'):
                metrics = await self.metrics(run.url)
            await asyncio.sleep(0.1)  # more than a word of the demo takes
            self.assertEqual(await run.end(signal.SIGTERM), 0)
        self.assertNotIn("Traceback", run.err)

    async def test_our_own_fault(self) -> None:
        """A bug of ours is a 500, counted `failed`, and no fault of the client's."""
        async with upstream(says("Hi")) as up, serving(up) as url:
            check, chatstream.check_chat = chatstream.check_chat, None  # type: ignore[assignment]
            try:
                with self.assertLogs("chatstream", "ERROR"):
                    answer = await self.ask(url)
            finally:
                chatstream.check_chat = check
            self.assertEqual((answer.status, answer.error["code"]), (500, "internal_error"))
            metrics = await self.metrics(url)
            self.assertEqual(metrics['chatstream_streams_total{outcome="failed"}'], 1)


# ---- A browser ---------------------------------------------------------------------------
# One Chromium for all, a fresh context (its own storage) per page. Things are found as a
# screen reader finds them: by role and accessible name.

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MUST_RUN = os.environ.get("CHATSTREAM_BROWSER") == "required"
NO_BROWSER = os.environ.get("CHATSTREAM_BROWSER") == "none"
CHROMIUM = None if NO_BROWSER else next(filter(None, map(shutil.which, NAMES)), None)
AXE = os.environ.get("CHATSTREAM_AXE")  # axe.min.js of the npm package axe-core
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--mute-audio --disable-background-networking --disable-component-update "
    "--remote-debugging-port=0 about:blank"
)


class Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.session = socket, ""
        self.answers: dict[int, asyncio.Future[Any]] = {}
        self.events: list[Any] = []
        self.numbers = itertools.count(1)
        self.reader = asyncio.create_task(self.read())

    async def read(self) -> None:
        async for message in self.socket:
            said = json.loads(message.data)
            if "id" in said:
                self.answers.pop(said["id"]).set_result(said)
            else:
                self.events.append(said)

    async def call(self, method: str, **params: Any) -> Any:
        number = next(self.numbers)
        answer = self.answers[number] = asyncio.get_running_loop().create_future()
        head = {"sessionId": self.session} if self.session else {}
        await self.socket.send_json({"id": number, "method": method, "params": params, **head})
        said = await asyncio.wait_for(answer, PATIENCE)
        if "error" in said:
            raise AssertionError(f"{method}: {said['error']['message']}")
        return said["result"]

    async def run(self, code: str, *values: Any) -> Any:
        """The value of a JavaScript expression in the page; of a function, called with these."""
        if values:
            code = f"({code})({', '.join(map(json.dumps, values))})"
        said = await self.call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in said:
            raise AssertionError(said["exceptionDetails"]["exception"].get("description", code))
        return said["result"].get("value")

    async def until(self, code: str) -> Any:
        """Wait until a JavaScript expression is true, and return its value."""
        end = time.monotonic() + PATIENCE
        while not (value := await self.run(code)):
            assert time.monotonic() < end, f"never true: {code}\n{await self.text()}"
            await asyncio.sleep(0.01)
        return value

    async def until_says(self, *words: str) -> None:
        for word in words:
            await self.until(f"document.body.innerText.includes({json.dumps(word)})")

    async def text(self) -> str:
        return str(await self.run("$.log.innerText"))

    async def all(self, role: str, name: str) -> list[int]:
        root = (await self.call("DOM.getDocument", depth=0))["root"]["nodeId"]
        query = {"nodeId": root, "role": role, "accessibleName": name}
        found = (await self.call("Accessibility.queryAXTree", **query))["nodes"]
        return [node["backendDOMNodeId"] for node in found if not node["ignored"]]

    async def find(self, role: str, name: str, index: int = -1) -> int:
        """The last element with this role and accessible name, as soon as there is one."""
        end = time.monotonic() + PATIENCE
        while not (found := await self.all(role, name)):
            assert time.monotonic() < end, f"no {role} {name!r}\n{await self.text()}"
            await asyncio.sleep(0.01)
        return found[index]

    async def focus(self, role: str, name: str, index: int = -1) -> None:
        await self.call("DOM.focus", backendNodeId=await self.find(role, name, index))

    async def tap(self, name: str, index: int = -1) -> None:
        """Presses a button by the keyboard."""
        await self.focus("button", name, index)
        await self.press("Enter")

    async def click(self, name: str, count: int = 1) -> None:
        node = {"backendNodeId": await self.find("button", name)}
        await self.call("DOM.scrollIntoViewIfNeeded", **node)
        x1, y1, x2, _, _, y2, *_ = (await self.call("DOM.getBoxModel", **node))["model"]["content"]
        at = {"x": (x1 + x2) / 2, "y": (y1 + y2) / 2, "button": "left"}
        for number in range(1, count + 1):
            for kind in ("mousePressed", "mouseReleased"):
                await self.call("Input.dispatchMouseEvent", type=kind, clickCount=number, **at)

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, code: int = 0, modifiers: int = 0) -> None:
        code = code or {"Enter": 13, "Escape": 27, "Tab": 9}.get(key, 0)
        event: dict[str, Any] = {"key": key, "code": key, "modifiers": modifiers}
        event |= {"windowsVirtualKeyCode": code} | ({"text": "\r"} if key == "Enter" else {})
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, **event)

    async def send(self, text: str) -> None:
        await self.focus("textbox", "Message")
        await self.type(text)
        await self.press("Enter")

    async def ask(self, text: str = "Hello") -> None:
        """Send a message and wait until its answer has ended, however it did."""
        await self.send(text)
        await self.until("$.log.ariaBusy === 'false'")

    async def reload(self) -> None:
        await self.run("window.before = true")
        await self.call("Page.reload")
        await self.until("window.before === undefined && document.readyState === 'complete'")


@unittest.skipUnless(CHROMIUM or MUST_RUN, "no Chromium found: install it to test the page")
class PageCase(unittest.IsolatedAsyncioTestCase):
    folder: tempfile.TemporaryDirectory[str]
    chromium: subprocess.Popen[str]
    devtools: str

    @classmethod
    def setUpClass(cls) -> None:
        assert CHROMIUM, "CHATSTREAM_BROWSER=required, but no Chromium was found"
        cls.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [CHROMIUM, f"--user-data-dir={cls.folder.name}", *FLAGS.split()]
        cls.chromium = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert cls.chromium.stderr
        lines = (line for line in cls.chromium.stderr if "DevTools listening" in line)
        cls.devtools = next(lines).split()[-1]

    @classmethod
    def tearDownClass(cls) -> None:
        cls.chromium.terminate()
        cls.chromium.communicate()
        cls.folder.cleanup()

    async def asyncSetUp(self) -> None:
        self.exits = AsyncExitStack()
        self.addAsyncCleanup(self.exits.aclose)
        self.up = await self.exits.enter_async_context(upstream(says("Hello.")))

    def sent(self, call: int = -1) -> list[str]:
        """The texts of the messages of a request, without the system's."""
        return [message["content"] for message in self.up.calls[call].body["messages"][1:]]

    async def open(
        self, fragment: str = "", width: int = 1000, height: int = 700, **settings: Any
    ) -> Page:
        """A new tab, with storage of its own, that shows a server in front of self.up."""
        self.url = await self.exits.enter_async_context(serving(self.up, **settings))
        http = await self.exits.enter_async_context(aiohttp.ClientSession())
        socket = http.ws_connect(self.devtools, max_msg_size=0)
        page = Page(await self.exits.enter_async_context(socket))
        context = await page.call("Target.createBrowserContext")
        target = await page.call("Target.createTarget", url="about:blank", **context)
        attached = await page.call("Target.attachToTarget", **target, flatten=True)
        page.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            await page.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await page.call("Emulation.setDeviceMetricsOverride", **size)
        await page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        await page.call("Page.navigate", url=self.url + "/" + fragment)
        await page.until("document.readyState === 'complete' && location.protocol === 'http:'")
        return page


# ---- Markdown ----------------------------------------------------------------------------
# As the models write it. Left: what came; right: the HTML it becomes, without attributes.

# fmt: off
MARKDOWN = {
    "# A\n\n## B ##\n### C#\n####### D": "<h1>A</h1><h2>B</h2><h3>C#</h3><p>####### D</p>",
    "##### E": "<h5>E</h5>",
    "a **b** *c* ***d*** ~~e~~ `f`": "<p>a <strong>b</strong> <em>c</em> "
        "<em><strong>d</strong></em> <del>e</del> <code>f</code></p>",
    "snake_case_name, 2*3*4, 2**3**4, a*b, ~5": "<p>snake_case_name, 2*3*4, 2**3**4, a*b, ~5</p>",
    "**open and *open": "<p>**open and *open</p>",
    r"\*no\* \# c:\dir": r"<p>*no* # c:\dir</p>",
    "one\ntwo  \nthree\\\nfour": "<p>one<br>two<br>three<br>four</p>",
    "- a\n- b\n  - c\n    - d\n- e":
        "<ul><li>a</li><li>b<ul><li>c<ul><li>d</li></ul></li></ul></li><li>e</li></ul>",
    "1. a\n   - b\n2. c": "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>",
    "1. a\n  - b\n\n2. c": "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>",
    "7. a\n8. b": '<ol start="7"><li>a</li><li>b</li></ol>',
    "- a\n\n  b\n- c\nd": "<ul><li>a<p>b</p></li><li>c<br>d</li></ul>",
    "In the year\n2024. it was": "<p>In the year<br>2024. it was</p>",
    "> a\n> - b\n>\n> c\n\nd":
        "<blockquote><p>a</p><ul><li>b</li></ul><p>c</p></blockquote><p>d</p>",
    "a\n\n---\n***\nb": "<p>a</p><hr><hr><p>b</p>",
    "```py\nif a:\n\n    *b*\n```\nc": "CODE[py|if a:\n\n    *b*]<p>c</p>",
    "````\n```\n````": "CODE[|```]",
    "~~~\nopen": "CODE[|open]",
    "- a\n  ```sh\n  ls\n   -l\n  ```\n- b": "<ul><li>aCODE[sh|ls\n -l]</li><li>b</li></ul>",
    "|a|b|c|\n|-|:-:|--:|\n|`x\\|y`|**2**|": "<div><table><thead><tr><th>a</th><th>b</th>"
        "<th>c</th></tr></thead><tbody><tr><td><code>x|y</code></td><td><strong>2</strong></td>"
        "<td></td></tr></tbody></table></div>",
    "a | b\n--- | ---\n1 | 2\n\nend": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>1</td><td>2</td></tr></tbody></table></div><p>end</p>",
    "a | b, no table": "<p>a | b, no table</p>",
    '[a *b*](https://x.y/w_(z)?q#f "t") [r](/x) [j](javascript:alert(1))':
        '<p><a href="https://x.y/w_(z)?q#f">a <em>b</em></a> [r](/x) [j](javascript:alert(1))</p>',
    "<https://x.y> <mailto:a@b.c> https://x.y/z. (http://q.r) [https://q.r]":
        '<p><a href="https://x.y">https://x.y</a> <a href="mailto:a@b.c">mailto:a@b.c</a> '
        '<a href="https://x.y/z">https://x.y/z</a>. (<a href="http://q.r">http://q.r</a>) '
        '[<a href="https://q.r">https://q.r</a>]</p>',
    "![pixel](https://x.y/p.png?d=1) ![](data:image/png,x)":
        '<p><a href="https://x.y/p.png?d=1">pixel</a> ![](data:image/png,x)</p>',
    "[![alt](https://i.j/k)](https://x.y)": '<p><a href="https://x.y">alt</a></p>',
    "<b onclick=x>hi</b> &amp; <!-- c -->":
        "<p>&lt;b onclick=x&gt;hi&lt;/b&gt; &amp;amp; &lt;!-- c --&gt;</p>",
    "**“重点”**内容，见https://x.y。":
        '<p><strong>“重点”</strong>内容，见<a href="https://x.y">https://x.y</a>。</p>',
    "`` a`b `` and `open": "<p><code>a`b</code> and `open</p>",
    r"\(a_1*b_2*c\) $x_1*y*z_2$ $5 and $6 \[": r"<p>\(a_1*b_2*c\) $x_1*y*z_2$ $5 and $6 [</p>",
    "\\[\na *b* c\n\\]": r"<p>\[<br>a *b* c<br>\]</p>",
    "- [ ] a\n- [x] b\n- [y] c": "<ul><li>☐ a</li><li>☑ b</li><li>[y] c</li></ul>",
}
# What must take no time, though it invites trouble: each is repeated to 50,000 characters.
HOSTILE = [
    "*", "**a", "*a_", "_a ", "[", "![", "](", "[](", "[a](b", '[](a "', "`", "`a``", "<",
    "<https://", ">", "> ", "- ", "- a ", "|", "|-", "~~", "\\", "#", "# ", "http://", "_https:///",
    "(http://a", "\n> ", "\n- ", "\n1. ", "\n" + " " * 40 + "- a", "```\n", "\n|a|\n|-|", "![a",
    "*a **b ", "a*", "a**_", " ", "\t", "\n\n", "-", "=", "0.", "<a", "[https://a.b ", "\n```",
]
# fmt: on
SAMPLE = "\n\n".join(MARKDOWN)
RENDER = """(...pieces) => {
    const root = document.createElement('div'), show = markdownInto(root);
    let text = '';
    for (const piece of pieces) show(text += piece);
    show(text);
    return root.innerHTML;
}"""
SKETCH = """(text) => {  // the HTML without the attributes that are the same everywhere
    const root = document.createElement('div');
    markdownInto(root)(text);
    for (const one of root.querySelectorAll('.code')) {
        const parts = [one.querySelector('span'), one.querySelector('code')];
        one.replaceWith(`CODE[${parts.map((part) => part.textContent).join('|')}]`);
    }
    for (const one of root.querySelectorAll('*'))
        for (const name of one.getAttributeNames())
            if (!['href', 'start'].includes(name)) one.removeAttribute(name);
    return root.innerHTML;
}"""


class Markdown(PageCase):
    async def test_what_models_write(self) -> None:
        """Markdown becomes the elements that people expect, and what is none stays text."""
        page = await self.open()
        for text, html in MARKDOWN.items():
            with self.subTest(text):
                self.assertEqual(await page.run(SKETCH, text), html)

    async def test_splits(self) -> None:
        """The final DOM is the same whatever the pieces that the text came in, and a block whose
        successor has a complete first line keeps its nodes to the end."""
        page, chance = await self.open(), random.Random(3)
        whole = await page.run(RENDER, SAMPLE)
        for count in (0, 5, 50, 500, len(SAMPLE)) * 6:
            cuts = sorted(chance.sample(range(len(SAMPLE)), count))
            bounds = zip([0, *cuts], [*cuts, len(SAMPLE)], strict=True)
            self.assertEqual(await page.run(RENDER, *(SAMPLE[a:b] for a, b in bounds)), whole)
        code = """(text) => {
            const root = document.createElement('div'), show = markdownInto(root), nodes = [];
            for (let end = 1; end <= text.length; end += 1) {
                show(text.slice(0, end));
                if (text[end - 1] === '\\n') nodes.push(...[...root.childNodes].slice(0, -1));
            }
            return nodes.length > 100 && nodes.every((node) => node.parentNode === root);
        }"""
        self.assertTrue(await page.run(code, SAMPLE.replace("open", "")))

    async def test_colours(self) -> None:
        """Code gets its colours as ranges, which add no node, and loses them with the answer."""
        self.up.reply = says('```py\ndef f(x):  # why\n    return "a" + 1\n```\n\nend')
        page = await self.open()
        await page.ask()
        seen = """[...CSS.highlights].map(([kind, ranges]) => [kind, ...[...ranges].map((range) =>
            range.startContainer.data.slice(range.startOffset, range.endOffset))])"""
        want = [
            ["keyword", "def", "return"],
            ["comment", "# why"],
            ["string", '"a"'],
            ["number", "1"],
        ]
        self.assertEqual(await page.run(seen), want)
        self.assertEqual(await page.run("document.querySelector('pre code').childNodes.length"), 1)
        self.up.reply = says("~~~\nnone\n~~~")
        await page.tap("Regenerate")
        await page.until_says("none", "Answer complete")
        self.assertEqual(
            await page.run("[...CSS.highlights.values()].map((one) => one.size)"), [0] * 4
        )

    async def test_hostile_text(self) -> None:
        """No text takes long or overflows the stack, however its marks are nested or left open."""
        page = await self.open()
        timed = f"(text) => {{ const t = performance.now(); ({RENDER})(text, 'x');"
        for unit in HOSTILE:
            with self.subTest(unit):
                text = (unit * 50_000)[:50_000]
                ms = await page.run(timed + "return performance.now() - t; }", text)
                self.assertLess(ms, 1000)

    async def test_sse_framing(self) -> None:
        """The parser finds the same events wherever the bytes are cut, whatever ends the lines."""
        page = await self.open()
        lines = ["\ufeffdata: a\u2028é😀", ": c", "data:b", "", "", "data", "", "id: 7", "data:  [DONE]"]  # fmt: skip  # noqa: E501
        code = """async (text) => {
            const all = new Set(), bytes = new TextEncoder().encode(text);
            for (let cut = 0; cut <= bytes.length; cut += 1) {
                const pieces = [bytes.slice(0, cut), new Uint8Array(), bytes.slice(cut)];
                const pull = (to) => { pieces.length ? to.enqueue(pieces.shift()) : to.close(); };
                const events = [], body = new ReadableStream({ pull });
                for await (const { data } of sseLines(body)) if (data !== null) events.push(data);
                all.add(JSON.stringify(events));
            }
            return [...all].map(JSON.parse);
        }"""
        for end, tail in itertools.product(("\n", "\r\n", "\r"), ("", "\n", "\n\n")):
            text = end.join(lines) + tail.replace("\n", end)
            self.assertEqual(await page.run(code, text), [["a\u2028é😀\nb", " [DONE]"]])


# ---- A conversation ----------------------------------------------------------------------


async def half(call: Call) -> None:
    """A reply that says the half of something and then waits."""
    await call.start()
    await call.send(delta(content="Half of"))
    await call.gone.wait()


def breaks(*pieces: str, error: Any = None) -> Reply:
    """A reply that breaks off after these pieces: with an in-band error, or without a word."""

    async def reply(call: Call) -> None:
        await call.start()
        for piece in pieces:
            await call.send(delta(content=piece))
        await (call.send(chunk(error=error)) if error else call.cut())

    return reply


def steps(go: asyncio.Semaphore, *parts: bytes) -> Reply:
    """A reply of these parts; each but the first waits for its turn."""

    async def reply(call: Call) -> None:
        await call.start()
        for part in parts:
            await call.send(part)
            await go.acquire()

    return reply


def refuses(status: int, message: str = "No.", **headers: str) -> Reply:
    async def reply(call: Call) -> None:
        await call.start(status, "application/json", **headers)
        error = {"message": message, "type": "t", "param": None, "code": "c"}
        await call.send(json.dumps({"error": error}).encode())

    return reply


LOST, TWICE = {"message": "GPU lost"}, {"message": "It broke off."}
BOTH = ["Continue", "Retry"]
# What the model does; what the person presses then, and what the model does next; the words that
# show in the end, after "not" those that do not; what is offered; what the last request was.
# fmt: off
ENDINGS: list[tuple[Reply, str, Reply, str, list[str], list[str]]] = [
    (says("Part"), "", silent, "Part|Answer complete", [], ["Hello"]),
    (says("Part", finish=None), "", silent, "Part|Answer complete", [], ["Hello"]),
    (sends(delta("stop"), DONE), "", silent, "Answer complete|not Copy", [], ["Hello"]),
    (says("Part", finish="length"), "", silent, "Part|Cut at the token limit.|not broke off",
        ["Continue"], ["Hello"]),
    (says("Part", finish="weird"), "", silent, "Part|broke off|“weird”", BOTH, ["Hello"]),
    (breaks("Part"), "", silent, "Part|broke off|Answer not complete", BOTH, ["Hello"]),
    (breaks("Part", error=LOST), "", silent, "The answer broke off: GPU lost", BOTH, ["Hello"]),
    (breaks("Part", error=TWICE), "", silent, "It broke off.|not The answer", BOTH, ["Hello"]),
    (refuses(400, "Too long."), "", silent, "No answer: Too long.", ["Retry"], ["Hello"]),
    (breaks(), "", silent, "No answer: ", ["Retry"], ["Hello"]),
    (half, "Stop", silent, "Half of|Stopped by you.", ["Continue"], ["Hello"]),
    (breaks("Half of ", error=LOST), "Continue", says("it."), "Half of it.|Answer complete|not GPU",
        [], ["Hello", "Half of "]),
    (says("Part", finish="length"), "Continue", refuses(400, "Full."), "Part|No answer: Full.",
        BOTH, ["Hello", "Part"]),
    (refuses(400), "Retry", says("Now."), "Now.|not No.", [], ["Hello"]),
    (says("Worse."), "Regenerate", says("Better."), "Better.|not Worse.", [], ["Hello"]),
    (says("Good."), "Regenerate", refuses(400, "Full."), "Good.|No answer: Full.", BOTH, ["Hello"]),
    (says("One."), "Edit", says("Two."), "Hello!|Two.|not One.", [], ["Hello!"]),
]
# fmt: on


class Conversation(PageCase):
    async def test_endings(self) -> None:
        """However an answer ends, its words say it, it offers what helps, and nothing is lost."""
        page = await self.open()
        for reply, press, then, words, offers, sent in ENDINGS:
            with self.subTest(f"{press} {words}"):
                self.up.reply = reply
                await page.click("New chat")
                await page.send("Hello")
                await page.until("$.log.ariaBusy === 'false' || $.log.innerText.includes('Half')")
                self.up.reply, calls = then, len(self.up.calls) + (press not in ("", "Stop"))
                if press:
                    await page.click(press)
                if press == "Edit":
                    await page.type("!")
                    await page.press("Enter")
                while len(self.up.calls) < calls:
                    await asyncio.sleep(0.01)
                await page.until("$.log.ariaBusy === 'false'")
                text = await page.run("document.body.innerText")
                for word in (*words.split("|"), "not undefined", "not [object", "not NaN"):
                    wanted = word.removeprefix("not ")
                    self.assertEqual(wanted in text, wanted == word, word)
                self.assertEqual([b for b in BOTH if await page.all("button", b)], offers)
                self.assertEqual(len(await page.all("alert", "")), int("Retry" in offers))
                self.assertEqual(self.sent(), sent)
        await page.run("wire.add = () => { throw new RangeError('oops'); }; 0")
        await page.ask()
        await page.until_says("No answer: This page has a fault (oops).")

    async def test_wait(self) -> None:
        """A 429 counts its Retry-After down and then enables Retry; nothing is sent by itself."""
        self.up.reply = refuses(429, "Slow down.", retry_after="1")
        page = await self.open()
        await page.ask()
        await page.until_says("Slow down.", "Wait 1 s")
        self.assertTrue(await page.run("$.log.querySelector(':disabled').innerText === 'Retry'"))
        await page.until("!$.log.querySelector(':disabled')")
        self.assertEqual(len(self.up.calls), 1)

    async def test_first_token_before_the_last(self) -> None:
        """What has arrived shows while the rest has not; the whole conversation is sent, and can
        be saved as Markdown; the tab is named by its first message."""
        go, usage = asyncio.Semaphore(0), chunk(choices=[], usage={"completion_tokens": 7})
        start = delta(role="assistant", content=None) + delta(content="**Hel")
        self.up.reply = steps(go, start, delta(content="lo**") + delta("stop") + usage + DONE)
        page = await self.open()
        await page.send("One")
        await page.until_says("Hel", "Answering…")
        self.assertEqual(await page.run("$.log.ariaBusy"), "true")
        go.release()
        await page.until_says("Answer complete", "7 tokens", "First token")
        self.assertIn("Hello", await page.run("document.querySelector('strong').innerText"))
        self.up.reply = says("Again.")
        await page.run("document.querySelector('header details').open = true")
        await page.focus("textbox", "System prompt")
        await page.type(" Be brief.")
        await page.ask("Two")
        body = self.up.calls[-1].body["messages"]
        self.assertEqual([m["role"] for m in body], ["system", "user", "assistant", "user"])
        self.assertEqual(self.sent(), ["One", "**Hello**", "Two"])
        self.assertIn("Be brief.", body[0]["content"])
        complaints = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        self.assertEqual([said for said in page.events if said["method"] in complaints], [])
        for name in ("You", "Assistant"):
            self.assertEqual(len(await page.all("article", name)), 2)
        self.assertTrue((await page.run("document.title")).startswith("One"))
        await page.run("URL.createObjectURL = (blob) => { window.saved = blob; return '#'; }")
        await page.click("Save")
        saved = await page.run("saved.text()")
        self.assertTrue(saved.startswith("## You\n\nOne\n\n## Assistant\n\n**Hello**\n\n## You"))
        self.assertIn("markdown", await page.run("saved.type"))

    async def test_stop(self) -> None:
        """Stop, and Esc, close the upstream within 50 ms and keep the part; Enter does nothing
        meanwhile, and a double click on Send does not stop."""
        page, took = await self.open(), []
        noted = "() => { window.at = Date.now(); }, true"
        await page.run(f"addEventListener('click', {noted}); addEventListener('keydown', {noted})")
        for reply, key in itertools.product((half, silent), ("", "Escape")):
            self.up.reply = reply
            await page.run("$.message.value = ''")
            await page.send("Hello")
            await page.until_says("Half of" if reply is half else "Answering…")
            while not self.up.calls or self.up.calls[-1].gone.is_set():
                await asyncio.sleep(0.01)
            await page.type("next")
            await page.press("Enter")
            await page.find("button", "Stop")
            await (page.press(key) if key else page.click("Stop"))
            await asyncio.wait_for(self.up.calls[-1].gone.wait(), PATIENCE)
            took.append(time.time() - await page.run("window.at") / 1000)
            await page.until_says("Stopped by you")
            await page.find("button", "Send")
            self.assertEqual(await page.run("$.message.value"), "next")
        self.assertEqual(len(self.up.calls), 4)
        self.assertLess(min(took), 0.05)
        self.up.reply = half
        await page.click("Send", count=2)  # a double click does not stop what it began
        await page.until_says("next", "Half of", "Answering…")
        self.assertEqual(len(self.up.calls), 5)

    async def test_edit(self) -> None:
        """Edit fills the composer and puts its draft aside; Esc, and sending, bring it back."""
        page = await self.open()
        value = "document.activeElement.value"
        await page.ask("First")
        await page.ask("Second")
        await page.type("draft")
        for name in ("Escape", "Enter"):
            await page.tap("Edit", 0)
            self.assertEqual(await page.run(value), "First")
            await page.press(name)
            self.assertEqual(await page.run(value), "draft")
        await page.until_says("Answer complete")
        self.assertEqual(self.sent(), ["First"])
        await page.tap("Edit", 0)
        await page.tap("Regenerate", 0)  # what is edited stays, its answer goes
        await page.until_says("Answer complete")
        self.assertEqual(await page.run(value), "draft")

    async def test_undo(self) -> None:
        """Undo brings back what New chat, Regenerate or Edit took, after a reload too, and stops
        what runs; it stays until the next message."""
        page = await self.open()
        texts = "turns.map((one) => one.content)"
        await page.ask("First")
        self.assertEqual(await page.all("button", "Undo"), [])
        await page.ask("Second")
        whole = await page.run(texts)
        self.up.reply = half
        for name in ("Regenerate", "Edit", "New chat"):
            with self.subTest(name):
                await page.tap(name, 0)
                if name == "Edit":
                    await page.press("Enter")
                if name == "New chat":
                    await page.reload()
                else:
                    await page.until_says("Half of")
                self.assertNotEqual(await page.run(texts), whole)
                await page.click("Undo")
                self.assertEqual(await page.run(texts), whole)
                self.assertEqual(await page.all("button", "Undo"), [])
                self.assertEqual(await page.run("$.log.ariaBusy"), "false")
        await page.send("Third")
        await page.until_says("Half of")
        await page.click("New chat")
        self.assertEqual(await page.run("$.log.childElementCount"), 0)
        for call in self.up.calls[2:]:
            await asyncio.wait_for(call.gone.wait(), PATIENCE)
        await page.find("button", "Undo")
        self.up.reply = says("Fresh.")
        await page.ask("Anew")
        self.assertEqual(self.sent(), ["Anew"])
        self.assertEqual(await page.all("button", "Undo"), [])

    async def test_token(self) -> None:
        """A 401 asks for the access token, again if it is wrong, and sends what was asked;
        #token=… is taken at the start and in an open page, and leaves the address bar."""
        page = await self.open(token="right+1")
        await page.send("Secret question")
        for token in ("wrong", "right+1"):
            await page.until("$.ask.open && !$.token.value")
            await page.focus("textbox", "Access token")
            await page.type(token)
            await page.press("Enter")
        await page.until_says("Hello.")
        self.assertEqual(self.sent(0), ["Secret question"])
        await page.reload()
        await page.ask()
        self.assertFalse(await page.run("$.ask.open"))
        page = await self.open("#token=wrong", token="right+1")
        self.assertEqual(await page.run("location.hash"), "")
        await page.run("location.hash = 'token=right+1'")
        await page.until("location.hash === ''")
        await page.ask()
        await page.until_says("Hello.")

    async def test_reload(self) -> None:
        """A reload keeps conversation and draft; an answer that it interrupts is marked so."""
        page = await self.open()
        await page.ask("First")
        self.up.reply = half
        await page.send("Second")
        await page.until_says("Half of")
        await page.type("a draft")
        await page.reload()
        await page.until_says("First", "Hello.", "Second", "Half of", "Interrupted")
        self.assertEqual(await page.run("$.message.value"), "a draft")
        await page.find("button", "Continue")

    async def test_storage(self) -> None:
        """Damaged or full, the storage stops nothing; it is not written at every key."""
        page = await self.open()
        await page.run("""window.saves = 0; const { stringify } = JSON;
            JSON.stringify = (value) => { saves += 'turns' in value; return stringify(value); }""")
        for letter in "not at every key":
            await page.type(letter)
        await page.until("sessionStorage.chat?.includes('not at every key')")
        self.assertLess(await page.run("saves"), 8)
        odd = '{"turns":[null,7,{"role":"assistant","content":5,"tools":9,"until":"x"}]}'
        for junk in ("{", "7", "[]", odd, '{"turns":{}}', '{"turns":"x","taken":[[]],"draft":{}}'):
            await page.run("onpagehide = null")
            await page.run("(junk) => { sessionStorage.chat = junk; }", junk)
            await page.reload()
            self.assertEqual(await page.run("$.log.childElementCount"), 0)
        await page.run("sessionStorage.rest = ' '.repeat(5e6 + 200000)")
        await page.ask("x" * 100_000)
        await page.until("$.status.innerText.includes('Storage is full')")
        self.assertIn("Hello.", await page.text())

    async def test_first_sight(self) -> None:
        """The empty page says how to send, what the demo is, and offers messages to click; with
        more than one model there is a picker, and what it shows is what is asked. Enter sends,
        but not with Shift and not the Enter that ends an IME composition."""
        page = await self.open(model=("demo", "demo-cut-off"))
        await page.until_says("This is the demo", "cut off")
        self.assertIn("Enter sends", await page.run("$.message.placeholder"))
        await page.find("combobox", "Model")
        await page.run("$.model.value = 'demo-cut-off'; $.model.onchange()")
        low = await page.run("$.message.offsetHeight")
        await page.type("a")
        await page.press("Enter", modifiers=8)
        self.assertGreater(await page.run("$.message.offsetHeight"), low)
        await page.press("Enter", code=229)
        event = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true })"
        await page.run(f"$.message.dispatchEvent({event})")
        self.assertEqual(self.up.calls, [])
        await page.press("Enter")
        await page.until_says("Hello.")
        self.assertNotIn("This is the demo", await page.run("document.body.innerText"))
        await page.click("New chat")
        await page.click("What are server-sent events?")
        await page.until_says("Hello.")
        self.assertEqual(
            [self.sent(0)[0].strip(), *self.sent()], ["a", "What are server-sent events?"]
        )
        self.assertEqual(self.up.calls[0].body["model"], "demo-cut-off")

    async def test_copy(self) -> None:
        """Copy takes the Markdown of an answer, or a block's code, and says so; on http too."""
        source = "**a**\n\n```\nx = 1\n```"
        self.up.reply = says(source)
        page = await self.open()
        await page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
        catch = "addEventListener('copy', (e) => { copied = e.clipboardData.getData('text'); })"
        for _ in range(2):
            await page.ask()
            for text in (source, "x = 1"):
                await page.tap("Copy")
                await page.find("button", "Copied")
                self.assertEqual(await page.run("window.copied"), text)
            await page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
            await page.run(catch)

    async def test_reasoning_and_tools(self) -> None:
        """Reasoning is folded, once, and not sent back; a refusal shows, tools are named."""
        call = {"name": "weather", "arguments": "{}"}
        page = await self.open()
        for thought in ({"reasoning_content": "hm", "reasoning": "hm"}, {"reasoning": "hm"}):
            self.up.reply = sends(
                delta(**thought) + delta(content="So"),
                delta(tool_calls=[{"index": 0, "function": call}, {"function": {"name": "clock"}}]),
                delta(refusal="I will not.") + delta("tool_calls") + DONE,
            )
            await page.click("New chat")
            await page.ask()
            folded = "document.querySelector('[role=log] details')"
            self.assertEqual(await page.run(folded + ".textContent"), "Reasoninghm")
            self.assertFalse(await page.run(folded + ".open"))
            for words in ("So\n", "weather, clock", "I will not."):
                self.assertIn(words, await page.text())
        await page.ask()
        self.assertNotIn("hm", json.dumps(self.up.calls[-1].body))

    async def test_scrolling(self) -> None:
        """The page follows the answer until the reader scrolls up; Latest returns."""
        go = asyncio.Semaphore(0)
        parts = [delta(content="line\n\n" * 40 + f"Part {i}\n\n") for i in range(3)]
        self.up.reply = steps(go, *parts, DONE)
        page = await self.open()
        gap = "$.log.scrollHeight - $.log.scrollTop - $.log.clientHeight"
        await page.send("Hello")
        await page.until_says("Part 0")
        await page.until(gap + " < 2")
        notch = {"x": 400, "y": 300, "deltaX": 0, "deltaY": -100}
        await page.call("Input.dispatchMouseEvent", type="mouseWheel", **notch)
        await page.until(gap + " > 50")
        go.release()
        await page.until_says("Part 1")
        self.assertGreater(await page.run(gap), 1000)
        await page.click("Latest")
        await page.until(gap + " < 2")
        self.assertEqual(await page.all("button", "Latest"), [])
        go.release()
        await page.until_says("Part 2")
        await page.until(gap + " < 2")
        go.release()

    async def test_wire(self) -> None:
        """The wire, opened late, follows the end: each line as it came, in one row, the last 500,
        what the token adds apart from what repeats; and the gaps between events, in words too."""
        go, texts = asyncio.Semaphore(0), [*["y"] * 600, *["x" * 500] * 5]
        text = b"".join(delta(content=text) for text in texts)
        self.up.reply = steps(go, text, delta("stop") + DONE)
        page = await self.open()
        await page.send("Hello")
        await page.until_says("xxxx")
        self.assertEqual(await page.all("complementary", "Wire"), [])
        await page.click("Wire")
        end = "$.lines.scrollHeight - $.lines.scrollTop - $.lines.clientHeight"
        self.assertLess(await page.run(end), 2)
        go.release()
        await page.until_says("Answer complete", "[DONE]", "606 events", "first event")
        self.assertLess(await page.run(end), 2)
        rows = await page.run("[...$.lines.children].map((row) => row.innerText)")
        self.assertEqual(len(rows), 500)
        self.assertRegex(rows[0], r"^\d+ ms\s+data: \{")
        self.assertLess(max(map(len, rows)), 420)
        one_row = "new Set([...$.lines.children].map((row) => row.offsetHeight)).size"
        self.assertEqual(await page.run(one_row), 1)
        self.assertEqual(await page.run("$.lines.querySelector('b').innerText"), '"y"')
        name = await page.run("$.plot.ariaLabel")
        self.assertRegex(name, r"longest \d.*full height.*median \d")
        self.assertTrue(await page.all("image", name))
        self.up.reply = sends(b": hm\n\n" + delta(content="z"), chunk(error={"message": "No."}))
        await page.ask()
        kinds = await page.run("[...$.lines.children].map((row) => row.className)")
        self.assertEqual(kinds, ["event", "error"])
        self.assertIn("M0 ", await page.run("$.firstMark.getAttribute('d')"))
        await page.click("Wire")
        self.assertEqual(await page.all("complementary", "Wire"), [])

    async def test_motion_and_touch(self) -> None:
        """Nothing moves for those who asked for that, and a finger finds 40 px; at 360 px nothing
        scrolls sideways but code and tables, each within its own box."""
        page = await self.open(width=360, height=740)
        await page.call("Emulation.setTouchEmulationEnabled", enabled=True)
        media = [{"name": "prefers-reduced-motion", "value": "reduce"}]
        await page.call("Emulation.setEmulatedMedia", features=media)
        table = "|a|b|\n|-|-|\n|" + "wide " * 9 + "|" + "x" * 99 + "|\n\n"
        self.up.reply = says(table + "```\n" + "x" * 200 + "\n```\n" + "y" * 300)
        await page.ask("z" * 300)
        boxes = "[document.documentElement, $.log].map((b) => b.scrollWidth - b.clientWidth)"
        for _ in range(2):
            self.assertEqual(await page.run(boxes), [0, 0])
            await page.click("Wire")
        self.up.reply = half
        await page.send("Hello")
        await page.until_says("Half of")
        moves = "document.getAnimations({ subtree: true }).length"
        self.assertEqual(await page.run(moves), 0)
        await page.call("Emulation.setEmulatedMedia", features=[])
        self.assertEqual(await page.run(moves), 1)
        low = """[...document.querySelectorAll('button, select, summary, textarea')].filter(
            (one) => one.checkVisibility() && one.getBoundingClientRect().height < 40).length"""
        self.assertTrue(await page.run("matchMedia('(pointer: coarse)').matches"))
        self.assertEqual(await page.run(low), 0)

    async def test_xss(self) -> None:
        """Whatever a model, a user, a model's name or an error says: no script, nothing loaded."""
        # fmt: off
        evil = [
            "<script>hit()</script>", "<img src=x onerror=hit()>", "<svg/onload=hit()>",
            "[x](javascript:hit())", "[x](JaVaScRiPt:hit())", "<javascript:hit()>",
            "[x](data:text/html,<script>hit()</script>)", "![x](https://evil.example/x.png)",
            '[x](https://a.b/"onmouseover=hit())', "[x](//evil.example)",
            "```<img src=x onerror=hit()>\n</code><script>hit()</script>\n```",
            "|<img src=x onerror=hit()>|\n|-|\n|<iframe src=//evil.example>|",
            "<style>@import 'https://evil.example'</style>", "<base href=https://evil.example>",
            "<meta http-equiv=refresh content=0;url=https://evil.example>", "\0000\0",
        ]
        # fmt: on
        text = "\n\n".join(evil)
        page = await self.open(model=(evil[1], "b"))
        await page.run("window.hits = 0; window.hit = () => { window.hits += 1; }")
        broken = breaks(text, error={"message": text[:400]})
        for reply in (says(text), broken, refuses(400, text[:400])):
            self.up.reply = reply
            await page.ask(text)
        inside = "[...document.querySelectorAll('[role=log] *')].map((one) => one.localName)"
        allowed = "article h2 div p a br span button pre code table thead tbody tr th td small"
        self.assertLessEqual(set(await page.run(inside)), set(allowed.split()))
        links = "[...$.log.querySelectorAll('a')].map((a) => a.protocol + ' ' + a.rel)"
        self.assertEqual(set(await page.run(links)), {"https: noopener noreferrer"})
        asked = [s["params"] for s in page.events if s["method"] == "Network.requestWillBeSent"]
        urls = {params["request"]["url"] for params in asked}
        self.assertEqual({url for url in urls if not url.startswith((self.url, "data:"))}, set())
        self.assertEqual(await page.run("window.hits"), 0)

    async def test_long_answers(self) -> None:
        """100 KB make no long task, whatever the one block they make, and 600 KB in one event are
        there in two seconds: 50 ms on a quiet machine; here more, since this one may be busy."""
        kinds = {
            "": "Some *words* in a `paragraph`.\n\n",
            "One ": "paragraph of *many* words in `code`, and [a link](https://x.y/z). ",
            "#": "- an item with **bold**\n",
            "|a|b|c|\n|-|:-:|-:|\n": "|a cell|`b`|**c** and more|\n",
            "```\n": "x = 1\n",
        }
        watch = """window.tasks = []; new PerformanceObserver((list) => tasks.push(
            ...list.getEntries().map((one) => one.duration))).observe({ type: 'longtask' })"""
        page = await self.open()
        await page.run(watch)
        await page.call("Accessibility.disable")  # DevTools' own tree costs more

        async def ask(limit: float) -> None:
            for _ in range(3):  # a busy machine may disturb one or two
                await page.run("$.newChat.click(); tasks.length = 0")
                started = time.monotonic()
                await page.run("send('Hello')")
                await page.until("$.status.innerText === 'Answer complete'")
                took = time.monotonic() - started
                tasks = [ms for ms in await page.run("tasks") if ms > 10 * PATIENCE]
                if not tasks and took < limit:
                    return
            self.fail(f"took {took} s, {tasks} ms")

        for start, unit in kinds.items():
            with self.subTest(unit):
                text = (start + unit * 9000)[:100_000]
                self.up.reply = says(*(text[i : i + 100] for i in range(0, len(text), 100)))
                await ask(PATIENCE)
        self.up.reply = says("Some words in a paragraph.\n\n" * 21_000)
        await ask(0.4 * PATIENCE)
        self.assertEqual(await page.run("document.querySelectorAll('.text p').length"), 21_000)

    @unittest.skipUnless(AXE, "CHATSTREAM_AXE does not name an axe.min.js")
    async def test_axe(self) -> None:
        """axe-core finds nothing: empty, streaming, done and failed, in light and in dark."""
        axe = Path(AXE or "").read_text(encoding="utf-8")
        check = """axe.run().then(({ violations }) => violations.map(
            (one) => one.id + ' ' + one.nodes.map((node) => node.html)))"""
        page = await self.open(model=("demo", "demo-cut-off"))
        await page.run(axe + ";0")

        async def look(state: str) -> None:
            self.assertEqual(await page.run(check), [], state)

        for scheme in ("light", "dark"):
            media = [{"name": "prefers-color-scheme", "value": scheme}]
            await page.call("Emulation.setEmulatedMedia", features=media)
            await look("empty")
            self.up.reply = half
            await page.send("Hello")
            await page.until_says("Half of")
            await page.click("Wire")
            await page.run("document.querySelector('header details').open = true")
            await look("streaming")
            await page.click("Stop")
            for reply in (says(SAMPLE), refuses(429, "Slow down.", retry_after="60")):
                self.up.reply = reply
                await page.ask()
                await look("ended")
            await page.tap("Edit")
            await look("edit")
            await page.press("Escape")
            await page.click("New chat")
            await page.click("Wire")
            await page.run("askToken('Why').then(() => {}); 0")
            await look("token")
            await page.press("Escape")


# ---- The README --------------------------------------------------------------------------
# Whatever can be read off the code is compared with it, so that no sentence there can become
# false unseen.


class Readme:
    """The README, taken apart."""

    def __init__(self) -> None:
        self.text = (HERE / "README.md").read_text(encoding="utf-8")

    def part(self, start: str, end: str = "\n## ") -> str:
        """The text from a heading (or a summary) on, up to the next one."""
        _, found, rest = self.text.partition(start)
        assert found, f"README.md has no {start!r}"
        return rest.partition(end)[0]

    def rows(self, start: str, end: str = "\n## ") -> list[list[str]]:
        """The rows of the first table in that part."""
        _, bar, rest = self.part(start, end).partition("\n|")
        table = (bar + rest).partition("\n\n")[0].strip().splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, re.DOTALL | re.MULTILINE)


def code(cell: str) -> list[str]:
    """The words in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def settings_rows() -> list[list[str]]:
    rows = []
    for each in dataclasses.fields(Settings):
        default = each.default
        shown = ",".join(default) if isinstance(default, tuple) else str(default).removesuffix(".0")
        shown = "https://api.openai.com/v1" if each.name == "base_url" else shown.lower()
        what = each.metadata["what"].partition("; if unset")[0]
        rows.append([f"`{chatstream.variable(each.name)}`", f"`{shown}`" if shown else "–", what])
    return rows


def as_table(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


class ReadmeTables(unittest.TestCase):
    """The tables of the README say what the code says."""

    readme = Readme()

    def compare(self, found: list[Any], true: list[Any]) -> None:
        """Fails with a diff whose + lines are what the README should say."""
        if found != true:
            lines = difflib.ndiff(as_table(found).splitlines(), as_table(true).splitlines())
            self.fail("README.md should say:\n" + "\n".join(lines))

    def test_settings(self) -> None:
        """The settings table is the dataclass: every variable, its default, what it does."""
        self.compare(self.readme.rows("## Settings"), settings_rows())

    def test_routes(self) -> None:
        """The routes of the README are the route table."""
        routes = {(method, path) for path, (method, _) in chatstream.ROUTES.items()}
        told = [code(row[0])[0].split() for row in self.readme.rows("## Routes")]
        self.assertEqual({(method, path) for method, path in told}, routes)

    def test_errors(self) -> None:
        """The error table is ERRORS: every code, with its status."""
        rows = self.readme.rows("<summary>Errors", "</details>")
        told = {each: row[0] for row in rows for each in code(row[1])}
        true = {each: str(row[0]) for each, row in chatstream.ERRORS.items()}
        self.assertEqual(told, true | {"upstream_rejected": "the upstream's"})

    def test_first_lines(self) -> None:
        """Both commands, run and test, stand in the first ten lines of the README."""
        head = "\n".join(self.readme.text.splitlines()[:10])
        for command in ("python chatstream.py", "python -m unittest"):
            self.assertIn(command, head)

    def test_requirement(self) -> None:
        """The README asks for the aiohttp that the module asks for."""
        module = (HERE / "chatstream.py").read_text(encoding="utf-8")
        wanted = re.findall(r'^# dependencies = \["(.+)"\]', module, re.MULTILINE)
        self.assertEqual(set(re.findall(r"aiohttp[<>=][^\"'\]]*", self.readme.text)), set(wanted))

    def test_upstreams(self) -> None:
        """Each of the README's lines for a real model is a set-up that the server accepts."""
        lines = [
            line
            for block in self.readme.blocks("sh")
            for line in block.splitlines()
            if line.startswith("OPENAI_")
        ]
        self.assertGreaterEqual(len(lines), 7)
        for line in lines:
            with self.subTest(line):
                words = shlex.split(line.replace("…", "x"), comments=True)
                split = words.index("python")
                self.assertEqual(words[split:], ["python", "chatstream.py"])
                environ = dict(word.split("=", 1) for word in words[:split])
                settings = chatstream.read_settings(environ, [])
                self.assertTrue(settings.api_key or settings.base_url, "that is the demo")
                known = {chatstream.variable(each.name) for each in dataclasses.fields(Settings)}
                self.assertLessEqual(set(environ), known)

    def test_kubernetes(self) -> None:
        """The Kubernetes part fits the program: port, routes, drain, metrics, variables."""
        yaml = "\n".join(self.readme.blocks("yaml"))
        found: Any = lambda pattern: re.findall(pattern, yaml)  # noqa: E731
        default = Settings(base_url="http://127.0.0.1:1/v1")
        self.assertEqual(found(r"containerPort: (\d+)"), [str(default.port)])
        self.assertEqual(sorted(found(r"httpGet: {path: (\S+),")), ["/healthz", "/readyz"])
        drains = found(r'name: CHATSTREAM_DRAIN_SECONDS, value: "(.+)"')
        drain = float(drains[0]) if drains else default.drain_seconds
        (grace,) = found(r"terminationGracePeriodSeconds: (\d+)")
        (asleep,) = found(r"preStop:\s+sleep: {seconds: (\d+)}")
        self.assertGreaterEqual(int(grace), int(asleep) + drain + 5)
        ((port, path),) = found(r"url: http://chatstream\.default\.svc\.cluster\.local:(\d+)(\S+)")
        self.assertEqual(port, str(default.port))
        self.assertIn(path, chatstream.ROUTES)
        text = chatstream.Metrics().text(Chatstream(Settings()))
        for metric in found(r"valueLocation: (\S+)") + found(r"metric: {name: (\S+)}"):
            self.assertIn(f"\n{metric} 0\n", text)
        known = {chatstream.variable(each.name) for each in dataclasses.fields(Settings)}
        self.assertLessEqual(set(found(r"name: ((?:CHATSTREAM|OPENAI)_\w+)")), known)
        # A Service named chatstream would set CHATSTREAM_PORT to an address, in every pod.
        self.assertIn("enableServiceLinks: false", yaml)
        for promise in ("runAsNonRoot: true", "readOnlyRootFilesystem: true"):
            self.assertIn(promise, yaml)


class ReadmeTranscripts(Case):
    """The shell transcripts of the README are what the demo really says."""

    async def test_transcripts(self) -> None:
        """Each `$ curl …` of the README, run against the demo, prints what stands below it."""
        if not shutil.which("curl"):
            self.skipTest("missing: curl")
        text = "".join(Readme().blocks("console"))
        steps = re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
        self.assertGreaterEqual(len(steps), 5)
        async with program() as run:
            assert run.process.stdout
            for command, expected in steps:
                with self.subTest(command):
                    if command == "python chatstream.py":
                        rest = [await run.process.stdout.readline() for _ in range(3)]
                        actual = run.out + b"".join(rest).decode()
                    else:
                        actual = await self.shell(command, run.url)
                    matches = re.fullmatch(self.pattern(expected, run.url), actual)
                    self.assertTrue(matches, f"README.md should say:\n{actual[:600]}")

    async def test_no_network(self) -> None:
        """The demo needs no network: it answers where the environment names a proxy, too."""
        async with program(http_proxy="http://127.0.0.1:9", no_proxy="") as run:
            answer = await self.ask(run.url, HELLO | {"model": "demo-error"})
        self.assertEqual(answer.status, 200)

    async def shell(self, command: str, address: str) -> str:
        port = address.rpartition(":")[2]
        shell = await asyncio.create_subprocess_shell(
            command.replace("localhost:8080", f"127.0.0.1:{port}"),
            env=clean_environment(),
            stdout=subprocess.PIPE,
        )
        output, _ = await asyncio.wait_for(shell.communicate(), PATIENCE)
        return output.decode()

    def pattern(self, expected: str, address: str) -> str:
        """The README's … stands for anything; a line of its own for any lines."""
        exact = re.escape(expected.replace("http://127.0.0.1:8080", address))
        exact = exact.replace("…\\\n", "(?:.*\n)*?").replace("…", ".*")
        return exact.removesuffix("\\\n") + "\n*"


# ---- The start, where something is missing -----------------------------------------------

QUIET: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


class Missing(unittest.TestCase):
    """Where it cannot start, it says why in one line, and what to do."""

    def start(self, *command: str, cwd: Path = HERE, **variables: str) -> str:
        """What stands on stderr after a start that fails: one line, no traceback."""
        done = subprocess.run(
            [*command, "chatstream.py"],
            cwd=cwd,
            env=clean_environment(PYTHONDEVMODE="", **variables),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        self.assertIn(done.returncode, (1, 2), done.stderr)
        self.assertEqual((done.stdout, len(done.stderr.splitlines())), ("", 1), done.stderr)
        return done.stderr

    def test_no_page(self) -> None:
        """A module copied without its page says that index.html belongs beside it."""
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(HERE / "chatstream.py", folder)
            said = self.start(sys.executable, cwd=Path(folder))
        self.assertIn("index.html", said)


# ---- A real client -----------------------------------------------------------------------
# The other neighbours (nginx, HAProxy, Prometheus, the SDK for JavaScript, llama.cpp) are met by
# `.ci/neighbours.py`.


class PythonSDK(Case):
    """OpenAI's own SDK for Python is a client of it."""

    async def test_example_of_the_readme(self) -> None:
        """The README's Python example prints the demo's answer."""
        if not importlib.util.find_spec("openai"):
            self.skipTest("missing: the Python package openai")
        (example,) = Readme().blocks("python")
        async with program() as demo:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                example.replace("http://localhost:8080", demo.url),
                env=clean_environment(PYTHONDEVMODE=""),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            output, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
        self.assertEqual(process.returncode, 0, output.decode())
        self.assertIn("Hello from the demo", output.decode())
        self.assertIn("> Hello", output.decode())


if __name__ == "__main__":
    unittest.main()
