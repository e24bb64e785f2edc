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
import time
import unittest
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from chatstream import Chatstream, EventParser, Relay, read_settings

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


# ---- The parser: bytes in any pieces become events ---------------------------------------


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def every_split(data: bytes) -> Iterator[list[bytes]]:
    """The bytes in one piece, in single bytes, and in two pieces, cut at each place."""
    yield [data]
    yield byte_by_byte(data)
    for cut in range(1, len(data)):
        yield [data[:cut], data[cut:]]


class Parser(unittest.TestCase):
    """Server-sent events, as the WHATWG HTML standard defines them."""

    def parse(self, *pieces: bytes, limit: int = 1000) -> list[tuple[bytes, bytes]]:
        """The events, those at the end of the body too."""
        parser = EventParser(limit)
        events: list[tuple[bytes, bytes]] = []
        for piece in pieces:
            events += parser.feed(piece)
        return [*events, *parser.close()]

    def test_an_event_has_a_type_and_data(self) -> None:
        """An `event:` line gives an event its type, a `data:` line its data."""
        self.assertEqual(self.parse(b"event: greeting\ndata: hi\n\n"), [(b"greeting", b"hi")])

    def test_the_type_ends_with_its_event(self) -> None:
        """The type belongs to one event; the next has none."""
        body = b"event: greeting\ndata: a\n\ndata: b\n\n"
        self.assertEqual(self.parse(body), [(b"greeting", b"a"), (b"", b"b")])

    def test_line_ends(self) -> None:
        """A line ends in LF, CRLF or CR."""
        for line_end in (b"\n", b"\r\n", b"\r"):
            with self.subTest(line_end):
                body = b"data: a\n\ndata: b\n\n".replace(b"\n", line_end)
                self.assertEqual(self.parse(body), [(b"", b"a"), (b"", b"b")])

    def test_any_byte_split(self) -> None:
        """Pieces may be cut anywhere: inside CRLF, and inside a UTF-8 character."""
        body = "\ufeffevent: x\r\ndata: Grüße 👋\r\n\r\ndata:\r\ndata: b\r\n\r\n".encode()
        for pieces in every_split(body):
            expected = [(b"x", "Grüße 👋".encode()), (b"", b"\nb")]
            self.assertEqual(self.parse(*pieces), expected, pieces)

    def test_empty_pieces(self) -> None:
        """An empty piece changes nothing, not even between CR and LF."""
        self.assertEqual(self.parse(b"data: a\r", b"", b"\ndata: b\n\n"), [(b"", b"a\nb")])

    def test_an_event_comes_with_its_last_byte(self) -> None:
        """An event is there as soon as its blank line has begun, not when the next one comes."""
        for blank_line in (b"\n\n", b"\r\n\r", b"\r\r"):
            with self.subTest(blank_line):
                parser = EventParser(1000)
                self.assertEqual(list(parser.feed(b"data: a" + blank_line)), [(b"", b"a")])

    def test_byte_order_mark(self) -> None:
        """A byte order mark may open the stream."""
        self.assertEqual(self.parse(b"\xef\xbb\xbfdata: a\n\n"), [(b"", b"a")])

    def test_unicode_line_separators_are_text(self) -> None:
        """U+2028, U+2029 and U+0085 do not end a line."""
        words = "a\u2028b\u2029c\x85d".encode()
        self.assertEqual(self.parse(b"data: " + words + b"\n\n"), [(b"", words)])

    def test_the_space_after_the_colon_is_optional(self) -> None:
        """One space after the colon is dropped if it is there; a second one is data."""
        body = b"data:a\n\ndata: b\n\ndata:  c\n\n"
        self.assertEqual(self.parse(body), [(b"", b"a"), (b"", b"b"), (b"", b" c")])

    def test_several_data_lines(self) -> None:
        """Several `data:` lines are one event, joined by LF."""
        self.assertEqual(self.parse(b"data: a\ndata: b\n\n"), [(b"", b"a\nb")])

    def test_no_data_no_event(self) -> None:
        """What has no data is no event."""
        self.assertEqual(self.parse(b"event: ping\n\ndata:\n\ndata\n\n\n\n"), [])

    def test_comments(self) -> None:
        """Comments are dropped, however long they are."""
        body = b": short\n:" + b"x" * 5000 + b"\ndata: a\n\n"
        self.assertEqual(self.parse(body, limit=100), [(b"", b"a")])

    def test_other_fields(self) -> None:
        """`id`, `retry` and unknown fields are dropped."""
        self.assertEqual(self.parse(b"id: 7\nretry: 9\nfoo: x\nfoo\ndata: a\n\n"), [(b"", b"a")])

    def test_the_last_event_may_lack_its_blank_line(self) -> None:
        """At the end of the body, a last event counts without its blank line or any newline."""
        for ending in (b"", b"\n", b"\r", b"\r\n"):
            with self.subTest(ending):
                self.assertEqual(self.parse(b"data: a" + ending), [(b"", b"a")])

    def test_an_event_may_be_as_long_as_the_limit(self) -> None:
        """Data of exactly the limit pass."""
        data = b"x" * 100
        self.assertEqual(self.parse(b"data: " + data + b"\n\n", limit=100), [(b"", data)])

    def test_too_long_an_event(self) -> None:
        """One byte more than the limit raises OverflowError, whatever the lines look like."""
        bodies = {
            "one line": b"data: " + b"x" * 101 + b"\n\n",
            "two lines": b"data: " + b"x" * 50 + b"\ndata: " + b"x" * 50 + b"\n\n",
            "a line without an end": b"data: " + b"x" * 200,
            "a field name without an end": b"x" * 200,
            "empty lines of data without an end": b"data:\n" * 200,
        }
        for name, body in bodies.items():
            with self.subTest(name), self.assertRaises(OverflowError):
                list(EventParser(100).feed(body))

    def test_too_long_an_event_in_pieces(self) -> None:
        """A line without an end is refused while it grows, not when it ends."""
        parser = EventParser(100)
        with self.assertRaises(OverflowError):
            for piece in [b"data: "] + [b"x"] * 200:
                list(parser.feed(piece))

    def test_events_before_too_long_a_one(self) -> None:
        """The events before one that is too long are not lost."""
        events = []
        with self.assertRaises(OverflowError):
            for each in EventParser(100).feed(b"data: a\n\ndata: " + b"x" * 200):
                events.append(each)
        self.assertEqual(events, [(b"", b"a")])

    def test_time_grows_with_length(self) -> None:
        """A long event in small pieces costs time in proportion to its length."""

        def seconds(length: int) -> float:
            parser = EventParser(length)
            started = time.process_time()
            for _ in range(length // 100):
                list(parser.feed(b"x" * 100))
            return time.process_time() - started

        short = min(seconds(200_000) for _ in range(3))
        long = min(seconds(3_200_000) for _ in range(3))
        self.assertLess(long, 16 * 6 * short)


# ---- The relay: what goes out, and what it says of the answer ----------------------------


@dataclass
class Relayed:
    """What a relay let out, and how the answer ended."""

    out: bytes
    code: str  # of the failure, or "" for a complete answer
    message: str
    status: int

    @property
    def chunks(self) -> list[Any]:
        payloads = re.findall(rb"(?m)^data: (.*)", self.out)
        return [json.loads(payload) for payload in payloads if payload != b"[DONE]"]

    @property
    def text(self) -> str:
        deltas = [choice["delta"] for chunk in self.chunks for choice in chunk["choices"]]
        return "".join(delta.get("content") or "" for delta in deltas)


def relay_body(*pieces: bytes, aborted: bool = False, limit: int = 100_000) -> Relayed:
    """Feeds the pieces of a body to a relay, up to the end of the body or of the connection."""
    relay = Relay(EventParser(limit))
    out = b""
    for piece in pieces:
        if not relay.done and not relay.failure:
            out += relay.feed(piece)
    if not relay.done and not relay.failure:
        out += relay.close(aborted)
    if relay.failure:
        assert not relay.done, "an answer is complete, or it failed"
        failure = relay.failure
        return Relayed(out, failure.code, failure.message, failure.status)
    assert relay.done
    return Relayed(out, "", "", 200)


GREETING = "Grüße 👩‍👩‍👧 你好 \u2028\u2029\x85 data: [DONE]"
SAID = text(GREETING)
GOOD = SAID + FINISH + DONE


@dataclass
class Framing:
    """A way to send the good answer."""

    name: str
    sent: bytes


FRAMINGS = [
    Framing("LF", GOOD),
    Framing("CRLF", GOOD.replace(b"\n", b"\r\n")),
    Framing("CR", GOOD.replace(b"\n", b"\r")),
    Framing("byte order mark", b"\xef\xbb\xbf" + GOOD),
    Framing("no space after the colon (openai-python#559)", GOOD.replace(b"data: {", b"data:{")),
    Framing("comments (OpenRouter)", b": OPENROUTER PROCESSING\n\n:\n\n" + GOOD),
    Framing("a comment longer than an event may be", b":" + b"x" * 250_000 + b"\n" + GOOD),
    Framing("other fields", b"id: 7\nretry: 10\nevent: message\nfoo: bar\n" + GOOD),
    Framing("events without data", b"event: ping\n\ndata:\n\n" + GOOD),
    Framing("null as a sign of life", event(b"null") + GOOD),
    Framing("an empty object", event(b"{}") + GOOD),
    Framing("an object without choices", event(b'{"type":"ping"}') + GOOD),
    Framing("an error that is null", event(b'{"error":null}') + GOOD),
    Framing("white space around [DONE]", SAID + FINISH + b"data:  [DONE] \n\n"),
    Framing("no [DONE], but a finish_reason", SAID + FINISH),
    Framing("no newline at the end", GOOD[:-2]),
    Framing("neither [DONE] nor a newline at the end", (SAID + FINISH)[:-2]),
    Framing("text after [DONE]", GOOD + SAID),
]


class Forwarding(unittest.TestCase):
    """Whatever the framing of the upstream, the client gets one: `data: PAYLOAD`, blank line."""

    def test_framings(self) -> None:
        """Every framing of a good answer goes out as the same bytes, in any pieces."""
        for framing in FRAMINGS:
            is_short = len(framing.sent) < 5000
            with self.subTest(framing.name):
                for pieces in every_split(framing.sent) if is_short else [[framing.sent]]:
                    relayed = relay_body(*pieces)
                    self.assertEqual((relayed.out, relayed.code), (GOOD, ""), pieces)

    def test_payloads_are_not_touched(self) -> None:
        """A payload goes out byte for byte, with its spaces, escapes and key order."""
        payload = rb'{"z" : 1.50e0, "choices":[ {"delta":{"content":"\u00e9\/ \ud83d"}} ],"a":[]}'
        self.assertEqual(relay_body(event(payload) + DONE).out, event(payload) + DONE)

    def test_an_event_goes_out_with_its_last_byte(self) -> None:
        """Each event goes out the moment it is complete."""
        for blank_line in (b"\n\n", b"\r\n\r", b"\r\r"):
            with self.subTest(blank_line):
                out = Relay(EventParser(1000)).feed(text("a")[:-2] + blank_line)
                self.assertEqual(out, text("a"))

    def test_events_that_are_there_go_out_together(self) -> None:
        """Events that came in one piece go out in one."""
        out = Relay(EventParser(1000)).feed(text("a") + text("b") + text("c")[:-1])
        self.assertEqual(out, text("a") + text("b"))

    def test_several_data_lines_go_out_as_one(self) -> None:
        """A payload on several `data:` lines goes out on one, with spaces where lines ended."""
        body = b'data: {"choices":\ndata: [{"delta":{}}]}\n\n' + DONE
        self.assertEqual(relay_body(body).out, event(b'{"choices": [{"delta":{}}]}') + DONE)

    def test_a_token_may_contain_the_end_mark(self) -> None:
        """`[DONE]` is the end only as the whole payload."""
        self.assertEqual(relay_body(text("[DONE]") + FINISH + DONE).text, "[DONE]")

    def test_usage_without_choices(self) -> None:
        """A payload with `usage` but no `choices` goes out with an empty list of choices."""
        relayed = relay_body(SAID + FINISH + event({"usage": {"total_tokens": 3}}) + DONE)
        self.assertEqual(relayed.chunks[-1], {"usage": {"total_tokens": 3}, "choices": []})

    def test_a_message_that_repeats_the_deltas(self) -> None:
        """A `message` after deltas says again what they said: it is not sent again (MiniMax)."""
        repeated = {"role": "assistant", "content": "Hello world"}
        choice = {"index": 0, "finish_reason": "stop", "message": repeated}
        for last in (choice, choice | {"delta": {}}):
            body = text("Hello") + text(" world") + event({"choices": [last]}) + DONE
            with self.subTest(last):
                relayed = relay_body(body)
                self.assertNotIn(b"Hello world", relayed.out)
                self.assertEqual((relayed.text, relayed.code), ("Hello world", ""))

    def test_the_finish_reason_beside_a_repeated_message(self) -> None:
        """The `finish_reason` of a chunk whose message is left out still reaches the client."""
        choice = {"index": 0, "finish_reason": "length", "message": {"content": "Hello"}}
        relayed = relay_body(text("Hello") + event({"choices": [choice]}) + DONE)
        reasons = [each["choices"][0].get("finish_reason") for each in relayed.chunks]
        self.assertEqual(reasons, [None, "length"])

    def test_a_whole_completion_as_an_event(self) -> None:
        """A whole completion in one event goes out as a chunk, `delta` for `message`."""
        relayed = relay_body(event(WHOLE_ANSWER) + DONE)
        self.assertEqual(relayed.text, "Hi")
        self.assertEqual(relayed.chunks[0]["object"], "chat.completion.chunk")
        self.assertNotIn("message", relayed.chunks[0]["choices"][0])

    def test_tool_calls_of_a_whole_completion(self) -> None:
        """Each of its `tool_calls` gets the `index` that clients need."""
        calls = [{"id": "a", "function": {"name": "f"}}, {"id": "b", "function": {"name": "g"}}]
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        relayed = relay_body(event({"object": "chat.completion", "choices": [choice]}) + DONE)
        delta = relayed.chunks[0]["choices"][0]["delta"]
        self.assertEqual([call["index"] for call in delta["tool_calls"]], [0, 1])

    def test_odd_fields_break_nothing(self) -> None:
        """A field that is null or of another type is the client's to judge: the chunk passes."""
        odd_choices = [
            {"delta": None, "finish_reason": None},
            {"delta": "text", "finish_reason": 7},
            {"message": None, "finish_reason": None},
            {"message": {"tool_calls": {}}, "finish_reason": None},
            {"message": {"tool_calls": [None, 7]}, "finish_reason": None},
            {"index": None, "delta": {"content": 7}},
            None,
            7,
            [],
        ]
        for choice in odd_choices:
            with self.subTest(choice):
                relayed = relay_body(SAID + event({"choices": [choice]}) + DONE)
                self.assertEqual(relayed.code, "")


class EndOfAnAnswer(unittest.TestCase):
    """An answer is complete, or it failed; a part never passes for the whole."""

    def test_done(self) -> None:
        """`[DONE]` completes an answer, also without a `finish_reason`."""
        self.assertEqual(relay_body(SAID + DONE).code, "")

    def test_every_choice_is_finished(self) -> None:
        """The end of the body completes an answer when every choice has a `finish_reason`."""
        both = text("a") + text("b", index=1) + FINISH
        relayed = relay_body(both + chunk({}, index=1, finish_reason="length"))
        self.assertEqual(relayed.code, "")
        self.assertTrue(relayed.out.endswith(DONE))

    def test_one_choice_is_not_finished(self) -> None:
        """One choice in mid-word makes the end of the body a truncation."""
        relayed = relay_body(text("a") + text("b", index=1) + FINISH)
        self.assertEqual(relayed.code, "stream_truncated")

    def test_no_choice_at_all(self) -> None:
        """Chunks without any choice are not a complete answer."""
        filtered = event({"choices": [], "prompt_filter_results": [{}]})
        self.assertEqual(relay_body(filtered).code, "stream_truncated")

    def test_a_finish_reason_stays(self) -> None:
        """A later chunk without a `finish_reason` does not take the earlier one back."""
        late = chunk({}, finish_reason=None)
        self.assertEqual(relay_body(SAID + FINISH + late).code, "")

    def test_an_empty_finish_reason(self) -> None:
        """An empty `finish_reason` finishes nothing."""
        self.assertEqual(relay_body(SAID + chunk({}, finish_reason="")).code, "stream_truncated")

    def test_an_unfinished_message(self) -> None:
        """A `message` whose `finish_reason` is null does not complete an answer by itself."""
        choice = {"index": 0, "message": {"content": "Hel"}, "finish_reason": None}
        self.assertEqual(relay_body(event({"choices": [choice]})).code, "stream_truncated")

    def test_usage_after_the_finish_reason(self) -> None:
        """A usage chunk after the last `finish_reason` changes nothing."""
        usage = event({"choices": [], "usage": {"total_tokens": 3}})
        self.assertEqual(relay_body(SAID + FINISH + usage).out, SAID + FINISH + usage + DONE)

    def test_a_connection_that_breaks_after_the_end(self) -> None:
        """A connection that breaks when every choice is finished harms nothing."""
        relayed = relay_body(SAID + FINISH, aborted=True)
        self.assertEqual((relayed.out, relayed.code), (SAID + FINISH + DONE, ""))

    def test_a_connection_that_breaks_before_the_end(self) -> None:
        """A connection that breaks before that is a truncation."""
        relayed = relay_body(SAID, aborted=True)
        self.assertEqual((relayed.out, relayed.code), (SAID, "stream_truncated"))

    def test_a_connection_that_breaks_inside_an_event(self) -> None:
        """What a broken connection left unfinished is not taken for an event."""
        relayed = relay_body(SAID + FINISH[:-2], aborted=True)
        self.assertEqual((relayed.out, relayed.code), (SAID, "stream_truncated"))

    def test_truncation_at_every_byte(self) -> None:
        """Wherever an answer is cut before its end, it is told as truncated."""
        first_cut = len(SAID)
        last_cut = len(SAID + FINISH) - 3
        for length in range(first_cut, last_cut):
            for aborted in (False, True):
                relayed = relay_body(GOOD[:length], aborted=aborted)
                self.assertEqual(relayed.code, "stream_truncated", GOOD[:length])
                self.assertEqual(relayed.out, SAID, GOOD[:length])

    def test_a_cut_first_event(self) -> None:
        """An end inside the first payload is a truncation."""
        self.assertEqual(relay_body(b'data: {"choices":[{').code, "stream_truncated")

    def test_nothing(self) -> None:
        """No event at all, comments, or nothing but `[DONE]`, is an empty answer."""
        for body in (b"", b": ping\n\n" * 3, DONE):
            with self.subTest(body):
                relayed = relay_body(body)
                self.assertEqual((relayed.out, relayed.code), (b"", "empty_stream"))


# ---- What the upstream reports, and what it gets wrong -----------------------------------


@dataclass
class Dialect:
    """A way to report an error, and what the client is told."""

    name: str
    sent: bytes
    code: str = "upstream_error"
    message: str = "Ouch"


OVERLOADED: Json = {"message": "Overloaded", "type": "overloaded_error", "code": "busy"}
NUMBERED: Json = {"message": "Ouch", "code": 400}

DIALECTS = [
    Dialect("an object", event({"error": OVERLOADED}), code="busy", message="Overloaded"),
    Dialect("a list", event(json.dumps([{"error": OVERLOADED}]).encode()), "busy", "Overloaded"),
    Dialect("a text (LM Studio)", event({"error": "Ouch"})),
    Dialect("object: error (vLLM)", event({"object": "error"} | NUMBERED)),
    Dialect("an error beside a message", event({"error": {"message": "Ouch"}, "message": "Out"})),
    Dialect("event: error", b"event: error\n" + event({"error": {"message": "Ouch"}})),
    Dialect("event: error with a bare message", b"event: error\n" + event({"message": "Ouch"})),
    Dialect("an error field (llama.cpp)", b'error: {"code":500,"message":"Ouch"}\n\n'),
    Dialect("an error beside choices", event({"choices": [{}], "error": {"message": "Ouch"}})),
    Dialect("an error in a choice", event({"choices": [{"error": {"message": "Ouch"}}]})),
    Dialect("a number as code", event({"error": {"message": "Ouch", "code": 500}})),
    Dialect("a code of a page", event({"error": {"message": "Ouch", "code": "x" * 65}})),
    Dialect("a message that is an object", event({"detail": [{"msg": "Ouch"}], "object": "error"})),
]


class UpstreamErrors(unittest.TestCase):
    """An error in the stream is told, in whatever dialect it comes."""

    def test_dialects(self) -> None:
        """Every dialect of an error gives its code and its message."""
        for dialect in DIALECTS:
            with self.subTest(dialect.name):
                for pieces in every_split(dialect.sent):
                    relayed = relay_body(*pieces, DONE)
                    self.assertEqual(relayed.code, dialect.code, pieces)
                    self.assertEqual(relayed.message, dialect.message, pieces)

    def test_dialects_in_mid_answer(self) -> None:
        """The part before an error goes out, the error ends the answer, and no `[DONE]` follows."""
        for dialect in DIALECTS:
            with self.subTest(dialect.name):
                relayed = relay_body(SAID + dialect.sent + FINISH + DONE)
                self.assertEqual((relayed.out, relayed.code), (SAID, dialect.code))

    def test_an_error_event_without_json(self) -> None:
        """`event: error` is an error whatever its data are."""
        self.assertEqual(relay_body(b"event: error\ndata: Ouch\n\n" + DONE).code, "upstream_error")

    def test_falsy_errors(self) -> None:
        """`"error": null`, and the like, beside choices is no error."""
        falsy: list[Any] = [None, "", False, {}]
        for error in falsy:
            with self.subTest(error):
                body = event({"choices": [{"delta": {}, "error": error}], "error": error})
                self.assertEqual(relay_body(body + DONE).out, body + DONE)


@dataclass
class Malformed:
    """A payload that cannot be forwarded."""

    name: str
    payload: bytes


MALFORMED = [
    Malformed("no JSON", b"nonsense"),
    Malformed("a list", b"[1]"),
    Malformed("a number", b"7"),
    Malformed("two objects", b"{}{}"),
    Malformed("NaN", b'{"choices":[NaN]}'),
    Malformed("Infinity", b'{"choices":[-Infinity]}'),
    Malformed("bad UTF-8", b'{"choices":["\xff"]}'),
    Malformed("a control character in a string", b'{"choices":["\x01"]}'),
    Malformed("deep nesting", b"[" * 90_000),
    Malformed("a newline inside a string", b'{"choices":[{"x":"a\ndata: b"}]}'),
    Malformed("a lone half of a pair", b'{"choices":[]},{"choices":[{}'),
    Malformed("the other half", b"{}]}"),
    Malformed("a number without end in a whole answer", b'{"choices":[{"message":1e999}]}'),
]


class MalformedPayloads(unittest.TestCase):
    """Each payload must be a JSON object (RFC 8259) by itself."""

    def test_malformed_payloads(self) -> None:
        """A payload that is no JSON object ends the answer; nothing of it goes out."""
        for malformed in MALFORMED:
            with self.subTest(malformed.name):
                relayed = relay_body(SAID, event(malformed.payload), FINISH, DONE)
                self.assertEqual((relayed.out, relayed.code), (SAID, "upstream_invalid"))

    def test_a_huge_integer(self) -> None:
        """An integer of more digits than Python reads is no fault of ours."""
        relayed = relay_body(event(b'{"choices":[],"n":%b}' % (b"1" * 5000)), FINISH, DONE)
        self.assertIn(relayed.code, ("", "upstream_invalid"))

    def test_too_large_an_event(self) -> None:
        """An event above the limit ends the answer, after the ones before it."""
        relayed = relay_body(SAID, text("x" * 200_000), FINISH, DONE)
        self.assertEqual((relayed.out, relayed.code), (SAID, "event_too_large"))

    def test_statuses(self) -> None:
        """What the upstream got wrong has status 502."""
        for body in (b"", event(b"nonsense"), b'data: {"', text("x" * 200_000)):
            with self.subTest(body[:20]):
                self.assertEqual(relay_body(body).status, 502)
