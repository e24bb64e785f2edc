"""What chatstream promises, each promise a test: the real server, a real scripted upstream,
real sockets, and a real browser for the page. Read the docstrings from top to bottom.

    python -m unittest                  # all of it; needs nothing but aiohttp (and Chromium)
"""

from __future__ import annotations

import asyncio
import base64
import copy
import fcntl
import gzip
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import pty
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import aiohttp

import chatstream
from chatstream import BadSetting, Chatstream, Relay, Settings

HERE = Path(__file__).parent
logging.getLogger("aiohttp.server").addFilter(chatstream.Quiet())
logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each slow step
chatstream.log = lambda line: None  # its lines are read where the program runs by itself
PATIENCE = 10.0 * float(os.environ.get("CHATSTREAM_TEST_PATIENCE", "1"))  # seconds, then: red
STREAM = "text/event-stream"
DONE = b"data: [DONE]\n\n"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
NOWHERE = "http://127.0.0.1:1/v1"  # an upstream that nobody asks


# ---- A scripted upstream -----------------------------------------------------------------
# A reply is a coroutine function that gets a Call and says, byte by byte, what to answer.


class Call(asyncio.Protocol):
    """A connection to the upstream: the request that came, and the means to answer it."""

    def __init__(self, up: Upstream) -> None:
        self.up, self.buffer, self.sent = up, b"", 0
        self.task: asyncio.Task[None]
        self.gone = asyncio.Event()  # the other side has closed the connection

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, blank, rest = self.buffer.partition(b"\r\n\r\n")
        self.request_line, *lines = head.decode().split("\r\n")
        self.headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        length = int(self.headers.get("content-length", 0))
        if blank and len(rest) >= length:
            self.raw_body, self.buffer = rest[:length], rest[length:]
            self.body: Any = json.loads(self.raw_body or b"null")
            call = copy.copy(self)  # the next one on this connection is another
            self.up.calls.append(call)
            call.task = asyncio.create_task(call.answer())

    async def answer(self) -> None:
        self.chunked = False
        with suppress(ConnectionError):
            await self.up.reply(self)
            if self.chunked and not self.transport.is_closing():
                await self.raw(b"0\r\n\r\n")

    async def raw(self, data: bytes) -> None:
        """These bytes, as they are; waits while the other side does not read."""
        if self.gone.is_set():
            raise ConnectionResetError
        self.transport.write(data)
        self.sent += len(data)
        while self.transport.get_write_buffer_size() > 2**16:
            await asyncio.sleep(0.001)

    async def start(self, status: int = 200, content_type: str = STREAM, **headers: str) -> None:
        """The head of a chunked answer; `retry_after="5"` makes a header `retry-after: 5`."""
        lines = [f"HTTP/1.1 {status} X", "Transfer-Encoding: chunked"]
        headers |= {"content_type": content_type} if content_type else {}
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.chunked = True
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def send(self, data: bytes) -> None:
        if data:
            await self.raw(b"%x\r\n%b\r\n" % (len(data), data))


Reply = Callable[[Call], Awaitable[None]]


@dataclass
class Upstream:
    reply: Reply
    url: str = ""
    calls: list[Call] = field(default_factory=list)


@asynccontextmanager
async def upstream(reply: Reply, tls: ssl.SSLContext | None = None) -> AsyncIterator[Upstream]:
    up, listen = Upstream(reply), asyncio.get_running_loop().create_server
    server = await listen(lambda: Call(up), "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    up.url = f"https://localhost:{port}/v1" if tls else f"http://127.0.0.1:{port}/v1"
    try:
        yield up
    finally:
        server.close()
        for call in up.calls:
            call.task.cancel()
            call.transport.abort()


def chunk(**fields: Any) -> bytes:
    """One event of a stream of chunks."""
    return b"data: %b\n\n" % json.dumps(fields, ensure_ascii=False).encode()


def delta(finish_reason: str | None = None, **fields: Any) -> bytes:
    return chunk(choices=[{"index": 0, "delta": fields, "finish_reason": finish_reason}])


def says(*pieces: str, finish: str | None = "stop", usage: Any = None) -> Reply:
    """A reply that streams these pieces of text, and ends as it should."""
    events = [*(delta(content=piece) for piece in pieces), delta(finish)]
    return sends(*events, *([chunk(choices=[], usage=usage)] if usage else []), DONE)


def sends(
    *pieces: bytes, status: int = 200, content_type: str = STREAM, pause: float = 0, **headers: str
) -> Reply:
    """A reply of these bytes, each piece in a read of its own."""

    async def reply(call: Call) -> None:
        await call.start(status, content_type, **headers)
        for piece in pieces:
            await call.send(piece)
            await asyncio.sleep(pause)

    return reply


def fails(status: int, body: bytes, **headers: Any) -> Reply:
    """A reply in JSON."""
    return sends(body, status=status, content_type="application/json", **headers)


async def silent(call: Call) -> None:
    """A reply that never comes."""
    await call.gone.wait()


async def stalls(call: Call, until: asyncio.Event | None = None) -> None:
    """A reply that begins, and then says nothing more, or not until then."""
    await call.start()
    await call.send(delta(content="Once"))
    await (until or call.gone).wait()
    await call.send(TAIL)


# ---- The real server, and a client -------------------------------------------------------


@asynccontextmanager
async def serving(up: Upstream | None = None, **settings: Any) -> AsyncIterator[str]:
    """The server in this process, in front of an upstream; gives its address."""
    usual: Any = {"base_url": up.url if up else NOWHERE, "model": ("m",), "drain_seconds": 0.0}
    server = Chatstream(Settings(port=0, **usual | settings))
    try:
        yield await server.start()
    finally:
        await server.drain()


def request(body: bytes = b"", line: str = "POST /stream HTTP/1.1", **more: str) -> bytes:
    """A request as it travels: of this body, else of HELLO, with these headers besides."""
    body = body or json.dumps(HELLO).encode()
    headers = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": len(body)}
    headers |= {name.replace("_", "-"): value for name, value in more.items()}
    lines = [line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


@dataclass
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def payloads(self) -> list[bytes]:
        """The payloads of the events, after a look at the framing of each."""
        assert re.fullmatch(rb"((: keep-alive|data: .*)\n\n)+", self.body), self.body
        return re.findall(rb"(?m)^data: (.*)", self.body)

    @property
    def error(self) -> Any:
        """The one error: the body's, or the last event's."""
        is_event = self.headers["Content-Type"] != "application/json"
        return json.loads(self.payloads[-1] if is_event else self.body)["error"]


class Case(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self) -> None:
        pool, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=PATIENCE)
        self.client = aiohttp.ClientSession(connector=pool, timeout=timeout)
        self.addAsyncCleanup(self.client.close)
        self.loop_errors: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, it: self.loop_errors.append(it))
        self.addCleanup(lambda: self.assertEqual(self.loop_errors, [], "behind the test's back"))

    async def ask(self, url: str, body: Any = HELLO, **headers: str) -> Answer:
        """POST /stream with this body (bytes as they are) and these headers besides."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.get(url + "/stream", "POST", data=data, headers=sent)

    async def ask_through(self, reply: Reply, body: Any = HELLO, **settings: Any) -> Answer:
        """The answer to one request, with an upstream that replies so."""
        async with upstream(reply) as up, serving(up, **settings) as url:
            return await self.ask(url, body)

    async def get(self, url: str, method: str = "GET", **how: Any) -> Answer:
        async with self.client.request(method, url, **how) as response:
            return Answer(response.status, response.headers, await response.read())

    def post(self, url: str, model: str | None = None) -> Any:
        """POST /stream, as a context in which the answer is still running."""
        return self.client.post(url + "/stream", json=HELLO | {"model": model})

    async def connect(self, url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        tls = CLIENT_TLS if url.startswith("https") else None
        return await asyncio.open_connection("127.0.0.1", urlsplit(url).port, ssl=tls)

    async def raw(self, url: str, data: bytes, end: bytes = b"}}") -> bytes:
        """What the server answers to these bytes, up to the end of an error, or this one."""
        reader, writer = await self.connect(url)
        writer.write(data)
        answer = await self.read_until(reader, end)
        writer.close()
        return answer

    async def read_until(self, reader: asyncio.StreamReader, end: bytes) -> bytes:
        """What comes, until this has come or nothing more does."""
        data = b""
        async with asyncio.timeout(PATIENCE):
            while end not in data and (more := await reader.read(65536)):
                data += more
        return data

    async def slow(self, url: str, segment: int = 536) -> asyncio.StreamReader:
        """A client that has asked and reads nothing; segments and buffers are small, so that
        some 40 KB fill all that lies between."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment)
        sock.connect(("127.0.0.1", urlsplit(url).port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
        self.addCleanup(writer.close)
        writer.write(request())
        return reader

    async def metrics(self, url: str) -> dict[str, float]:
        lines = (await self.get(url + "/metrics")).body.decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    async def outcomes(self, url: str) -> dict[str, float]:
        """How streams ended, and how often."""
        every = (await self.metrics(url)).items()
        return {name.split('"')[1]: n for name, n in every if n and "{outcome=" in name}

    def has(self, headers: Any, **wanted: str) -> None:
        """Among these headers are those: `x_request_id="i"` is `X-Request-Id: i`."""
        told = {name: headers.get(name.replace("_", "-")) for name in wanted}
        self.assertEqual(told, wanted)

    async def eventually(self, true: Callable[[], Any]) -> Any:
        async with asyncio.timeout(PATIENCE):
            while not (found := true()):
                await asyncio.sleep(0.002)
        return found


# ---- The program, as people start it -----------------------------------------------------

# Made for these tests, for localhost, for a hundred years; it guards nothing.
PEM = """\
-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEILsLHUyW/EYm2z21JVv4fI6wRrQVV+fB3eGfkxQ1sBCV
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBGjCBzaADAgECAhRtpFCzKGMjPOVPbLMig0qGMzJtDjAFBgMrZXAwFDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNTE4
MDE1OFoYDzIxMjYxMTAxMTgwMTU4WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwKjAFBgMrZXADIQAeSBes2VrPrVF/W4Kpre3MNGAs
bmd9ES6xtJa/TJSN6aMvMC0wDwYDVR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwBQYDK2VwA0EAVe0N
VrDviZQl6QgPOl04sNrwP0l8h6aFvB4768fxq+G0YNJpWyrj/vU26CotR8XZO4h2gYI7a+DqgS+Sgh2DAA==
-----END CERTIFICATE-----
"""
CLIENT_TLS = ssl.create_default_context(cadata=PEM)


@contextmanager
def certificate() -> Iterator[tuple[dict[str, str], ssl.SSLContext]]:
    """What makes the program serve HTTPS, with this key and certificate, or an upstream."""
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(PEM)
        file.flush()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(file.name)
        yield {"CHATSTREAM_TLS_CERT": file.name, "CHATSTREAM_TLS_KEY": file.name}, context


class Program:
    """`python chatstream.py` as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, log: IO[bytes]) -> None:
        self.process, self.log = process, log  # a file: a pipe that nobody reads would stop it
        self.url = self.out = self.err = ""

    def memory(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def end(self, number: int | None = None) -> int:
        """Waits for the end, after a signal if one is given; the exit status. No traceback."""
        if number is not None:
            self.process.send_signal(number)
        out, _ = await asyncio.wait_for(self.process.communicate(), PATIENCE)
        self.log.seek(0)
        self.out, self.err = self.out + (out or b"").decode(), self.log.read().decode()
        asyncios = re.findall("out of system resource|ignored in: <function _Selector", self.err)
        assert self.err.count("Traceback") == len(asyncios) and "Warning" not in self.err, self.err
        return self.process.returncode or 0


@asynccontextmanager
async def running(
    command: list[str], environment: dict[str, str], shell: str = 'exec "$@"', **how: Any
) -> AsyncIterator[Program]:
    """Python runs this, started by a shell. The address is read from its first line; where that
    is not to be had, the environment has chosen the port."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "CHATSTREAM_"))}
    env = kept | {"PYTHONDEVMODE": "1", "CHATSTREAM_PORT": "0"} | environment
    with tempfile.TemporaryFile() as log:
        usual: Any = {"cwd": HERE, "env": env, "stdout": subprocess.PIPE, "stderr": log}
        shell_command = ("sh", "-c", shell, "sh", sys.executable, *command)
        process = await asyncio.create_subprocess_exec(*shell_command, **usual | how)
        run = Program(process, log)
        try:
            if process.stdout:
                line = await asyncio.wait_for(process.stdout.readline(), 3 * PATIENCE)
                run.out = line.decode()
            chosen = f"http://127.0.0.1:{env['CHATSTREAM_PORT']}"
            run.url = run.out.rpartition(" ")[2].strip() or chosen
            yield run
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()


def program(*arguments: str, **environment: str) -> Any:
    return running(["chatstream.py", *arguments], environment)


# ---- The relay: any framing in, one framing out ------------------------------------------

TEXT = "Grüße 👩‍👩‍👧 你好 \u2028\u2029\x85 data: [DONE]"
SAID = json.dumps({"choices": [{"delta": {"content": TEXT}}]}, ensure_ascii=False).encode()
STOP = b'{"choices":[{"delta":{},"finish_reason":"stop"}]}'


def framed(*payloads: bytes) -> bytes:
    return b"".join(b"data: %b\n\n" % payload for payload in payloads)


TAIL = framed(STOP) + DONE
GOOD = framed(SAID) + TAIL
COMPLETION = b'{"choices":[{"message":{"content":"Hi"}}]}'
AS_CHUNK = b'{"choices": [{"delta": {"content": "Hi"}}], "object": "chat.completion.chunk"}'
LOUD = b'{"error":{"message":"Overloaded","type":"overloaded_error","code":"busy"}}'

# fmt: off
GOOD_STREAMS = {  # name: what the upstream sends, and what goes out if it is not GOOD
    "LF": [GOOD], "CRLF": [GOOD.replace(b"\n", b"\r\n")], "CR": [GOOD.replace(b"\n", b"\r")],
    "byte order mark": [b"\xef\xbb\xbf" + GOOD],
    "no space after the colon (openai-python#559)": [re.sub(b"(?m)^data: ", b"data:", GOOD)],
    "comments (OpenRouter)": [b": OPENROUTER PROCESSING\n\n:\n\n" + GOOD],
    "a comment longer than an event may be": [b":" + b"x" * 250_000 + b"\n" + GOOD],
    "other fields": [b"id: 7\nretry: 10\nevent: message\nfoo: bar\nfoo\n" + GOOD],
    "an event without data": [b"event: ping\n\ndata:\n\ndata\n\n" + GOOD],
    "payloads that are no chunk": [framed(b"{}", b'{"type":"ping"}') + GOOD],
    "several data lines": [
        b'data: {"choices":\r\ndata: [{"content":""}]}\r\n\r\n' * 2 + TAIL,
        framed(b'{"choices": [{"content":""}]}') * 2 + TAIL],
    "white space around": [framed(b" %b\t" % STOP, b" [DONE] "), framed(b" %b\t" % STOP) + DONE],
    "finish_reason, then the end": [GOOD.removesuffix(DONE)],
    "[DONE] without its newline": [GOOD[:-2]],
    "the last chunk without its newline": [GOOD.removesuffix(b"\n\n" + DONE)],
    "text after [DONE]": [GOOD + framed(SAID)],
    "a whole completion as an event": [framed(COMPLETION) * 2 + DONE, framed(AS_CHUNK) * 2 + DONE],
} | {name: [framed(payload) + DONE] * 2 for name, payload in {
    "an empty finish_reason, but [DONE]": b'{"choices":[{"delta":{},"finish_reason":""}]}',
    "Azure's filter": b'{"choices":[],"prompt_filter_results":[{"x":1}]}',
    "nulls": b'{"choices":[{"delta":{"role":"assistant","content":null}}],"error":null}',
}.items()}
BAD_STREAMS: dict[str, dict[str, bytes]] = {  # code and message: by name, what the upstream sends
    "busy Overloaded": {
        "an error object": framed(LOUD), "event: error": b"event: error\n" + framed(LOUD)},
    "upstream_error Ouch": {
        "a text (LM Studio)": framed(b'{"error":"Ouch"}'),
        "object: error (vLLM)": framed(b'{"object":"error","message":"Ouch","code":400}'),
        "an error beside a message": framed(b'{"error":{"message":"Ouch"},"message":"Out"}'),
        "an error beside choices": framed(b'{"choices":[{}],"error":{"message":"Ouch"}}'),
        "event: error with a bare message": b'event: error\ndata: {"message":"Ouch"}\n\n'},
    "upstream_error failed": {"event: error that is no JSON": b"event: error\ndata: Ouch\n\n"},
    "stream_truncated": {"an end inside a payload": b'data: {"choices":[{'},
    "empty_stream": {
        "nothing": b"", "comments alone": b": ping\n\n" * 3, "nothing but [DONE]": DONE},
    "event_too_large": {
        "a long event": framed(b'{"choices":["%b"]}' % (b"x" * 200_000)),
        "a long line": b"data:" + b"x" * 200_000, "lines without end": b"data:\n" * 200_000},
    "upstream_invalid": {
        "no event stream": b"Hello, world\n", "a stray line of JSON": b'{"choices":3}',
        "no JSON": framed(b"nonsense"), "a list": framed(b"[1]"), "two objects": framed(b"{}{}"),
        "NaN": framed(b'{"choices":[NaN]}'), "bad UTF-8": framed(b'{"choices":["\xff"]}'),
        "one that is reported": b'data: {"error":{"message":"x","code":"upstream_invalid"}}',
        "a number too large for JSON": framed(COMPLETION.replace(b'"Hi"', b"1e999")),
        "an integer of 5,000 digits": framed(b'{"choices":[],"n":%b}' % (b"1" * 5000)),
        "deep nesting": framed(b"[" * 100_000),
        "a newline inside a JSON string": b'data: {"choices":[{"x":"a\ndata: b"}]}\n\n',
        "two bad ones that complete each other": framed(b'{"choices":[]},{"choices":[{}', b"{}]}")},
}


def said(text: bytes) -> bytes:
    return framed(b'{"choices":[{"delta":{"content":"%b"}}]}' % text)


HALF = framed(b'{"delta":{"content":"a"}}]}')
LONE: list[tuple[Any, ...]] = [  # pieces, each in a read of its own; what the last one gives
    (said(b"a"), said(b"b c"), said(b"b c")), (said(b"a"), said(b"\xc3\xa9"), said(b"\xc3\xa9")),
    *((said(b"a"), said(bad), "upstream_invalid") for bad in (b'"', b"\\", b"\x01", b"\xff")),
    (said(b"a"), framed(b'{"choices":[{"delta":{"content":"}}]}'), "upstream_invalid"),
    (said(b"a"), said(b"b").replace(b"es", b"ez"), b""),
    (said(b"a"), said(b"b").replace(b"]}", b"]]"), "upstream_invalid"),
    (said(b"a"), said(b"x" * 100), "event_too_large"),
    (said(b"a"), b"data: ", said(b"b"), "upstream_invalid"),
    (said(b"a"), b"event: error\n", said(b"b"), "upstream_error"),
    (b'data: {"choices":[\n', HALF, HALF, "upstream_invalid"),
    (framed(b'{"content":"a"}'), framed(b'{"content":"b"}'), b""),
]
# fmt: on


class Framing(unittest.TestCase):
    """What upstreams really send (the sources stand in the names), cut in every way."""

    def feed(self, body: bytes, cuts: Iterable[int] = (), cut: bool = False) -> tuple[bytes, str]:
        """What goes out, and the code and message at the end: none for a whole answer."""
        relay, out = Relay(chatstream.EventParser(100_000)), b""
        for start, end in itertools.pairwise([0, *cuts, len(body)]):
            if start < end and not (relay.done or relay.failure):
                out += relay.feed(body[start:end])
        out += b"" if relay.done or relay.failure else relay.close(cut)
        self.assertEqual(relay.done, not relay.failure)
        return out, f"{relay.failure.code} {relay.failure.message}" if relay.failure else ""

    def splits(self, body: bytes) -> Iterator[tuple[bytes, str]]:
        """Whole; halved; if short in single bytes, and in two at each: in UTF-8 and CRLF too."""
        short = range(1, len(body)) if len(body) < 4000 else ()
        for cuts in ((), (len(body) // 2,), short, *((offset,) for offset in short)):
            with self.subTest(body[:300], cuts=cuts):
                yield self.feed(body, cuts)

    def test_good_streams(self) -> None:
        """Whatever the framing, out goes `data: PAYLOAD`, byte for byte, then [DONE]; each event
        the moment its last byte is in, not when the next one comes."""
        for end in (b"\n\n", b"\r\n\r", b"\r\r"):
            relay = Relay(chatstream.EventParser(99))
            self.assertEqual(relay.feed(said(b"a")[:-2] + end), said(b"a"))
        parser, pieces = chatstream.EventParser(9), (b"data:a\r", b"", b"\ndata:b\n\n")
        self.assertEqual([*itertools.chain(*map(parser.feed, pieces))], [(b"", b"a\nb")])
        for body, *expected in GOOD_STREAMS.values():
            for ending in self.splits(body):
                self.assertEqual(ending, (expected[0] if expected else GOOD, ""))

    def test_bad_streams(self) -> None:
        """Whatever the dialect of the error, it is told, alone or after part of an answer. A long
        event costs time in proportion to its length, however small its pieces."""
        for ending, streams in BAD_STREAMS.items():
            code, _, message = ending.partition(" ")
            for body in streams.values():
                out, told = self.feed(body)
                self.assertEqual((out, told.split(" ")[0]), (b"", code))
                good = b"" if code == "empty_stream" else framed(SAID)
                is_half = code == "upstream_invalid" and not body.startswith(b"data")
                for out, told in self.splits(good + body):
                    expected = "stream_truncated" if is_half else code
                    self.assertEqual((out, told.split(" ")[0]), (good, expected))
                    self.assertIn(message, told)
        began, body = time.monotonic(), framed(b'{"choices":["%b"]}' % (b"x" * 99_984)) + TAIL
        self.assertEqual(self.feed(body, range(1, 100_000)), (body, ""))  # just within the limit
        self.feed(b'data: {"choices":[{%b"x":1}],\ndata: "y":1}\n\n' % (b'"content":"",' * 7000))
        self.assertLess(time.monotonic() - began, PATIENCE / 10)

    def test_lone_events(self) -> None:
        """A payload like a good one but for its plain text is good, and counts; no other is."""
        for *earlier, piece, expected in LONE:
            with self.subTest(piece, earlier=earlier):
                relay = Relay(chatstream.EventParser(100))
                before = [(relay.feed(each), relay.events)[1] for each in earlier][-1]
                out = relay.feed(piece)
                self.assertEqual(relay.failure.code if relay.failure else out, expected)
                self.assertEqual(relay.events - before, out == piece)

    def test_truncation_at_every_byte(self) -> None:
        """An answer that ends before its finish_reason is never a whole one; one whose
        connection breaks needs its [DONE], too."""
        for length in range(len(framed(SAID)), len(GOOD)):
            self.assertIn("stream_truncated", self.feed(GOOD[:length], cut=True)[1])
            if length < GOOD.index(STOP) + len(STOP):
                self.assertIn("stream_truncated", self.feed(GOOD[:length])[1])


# ---- An honest status --------------------------------------------------------------------


def resets(data: bytes) -> Reply:
    """A reply of these bytes, as they are, and then a reset."""

    async def reply(call: Call) -> None:
        await call.raw(data)
        await asyncio.sleep(0.02)
        call.transport.abort()

    return reply


OPEN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"  # its body ends with it
LEAK = b'{"error":"Key sk-secret-1 of x at /v1: in 10.24 s"}'
NO_TEXTS = b'{"error":{"message":{},"type":7,"code":[]}}'
LISTED = b'{"detail":[{"loc":["body"],"msg":"Field required"}]}'
# fmt: off
FAULTS: dict[str, dict[str, Reply]] = {  # code and message: by name, what comes
    "400 busy Overloaded": {
        "llama.cpp": fails(400, LOUD), "in a list (Gemini)": fails(400, b"[%b]" % LOUD)},
    "422 upstream_rejected Bad": {"FastAPI": fails(422, b'{"detail":"Bad"}')},
    "422 upstream_rejected Field required": {"FastAPI, in a list": fails(422, LISTED)},
    "429 upstream_rejected No": {"a text (Scaleway)": fails(429, b'{"error":"No"}')},
    "404 upstream_rejected refused": {"HTML": fails(404, b"<html>")},
    "400 upstream_rejected refused": {
        "HTML in JSON": fails(400, b'{"error":"<html>x"}'), "no texts": fails(400, NO_TEXTS)},
    "400 upstream_rejected Key *** of x at /v1: in 10.24 s": {"a secret": fails(400, LEAK)},
    "400 upstream_rejected yyy": {"a novel": fails(400, b'{"error":"%b"}' % (b"y" * 999))},
    "502 upstream_auth key": {"401": fails(401, LOUD), "403": fails(403, LOUD)},
    "502 upstream_error failed": {
        "500": fails(500, LOUD), "a redirect, to itself": fails(307, b"", location="/"),
        "a page": sends(b"<html>", content_type="text/html")},
    "502 upstream_invalid be read": {
        "a text": sends(b"Hi", content_type="text/plain"), "bad JSON": fails(200, b"{"),
        "no HTTP": resets(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")},
    "502 empty_stream empty": {"nothing": sends()},
    "502 event_too_large too large": {"too much": sends(b"data: %b" % (b"x" * 50_000))},
    "502 busy Overloaded": {"in JSON": fails(200, LOUD), "in a stream": sends(framed(LOUD))},
    "200 busy Overloaded": {"an error later": sends(framed(SAID, LOUD) + DONE)},
    "502 stream_truncated broke off": {"half a payload": sends(b'data: {"cho')},
    "200 stream_truncated broke off": {
        "half an answer": sends(framed(SAID)), "a reset later": resets(OPEN + framed(SAID))},
    "502 upstream_unreachable reached": {"a reset": resets(b""), "half a head": resets(OPEN[:30])},
    "504 upstream_timeout in time": {
        "silence": silent, "comments": sends(*[b": ping\n\n"] * 99, pause=0.02)},
    "200 upstream_timeout in time": {"silence in mid-stream": stalls},
}
# fmt: on
TYPES = {429: "rate_limit_error"} | dict.fromkeys((200, 502, 504), "upstream_error")
OUTCOMES = {"stream_truncated": "truncated", "upstream_timeout": "timeout"}


class Status(Case):
    async def test_replay(self) -> None:
        """What servers that nobody here wrote really sent ends, through the whole of chatstream,
        as its text says: whole, or with the error that it is."""
        folder = os.environ.get("CHATSTREAM_TRANSCRIPTS", "")
        if not folder:
            self.skipTest("CHATSTREAM_TRANSCRIPTS names no folder of transcripts")
        paths = sorted(Path(folder).glob("*.sse"))
        self.assertTrue(paths, f"no transcripts in {folder}")
        for path in paths:
            with self.subTest(path.stem):
                head, _, body = path.read_bytes().partition(b"\r\n\r\n")
                status = int(head[9:12] or 502)
                kind = b"".join(re.findall(rb"(?im)^content-type: ([^\r\n]+)", head)).decode()
                answer = await self.ask_through(sends(body, status=status, content_type=kind))
                *payloads, last = re.findall(rb"(?m)^data: (.*)\n", body) or [b""]
                is_json = all(re.fullmatch(rb"\{.*\}", each) for each in payloads)
                if status in (401, 403) or status >= 500:
                    self.assertEqual(answer.status, 502)
                elif status >= 400:
                    self.assertEqual(answer.status, status)
                    self.assertIn(answer.error["message"].encode(), body)
                elif b'"chat.completion"' in body:
                    self.assertEqual(answer.payloads[-1], b"[DONE]")
                elif last == b"[DONE]" and is_json and b'"error"' not in body:
                    self.assertEqual(answer.payloads, [*payloads, last])
                else:
                    self.assertNotIn(b"[DONE]", answer.body)
                    self.assertTrue(answer.error["code"])

    async def test_faults(self) -> None:
        """What fails before the first event has a real status; what fails later is the last
        event, without [DONE]. It has a code, and a message for people, without secrets; it is
        counted once, under who is to blame; and nothing is asked twice."""
        settings = {"api_key": "sk-secret-1", "token": "x", "max_event_bytes": 10_000}
        counted: dict[str, float] = {}
        async with upstream(silent) as up, serving(up, idle_seconds=0.2, **settings) as url:
            rows = [(told, *row) for told, rows in FAULTS.items() for row in rows.items()]
            for told, name, up.reply in rows:
                status, code, message = told.split(" ", 2)
                outcome = OUTCOMES.get(code, "upstream_error")
                counted[outcome] = counted.get(outcome, 0) + 1
                with self.subTest(told, name=name):
                    answer = await self.ask(url, Authorization="Bearer x")
                    error = answer.error
                    self.assertEqual((answer.status, error["code"]), (int(status), code))
                    usual = TYPES.get(answer.status, "invalid_request_error")
                    self.assertEqual(error["type"], "overloaded_error" if code == "busy" else usual)
                    self.assertIn(message, error["message"])
                    self.assertLessEqual(len(error["message"]), 500)
                    self.assertEqual(error["request_id"], answer.headers["X-Request-Id"])
                    self.assertEqual(len(error), 5)
                    if status == "200":
                        self.assertEqual(len(answer.payloads), 2)
            self.assertEqual(await self.outcomes(url), counted)
            self.assertEqual(len(up.calls), len(rows))

    async def test_unreachable(self) -> None:
        """Nobody there, or a certificate that nobody vouches for: 502; not there in time: 504."""
        async with serving() as url:
            self.assertEqual((await self.ask(url)).error["code"], "upstream_unreachable")
        with certificate() as (_, context):
            async with upstream(says("Hi"), context) as up, serving(up) as url:
                self.assertEqual((await self.ask(url)).error["code"], "upstream_unreachable")
                self.assertEqual(up.calls, [])
        self.loop_errors.clear()  # of the upstream's side of the handshake
        with socket.create_server(("127.0.0.1", 0)) as mute:  # it shakes no hands
            base = f"https://127.0.0.1:{mute.getsockname()[1]}/v1"
            async with serving(base_url=base, connect_seconds=0.3) as url:
                answer = await self.ask(url)
        self.assertEqual((answer.status, answer.error["code"]), (504, "upstream_timeout"))

    async def test_kept(self) -> None:
        """Of another 4xx the param, Retry-After and rate limits are passed on, if they are good
        ASCII, also where the parser of HTTP lets through what is not."""
        head = b"HTTP/1.1 429 X\r\nX-RateLimit-A: 60\r\nX-RateLimit-B: \xff\r\nSet-Cookie: a\r\n"
        head += b"Retry-After: %b\r\nContent-Length: 23\r\n\r\n" + b'{"error":{"param":"n"}}'
        async with upstream(resets(head % b"\x01")) as up:
            async with program(OPENAI_BASE_URL=up.url, PYTHONDEVMODE="") as run:
                answer = await self.ask(run.url)
        self.assertEqual((answer.status, answer.headers.get("Retry-After")), (429, None))
        answer = await self.ask_through(resets(head % b"7"))
        self.assertEqual((answer.status, answer.error["param"]), (429, "n"))
        self.has(answer.headers, retry_after="7", x_ratelimit_a="60")
        self.assertFalse({"X-RateLimit-B", "Set-Cookie"} & set(answer.headers))

    async def test_heartbeats(self) -> None:
        """A silent stream gets a comment every so often, and its status is 200 from then on."""
        answer = await self.ask_through(silent, heartbeat_seconds=0.2, idle_seconds=0.5)
        self.assertEqual((answer.status, answer.error["code"]), (200, "upstream_timeout"))
        self.assertIn(answer.body.count(b": keep-alive"), (1, 2, 3), "not one a look")


# ---- What the upstream is asked ----------------------------------------------------------


class Asking(Case):
    async def test_request(self) -> None:
        """The upstream gets the key, the request id and the body, all that OpenAI's API knows or
        may add; nothing else of the client. What is sent on is what was checked: a second
        `model` cannot slip past. What comes back has what keeps proxies from holding it back."""
        parts = [{"type": "text", "text": "x"}]
        contents = {"developer": "x", "user": parts, "assistant": None, "tool": "\U0001f600 \ud83d"}
        messages = [{"role": role, "content": what, "x": 1} for role, what in contents.items()]
        body = {"messages": messages, "stream": None, "next_year": {"x": [1]}, "model": None}
        text = b'{"model": "gpt-9", ' + json.dumps(body)[1:].encode()
        async with upstream(says("Hi")) as up, serving(up, api_key="sk-1") as url:
            sent = {"Cookie": "a=b", "X-Request-Id": "a.1-2_3", "Authorization": "Bearer no"}
            answer = await self.ask(url, text, **sent)
        (call,) = up.calls
        self.assertEqual(call.request_line, "POST /v1/chat/completions HTTP/1.1")
        self.has(call.headers, authorization="Bearer sk-1", accept="text/event-stream")
        self.has(call.headers, accept_encoding="identity", x_request_id="a.1-2_3")
        self.assertEqual(call.body, body | {"model": "m", "stream": True})
        self.assertNotIn(b"gpt-9", call.raw_body)
        self.assertNotIn("cookie", call.headers)
        self.has(answer.headers, content_type="text/event-stream; charset=utf-8")
        self.has(answer.headers, cache_control="no-cache, no-transform", x_accel_buffering="no")
        self.has(answer.headers, x_content_type_options="nosniff", server="chatstream")

    async def test_without_a_key(self) -> None:
        """No key: no Authorization header. No cookie of an upstream is kept, though its connection
        is used again. A whole completion in JSON goes out as one chunk and [DONE]."""
        mixed = b'\xef\xbb\xbf\r\n{"choices":[{"delta":{}},\r\n{"message":{}}]\r\n}'
        sent = b'{"choices": [{"delta": {}}, {"delta": {}}], "object": "chat.completion.chunk"}'
        async with upstream(fails(200, mixed, set_cookie="a=b")) as up:
            up.url = up.url.replace("127.0.0.1", "localhost")  # cookies need a name
            async with serving(up) as url:
                for _ in range(2):
                    self.assertEqual((await self.ask(url)).payloads, [sent, b"[DONE]"])
        self.assertEqual((len(up.calls), len({call.transport for call in up.calls})), (2, 1))
        self.assertFalse({"authorization", "cookie"} & set(up.calls[1].headers))

    async def test_any_model(self) -> None:
        """With `*` any model may be asked for, the upstream has the list, and `*` is no default."""
        models = fails(200, b'{"data":[{"id":"a","x":1},{"id":"m"}]}')
        async with upstream(models) as up, serving(up, model=("m", "*"), api_key="k") as url:
            await self.ask(url, HELLO | {"model": "any"})
            self.assertEqual(up.calls[0].body["model"], "any")
            listed = json.loads((await self.get(url + "/v1/models")).body)
            names = [{"id": "m", "object": "model"}, {"id": "a", "object": "model"}]
            self.assertEqual(listed, {"object": "list", "data": names})
            self.assertEqual(up.calls[1].request_line, "GET /v1/models HTTP/1.1")
            self.assertEqual(up.calls[1].headers["authorization"], "Bearer k")
        async with upstream(says("Hi")) as up, serving(up, model=("*",)) as url:
            answer = await self.ask(url)
            self.assertEqual((answer.status, up.calls), (400, []))
            self.assertIn("GET /v1/models lists them", answer.error["message"])
            self.assertEqual((await self.get(url + "/v1/models")).error["code"], "upstream_invalid")

    async def test_proxy(self) -> None:
        """The environment's proxy is used, except where no_proxy says so, and never for what is
        asked of a model on this machine. The upstream's address, however short, is blotted out."""
        async with upstream(fails(400, b'{"error":"see gpu:8000"}')) as proxy:
            os.environ |= {"http_proxy": proxy.url[:-3], "no_proxy": "example.com"}
            self.addCleanup(lambda: (os.environ.pop("http_proxy"), os.environ.pop("no_proxy")))
            async with serving(base_url="http://gpu:8000/v1") as url:
                self.assertEqual((await self.ask(url)).error["message"], "see ***")
            for host in ("localhost:1", "127.0.0.9", "[::1]:8", "example.com"):
                self.assertIsNone(chatstream.environment_proxy(f"http://{host}/v1"))
        lines = [call.request_line for call in proxy.calls]
        self.assertEqual(lines, ["POST http://gpu:8000/v1/chat/completions HTTP/1.1"])


# ---- Time: cancellation, back-pressure, limits -------------------------------------------


def is_gone(call: Call) -> bool:
    """The other side has let go of this connection, whether or not we read."""
    if call.gone.is_set() or not hasattr(socket, "TCP_INFO"):
        return call.gone.is_set()
    sock = call.transport.get_extra_info("socket")
    return not sock or sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != 1  # not open


class Time(Case):
    async def leave(self, up: Upstream, url: str, begun: bool, mute: bool = False) -> None:
        """Asks, and leaves in the middle: 50 ms later the upstream is let go, at the best of three
        tries. A mute upstream reads no more, so it never says goodbye."""
        took: list[float] = []
        for number in range(len(up.calls), len(up.calls) + 3):
            reader, writer = await self.connect(url)
            writer.write(request())
            await self.eventually(partial(up.calls.__getitem__, slice(number, None)))
            if mute:
                up.calls[-1].transport.pause_reading()
            if begun:
                await self.read_until(reader, b"\n\n")
            await asyncio.sleep(0.05)
            self.assertFalse(is_gone(up.calls[-1]))
            writer.transport.abort()
            left = time.monotonic()
            await self.eventually(lambda: is_gone(up.calls[-1]))
            took.append(time.monotonic() - left)
        self.assertLess(min(took), 0.05)

    async def test_client_leaves(self) -> None:
        """The client goes, and 50 ms later the upstream's connection is gone: before the first
        token, during heartbeats, in mid-stream."""
        for reply, beat in ((silent, 10.0), (silent, 0.02), (stalls, 10.0)):
            async with upstream(reply) as up, serving(up, heartbeat_seconds=beat) as url:
                await self.leave(up, url, begun=beat < 1 or reply is stalls)
                self.assertEqual(await self.outcomes(url), {"client_gone": 3})
                self.assertEqual((await self.metrics(url))["chatstream_active_streams"], 0)

    async def test_tls(self) -> None:
        """The same over TLS on both sides, also with an upstream that has gone mute. The page
        says that it will go on to speak HTTPS."""
        with certificate() as (env, context):
            env["SSL_CERT_FILE"] = env["CHATSTREAM_TLS_CERT"]
            async with upstream(silent, context) as up:
                async with program(OPENAI_BASE_URL=up.url, **env) as run:
                    for up.reply, mute in itertools.product((silent, stalls), (False, True)):
                        await self.leave(up, run.url, up.reply is stalls, mute)
                    page = await self.get(run.url, ssl=CLIENT_TLS)
        self.assertIn("max-age", page.headers["Strict-Transport-Security"])

    async def test_fixed_waits(self) -> None:
        """Two fixed waits. An idle connection is closed before most servers do it (5 s). A refusal
        whose body stalls is told after 2 s: no heartbeat makes it a 200, no idle limit a 504."""
        begun = b"HTTP/1.1 429 X\r\nRetry-After: 7\r\nContent-Length: 9\r\n\r\n{"
        short = {"heartbeat_seconds": 0.1, "idle_seconds": 0.5}
        async with upstream(says("Hi")) as up, serving(up) as url:
            await self.ask(url)
            asked = time.monotonic()
            refused = self.ask_through(partial(Call.raw, data=begun), **short)
            answer, _ = await asyncio.gather(refused, up.calls[0].gone.wait())
            self.assertTrue(2 < time.monotonic() - asked < 5)
        self.assertEqual((answer.status, answer.headers["Retry-After"]), (429, "7"))
        self.assertEqual(answer.error["message"], chatstream.ERRORS["upstream_rejected"][2])

    async def test_long_streams_live(self) -> None:
        """As long as events come, no limit ends a stream; dropped ones count as life too."""
        events = [b"data: {}\n\n", b"data: {}\n\n", framed(SAID)] * 4
        reply = sends(*events, TAIL, pause=0.05)
        answer = await self.ask_through(reply, idle_seconds=0.3, write_seconds=0.3)
        self.assertEqual(answer.payloads[-1], b"[DONE]")

    async def test_slow_client(self) -> None:
        """Who reads slowly, but steadily, is never cut: no large buffer hides what it takes."""
        reply = sends(*[said(b"x" * 50_000)] * 80)
        env = {"CHATSTREAM_WRITE_SECONDS": "1.2"}
        async with upstream(reply) as up, program(OPENAI_BASE_URL=up.url, **env) as run:
            reader = await self.slow(run.url, segment=32767)
            for _ in range(40):
                await asyncio.sleep(0.05)
                await reader.readexactly(7500)
            self.assertEqual(await self.outcomes(run.url), {})

    async def test_the_tail_belongs_to_the_stream(self) -> None:
        """After [DONE] the upstream is let go, even if it holds the socket open. But a stream
        runs until its client has taken the last byte: one that is `completed` has got there,
        whatever comes, and nothing, no heartbeat either, follows that byte."""
        sizes = range(20_000, 160_000, 10_000)  # asyncio would not wait for the last 64 KB
        events = (framed(b'{"choices":["%b"]}' % (b"x" * size)) for size in sizes)
        env = {"CHATSTREAM_HEARTBEAT_SECONDS": "0.1", "CHATSTREAM_WRITE_SECONDS": "1"}
        async with upstream(lambda call: call.raw(OPEN + next(events) + TAIL)) as up:
            async with program(OPENAI_BASE_URL=up.url, **env) as run:
                readers = [await self.slow(run.url) for _ in sizes]
                await self.eventually(lambda: sum(call.gone.is_set() for call in up.calls) == 14)
                self.assertGreater((await self.metrics(run.url))["chatstream_active_streams"], 1)
                await self.eventually(lambda: b"client_gone" in os.pread(run.log.fileno(), 9999, 0))
                await asyncio.sleep(0.2)
                self.assertEqual(await run.end(signal.SIGTERM), 0)
        whole = 0
        for reader in readers:
            with suppress(ConnectionError):
                data = await self.read_until(reader, b"?")
                whole += data.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
        ends = [run.err.count(f"outcome={name}") for name in ("completed", "client_gone")]
        self.assertEqual(ends, [whole, 14 - whole])

    async def test_stalled_client(self) -> None:
        """Who takes nothing for the write limit has gone: new tokens do not count as reading.
        Meanwhile the upstream waits and the process does not grow, whatever would come."""
        reply = sends(*[said(b"x" * 2000)] * 200, pause=0.05)
        async with upstream(reply) as up, serving(up, write_seconds=0.4) as url:
            await self.slow(url)
            await self.eventually(lambda: up.calls and up.calls[0].gone.is_set())
            self.assertEqual(await self.outcomes(url), {"client_gone": 1})
            self.assertLess(up.calls[0].sent, 200_000)
        async with upstream(sends(*[said(b"x") * 9] * 2**16)) as up:
            async with program(OPENAI_BASE_URL=up.url, CHATSTREAM_WRITE_SECONDS="1") as run:
                await self.ask(run.url, b"{}")  # what grows at a first request has grown
                before, started = run.memory(), time.monotonic()
                answers = [await self.post(run.url) for _ in range(6)]
                await self.eventually(lambda: all(call.gone.is_set() for call in up.calls))
                self.assertGreater(time.monotonic() - started, 0.9)
                self.assertLess(run.memory() - before, 3_500_000)
                self.assertLess(max(call.sent for call in up.calls), 20_000_000)
                for answer in answers:
                    answer.close()


# ---- Who gets in, and what they may send -------------------------------------------------

# fmt: off
BODIES: dict[str, list[bytes]] = {  # what a body gets
    "400 invalid_json": [
        b"", b'{"messages":[{"role":"user","content":"\xff"}]}', b'{"messages":[{}],"x":NaN}',
        b'{"messages":[{"role":"user"}],"x":1e999}', b'{"messages":[{}],"x":%b}' % (b"1" * 5000),
        b"[" * 100_000, b'{"x":%b%b}' % (b"[" * 50_000, b"]" * 50_000)],
    "400 invalid_request": [b"[]", b'{"messages":[{"role":"user"}],"model":["m"]}'],
    "404 model_not_found": [b'{"messages":[{"role":"user"}],"model":"n"}'],
    "400 stream_required": [b'{"messages":[{"role":"user"}],"stream":false}'],
    "413 body_too_large": [b"x" * 200_001],
    "400 invalid_messages": [b'{"messages":%b}' % messages for messages in (
        b"[]", b'{"role":"user"}', b'["hi"]', b'[{"role":"root"}]', b'[{"role":["user"]}]',
        b'[{"role":"user","content":7}]', b'[{"role":"user","content":["x"]}]')],
}
VISITORS = {  # what it gets: who asks, and with which headers
    "403 forbidden_host": ["GET / Host=evil.example:80", "GET /v1/models Host=evil.example"],
    "200": [
        "GET / Host=LocalHost:1234", "HEAD / Host=[::1]:8080", "GET / Host=Chat.Example:443",
        "GET /healthz Host=10.0.0.7:8080", "HEAD /readyz Host=x", "HEAD /metrics Host=x"],
    "403 forbidden_origin": [
        "POST /stream Origin=null", "POST /stream Origin=http://localhost:1",
        "POST /stream Sec-Fetch-Site=same-site", "POST /v1/chat/completions Sec-Fetch-Site=x"],
    "400 invalid_json": [  # so it may come in
        "POST /stream Sec-Fetch-Mode=cors", "POST /stream Host=[::1]:8 Origin=http://[::1]:8",
        "POST /stream Sec-Fetch-Site=none", "POST /stream Sec-Fetch-Site=same-origin",
        "POST /stream Content-Type=application/json;a=b"],
    "415 unsupported_media_type": [
        "POST /stream Content-Type=text/plain", "POST /stream Content-Encoding=gzip"],
    "404 not_found": ["GET /nothing", "POST /nothing"],
    "405 method_not_allowed POST": ["GET /stream"],
    "405 method_not_allowed GET, HEAD": ["POST / Content-Type=x/y", "DELETE /healthz"],
}
# fmt: on


class Access(Case):
    async def test_bodies(self) -> None:
        """Every bad body gets its error, and costs nothing: the upstream is not asked."""
        async with upstream(says("Hi")) as up, serving(up, max_body_bytes=200_000) as url:
            for told, body in ((told, body) for told, every in BODIES.items() for body in every):
                with self.subTest(body[:60]):
                    answer = await self.ask(url, body)
                    self.assertEqual(f"{answer.status} {answer.error['code']}", told)
            self.assertEqual(up.calls, [])
            self.assertEqual(await self.outcomes(url), {"rejected": sum(map(len, BODIES.values()))})

    async def test_visitors(self) -> None:
        """A page elsewhere, or a rebound name, cannot spend the key."""
        async with serving(allowed_hosts=("chat.example",)) as url:
            rows = [(told, visitor) for told, visitors in VISITORS.items() for visitor in visitors]
            for told, visitor in rows:
                with self.subTest(visitor):
                    method, path, *headers = visitor.split()
                    sent = {"Content-Type": "application/json"}
                    sent |= dict(header.split("=", 1) for header in headers)
                    answer = await self.get(url + path, method, headers=sent)
                    code = answer.error["code"] if answer.status != 200 else ""
                    got = f"{answer.status} {code} {answer.headers.get('Allow', '')}".strip()
                    self.assertEqual(got, told)
                    self.assertTrue(answer.headers["X-Request-Id"])
        # Bound to all addresses every host is served, or the allowed ones if there are any.
        for allowed, status in (((), 200), (("chat.example",), 403)):
            async with serving(host="0.0.0.0", token="t", allowed_hosts=allowed) as url:
                near = url.replace("0.0.0.0", "127.0.0.1")
                self.assertEqual((await self.get(near, headers={"Host": "other"})).status, status)

    async def test_token(self) -> None:
        """With a token set, POST and the models need it; the page itself does not."""
        async with upstream(says("Hi")) as up, serving(up, token="t0k-en") as url:
            bad = ("", "Bearer ", "Bearer no", "t0k-en", "Basic t0k-en", "Bearer tök")
            for sent in (*bad, "Bearer t0k-en", "bearer t0k-en"):
                answer = await self.ask(url, Authorization=sent)
                listed = await self.get(url + "/v1/models", headers={"Authorization": sent})
                self.assertEqual({answer.status, listed.status}, {401 if sent in bad else 200})
                if sent in bad:
                    kind, code = answer.error["type"], answer.error["code"]
                    self.assertEqual((kind, code), ("authentication_error", "invalid_token"))
                    self.has(answer.headers, www_authenticate="Bearer")
            self.assertEqual((await self.get(url)).status, 200)
            no_ascii = request(authorization="Bearer ?").replace(b"?", b"\xff")
            self.assertIn(b" 401 ", await self.raw(url, no_ascii))

    async def test_bodies_as_they_come(self) -> None:
        """A body that does not arrive in time is a 408, a broken one a 400, one without end a
        413. A compressed one is never unpacked. `Expect: 100-continue` is honoured."""
        head = request().partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n"
        zipped = request(gzip.compress(json.dumps(HELLO).encode()))
        lies = b"\r\nContent-Encoding: identity\r\nContent-Encoding: gzip\r\n"
        async with serving(write_seconds=0.2) as url:
            for sent, status, code in (
                (request(Content_Length="999"), b"408", b"request_timeout"),
                (head + b"zz\r\n", b"400", b""),
                (head + b"100000\r\n%b\r\n" % (b"x" * 2**20) * 2, b"413", b"body_too_large"),
                (zipped.replace(b"\r\n", lies, 1), b"400", b"invalid_json"),
                (request(b"{}", expect="100-continue"), b"100 Continue\r\n\r\nHTTP/1.1 400", b""),
            ):
                answer = await self.raw(url, sent)
                self.assertTrue(answer.partition(b" ")[2].startswith(status), answer)
                self.assertIn(code, answer)

    async def test_too_many(self) -> None:
        """Of two streams the third gets 503, with Retry-After; a body that never arrives counts
        against that limit, but not as an active stream."""
        async with upstream(stalls) as up, serving(up, max_streams=2) as url:
            _, writer = await self.connect(url)
            writer.write(request(Content_Length="999"))
            async with self.post(url):
                answer = await self.ask(url)
                self.assertEqual(answer.error["code"], "too_many_streams")
                self.has(answer.headers, retry_after="1")
                self.assertEqual((await self.metrics(url))["chatstream_active_streams"], 1)
            writer.close()

    async def test_http_1_0(self) -> None:
        """A client of HTTP/1.0 gets an answer that ends with the connection, whatever it asks."""
        async with upstream(sends(framed(SAID), TAIL)) as up, serving(up) as url:
            for route, status in {"POST /stream": 200, "GET /": 200, "GET /nothing": 404}.items():
                sent = request(b"", f"{route} HTTP/1.0", connection="keep-alive")
                answer = await self.raw(url, sent, end=b"no end but that of the connection")
                self.assertIn(b" %d " % status, answer.partition(b"\r\n")[0])

    async def test_page(self) -> None:
        """The page comes with a policy that names its own script and style, with ETag and 304."""
        html = (HERE / "index.html").read_text(encoding="utf-8")
        policy = {"default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"}
        policy |= {"form-action 'none'", "frame-ancestors 'none'", "trusted-types 'none'"}
        policy.add("require-trusted-types-for 'script'")
        for tag, text in re.findall(r"(?s)<(script|style)>(.*?)</\1>", html):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            policy.add(f"{tag}-src 'sha256-{digest}'")
        async with serving() as url:
            answer = await self.get(url)
            headers, tag = answer.headers, answer.headers["ETag"]
            self.assertEqual(answer.body.decode(), html)
            self.assertEqual(set(headers["Content-Security-Policy"].split("; ")), policy)
            self.has(headers, cache_control="no-cache", referrer_policy="no-referrer")
            self.has(headers, cross_origin_opener_policy="same-origin")
            self.has(headers, cross_origin_resource_policy="same-origin")
            self.assertIn("microphone=()", headers["Permissions-Policy"])
            self.assertNotIn("Strict-Transport-Security", headers)
            for sent, status in ((tag, 304), (f'W/{tag}, "x"', 304), ("*", 304), ('"x"', 200)):
                answer = await self.get(url, headers={"If-None-Match": sent})
                self.assertEqual((answer.status, answer.headers["ETag"]), (status, tag), sent)
            for bad in ("a b", "x" * 129, "<b>", "", "ä"):
                answer = await self.get(url, headers={"X-Request-Id": bad})
                self.assertRegex(answer.headers["X-Request-Id"], r"^[a-f0-9]{8,128}$")


# ---- What can be watched -----------------------------------------------------------------


class Watching(Case):
    async def test_metrics(self) -> None:
        """Every POST to the stream routes is counted once; what we refuse has no duration; a bug of
        ours is nobody else's fault. Each metric has help and type, histograms GenAI's buckets."""
        async with upstream(says("Hi")) as up, serving(up) as url:
            await self.ask(url)
            await self.get(url + "/v1/chat/completions", "POST", json=HELLO)
            for body, host in ((b"{", "localhost"), (b"{}", "localhost"), (b"", "evil.example")):
                await self.ask(url, body, Host=host)
            await self.get(url + "/stream")
            await self.get(url + "/healthz", "POST")
            self.assertEqual(await self.outcomes(url), {"completed": 2, "rejected": 3})
            metrics = await self.metrics(url)
            answer = await self.get(url + "/metrics")
        self.assertEqual(metrics["chatstream_events_total"], 2 * 2)
        self.assertIn("text/plain; version=0.0.4", answer.headers["Content-Type"])
        told = re.findall(r"# HELP (\w+) .+\n# TYPE \1 (\w+)\n", answer.body.decode())
        genai = [
            f"gen_ai_client_operation_{n}_seconds" for n in ("time_to_first_chunk", "duration")
        ]
        kinds = {f"chatstream_{n}": "gauge" for n in ("active_streams", "draining", "max_streams")}
        kinds |= {f"chatstream_{n}_total": "counter" for n in ("streams", "events")}
        self.assertEqual(dict(told), kinds | dict.fromkeys(genai, "histogram"))
        for each in genai:
            bounds = re.findall(each + r'_bucket\{le="(.+)"\} [012]\n', answer.body.decode())
            self.assertEqual(list(map(float, bounds[:15])), [0.01 * 2**n for n in range(15)])
            self.assertEqual(bounds[15:], ["327.68", "+Inf"])
            self.assertEqual(metrics[each + "_count"], 2)
        async with serving(model=()) as url:  # a bug of ours: variables cannot ask for this
            with self.assertLogs(level="ERROR"):
                self.assertEqual((await self.ask(url)).error["code"], "internal_error")
            self.assertEqual(await self.outcomes(url), {"failed": 1})

    async def test_no_secret_gets_out(self) -> None:
        """One log line a stream: id, outcome, status, events, and how long. Key, token and
        message text stand in no answer, log line, metric, repr or process list."""
        secrets = ["sk-secret-1", "token-secret-2", "PRIVATE TEXT"]
        body = json.dumps({"messages": [{"role": "user", "content": secrets[2]}]}).encode()
        leak = json.dumps({"error": f"{secrets[:2]}"}).encode()
        env = {"OPENAI_API_KEY": secrets[0], "CHATSTREAM_TOKEN": secrets[1], "OPENAI_MODEL": "m"}
        seen = [repr(Settings(api_key=secrets[0], token=secrets[1]))]
        async with upstream(says("Hi")) as up, program(OPENAI_BASE_URL=up.url, **env) as run:
            for up.reply in (says("Hi"), fails(400, leak), sends(framed(leak)), fails(500, leak)):
                for text, token in ((body, secrets[1]), (body[:-1], secrets[1]), (body, "no")):
                    headers = {"Authorization": f"Bearer {token}", "X-Request-Id": "my-id"}
                    seen.append((await self.ask(run.url, text, **headers)).body.decode())
            malformed = await self.raw(run.url, b"GET / HTTP/9\r\nPRIVATE TEXT\r\n\r\n")
            seen += [malformed.decode(), str(await self.metrics(run.url))]
            seen.append(Path(f"/proc/{run.process.pid}/cmdline").read_text())
            self.assertEqual(await run.end(signal.SIGTERM), 0)
        self.assertEqual(run.err.count("\n"), 4 * 3, run.err)
        pattern = r"id=my-id outcome=completed status=200 events=2 first=0\.\d+s total=0\.\d+s\n"
        self.assertRegex(run.err, pattern)
        for secret in secrets:
            for place in (*seen, run.err):
                self.assertNotIn(secret, place)

    async def test_nothing_is_left_behind(self) -> None:
        """The 101st stream does not wait for the first hundred. Streams by the hundred, whole,
        refused, broken and left, leave memory and files as they were."""
        replies = {"a": says("Hi"), "b": fails(400, b"{}"), "c": sends(framed(SAID)), "d": stalls}

        async def some() -> None:
            for model in [*replies] * 6:
                async with self.post(run.url, model) as response:
                    await (response.content.readany() if model == "d" else response.read())

        async with upstream(lambda call: replies[call.body["model"]](call)) as up:
            async with program(OPENAI_BASE_URL=up.url, OPENAI_MODEL="a,b,c,d") as run:
                for answer in await asyncio.gather(*(self.post(run.url, "d") for _ in range(101))):
                    answer.close()
                memory = []
                for _ in range(4):
                    await asyncio.gather(*(some() for _ in range(10)))
                    memory.append(run.memory())
                grown = (after - before for before, after in itertools.pairwise(memory))
                self.assertLess(min(grown), 250_000, "a leak shows in each of them")
                self.assertLess(run.files(), 30, "but for the pool's idle ones")
                await run.end(signal.SIGTERM)

    async def test_open_files(self) -> None:
        """With few open files fewer streams are admitted, and one line says so. That none is left
        for the upstream is not counted as its fault; asyncio does not fill the log with it."""
        async with upstream(stalls) as up:
            how = ["chatstream.py"], {"OPENAI_BASE_URL": up.url}, 'ulimit -n 72; exec "$@"'
            async with running(*how) as run:
                self.assertEqual((await self.metrics(run.url))["chatstream_max_streams"], 4)
                for answer in await asyncio.gather(*(self.post(run.url) for _ in range(8))):
                    await answer.read() if answer.status == 503 else answer.close()
                others = []
                while run.files() < 72:
                    others.append(await self.connect(run.url))
                    await asyncio.sleep(0.005)
                answer = await self.ask(run.url)  # on a connection that is open
                self.assertEqual((answer.status, answer.error["code"]), (503, "too_many_streams"))
                for _, writer in others:
                    writer.close()
                await asyncio.sleep(1.2)  # asyncio pauses its accepting for a second
                self.assertEqual(await self.outcomes(run.url), {"client_gone": 4, "rejected": 5})
                await run.end(signal.SIGTERM)
        self.assertIn("72 open files: 4 streams; for 1000, ulimit -n 2064", run.err)
        self.assertLess(run.err.count("out of system resource"), 4)


# ---- Start and stop ----------------------------------------------------------------------

REFUSED = {  # what is set (flags begin with --): what the one line says of it
    "CHATSTREAM_PORT=65536": "'65536' must be a whole number up to 65535",
    "--port=y": "CHATSTREAM_PORT='y' must be a whole number",
    "--port": "CHATSTREAM_PORT='\\n' must be",
    "CHATSTREAM_MAX_STREAMS=0": "'0' must be a whole number above 0",
    "CHATSTREAM_IDLE_SECONDS=0": "'0' must be a number of seconds above 0",
    "CHATSTREAM_DRAIN_SECONDS=-1": "'-1' must be a number of seconds, which may be 0",
    "CHATSTREAM_REUSE_PORT=maybe": "'maybe' must be true or false",
    "OPENAI_MODEL=,": "',' must be names, separated by commas",
    "OPENAI_BASE_URL=ftp://x/": "'ftp://x/' must be a URL like http",
    "OPENAI_BASE_URL=http://x:99999/": "'http://x:99999/' must be",
    "OPENAI_API_KEY=s3\ncret": "(not shown) must be visible ASCII",
    "--token=s3\ncret": "no such flag: --token; --help",
    "CHATSTREAM_HOST=0.0.0.0": "='0.0.0.0': set CHATSTREAM_TOKEN, or 127.0.0.1",
    "CHATSTREAM_TLS_CERT=/none": "CHATSTREAM_TLS_KEY: set both",
    "CHATSTREAM_TLS_CERT=/none CHATSTREAM_TLS_KEY=/none": "CHATSTREAM_TLS_CERT=/none",
    "CHATSTREAM_HOST=192.0.2.1 CHATSTREAM_TOKEN=t": "CHATSTREAM_HOST=192.0.2.1",
}
AS_A_PROGRAM = "import os, runpy, asyncio; {}; runpy.run_path('chatstream.py', run_name='__main__')"


class Start(Case):
    async def test_refused(self) -> None:
        """A bad or dangerous set-up stops the start with one line that shows the way out, and
        shows no secret; so does a port that is taken."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            setting = f"CHATSTREAM_PORT={taken.getsockname()[1]}"
            for given, told in (REFUSED | {setting: setting}).items():
                with self.subTest(given), self.assertRaises(BadSetting) as caught:
                    words = given.split(" ")
                    environ = dict(word.split("=") for word in words if word[0] != "-")
                    flags = [word for word in words if word[0] == "-"]
                    await Chatstream(chatstream.read_settings(environ, flags)).start()
                line = str(caught.exception)
                self.assertIn(told, line)
                self.assertIn(next(iter(environ), ""), line)
                self.assertNotIn("\n", line)

    async def test_refused_program(self) -> None:
        """The line stands alone on stderr, and the exit status is 2: for a bad setting, and for
        a page that is missing. Started through a link it finds its page."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "chatstream.py")
            path.symlink_to(HERE / "chatstream.py")
            async with running([str(path)], {}) as run:
                self.assertEqual(await run.end(signal.SIGTERM), 0)
            path.unlink()
            shutil.copy(HERE / "chatstream.py", folder)
            for port, told in (("0", "index.html"), ("y", "='y'")):
                async with running([str(path), "--port", port], {}) as run:
                    self.assertEqual((await run.end(), run.out), (2, ""))
                self.assertRegex(run.err, rf"^.*{told}.*\n$")

    async def test_encrypted_key(self) -> None:
        """A key with a password is refused; nobody is asked for it at the terminal."""
        ours, terminal = pty.openpty()
        code = AS_A_PROGRAM.format("os.open(os.ttyname(0), os.O_RDWR)")  # now it is in control
        cipher = "DEK-Info: AES-128-CBC,00112233445566778899AABBCCDDEEFF"
        with certificate() as (env, _):
            encrypted = PEM.replace("-\n", f"-\nProc-Type: 4,ENCRYPTED\n{cipher}\n\n", 1)
            Path(env["CHATSTREAM_TLS_KEY"]).write_text(encrypted)
            async with running(["-c", code], env, stdin=terminal, start_new_session=True) as run:
                self.assertEqual(await run.end(), 2)
        self.assertIn("PEM without a password", run.err)
        os.set_blocking(ours, False)
        with self.assertRaises(BlockingIOError), open(ours), open(terminal):
            os.read(ours, 100)

    def test_flags_beat_variables(self) -> None:
        """A flag beats its variable; an empty variable is none; numbers keep their fraction."""
        env = {"CHATSTREAM_PORT": "1", "CHATSTREAM_MAX_STREAMS": "", "OPENAI_MODEL": "a, b"}
        args = ["--port", "2", "--idle-seconds", "0.5", "--drain-seconds", "0", "--reuse-port"]
        told = chatstream.read_settings(env, args)
        self.assertEqual((told.port, told.max_streams, told.idle_seconds), (2, 1000, 0.5))
        self.assertEqual((told.drain_seconds, told.model, told.reuse_port), (0, ("a", "b"), True))

    async def test_help_and_shared_port(self) -> None:
        """--help names every variable; with REUSE_PORT several processes listen on one port."""
        async with program("--help") as run:
            await run.end()
        for each in fields(Settings):
            self.assertIn(chatstream.variable(each.name), run.out)
        async with program("--reuse-port") as one:
            port = one.url.rpartition(":")[2]
            async with program("--reuse-port", CHATSTREAM_PORT=port) as two:
                self.assertEqual(one.url, two.url)

    async def test_demo(self) -> None:
        """With no key it answers by itself, in Markdown, with what was asked, whatever proxy the
        environment names; its models show what goes wrong. Who leaves leaves no traceback."""
        async with program("--heartbeat-seconds", "0.2", http_proxy=NOWHERE, no_proxy="") as run:
            async with self.post(run.url) as response:
                await response.content.readany()
            listed = json.loads((await self.get(run.url + "/v1/models")).body)["data"]
            names = [each["id"] for each in listed]
            asks = (self.ask(run.url, HELLO | {"model": name}) for name in names)
            answers = dict(zip(names, await asyncio.gather(*asks), strict=True))
            await run.end(signal.SIGTERM)
        deltas = (json.loads(each)["choices"][0]["delta"] for each in answers["demo"].payloads[:-1])
        text = "".join(each.get("content", "") for each in deltas)
        for words in ("Hello from the demo", "> Hello", "OPENAI_API_KEY"):
            self.assertIn(words, text)
        slow, limited = answers["demo-slow-start"], answers["demo-rate-limit"]
        self.assertTrue(slow.body.startswith(b": keep-alive\n\n") and slow.body.endswith(DONE))
        self.assertEqual((limited.status, limited.headers["Retry-After"]), (429, "5"))
        self.assertEqual(answers["demo-cut-off"].error["code"], "stream_truncated")
        self.assertEqual(answers["demo-error"].error["code"], "out_of_memory")
        self.assertIn("the demo", run.out)


class Drain(Case):
    async def test_idle(self) -> None:
        """With no stream running, SIGTERM and SIGINT end it at once, with status 0, an idle
        connection or not; a half-sent body gets its 503. So on a loop without signal handlers."""
        refuse = AS_A_PROGRAM.format("asyncio.SelectorEventLoop.add_signal_handler = None")
        for number, *command in ((signal.SIGTERM, "chatstream.py"), (signal.SIGINT, "-c", refuse)):
            async with running(command, {"OPENAI_BASE_URL": NOWHERE}) as run:
                await self.metrics(run.url)
                reader, writer = await self.connect(run.url)
                writer.write(request(Content_Length="999"))
                await asyncio.sleep(0.1)
                self.assertEqual(await run.end(number), 0)
                self.assertIn(b" 503 ", await reader.readline())
                self.assertRegex(run.err, r"^\S+ \S+ id=\w+ outcome=rejected status=503 .*\n$")
                writer.close()

    def is_open(self, url: str) -> bool:
        """Connections are accepted."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", urlsplit(url).port)):
            return True
        return False

    async def test_running_requests_go_on(self) -> None:
        """What runs is finished, a stream or a list of models; new requests are refused, nobody
        can connect. All this whatever becomes of stdout and stderr; pipes are left as they were."""

        async def reply(call: Call) -> None:
            if call.request_line.startswith("POST"):
                return await stalls(call, until=go)
            await go.wait()
            await asyncio.sleep(0 if to else 1)  # longer than aiohttp would wait by itself
            return await fails(200, b'{"data":[{"id":"a"}]}')(call)

        # Not in development mode, where asyncio tells of a connection that comes while it closes.
        env = {"PYTHONDEVMODE": "", "OPENAI_MODEL": "模型,*", "PYTHONIOENCODING": "ascii"}
        (gone, stdout), (asleep, stderr) = os.pipe(), os.pipe()
        os.close(gone)  # as `| head -1` does
        os.write(stderr, bytes(fcntl.fcntl(stderr, fcntl.F_GETPIPE_SZ)))  # full: its reader sleeps
        pipes = {"stdout": stdout, "stderr": stderr}
        for each in (asleep, *pipes.values()):
            self.addCleanup(os.close, each)
        for to in ("", ">/dev/full 2>/dev/full", ">&- 2>&-", "2>&-", None):
            go, how = asyncio.Event(), {} if to is not None else pipes
            with socket.create_server(("127.0.0.1", 0)) as free:
                env["CHATSTREAM_PORT"] = str(free.getsockname()[1])
            async with upstream(reply) as up:
                env["OPENAI_BASE_URL"] = up.url
                async with running(["chatstream.py"], env, f'exec "$@" {to or ""}', **how) as run:
                    await self.eventually(lambda: self.is_open(run.url))
                    listing = asyncio.ensure_future(self.get(run.url + "/v1/models"))
                    async with self.post(run.url) as response:
                        await self.eventually(lambda: len(up.calls) == 2)
                        await asyncio.gather(*(self.get(run.url + "/readyz") for _ in range(8)))
                        run.process.send_signal(signal.SIGTERM)
                        await self.eventually(lambda: not self.is_open(run.url))
                        for path, status in {"/readyz": 503, "/healthz": 200, "/": 503}.items():
                            self.assertEqual((await self.get(run.url + path)).status, status)
                        answer = await self.ask(run.url)
                        self.assertEqual(answer.error["code"], "server_draining")
                        self.has(answer.headers, retry_after="1", connection="close")
                        go.set()
                        self.assertTrue((await response.read()).endswith(DONE))
                    self.assertIn(b'"id": "a"', (await listing).body)
                    self.assertEqual(await run.end(), 0)
            self.assertNotIn("outcome=", run.out, "log lines are no output")
        for each in pipes.values():
            self.assertFalse(fcntl.fcntl(each, fcntl.F_GETFL) & os.O_NONBLOCK)

    async def test_deadline(self) -> None:
        """Those left at the deadline are told, in-band or by 503; a stalled reader stops nobody;
        who has the tail of a whole answer to take is not told that there is none."""
        replies = {"a": silent, "b": stalls, "c": sends(*[framed(SAID) * 500] * 10_000)}
        replies["d"] = lambda call: call.raw(OPEN + said(b"x" * 80_000) + TAIL)
        env = {"OPENAI_MODEL": "d,a,b,c", "CHATSTREAM_DRAIN_SECONDS": "0.4"}
        async with upstream(lambda call: replies[call.body["model"]](call)) as up:
            async with program(OPENAI_BASE_URL=up.url, **env) as run:
                tail = await self.slow(run.url, segment=8192)
                async with self.post(run.url, "c"), self.post(run.url, "c") as slow:
                    asks = (self.ask(run.url, HELLO | {"model": model}) for model in "ab")
                    told = asyncio.gather(*asks)
                    await self.eventually(lambda: len(up.calls) == 5)
                    end = asyncio.ensure_future(run.end(signal.SIGTERM))
                    ends = [(each.status, each.error["code"]) for each in await told]
                    taken = await self.read_until(tail, b"[DONE]\n\n\r\n0\r\n\r\n")
                    self.assertIn(b'"code": "server_draining"', (await slow.read())[-300:])
                    self.assertEqual(await end, 0)
        self.assertEqual(ends, [(503, "server_draining"), (200, "server_draining")])
        self.assertEqual((taken[-9:], await tail.read()), (b"\n\n\r\n0\r\n\r\n", b""))
        self.assertEqual(run.err.count("outcome=drained"), 4)

    async def test_the_first_verdict_stays(self) -> None:
        """A stream that ends for one reason is not told another, even if the machine slept."""
        env = {"CHATSTREAM_IDLE_SECONDS": "0.8", "CHATSTREAM_DRAIN_SECONDS": "1.5"}
        env["PYTHONDEVMODE"] = ""  # see above
        async with upstream(stalls) as up, program(OPENAI_BASE_URL=up.url, **env) as run:
            async with self.post(run.url) as response:
                await asyncio.sleep(0.3)
                run.process.send_signal(signal.SIGTERM)
                await self.eventually(lambda: not self.is_open(run.url))
                run.process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(1.6)
                run.process.send_signal(signal.SIGCONT)
                self.assertIn(b"upstream_timeout", await response.read())

    async def test_second_signal(self) -> None:
        """A second signal ends it at once, with status 1; who left just before is in the log."""
        async with upstream(stalls) as up, program(OPENAI_BASE_URL=up.url) as run:
            async with self.post(run.url) as left, self.post(run.url):
                run.process.send_signal(signal.SIGINT)
                await run.process.stdout.readuntil(b"draining")
                left.close()
                await up.calls[0].gone.wait()
                self.assertEqual(await run.end(signal.SIGINT), 1)
        self.assertEqual(run.err.count("outcome=client_gone"), 1)


# ---- A browser ---------------------------------------------------------------------------
# One Chromium for all, a fresh context (its own storage) per page. Things are found as a
# screen reader finds them: by role and accessible name.

WANTED = os.environ.get("CHATSTREAM_BROWSER")  # "required" or "none"; else: if there is one
CHROMIUM = WANTED != "none" and (shutil.which("chromium") or shutil.which("google-chrome"))
AXE = os.environ.get("CHATSTREAM_AXE")  # axe.min.js of the npm package axe-core


class Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse, up: Upstream) -> None:
        self.socket, self.session, self.up = socket, "", up
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
        assert "error" not in said, said
        return said["result"]

    async def run(self, code: str, *values: Any) -> Any:
        """The value of a JavaScript expression in the page; of a function, called with these."""
        code = f"({code})({', '.join(map(json.dumps, values))})" if values else code
        how = {"awaitPromise": True, "returnByValue": True}
        said = await self.call("Runtime.evaluate", expression=code, **how)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    async def wait(self, look: Callable[[], Awaitable[Any]], aim: str) -> Any:
        """What a look finds, as soon as it finds something."""
        end = time.monotonic() + PATIENCE
        while not (found := await look()):
            assert time.monotonic() < end, f"never: {aim}\n{await self.run('$.log.innerText')}"
            await asyncio.sleep(0.01)
        return found

    async def until(self, code: str) -> Any:
        """The value of a JavaScript expression, as soon as it is true."""
        return await self.wait(partial(self.run, code), code)

    async def until_says(self, *words: str) -> None:
        for word in words:
            await self.until(f"document.body.innerText.includes({json.dumps(word)})")

    async def all(self, role: str, name: str) -> list[int]:
        root = (await self.call("DOM.getDocument", depth=0))["root"]["nodeId"]
        query = {"nodeId": root, "role": role, "accessibleName": name}
        found = (await self.call("Accessibility.queryAXTree", **query))["nodes"]
        return [node["backendDOMNodeId"] for node in found if not node["ignored"]]

    async def find(self, role: str, name: str, index: int = -1) -> Any:
        """The last element with this role and accessible name, as soon as there is one."""
        return (await self.wait(partial(self.all, role, name), f"{role} {name!r}"))[index]

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
        event: dict[str, Any] = {"key": key, "code": key, "modifiers": modifiers}
        event["windowsVirtualKeyCode"] = code or {"Enter": 13, "Escape": 27}[key]
        event |= {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, **event)

    async def send(self, text: str, box: str = "Message") -> None:
        await self.focus("textbox", box)
        await self.type(text)
        await self.press("Enter")

    async def ask(self, text: str = "Hello", reply: Reply | None = None) -> None:
        """Send a message, answered by this reply or the last, and wait for the answer's end."""
        self.up.reply = reply or self.up.reply
        await self.send(text)
        await self.until("$.log.ariaBusy === 'false'")

    async def begin(self, text: str = "Hello") -> None:
        """Send a message, and wait for the beginning of an answer that never ends."""
        self.up.reply = stalls
        await self.send(text)
        await self.until_says("Once")

    async def reload(self) -> None:
        await self.run("window.before = true")
        await self.call("Page.reload")
        await self.until("window.before === undefined && document.readyState === 'complete'")


@unittest.skipUnless(CHROMIUM or WANTED == "required", "no Chromium: the page is not tested")
class PageCase(unittest.IsolatedAsyncioTestCase):
    devtools: str

    @classmethod
    def setUpClass(cls) -> None:
        assert CHROMIUM, "CHATSTREAM_BROWSER=required, but no Chromium was found"
        folder = cls.enterClassContext(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        flags = "--headless=new --no-sandbox --disable-gpu --no-first-run --remote-debugging-port=0"
        flags += " --disable-quic --disable-background-networking --disable-component-update"
        command = [CHROMIUM, f"--user-data-dir={folder}", *flags.split(), "about:blank"]
        chromium = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        cls.enterClassContext(chromium)
        cls.addClassCleanup(chromium.terminate)
        lines = (line for line in chromium.stderr or () if "DevTools listening" in line)
        cls.devtools = next(lines).split()[-1]

    async def asyncSetUp(self) -> None:
        self.up = await self.enterAsyncContext(upstream(says("Hello.")))

    def sent(self, call: int = -1) -> list[str]:
        """The texts of the messages of a request, without the system's."""
        return [message["content"] for message in self.up.calls[call].body["messages"][1:]]

    async def open(self, fragment: str = "", width: int = 1000, **settings: Any) -> Page:
        """A new tab, with storage of its own, that shows a server in front of self.up."""
        self.url = await self.enterAsyncContext(serving(self.up, **settings))
        http = await self.enterAsyncContext(aiohttp.ClientSession())
        socket = http.ws_connect(self.devtools, max_msg_size=0)
        page = Page(await self.enterAsyncContext(socket), self.up)
        context = await page.call("Target.createBrowserContext", disposeOnDetach=True)
        target = await page.call("Target.createTarget", url="about:blank", **context)
        attached = await page.call("Target.attachToTarget", **target, flatten=True)
        page.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            await page.call(f"{domain}.enable")
        size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": False}
        await page.call("Emulation.setDeviceMetricsOverride", **size)
        await page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        await page.call("Page.navigate", url=self.url + "/" + fragment)
        await page.until("document.readyState === 'complete' && location.protocol === 'http:'")
        return page


# ---- Markdown ----------------------------------------------------------------------------
# As the models write it. Left: what came; right: the HTML it becomes, without attributes.

# fmt: off
CODE = "<div><div><span>%s</span><button>Copy</button></div><pre><code>%s</code></pre></div>"
MARKDOWN = {
    "# A\n\n## B ##\n### C#\n####### D": "<h1>A</h1><h2>B</h2><h3>C#</h3><p>####### D</p>",
    "a **b** *c* ***d*** ~~e~~ `f`": "<p>a <strong>b</strong> <em>c</em> "
        "<em><strong>d</strong></em> <del>e</del> <code>f</code></p>",
    "snake_case_name, 2*3*4, 2**3**4, a | b": "<p>snake_case_name, 2*3*4, 2**3**4, a | b</p>",
    "`` a`b `` **b *c `d": "<p><code>a`b</code> **b *c `d</p>",
    r"\*no\* \# c:\dir": r"<p>*no* # c:\dir</p>",
    "one\ntwo  \nthree\\\nfour": "<p>one<br>two<br>three<br>four</p>",
    "- a\n  - b\n    - c": "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li></ul>",
    "7. a\n8. b": '<ol start="7"><li>a</li><li>b</li></ol>',
    "- a\n\n  b\n- c\nd": "<ul><li>a<p>b</p></li><li>c<br>d</li></ul>",
    "In the year\n2024. it was": "<p>In the year<br>2024. it was</p>",
    "> a\n> - b\n>\n> c": "<blockquote><p>a</p><ul><li>b</li></ul><p>c</p></blockquote>",
    "a\n\n---\n***\nb": "<p>a</p><hr><hr><p>b</p>",
    "```py\nif a:\n\n    *b*\n```\nc": CODE % ("py", "if a:\n\n    *b*") + "<p>c</p>",
    "- a\n  ```\n   b\n  ```\n- c": "<ul><li>a" + CODE % ("", " b") + "</li><li>c</li></ul>",
    "|a|b|\n|-|--:|\n|`x\\|y`|": "<div><table><thead><tr><th>a</th>"
        '<th class="right">b</th></tr></thead><tbody><tr><td><code>x|y</code></td>'
        '<td class="right"></td></tr></tbody></table></div>',
    "a | b\n--- | ---\n1 | 2\n\nend": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>1</td><td>2</td></tr></tbody></table></div><p>end</p>",
    '[a *b*](https://x.y/w_(z)?q#f "t") [r](/x) [j](javascript:alert(1))':
        '<p><a href="https://x.y/w_(z)?q#f">a <em>b</em></a> [r](/x) [j](javascript:alert(1))</p>',
    "<https://x.y> <mailto:a@b.c> https://x.y/z. (http://q.r)":
        '<p><a href="https://x.y">https://x.y</a> <a href="mailto:a@b.c">mailto:a@b.c</a> '
        '<a href="https://x.y/z">https://x.y/z</a>. (<a href="http://q.r">http://q.r</a>)</p>',
    "![p](https://x.y/p) ![](data:x)": '<p><a href="https://x.y/p">p</a> ![](data:x)</p>',
    "<b onclick=x>hi</b> &amp;": "<p>&lt;b onclick=x&gt;hi&lt;/b&gt; &amp;amp;</p>",
    "**“重”**见https://x.y。": '<p><strong>“重”</strong>见<a href="https://x.y">https://x.y</a>。</p>',
    r"\(a_1*b_2*c\) $x_1*y*z_2$ $5 and $6 \[": r"<p>\(a_1*b_2*c\) $x_1*y*z_2$ $5 and $6 [</p>",
    "\\[\na *b* c\n\\]": r"<p>\[<br>a *b* c<br>\]</p>",
    "- [ ] a\n- [x] b\n- [y] c": "<ul><li>☐ a</li><li>☑ b</li><li>[y] c</li></ul>",
    "|a|\n|-|\n" + "|b|\n" * 101: "".join("<div><table><thead><tr><th>a</th></tr></thead><tbody>"
        f"{'<tr><td>b</td></tr>' * count}</tbody></table></div>" for count in (100, 1)),
    "~~~\nopen": CODE % ("", "open"),
}
# What must take no time, though it invites trouble: each is repeated to 50,000 characters.
HOSTILE = [
    "*", "**a", "*a_", "[", "![", "](", "[a](b", '[](a "', "`", "`a``", "<https://", "> ", "- a ",
    "|", "~~", "\\", "http://", "_https:///", "(http://a", "\n> ", "\n- ", "```\n", "\n1. ",
    "\n" + " " * 40 + "- a", "\n|a|\n|-|", "*a **b ", "a**_", " ", "\t", "\n\n", "-", "[http://b ",
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


class Markdown(PageCase):
    async def test_what_models_write(self) -> None:
        """Markdown becomes the elements that people expect, and what is none stays text; no text
        takes long or overflows the stack, however its marks are nested or left open."""
        page = await self.open()
        for text, html in MARKDOWN.items():
            with self.subTest(text):
                made = await page.run(RENDER, text)
                made = re.sub(r' (?!href|start|class="right)[a-z-]+="[^"]*"', "", made)
                self.assertEqual(made, html)
        for unit in HOSTILE:
            with self.subTest(unit):
                began = time.monotonic()
                await page.run(RENDER, (unit * 50_000)[:50_000], "x")
                self.assertLess(time.monotonic() - began, PATIENCE / 10)

    async def test_splits(self) -> None:
        """Whatever the pieces, the final DOM is the same, and finished blocks keep their nodes."""
        page, chance = await self.open(), random.Random(3)
        long = "*a* b\n\n" * 250 + "some `words` " * 4000 + "\n\n" + SAMPLE  # goes on in parts
        for text, counts in ((SAMPLE, (0, 5, 50, 500, len(SAMPLE)) * 6), (long, (9, 99))):
            whole = await page.run(RENDER, text)
            for count in counts:
                cuts = [0, *sorted(chance.sample(range(len(text)), count)), len(text)]
                pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
                self.assertEqual(await page.run(RENDER, *pieces), whole)
        code = """(text) => {
            const root = document.createElement('div'), show = markdownInto(root), nodes = [];
            for (let end = 1; end <= text.length; end += 1) {
                show(text.slice(0, end));
                if (text[end - 1] === '\\n') nodes.push(...[...root.childNodes].slice(0, -1));
            }
            return nodes.length > 100 && nodes.every((node) => node.parentNode === root);
        }"""
        self.assertTrue(await page.run(code, SAMPLE) and max(map(len, whole.split("<p>"))) < 50_000)

    async def test_code(self) -> None:
        """Code gets its colours as ranges, which add no node, and loses them with the answer; a
        browser without such ranges shows it plain. Copy takes a block's code, or the Markdown of
        its answer, and says so; on http too."""
        page, code = await self.open(), 'def f(x):  # why\n    return "a" + 1'
        source = f"```py\n{code}\n```\n\n**end**"
        await page.ask(reply=says(source))
        seen = """[...CSS.highlights].map(([kind, ranges]) => [kind, ...[...ranges].map((range) =>
            range.startContainer.data.slice(range.startOffset, range.endOffset))].join(' '))"""
        want = ["keyword def return", "comment # why", 'string "a"', "number 1"]
        self.assertEqual(await page.run(seen), want)
        self.assertEqual(await page.run("document.querySelector('pre code').childNodes.length"), 1)
        await page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
        catch = "addEventListener('copy', (e) => { copied = e.clipboardData.getData('text'); })"
        for _ in range(2):
            for index, text in ((-2, code), (-1, source)):
                await page.tap("Copy", index)
                await page.find("button", "Copied")
                self.assertEqual(await page.run("window.copied"), text)
            await page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
            await page.run(catch)
            await page.ask()
        await page.run("$.newChat.click()")
        for text in ("none", "return"):
            await page.ask(reply=says("~~~\n" + text))
            sizes = await page.run("[...CSS.highlights.values()].map((one) => one.size)")
            self.assertEqual(sizes, [0] * 4)
            await page.run("delete window.Highlight")
        await page.until_says("return", "Answer complete")

    async def test_sse_framing(self) -> None:
        """The parser finds the same events wherever the bytes are cut, whatever ends the lines."""
        page = await self.open()
        text = "\ufeffdata: a\u2028é😀\n: c\ndata:b\n\n\ndata\n\nid: 7\ndata:  [DONE]"
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
            seen = await page.run(code, (text + tail).replace("\n", end))
            self.assertEqual(seen, [["a\u2028é😀\nb", " [DONE]"]])


# ---- A conversation ----------------------------------------------------------------------


def steps(go: asyncio.Semaphore, *parts: bytes) -> Reply:
    """A reply of these parts; each but the first waits for its turn."""

    async def reply(call: Call) -> None:
        await call.start()
        for part in parts:
            await call.send(part)
            await go.acquire()

    return reply


def refuses(status: int, message: str = "No.", **headers: str) -> Reply:
    error = {"message": message, "type": "t", "param": None, "code": "c"}
    return fails(status, json.dumps({"error": error}).encode(), **headers)


PART, CUT, PIECE = says("Part"), says("Part", finish="length"), delta(content="Part")
LOST, TWICE = (chunk(error={"message": m}) for m in ("GPU lost", "It broke off."))
BOTH = ["Continue", "Retry"]
# What the model does; what the person presses then, and what the model does next; the words that
# show in the end, after "not" those that do not; what is offered; what the last request was.
# fmt: off
ENDINGS: list[tuple[Reply, str, Reply, str, list[str], list[str]]] = [
    (PART, "", silent, "Part|Answer complete", [], ["Hello"]),
    (sends(delta("stop"), DONE), "", silent, "Answer complete|not Copy", [], ["Hello"]),
    (CUT, "", silent, "Cut at the token limit.|not broke off", ["Continue"], ["Hello"]),
    (says("Part", finish="weird"), "", silent, "Part|broke off|“weird”", BOTH, ["Hello"]),
    (sends(PIECE), "", silent, "Part|broke off|Answer not complete", BOTH, ["Hello"]),
    (sends(PIECE, LOST), "", silent, "The answer broke off: GPU lost", BOTH, ["Hello"]),
    (sends(PIECE, TWICE), "", silent, "It broke off.|not The answer", BOTH, ["Hello"]),
    (sends(), "", silent, "No answer: ", ["Retry"], ["Hello"]),
    (stalls, "Stop", silent, "Once|Stopped by you.", ["Continue"], ["Hello"]),
    (sends(PIECE, LOST), "Continue", says("ner."), "Partner.|Answer complete|not GPU", [],
        ["Hello", "Part"]),
    (CUT, "Continue", refuses(400, "Full."), "Part|No answer: Full.", BOTH, ["Hello", "Part"]),
    (refuses(400), "Retry", says("Now."), "Now.|not No.", [], ["Hello"]),
    (PART, "Regenerate", says("Better."), "Better.|not Part", [], ["Hello"]),
    (PART, "Regenerate", refuses(400, "Full."), "Part|No answer: Full.", BOTH, ["Hello"]),
    (PART, "Edit", says("Two."), "Hello!|Two.|not Part", [], ["Hello!"]),
]
# fmt: on


class Conversation(PageCase):
    async def test_endings(self) -> None:
        """However an answer ends, its words say it, it offers what helps, and nothing is lost; a
        429 counts down, then enables Retry. What no server sends, and faults of the page, too."""
        page = await self.open()
        for reply, press, then, words, offers, sent in ENDINGS:
            with self.subTest(f"{press} {words}"):
                await page.click("New chat")
                self.up.reply = reply
                await page.send("Hello")
                await page.until("$.log.ariaBusy === 'false' || $.log.innerText.includes('Once')")
                self.up.reply = then
                if press:
                    await page.click(press)
                if press == "Edit":
                    await page.send("!")
                await page.until("$.log.ariaBusy === 'false'")
                text = await page.run("document.body.innerText")
                for word in (*words.split("|"), "not undefined", "not [object", "not NaN"):
                    wanted = word.removeprefix("not ")
                    self.assertEqual(wanted in text, wanted == word, word)
                self.assertEqual([b for b in BOTH if await page.all("button", b)], offers)
                self.assertEqual(len(await page.all("alert", "")), int("Retry" in offers))
                self.assertEqual(self.sent(), sent)
        await page.ask(reply=refuses(429, "Slow down.", retry_after="1"))
        await page.until_says("Slow down.", "Wait 1 s")
        calls = len(self.up.calls)
        self.assertTrue(await page.run("$.log.querySelector(':disabled').innerText === 'Retry'"))
        await page.until("!$.log.querySelector(':disabled')")
        self.assertEqual(len(self.up.calls), calls)
        answers = {
            'new Response("data: {}\\n\\n")': "The stream ended without its end mark.",
            'new Response("data: <html>\\n\\n")': "An event was not JSON.",
            'new Response("<html>", { status: 502 })': "The server answered with status 502.",
            "Promise.reject(new TypeError())": "The server cannot be reached.",
            "new Response(new ReadableStream({ pull() { throw TypeError(); } }))": "was lost.",
            "({ ok: true, get body() { throw new RangeError('oops'); } })": "has a fault (oops).",
        }
        for answer, words in answers.items():
            await page.run(f"window.fetch = async () => {answer}; 0")
            await page.ask()
            await page.until_says("No answer: ", words)

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
        await page.until_says("Answer complete", "7 tokens", "First token", "· m")
        self.assertIn("Hello", await page.run("document.querySelector('strong').innerText"))
        await page.run("document.querySelector('header details').open = true")
        await page.focus("textbox", "System prompt")
        await page.type("Be brief. ")
        await page.ask("Two", says("Again."))
        body = self.up.calls[-1].body["messages"]
        self.assertEqual([m["role"] for m in body], ["system", "user", "assistant", "user"])
        self.assertEqual(self.sent(), ["One", "**Hello**", "Two"])
        self.assertEqual(body[0]["content"], "Be brief. You are a helpful assistant.")
        complaints = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        self.assertEqual([said for said in page.events if said["method"] in complaints], [])
        for name in ("You", "Assistant"):
            self.assertEqual(len(await page.all("article", name)), 2)
        self.assertTrue((await page.run("document.title")).startswith("One"))
        await page.run("URL.createObjectURL = (blob) => { window.saved = blob; return '#'; }")
        await page.click("Save")
        saved = await page.run("saved.text().then((text) => saved.type + '\\n' + text)")
        self.assertIn("/markdown\n## You\n\nOne\n\n## Assistant\n\n**Hello**\n\n## You", saved)

    async def test_stop(self) -> None:
        """Stop, and Esc, close the upstream within 50 ms and keep the part; Enter does nothing
        meanwhile, and a double click on Send does not stop."""
        page, took = await self.open(), []
        for reply, key in itertools.product((stalls, silent), ("", "Escape")):
            self.up.reply, calls = reply, len(self.up.calls)
            await page.run("$.message.value = ''")
            await page.send("Hello")
            await page.until_says("Once" if reply is stalls else "Answering…")
            while len(self.up.calls) == calls:
                await asyncio.sleep(0.01)
            await page.send("next")
            began = time.monotonic()
            await (page.press(key) if key else page.click("Stop"))
            await asyncio.wait_for(self.up.calls[-1].gone.wait(), PATIENCE)
            took.append(time.monotonic() - began)
            await page.until_says("Stopped by you")
            self.assertEqual(await page.run("$.message.value"), "next")
        self.assertLess(min(took), 0.05)
        self.up.reply = stalls
        await page.click("Send", count=2)
        await page.until_says("next", "Once", "Answering…")
        self.assertEqual(len(self.up.calls), 5)

    async def test_edit_and_undo(self) -> None:
        """Edit puts the draft aside, until Esc or sending. Undo brings back what New chat, Edit or
        Regenerate took, after a reload too, stops what runs, and stays until the next message."""
        page, value = await self.open(), "document.activeElement.value"
        texts = "turns.map((one) => one.content)"
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
        self.assertEqual(await page.run(value), "draft")
        await page.until_says("Answer complete")
        await page.ask()
        whole = await page.run(texts)
        self.up.reply = stalls
        for name in ("Regenerate", "Edit", "New chat"):
            with self.subTest(name):
                self.assertEqual(await page.all("button", "Undo"), [])
                await page.tap(name, 0)
                if name == "Edit":
                    await page.press("Enter")
                await (page.reload() if name == "New chat" else page.until_says("Once"))
                self.assertNotEqual(await page.run(texts), whole)
                await page.click("Undo")
                self.assertEqual(await page.run(texts), whole)
                self.assertEqual(await page.run("$.log.ariaBusy"), "false")
        await page.begin("Third")
        await page.click("New chat")
        self.assertEqual(await page.run("$.log.childElementCount"), 0)
        for call in self.up.calls:
            await asyncio.wait_for(call.gone.wait(), PATIENCE)
        await page.find("button", "Undo")
        await page.ask("Anew", PART)
        self.assertEqual(self.sent(), ["Anew"])
        self.assertEqual(await page.all("button", "Undo"), [])

    async def test_token(self) -> None:
        """A 401 asks for the access token, again if it is wrong, and sends what was asked;
        #token=… is taken at the start and in an open page, and leaves the address bar."""
        page = await self.open("#token=wrong", token="right+1")
        self.assertEqual(await page.run("location.hash"), "")
        await page.send("Secret question")
        for token in ("wrong", "right+1"):
            await page.until("$.ask.open && !$.token.value")
            await page.send(token, "Access token")
        await page.until_says("Hello.")
        self.assertEqual(self.sent(0), ["Secret question"])
        for token in ("wrong", "right+1"):
            await page.run("(token) => { location.hash = 'token=' + token; }", token)
            await page.until("location.hash === ''")
            self.assertEqual(await page.run("token"), token)
        await page.reload()
        await page.ask()
        await page.until_says("Answer complete")

    async def test_storage(self) -> None:
        """A reload keeps conversation and draft; an answer that it interrupts is marked so.
        Damaged or full, the storage stops nothing; it is not written at every key."""
        page = await self.open()
        await page.ask("First")
        await page.begin("Second")
        await page.run("""window.saves = 0; const { stringify } = JSON;
            JSON.stringify = (value) => { saves += 'turns' in value; return stringify(value); }""")
        for letter in "not at every key":
            await page.type(letter)
        await page.until("sessionStorage.chat?.includes('not at every key')")
        self.assertLess(await page.run("saves"), 8)
        await page.reload()
        await page.until_says("First", "Hello.", "Second", "Once", "Interrupted")
        self.assertEqual(await page.run("$.message.value"), "not at every key")
        await page.find("button", "Continue")
        odd = '{"turns":[null,7,{"role":"assistant","content":5,"tools":9,"until":"x"}]}'
        for junk in ("{", "7", "[]", odd, '{"turns":{}}', '{"turns":"x","taken":[[]],"draft":{}}'):
            await page.run("(junk) => { onpagehide = null; sessionStorage.chat = junk; }", junk)
            await page.reload()
            self.assertEqual(await page.run("$.log.childElementCount"), 0)
        await page.run("sessionStorage.rest = ' '.repeat(5e6 + 200000)")
        await page.ask("x" * 100_000, PART)
        await page.until("$.status.innerText.includes('Storage is full')")
        await page.until_says("Part")

    async def test_first_sight(self) -> None:
        """The empty page says how to send, what the demo is, and offers messages to click; a picker
        shows the model that is asked. Enter sends, but not with Shift, nor to end an IME's."""
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
        self.assertEqual(self.sent(0) + self.sent(), ["a\n\n", "What are server-sent events?"])
        self.assertEqual(self.up.calls[0].body["model"], "demo-cut-off")

    async def test_reasoning_and_tools(self) -> None:
        """Reasoning is folded, and not sent back; refusal, tools and a list of parts show."""
        page, call = await self.open(), {"name": "weather", "arguments": "{}"}
        thoughts = delta(reasoning_content="h", reasoning="h") + delta(reasoning="m")
        tools = [{"index": 0, "function": call}, {"function": {"name": "clock"}}]
        refusal = delta(refusal="I will not.") + delta("tool_calls") + DONE
        parts = [{"type": "text", "text": "S"}, {"type": "text", "text": "o"}]
        await page.ask(reply=sends(thoughts + delta(content=parts, tool_calls=tools) + refusal))
        folded = "(({ textContent, open }) => [textContent, open])($.log.querySelector('details'))"
        self.assertEqual(await page.run(folded), ["Reasoninghm", False])
        for words in ("So\n", "weather, clock", "I will not.", "Answer complete"):
            await page.until_says(words)
        await page.ask()
        self.assertNotIn("hm", json.dumps(self.up.calls[-1].body))

    async def test_scrolling(self) -> None:
        """The page follows the answer until the reader scrolls up; Latest returns."""
        go = asyncio.Semaphore(0)
        parts = [delta(content="line\n\n" * 40 + f"Part {i}\n\n") for i in range(3)]
        self.up.reply = steps(go, *parts, DONE)
        page, gap = await self.open(), "$.log.scrollHeight - $.log.scrollTop - $.log.clientHeight"
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

    async def test_wire(self) -> None:
        """The wire, opened late, follows the end: each line as it came, in one row, the last 500,
        what the token adds apart from what repeats; and the gaps between events, in words too."""
        go, text = asyncio.Semaphore(0), delta(content="y") * 600 + delta(content="x" * 500) * 5
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
        looks = "[...$.lines.children].map((row) => [row.innerText, row.offsetHeight])"
        rows, heights = zip(*await page.run(looks), strict=True)
        self.assertEqual((len(rows), len(set(heights))), (500, 1))
        self.assertRegex(rows[0], r"^\d+ ms\s+data: \{")
        self.assertLess(max(map(len, rows)), 420)
        self.assertEqual(await page.run("$.lines.querySelector('b').innerText"), '"y"')
        name = await page.run("$.plot.ariaLabel")
        self.assertRegex(name, r"longest \d.*full height.*median \d")
        self.assertTrue(await page.all("image", name))
        await page.ask(reply=sends(delta(content="z"), LOST))
        kinds = await page.run("[...$.lines.children].map((row) => row.className)")
        self.assertEqual(kinds, ["event", "error"])
        self.assertIn("M0 ", await page.run("$.firstMark.getAttribute('d')"))

    async def test_motion_and_touch(self) -> None:
        """Nothing moves for those who asked for that, and a finger finds 40 px; at 360 px nothing
        scrolls sideways but code and tables, each within its own box."""
        page = await self.open(width=360)
        await page.call("Emulation.setTouchEmulationEnabled", enabled=True)
        media = [{"name": "prefers-reduced-motion", "value": "reduce"}]
        await page.call("Emulation.setEmulatedMedia", features=media)
        table = "|a|b|\n|-|-|\n|" + "wide " * 9 + "|" + "x" * 99 + "|\n\n"
        await page.ask("z" * 300, says(table + "```\n" + "x" * 200 + "\n```\n" + "y" * 300))
        boxes = "[document.documentElement, $.log].map((b) => b.scrollWidth - b.clientWidth)"
        for _ in range(2):
            self.assertEqual(await page.run(boxes), [0, 0])
            await page.click("Wire")
        await page.begin()
        moves = "document.getAnimations({ subtree: true }).length"
        self.assertEqual(await page.run(moves), 0)
        await page.call("Emulation.setEmulatedMedia", features=[])
        self.assertEqual(await page.run(moves), 1)
        low = """matchMedia('(pointer: coarse)').matches &&
            [...document.querySelectorAll('button, select, summary, textarea')].filter(
                (one) => one.checkVisibility() && one.getBoundingClientRect().height < 40).length"""
        self.assertIs(await page.run(low), 0)

    async def test_xss(self) -> None:
        """Whatever a model, a user, a model's name or an error says: no script, nothing loaded."""
        evil = (
            "<script>hit()</script> <img src=x onerror=hit()> <svg/onload=hit()> \0000\0\n\n"
            "[x](javascript:hit()) [x](JaVaScRiPt:hit()) <javascript:hit()> [x](//evil.example)\n"
            '[x](data:text/html,<script>hit()</script>) [x](https://a.b/"onmouseover=hit())\n'
            "![x](https://evil.example/x.png)\n\n"
            "```<img src=x onerror=hit()>\n</code><script>hit()</script>\n```\n\n"
            "|<img src=x onerror=hit()>|\n|-|\n|<iframe src=//evil.example>|\n\n"
            "<meta http-equiv=refresh content=0;url=https://evil.example>"
        )
        page = await self.open(model=("<img src=x onerror=hit()>", "b"))
        await page.run("window.hits = 0; window.hit = () => { window.hits += 1; }")
        await page.ask(evil, sends(delta(content=evil), chunk(error={"message": evil[:400]})))
        await page.ask(evil, refuses(400, evil[:400]))
        inside = "[...document.querySelectorAll('[role=log] *')].map((one) => one.localName)"
        allowed = "article h2 div p a br span button pre code table thead tbody tr th td small"
        self.assertLessEqual(set(await page.run(inside)), set(allowed.split()))
        links = await page.run("[...$.log.querySelectorAll('a')].map((a) => a.protocol + a.rel)")
        self.assertEqual(set(links), {"https:noopener noreferrer"})
        asked = (s for s in page.events if s["method"] == "Network.requestWillBeSent")
        urls = [said["params"]["request"]["url"] for said in asked]
        self.assertEqual([u for u in urls if not u.startswith((self.url, "data:"))], [])
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
        cases = [((start + unit * 9000)[:100_000], 100, 1.0) for start, unit in kinds.items()]
        cases.append(("Some words in a paragraph.\n\n" * 21_000, 600_000, 0.4))
        page = await self.open()
        await page.run("""window.tasks = []; new PerformanceObserver((list) => tasks.push(
            ...list.getEntries().map((one) => one.duration))).observe({ type: 'longtask' })""")
        await page.call("Accessibility.disable")  # DevTools' own tree costs more
        for text, size, patience in cases:
            self.up.reply = says(*(text[i : i + size] for i in range(0, len(text), size)))
            for _ in range(5):  # a busy machine may disturb some
                await page.run("$.newChat.click(); tasks.length = 0")
                started = time.monotonic()
                await page.run("send('Hello')")
                await page.until("$.status.innerText === 'Answer complete'")
                took = time.monotonic() - started
                busy = os.getloadavg()[0] / (os.cpu_count() or 1)
                tasks = [t for t in await page.run("tasks") if t > (10 + 5 * busy) * PATIENCE]
                if not tasks and took < patience * PATIENCE:
                    break
            else:
                self.fail(f"{text[:50]!r} took {took} s, {tasks} ms")
        counts = "['p', '> div'].map((kind) => document.querySelectorAll('.text ' + kind).length)"
        self.assertEqual(await page.run(counts), [21_000, 212])

    @unittest.skipUnless(AXE, "CHATSTREAM_AXE does not name an axe.min.js")
    async def test_axe(self) -> None:
        """axe-core finds nothing: empty, streaming, done and failed, in light and in dark."""
        check = """axe.run().then(({ violations }) => violations.map(
            (one) => one.id + ' ' + one.nodes.map((node) => node.html)))"""
        page = await self.open(model=("demo", "demo-cut-off"))
        await page.run(Path(AXE or "").read_text(encoding="utf-8") + ";0")
        found = []
        for scheme in ("light", "dark"):
            media = [{"name": "prefers-color-scheme", "value": scheme}]
            await page.call("Emulation.setEmulatedMedia", features=media)
            found += await page.run(check)
            await page.begin()
            await page.click("Wire")
            await page.run("document.querySelector('header details').open = true")
            found += await page.run(check)
            await page.click("Stop")
            for reply in (says(SAMPLE), refuses(429, "Slow down.", retry_after="60")):
                await page.ask(reply=reply)
                found += await page.run(check)
            await page.tap("Edit")
            found += await page.run(check)
            await page.press("Escape")
            await page.click("New chat")
            await page.click("Wire")
            await page.run("askToken('Why').then(() => {}); 0")
            found += await page.run(check)
            await page.press("Escape")
        self.assertEqual(found, [])


# ---- The README --------------------------------------------------------------------------


class Readme(Case):
    text = (HERE / "README.md").read_text(encoding="utf-8")

    def rows(self, start: str) -> list[list[str]]:
        """The rows of the first table after this."""
        self.assertIn(start, self.text)
        table = self.text.partition(start)[2].partition("\n|")[2].partition("\n\n")[0]
        lines = table.partition("\n</details>")[0].splitlines()[2:]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    def test_tables(self) -> None:
        """The settings table is the dataclass: every variable, its default, what it does. The
        routes are the route table; the errors are ERRORS: every code, with its status; and it asks
        for the aiohttp that the module asks for."""
        true = []
        for each in fields(Settings):
            default = each.default
            shown = ",".join(default) if isinstance(default, tuple) else str(default).lower()
            what, _, unset = each.metadata["what"].partition("; if unset ")
            cell = unset or shown.removesuffix(".0")
            true.append([f"`{chatstream.variable(each.name)}`", f"`{cell}`" if cell else "–", what])
        self.assertEqual(self.rows("## Settings"), true)
        told = {row[0].strip("`") for row in self.rows("## Routes")}
        routes = chatstream.ROUTES.items()
        self.assertEqual(told, {f"{method} {path}" for path, (method, _) in routes})
        rows = self.rows("<summary>Errors")
        codes = {code: row[0] for row in rows for code in re.findall(r"`(\w+)`", row[1])}
        errors = {code: str(row[0]) for code, row in chatstream.ERRORS.items()}
        self.assertEqual(codes, errors | {"upstream_rejected": "the upstream's"})
        source = Path(chatstream.__file__).read_text()
        wanted = re.findall(r'(?m)^# dependencies = \["(.+)"\]', source)
        self.assertEqual(set(re.findall(r"aiohttp[<>=][^\"'\]]*", self.text)), set(wanted))

    async def test_transcripts(self) -> None:
        """Each `$ curl …`, run against the demo, prints what stands below it; … stands for
        anything, and on a line of its own for any lines."""
        if not shutil.which("curl"):
            self.skipTest("missing: curl")
        consoles = "".join(re.findall(r"(?ms)^```console\n(.*?)^```", self.text))
        steps = re.findall(r"(?m)^\$ (.+)\n((?:(?!\$ ).*\n)*)", consoles)
        self.assertGreaterEqual(len(steps), 5)
        async with program() as run:
            lines = [run.out.encode(), *[await run.process.stdout.readline() for _ in range(3)]]
            for command, expected in steps:
                with self.subTest(command):
                    printed = b"".join(lines)
                    if command != "python chatstream.py":
                        here = command.replace("localhost:8080", run.url[7:])
                        shell = asyncio.create_subprocess_shell
                        process = await shell(here, stdout=subprocess.PIPE)
                        printed, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
                    pattern = re.escape(expected.replace("http://127.0.0.1:8080", run.url))
                    pattern = pattern.replace("…\\\n", "(?:.*\n)*?").replace("…", ".*")
                    matches = re.fullmatch(pattern.removesuffix("\\\n") + "\n*", printed.decode())
                    self.assertTrue(matches, f"README.md should say:\n{printed[:600].decode()}")

    async def test_python_sdk(self) -> None:
        """OpenAI's own SDK is a client of it: the Python example prints the demo's answer. (Other
        neighbours, from nginx to llama.cpp, are met by `.ci/neighbours.py`.)"""
        if not importlib.util.find_spec("openai"):
            self.skipTest("missing: the Python package openai")
        (example,) = re.findall(r"(?ms)^```python\n(.*?)^```", self.text)
        async with program() as demo:
            example = example.replace("http://localhost:8080", demo.url)
            async with running(["-c", example], {"PYTHONDEVMODE": ""}) as client:
                self.assertEqual(await client.end(), 0, client.err)
        self.assertIn("Hello from the demo", client.out)
