"""What chatstream promises, each promise a test: the real server, a real scripted upstream,
real sockets, and a real browser for the page. Read the docstrings from top to bottom.

    python -m unittest                  # all of it; needs nothing but aiohttp (and Chromium)
    python test_chatstream.py bench     # measures, see README
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import unittest
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

import chatstream
from chatstream import Chatstream, Settings

HERE = Path(__file__).parent
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
    settings = {"port": 0, "drain_seconds": 0.0, "model": ("m",)} | settings
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


# ---- The relay: any framing in, one framing out ------------------------------------------

TEXT = "Grüße 👩‍👩‍👧 你好 \u2028\u2029\x85"
CHUNK = json.dumps({"choices": [{"delta": {"content": TEXT}}]}, ensure_ascii=False).encode()
LAST = b'{"choices":[{"delta":{},"finish_reason":"stop"}]}'
END = [LAST, b"[DONE]"]


class Quirks(Case):
    """What upstreams really send: each row whole, byte by byte, and cut at every offset."""

    def feed(self, body: bytes, cuts: Iterable[int], cut: bool = False) -> chatstream.Relay:
        relay = chatstream.Relay(10_000, ("sk-secret",))
        bounds = [0, *cuts, len(body)]
        pieces = [body[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
        relay.out = b""
        for piece in pieces:
            if not (relay.done or relay.failure):
                relay.out += relay.feed(piece)
        if not (relay.done or relay.failure):
            relay.out += relay.close(cut)
        return relay

    def test_framing(self) -> None:
        """Every framing becomes `data: PAYLOAD\\n\\n`, the payload byte for byte."""
        row = b"data: " + CHUNK
        end = b"data: " + LAST + b"\n\ndata: [DONE]\n\n"
        rows = {
            "LF": (row + b"\n\n" + end, [CHUNK, *END]),
            "CRLF": ((row + b"\n\n" + end).replace(b"\n", b"\r\n"), [CHUNK, *END]),
        }
        for name, (body, expected) in rows.items():
            want = b"".join(b"data: %b\n\n" % payload for payload in expected)
            for cuts in ([], range(1, len(body)), *([n] for n in range(1, len(body)))):
                with self.subTest(name, cuts=cuts):
                    relay = self.feed(body, cuts)
                    self.assertEqual(relay.out, want)
                    self.assertTrue(relay.done)


if __name__ == "__main__":
    unittest.main()
