"""What chatstream promises: each test is one promise, and its docstring says which.

    python -m unittest                         # everything
    python -m unittest test_chatstream.Drain   # one group

The tests need nothing but aiohttp. They run the real server against a real, scripted upstream,
over real sockets. The tests of the page also need Chromium; without it they are skipped.
Environment variables:

    CHATSTREAM_TEST_PATIENCE=3   waits three times as long before a test fails (slow machines)
    CHATSTREAM_TEST_SLOW=1       also runs what takes more than a minute
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import unittest
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from chatstream import Chatstream, read_settings

HERE = Path(__file__).parent
# A wait longer than this many seconds means that what we wait for does not happen.
PATIENCE = 20.0 * float(os.environ.get("CHATSTREAM_TEST_PATIENCE", "1"))
EVENT_STREAM = "text/event-stream"
JSON = "application/json"

T = TypeVar("T")
Json = dict[str, Any]
Headers = Mapping[str, str]
HELLO: Json = {"messages": [{"role": "user", "content": "Hello"}]}


async def within_patience(awaitable: Awaitable[T]) -> T:
    """The result, or TimeoutError if it takes unreasonably long."""
    return await asyncio.wait_for(awaitable, PATIENCE)


async def eventually(is_true: Callable[[], Any]) -> None:
    """Waits until the condition holds; TimeoutError if it takes unreasonably long."""
    async with asyncio.timeout(PATIENCE):
        while not is_true():
            await asyncio.sleep(0.005)


# ---- What an upstream says ---------------------------------------------------------------


def event(payload: bytes | Json) -> bytes:
    """One server-sent event with this payload."""
    if isinstance(payload, dict):
        payload = json.dumps(payload, ensure_ascii=False).encode()
    return b"data: " + payload + b"\n\n"


def chunk(delta: Json, *, index: int = 0, finish_reason: str | None = None) -> bytes:
    """One event of a streamed chat completion."""
    choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
    return event({"object": "chat.completion.chunk", "choices": [choice]})


def text(words: str, *, index: int = 0) -> bytes:
    """A chunk that adds these words to the answer."""
    return chunk({"content": words}, index=index)


FINISH = chunk({}, finish_reason="stop")
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
WHOLE_ANSWER: Json = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi"},
            "finish_reason": "stop",
        }
    ],
}


# ---- The scripted upstream ---------------------------------------------------------------
# A script is a coroutine function. It receives the Call and says what is sent, and when.


class Call(asyncio.Protocol):
    """One request that the upstream received, and the means to answer it."""

    request_line: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    transport: asyncio.Transport

    def __init__(self, connection: UpstreamConnection) -> None:
        self.transport = connection.transport
        self.gone = connection.gone
        self.bytes_sent = 0
        self.chunked = False

    @property
    def json(self) -> Any:
        """The request's body, parsed."""
        return json.loads(self.body)

    async def send_raw(self, data: bytes) -> None:
        """Sends these bytes as they are. Waits while the other side does not read."""
        self.transport.write(data)
        self.bytes_sent += len(data)
        while not self.gone.is_set() and self.transport.get_write_buffer_size() > 2**16:
            await asyncio.sleep(0.002)
        if self.gone.is_set():
            raise ConnectionResetError

    async def send_head(
        self, status: int = 200, content_type: str = EVENT_STREAM, headers: Headers | None = None
    ) -> None:
        """Sends the head of an answer whose body comes in chunks."""
        lines = [f"HTTP/1.1 {status} Scripted", "Transfer-Encoding: chunked"]
        if content_type:
            lines.append(f"Content-Type: {content_type}")
        for name, value in (headers or {}).items():
            lines.append(f"{name}: {value}")
        self.chunked = True
        await self.send_raw("\r\n".join([*lines, "", ""]).encode())

    async def send(self, data: bytes) -> None:
        """Sends a piece of the body."""
        if data:
            await self.send_raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def end_body(self) -> None:
        """Ends the body; done by itself when a script returns."""
        if self.chunked:
            self.chunked = False
            await self.send_raw(b"0\r\n\r\n")

    def break_off(self) -> None:
        """Closes the connection in the middle of the answer."""
        self.chunked = False
        self.transport.abort()


class UpstreamConnection(asyncio.Protocol):
    """Reads requests and lets the script answer each."""

    transport: asyncio.Transport

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.upstream = upstream
        self.received = b""
        self.gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.upstream.connections.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.gone.set()

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, blank_line, rest = self.received.partition(b"\r\n\r\n")
        if not blank_line:
            return
        request_line, *lines = head.decode().split("\r\n")
        call = Call(self)
        call.request_line = request_line
        call.headers = {}
        for line in lines:
            name, _, value = line.partition(": ")
            call.headers[name.lower()] = value
        length = int(call.headers.get("content-length", 0))
        if len(rest) >= length:
            call.body = rest[:length]
            self.received = rest[length:]
            self.upstream.answer(call)


@dataclass
class ScriptedUpstream:
    """A model server that does what its script says, and remembers what it was asked."""

    script: Script
    url: str = ""

    def __post_init__(self) -> None:
        self.calls: list[Call] = []
        self.connections: list[UpstreamConnection] = []
        self.tasks: set[asyncio.Task[None]] = set()

    def answer(self, call: Call) -> None:
        self.calls.append(call)
        task = asyncio.ensure_future(self.play(call))
        self.tasks.add(task)

    async def play(self, call: Call) -> None:
        with suppress(ConnectionError):
            await self.script(call)
            await call.end_body()

    async def next_call(self, number: int = 1) -> Call:
        """The call of this number, the first being 1, once it has come."""
        await eventually(lambda: len(self.calls) >= number)
        return self.calls[number - 1]


Script = Callable[[Call], Awaitable[None]]


@asynccontextmanager
async def scripted_upstream(
    script: Script, tls: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedUpstream]:
    """An upstream that listens on a port of its own."""
    upstream = ScriptedUpstream(script)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: UpstreamConnection(upstream), "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    upstream.url = f"https://localhost:{port}/v1" if tls else f"http://127.0.0.1:{port}/v1"
    try:
        yield upstream
    finally:
        server.close()
        for task in upstream.tasks:
            task.cancel()
        results = await asyncio.gather(*upstream.tasks, return_exceptions=True)
        for connection in upstream.connections:
            connection.transport.abort()
        for result in results:
            # A mistake in a script must not look like a fault of the server.
            if isinstance(result, Exception):
                raise result


# How an answer can go on after its last piece.


async def ends(call: Call) -> None:
    """The body ends in good order."""
    await call.end_body()


async def hangs(call: Call) -> None:
    """Nothing more comes, and the connection stays open."""
    await call.gone.wait()


async def breaks_off(call: Call) -> None:
    """The connection is closed in the middle of the body."""
    await asyncio.sleep(0.02)
    call.break_off()


def sends(
    *pieces: bytes,
    status: int = 200,
    content_type: str = EVENT_STREAM,
    headers: Headers | None = None,
    pause: float = 0,
    then: Script = ends,
) -> Script:
    """A script that sends the head, then each piece in a write of its own."""

    async def script(call: Call) -> None:
        await call.send_head(status, content_type, headers)
        for piece in pieces:
            await call.send(piece)
            await asyncio.sleep(pause)
        await then(call)

    return script


def sends_raw(data: bytes, then: Script = hangs) -> Script:
    """A script that sends these bytes as they are, head and all."""

    async def script(call: Call) -> None:
        await call.send_raw(data)
        await then(call)

    return script


def streams(*words: str, usage: Json | None = None) -> Script:
    """A script that streams these words and ends as a good answer does."""
    pieces = [text(word) for word in words]
    pieces.append(FINISH)
    if usage:
        pieces.append(event({"object": "chat.completion.chunk", "choices": [], "usage": usage}))
    return sends(*pieces, DONE)


SAYS_HI = streams("Hi")


def responds(status: int, body: bytes | Json | list[Any], headers: Headers | None = None) -> Script:
    """A script that answers with one JSON document."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return sends(body, status=status, content_type=JSON, headers=headers)


async def says_nothing(call: Call) -> None:
    """A script that never answers, not even with a head."""
    await call.gone.wait()


def waits_for(go_on: asyncio.Event, script: Script) -> Script:
    """A script that begins only when the test says so."""

    async def waiting_script(call: Call) -> None:
        await go_on.wait()
        await script(call)

    return waiting_script


# ---- The server in this process ----------------------------------------------------------


def variable(name: str) -> str:
    """The environment variable of a setting: `port` -> CHATSTREAM_PORT."""
    prefix = "OPENAI_" if name in ("api_key", "base_url", "model") else "CHATSTREAM_"
    return prefix + name.upper()


@dataclass
class Server:
    """A running server, and the upstream behind it."""

    url: str
    upstream: ScriptedUpstream


@asynccontextmanager
async def serving(script: Script = SAYS_HI, **settings: object) -> AsyncIterator[Server]:
    """The server, in front of an upstream that follows the script.

    Settings are given by their short names: `idle_seconds=0.2` is CHATSTREAM_IDLE_SECONDS=0.2.
    """
    async with scripted_upstream(script) as upstream:
        # With no drain time, a test that leaves a stream behind ends at once.
        usual = {"base_url": upstream.url, "model": "m", "port": 0, "drain_seconds": 0}
        chosen = usual | settings
        environ = {variable(name): str(value) for name, value in chosen.items()}
        server = Chatstream(read_settings(environ, []))
        url = await server.start()
        try:
            yield Server(url, upstream)
        finally:
            await server.drain()


class LogRecords(logging.Handler):
    """Keeps what is logged, so that a test can read it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self.records]

    @property
    def complaints(self) -> list[str]:
        """Tracebacks, and what asyncio found wrong: no test may leave one behind."""
        formatter = logging.Formatter()
        return [
            formatter.format(record)
            for record in self.records
            if record.exc_info or (record.name == "asyncio" and record.levelno >= logging.ERROR)
        ]


# ---- The client --------------------------------------------------------------------------


@dataclass
class Answer:
    """What the server answered, once it is there as a whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_stream(self) -> bool:
        return self.headers.get("Content-Type", "").startswith(EVENT_STREAM)

    @property
    def payloads(self) -> list[bytes]:
        """The payloads of the events. Fails if anything but events and heartbeats was sent."""
        assert re.fullmatch(rb"((: keep-alive|data: [^\n]*)\n\n)+", self.body), self.body
        return re.findall(rb"(?m)^data: (.*)", self.body)

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The error: the body's, or the last event's."""
        document = json.loads(self.payloads[-1]) if self.is_stream else self.json
        return document["error"]

    @property
    def is_complete(self) -> bool:
        """The answer is told to be whole."""
        return self.status == 200 and self.is_stream and self.payloads[-1] == b"[DONE]"

    @property
    def text(self) -> str:
        """The words of a streamed answer."""
        words = []
        for payload in self.payloads:
            if payload != b"[DONE]":
                for choice in json.loads(payload).get("choices", []):
                    words.append(choice["delta"].get("content") or "")
        return "".join(words)


def http_request(
    body: bytes | Json = b"",
    *,
    line: str = "POST /stream HTTP/1.1",
    headers: Headers | None = None,
) -> bytes:
    """A request, as bytes: by default a good one of a chat."""
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    fields = {"Host": "localhost", "Content-Type": JSON, "Content-Length": str(len(body))}
    fields |= headers or {}
    lines = [line, *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


@dataclass
class Connection:
    """A client that sends and reads what the test says, byte by byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def read_until(self, mark: bytes) -> bytes:
        """What comes up to this mark; fails if the connection ends before it."""
        data = b""
        async with asyncio.timeout(PATIENCE):
            while mark not in data:
                piece = await self.reader.read(2**16)
                assert piece, f"the connection ended after {data!r}"
                data += piece
        return data

    async def read_to_end(self) -> bytes:
        """All that comes until the server closes the connection."""
        return await within_patience(self.reader.read())

    def leave(self) -> None:
        """Is gone at once, as a closed tab is."""
        self.writer.transport.abort()


@asynccontextmanager
async def connected(
    url: str, *, receive_buffer: int | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Connection]:
    """A connection to the server. With a small receive buffer a test can be a slow client."""
    parts = urlsplit(url)
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect((parts.hostname, parts.port))
    reader, writer = await asyncio.open_connection(
        sock=client, limit=2**10, ssl=tls, server_hostname="localhost" if tls else None
    )
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


class ServerCase(unittest.IsolatedAsyncioTestCase):
    """A test of the server. It fails if a traceback is left in the log."""

    async def asyncSetUp(self) -> None:
        self.client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE),
        )
        self.addAsyncCleanup(self.client.close)
        self.log = LogRecords()
        root = logging.getLogger()
        root.addHandler(self.log)
        self.addCleanup(root.removeHandler, self.log)
        self.addCleanup(root.setLevel, root.level)
        root.setLevel(logging.INFO)
        self.addCleanup(self.check_log)

    def check_log(self) -> None:
        gc.collect()  # asyncio reports a lost exception when its task is collected
        self.assertEqual(self.log.complaints, [])

    async def ask(
        self,
        url: str,
        body: bytes | Json = HELLO,
        *,
        path: str = "/stream",
        headers: Headers | None = None,
    ) -> Answer:
        """The whole answer to one chat request."""
        async with self.asking(url, body, path=path, headers=headers) as response:
            return Answer(response.status, response.headers, await response.read())

    @asynccontextmanager
    async def asking(
        self,
        url: str,
        body: bytes | Json = HELLO,
        *,
        path: str = "/stream",
        headers: Headers | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A chat request whose answer is still running."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        sent = {"Content-Type": JSON} | dict(headers or {})
        async with self.client.post(url + path, data=data, headers=sent) as response:
            yield response

    async def get(self, url: str, *, method: str = "GET", headers: Headers | None = None) -> Answer:
        """The answer to a request without a body."""
        async with self.client.request(
            method, url, headers=headers, allow_redirects=False, ssl=CLIENT_TLS
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    async def answer_to(self, script: Script, **settings: object) -> Answer:
        """What one client gets when the upstream follows this script."""
        async with serving(script, **settings) as server:
            return await self.ask(server.url)

    async def metrics(self, url: str) -> dict[str, float]:
        """Every sample of /metrics, by its name with labels."""
        lines = (await self.get(url + "/metrics")).body.decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    async def outcomes(self, url: str) -> dict[str, int]:
        """How many streams ended in which way."""
        found = {}
        for name, value in (await self.metrics(url)).items():
            if name.startswith("chatstream_streams_total") and value:
                found[name.split('"')[1]] = int(value)
        return found

    async def assert_outcomes(self, url: str, **expected: int) -> None:
        """So many streams end in these ways, and none in another."""
        async with asyncio.timeout(PATIENCE):
            found = await self.outcomes(url)
            while sum(found.values()) < sum(expected.values()):
                await asyncio.sleep(0.01)
                found = await self.outcomes(url)
        self.assertEqual(found, expected)

    def assert_headers(self, answer: Answer, expected: Headers) -> None:
        """The answer has these headers, whatever others it has."""
        found = {name: answer.headers.get(name) for name in expected}
        self.assertEqual(found, dict(expected))


# ---- The program, as people start it -----------------------------------------------------

# Made for these tests, for localhost, valid for a hundred years; it guards nothing.
PEM = """\
-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEILsLHUyW/EYm2z21JVv4fI6wRrQVV+fB3eGfkxQ1sBCV
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBGjCBzaADAgECAhRtpFCzKGMjPOVPbLMig0qGMzJtDjAFBgMrZXAwFDESMBAG
A1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNTE4MDE1OFoYDzIxMjYxMTAxMTgwMTU4
WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwKjAFBgMrZXADIQAeSBes2VrPrVF/W4Kp
re3MNGAsbmd9ES6xtJa/TJSN6aMvMC0wDwYDVR0TAQH/BAUwAwEB/zAaBgNVHREE
EzARgglsb2NhbGhvc3SHBH8AAAEwBQYDK2VwA0EAVe0NVrDviZQl6QgPOl04sNrw
P0l8h6aFvB4768fxq+G0YNJpWyrj/vU26CotR8XZO4h2gYI7a+DqgS+Sgh2DAA==
-----END CERTIFICATE-----
"""
CLIENT_TLS = ssl.create_default_context(cadata=PEM)


@dataclass
class Certificate:
    """A key and certificate in one file, and what an upstream needs to use them."""

    path: str

    @property
    def upstream_tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.path)
        return context

    @property
    def served(self) -> dict[str, str]:
        """The settings that make the program serve HTTPS."""
        return {"CHATSTREAM_TLS_CERT": self.path, "CHATSTREAM_TLS_KEY": self.path}

    @property
    def trusted(self) -> dict[str, str]:
        """What makes the program trust an upstream with this certificate."""
        return {"SSL_CERT_FILE": self.path}


@contextmanager
def certificate(pem: str = PEM) -> Iterator[Certificate]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "localhost.pem")
        path.write_text(pem)
        yield Certificate(str(path))


@dataclass
class Exit:
    """How the program ended, and all that it printed."""

    status: int
    stdout: str
    stderr: str


class Program:
    """`python chatstream.py` as a process of its own."""

    url: str

    def __init__(self, process: asyncio.subprocess.Process, stderr: IO[bytes]) -> None:
        self.process = process
        self.stderr_file = stderr
        self.stdout = ""

    @property
    def stderr(self) -> str:
        """What stderr has so far."""
        size = os.fstat(self.stderr_file.fileno()).st_size
        return os.pread(self.stderr_file.fileno(), size, 0).decode(errors="replace")

    async def read_line(self) -> str:
        """The next line of stdout."""
        assert self.process.stdout
        line = (await within_patience(self.process.stdout.readline())).decode()
        self.stdout += line
        return line

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def exit(self) -> Exit:
        """Waits for the program's end."""
        rest, _ = await within_patience(self.process.communicate())
        self.stdout += (rest or b"").decode()
        return Exit(await self.process.wait(), self.stdout, self.stderr)

    async def stop(self) -> Exit:
        """Sends SIGTERM and waits for the program's end."""
        self.signal(signal.SIGTERM)
        return await self.exit()


COMPLAINTS = ("Traceback", "never retrieved", "never awaited", "was destroyed", "ResourceWarning")


@asynccontextmanager
async def process(
    *arguments: str,
    environment: Headers,
    redirection: str = "",
    prefix: str = "",
    stdin: int | None = subprocess.DEVNULL,
    new_session: bool = False,
) -> AsyncIterator[Program]:
    """`python ARGUMENTS`, started by a shell, with no setting but those of this environment.

    Fails if the process leaves a traceback or a warning on stderr.
    """
    ours = ("OPENAI_", "CHATSTREAM_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    inherited = {k: v for k, v in os.environ.items() if not k.upper().startswith(ours)}
    command = f'{prefix} exec "$@" {redirection}'
    with tempfile.TemporaryFile() as stderr:
        started = await asyncio.create_subprocess_exec(
            *("sh", "-c", command, "sh", sys.executable, *arguments),
            cwd=HERE,
            env=inherited | {"PYTHONDEVMODE": "1"} | dict(environment),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=new_session,
        )
        program = Program(started, stderr)
        try:
            yield program
        finally:
            if started.returncode is None:
                started.kill()
                await started.communicate()
        found = [complaint for complaint in COMPLAINTS if complaint in program.stderr]
        assert not found, program.stderr


@asynccontextmanager
async def running_program(*arguments: str, **environment: str) -> AsyncIterator[Program]:
    """`python chatstream.py ARGUMENTS`, once it listens."""
    chosen = {"CHATSTREAM_PORT": "0"} | environment
    async with process("chatstream.py", *arguments, environment=chosen) as program:
        line = await program.read_line()
        address = re.search(r"https?://\S+", line)
        assert address, line + program.stderr
        program.url = address[0]
        yield program


async def failed_start(*arguments: str, **environment: str) -> Exit:
    """How `python chatstream.py ARGUMENTS` ends that must not start."""
    chosen = {"CHATSTREAM_PORT": "0"} | environment
    async with process("chatstream.py", *arguments, environment=chosen) as program:
        return await program.exit()


class Harness(ServerCase):
    async def test_a_stream(self) -> None:
        async with serving(streams("Hel", "lo")) as server:
            answer = await self.ask(server.url)
            self.assertTrue(answer.is_complete)
            self.assertEqual(answer.text, "Hello")
            await self.assert_outcomes(server.url, completed=1)

    async def test_the_program(self) -> None:
        async with scripted_upstream(streams("Hi")) as upstream:
            async with running_program(OPENAI_BASE_URL=upstream.url) as program:
                self.assertEqual((await self.ask(program.url)).text, "Hi")
                self.assertEqual((await program.stop()).status, 0)
