"""Measures what a streaming proxy costs, chatstream beside what people write for the same job.

    python .ci/bench.py                        # every server found, all work, three runs
    python .ci/bench.py --work paced --runs 7
    python .ci/bench.py --only chatstream --only pump

Each server relays the same streams from a scripted upstream to the same clients. It has one core to
itself; the upstream and the clients share another. It prints medians of the runs: first the
README's table, with CPU as a multiple of chatstream's, then everything that was measured.

The servers are chatstream and those of `.ci/peers`: `pump` always; `starlette_httpx` and
`fastapi_openai` where these Python packages and uvicorn are installed; `go_stdlib` where `go` is on
the PATH. Seconds differ from machine to machine, and on a shared machine from minute to minute:
compare only the servers of one call.

It needs Linux (it reads /proc), two cores, and aiohttp.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SERVER_CORE, LOAD_CORE = 0, 1


@dataclass
class Work:
    streams: int
    at_once: int
    events: int  # in each stream
    pause: float = 0  # seconds between two events
    ramp: float = 0  # seconds over which the first streams are started


WORKS = {
    # As fast as the upstream can.
    "saturate": Work(streams=200, at_once=20, events=500),
    # 100 people who read along.
    "paced": Work(streams=200, at_once=100, events=100, pause=0.02, ramp=1),
    # What a stream costs before and after its events.
    "short": Work(streams=3000, at_once=20, events=3),
    # Many streams that are open and say little.
    "idle": Work(streams=1000, at_once=1000, events=30, pause=0.2, ramp=3),
}
# One stream after the other: the memory after the first thousand is compared with that at the end.
LEAK = Work(streams=1000, at_once=1, events=3)
LEAK_REPEATS = 10


# ---- The upstream ----------------------------------------------------------------------------

HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"Content-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
# As long as OpenAI's own. The content is the time of sending in ns.
EVENT = (
    b'data: {"id":"chatcmpl-bench0000000000000000000000","object":"chat.completion.chunk",'
    b'"created":1750000000,"model":"gpt-4o-mini-2024-07-18","service_tier":"default",'
    b'"system_fingerprint":"fp_0000000000","choices":[{"index":0,"delta":{"content":"t%d "},'
    b'"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)
END = (
    b'data: {"id":"chatcmpl-bench0000000000000000000000","object":"chat.completion.chunk",'
    b'"created":1750000000,"model":"gpt-4o-mini-2024-07-18",'
    b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b"data: [DONE]\n\n"
)
BURST = 20


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


FULL_BURST = http_chunk(EVENT % 0 * BURST)


async def send_at_once(writer: asyncio.StreamWriter, events: int) -> None:
    bursts, rest = divmod(events, BURST)
    for _ in range(bursts):
        writer.write(FULL_BURST)
        await writer.drain()
    if rest:
        writer.write(http_chunk(EVENT % 0 * rest))


async def send_paced(writer: asyncio.StreamWriter, events: int, pause: float) -> None:
    due = time.monotonic()
    for _ in range(events):
        writer.write(http_chunk(EVENT % time.monotonic_ns()))
        await writer.drain()
        due += pause
        await asyncio.sleep(due - time.monotonic())


async def answer_requests(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answers every request of one connection as its message says."""
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            assert length, head
            body = json.loads(await reader.readexactly(int(length[1])))
            events, pause = json.loads(body["messages"][0]["content"])
            writer.write(HEAD)
            if pause:
                await send_paced(writer, events, pause)
            else:
                await send_at_once(writer, events)
            writer.write(http_chunk(END) + b"0\r\n\r\n")
            await writer.drain()
    writer.close()


async def run_upstream(port: int) -> None:
    server = await asyncio.start_server(
        answer_requests, "127.0.0.1", port, backlog=1000
    )
    await server.serve_forever()


# ---- The clients -----------------------------------------------------------------------------


async def read_stream(
    client: aiohttp.ClientSession, url: str, work: Work
) -> list[float]:
    """The delay of each event of one stream, in ms."""
    content = json.dumps([work.events, work.pause])
    body = {
        "model": "m",
        "stream": True,
        "messages": [{"role": "user", "content": content}],
    }
    delays = []
    pending = b""
    async with client.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        while data := await response.content.readany():
            now = time.monotonic_ns()
            complete, separator, pending = (pending + data).rpartition(b"\n\n")
            for sent in re.findall(rb'"t(\d+) "', complete + separator):
                delays.append((now - int(sent)) / 1e6)
    assert len(delays) == work.events, f"{len(delays)} of {work.events} events came"
    return delays


async def run_load(url: str, work: Work) -> None:
    """Runs all the streams, and prints the delays' p50 and p99 in ms as JSON."""
    delays: list[float] = []
    left = iter(range(work.streams))
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:

        async def work_off(number: int) -> None:
            await asyncio.sleep(work.ramp * number / work.at_once)
            for _ in left:
                delays.extend(await read_stream(client, url, work))

        async with asyncio.TaskGroup() as tasks:
            for number in range(work.at_once):
                tasks.create_task(work_off(number))
    delays.sort()
    p50 = delays[len(delays) // 2]
    p99 = delays[len(delays) * 99 // 100]
    print(json.dumps({"p50": p50, "p99": p99}))


# ---- The servers -----------------------------------------------------------------------------

LABELS = {
    "chatstream": "chatstream",
    "pump": "aiohttp, no parsing",
    "go_stdlib": "Go, net/http",
    "starlette_httpx": "Starlette, httpx",
    "fastapi_openai": "FastAPI, OpenAI's SDK",
}


def is_installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def find_servers(folder: str) -> dict[str, list[str]]:
    """The command that starts each server that can run here. Says which cannot, and why."""
    python = sys.executable
    commands = {
        "chatstream": [python, str(ROOT / "chatstream.py")],
        "pump": [python, str(HERE / "peers/pump.py")],
    }
    if shutil.which("go"):
        commands["go_stdlib"] = [f"{folder}/go_stdlib"]
        source = HERE / "peers/go_stdlib.go"
        build = ["go", "build", "-o", commands["go_stdlib"][0], str(source)]
        subprocess.run(build, check=True, env=os.environ | {"GOTOOLCHAIN": "local"})
    else:
        print("without go_stdlib: there is no go on the PATH", file=sys.stderr)
    needs = {
        "starlette_httpx": ("starlette", "httpx", "uvicorn"),
        "fastapi_openai": ("fastapi", "openai", "uvicorn"),
    }
    for name, packages in needs.items():
        if is_installed(*packages):
            commands[name] = [python, str(HERE / f"peers/{name}.py")]
        else:
            print(f"without {name}: it needs {', '.join(packages)}", file=sys.stderr)
    return commands


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def pinned(
    command: list[str],
    core: int,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[subprocess.Popen[str]]:
    """A process that runs on this core only, from its first instruction to the block's end."""
    process = subprocess.Popen(
        command,
        env=os.environ | (environment or {}),
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # noqa: PLW1509
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until_listening(port: int, process: subprocess.Popen[str]) -> None:
    while True:
        assert process.poll() is None, f"{process.args!r} has ended"
        with suppress(ConnectionError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.05)


@contextmanager
def running_server(command: list[str], upstream: str) -> Iterator[tuple[int, str]]:
    """One of the servers; gives its process id and its address."""
    port = free_port()
    environment = {
        "OPENAI_BASE_URL": upstream,
        "OPENAI_API_KEY": "any",
        "OPENAI_MODEL": "m",
        "CHATSTREAM_PORT": str(port),
        "CHATSTREAM_MAX_STREAMS": "10000",
        # On a slow machine, a thousand connections at once take a while.
        "CHATSTREAM_CONNECT_SECONDS": "60",
        "PORT": str(port),
        "GOMAXPROCS": "1",
        "PYTHONDEVMODE": "",
    }
    with pinned(
        command,
        SERVER_CORE,
        environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_until_listening(port, process)
        yield process.pid, f"http://127.0.0.1:{port}/stream"


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_kb(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


# ---- Measuring -------------------------------------------------------------------------------


@dataclass
class Result:
    cpu_us_per_event: float
    cpu_us_per_stream: float
    delay_p50_ms: float
    delay_p99_ms: float
    kb_per_stream: float


def load(url: str, work: Work, pid: int) -> tuple[dict[str, float], int]:
    """Runs this work; gives the delays, and the server's largest memory meanwhile, in KB."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "load",
        url,
        json.dumps(asdict(work)),
    ]
    largest = 0
    environment = {"PYTHONDEVMODE": ""}
    with pinned(command, LOAD_CORE, environment, stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            largest = max(largest, resident_kb(pid))
            time.sleep(0.2)
        assert process.returncode == 0, f"the load on {url} failed"
        assert process.stdout
        delays: dict[str, float] = json.loads(process.stdout.read())
    return delays, largest


def measure(pid: int, url: str, work: Work) -> Result:
    memory_before = resident_kb(pid)
    cpu_before = cpu_seconds(pid)
    delays, largest = load(url, work, pid)
    cpu = cpu_seconds(pid) - cpu_before
    # Without a pause, the upstream's events do not say when they were sent.
    if not work.pause:
        delays = {"p50": math.nan, "p99": math.nan}
    return Result(
        cpu_us_per_event=1e6 * cpu / work.streams / work.events,
        cpu_us_per_stream=1e6 * cpu / work.streams,
        delay_p50_ms=delays["p50"],
        delay_p99_ms=delays["p99"],
        kb_per_stream=(largest - memory_before) / work.at_once,
    )


def measure_growth(pid: int, url: str) -> int:
    """By how many KB a process is larger after 10,000 streams than after 1,000."""
    load(url, LEAK, pid)
    after_first = resident_kb(pid)
    for _ in range(LEAK_REPEATS - 1):
        load(url, LEAK, pid)
    return resident_kb(pid) - after_first


def median(results: list[Result], field: str) -> float:
    values: list[float] = [getattr(result, field) for result in results]
    return statistics.median(values)


# ---- Printing --------------------------------------------------------------------------------

Results = dict[str, dict[str, list[Result]]]  # by work, then by server

# The work, the field, and what the row says.
README_ROWS = [
    ("saturate", "cpu_us_per_event", "per event, at full speed"),
    ("paced", "cpu_us_per_event", "per event, at 50 a second"),
    ("short", "cpu_us_per_stream", "per stream of 3 events"),
]
ALL_ROWS = [
    (
        "saturate",
        "cpu_us_per_event",
        "CPU per event, as fast as the upstream sends, µs",
    ),
    ("paced", "cpu_us_per_event", "CPU per event, 100 streams of 50 events/s, µs"),
    ("short", "cpu_us_per_stream", "CPU per stream of 3 events, µs"),
    ("paced", "delay_p50_ms", "delay, median, 100 streams of 50 events/s, ms"),
    ("paced", "delay_p99_ms", "delay, 99th percentile, the same, ms"),
    ("idle", "delay_p99_ms", "delay, 99th percentile, 1,000 streams of 5 events/s, ms"),
    ("idle", "kb_per_stream", "memory per open stream, of 1,000, KB"),
]


def table(
    results: Results,
    servers: list[str],
    rows: list[tuple[str, str, str]],
    relative_to: str = "",
) -> str:
    """A table in Markdown: the medians, or their ratios to those of one server."""
    lines = [
        "| | " + " | ".join(LABELS[server] for server in servers) + " |",
        "|---" * (len(servers) + 1) + "|",
    ]
    for work, field, label in rows:
        if work not in results:
            continue
        unit = median(results[work][relative_to], field) if relative_to else 1.0
        values = [median(results[work][server], field) / unit for server in servers]
        # Such a measurement is not worth more than two digits.
        cells = [f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in values]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=LABELS, help="a server (repeatable)"
    )
    parser.add_argument(
        "--work", action="append", choices=[*WORKS, "memory"], help="(repeatable)"
    )
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    works = arguments.work or [*WORKS, "memory"]
    results: Results = {work: {} for work in works if work in WORKS}
    growth = []
    with ExitStack() as stack:
        commands = find_servers(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [name for name in commands if name in (arguments.only or commands)]
        port = free_port()
        upstream = [
            sys.executable,
            str(Path(__file__).resolve()),
            "upstream",
            str(port),
        ]
        wait_until_listening(port, stack.enter_context(pinned(upstream, LOAD_CORE)))
        for run in range(1, arguments.runs + 1):
            for server in servers:
                with running_server(
                    commands[server], f"http://127.0.0.1:{port}/v1"
                ) as (pid, url):
                    # A server's first streams cost more than the others.
                    load(url, Work(streams=20, at_once=5, events=5), pid)
                    for work, by_server in results.items():
                        result = measure(pid, url, WORKS[work])
                        by_server.setdefault(server, []).append(result)
                        print(f"run {run}, {server}, {work}: {result}", file=sys.stderr)
                    if server == "chatstream" and run == 1 and "memory" in works:
                        growth.append(measure_growth(pid, url))
    peers = [server for server in servers if server != "chatstream"]
    if results and peers and "chatstream" in servers:
        print(table(results, peers, README_ROWS, relative_to="chatstream") + "\n")
    if results:
        print(table(results, servers, ALL_ROWS))
    for kilobytes in growth:
        print(
            f"\nchatstream after 10,000 streams, beside after 1,000: {kilobytes:+} KB"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["upstream"]:
        asyncio.run(run_upstream(int(sys.argv[2])))
    elif sys.argv[1:2] == ["load"]:
        asyncio.run(run_load(sys.argv[2], Work(**json.loads(sys.argv[3]))))
    else:
        main()
