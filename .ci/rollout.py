"""A rolling restart, as Kubernetes does it.

Three processes behind a balancer are replaced one after the other while they stream, and every
stream ends whole.

    python .ci/rollout.py
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_chatstream import (
    DONE,
    FINISH,
    HELLO,
    PATIENCE,
    Call,
    Program,
    running_program,
    scripted_upstream,
    text,
)

PROCESSES = 3
STREAMS = 6


class Balancer:
    """A TCP load balancer: each new connection goes to the backend that has the fewest.

    A Service does this for pods. A backend that is taken out of `ports` is a pod that is ending:
    it gets no new connections, and the old ones go on.
    """

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.connections: Counter[int] = Counter()

    async def start(self) -> str:
        self.server = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def connect(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        port = min(self.ports, key=self.connections.__getitem__)
        self.connections[port] += 1
        backend_reader, backend_writer = await asyncio.open_connection(
            "127.0.0.1", port
        )
        pumps = [
            asyncio.create_task(self.pump(reader, backend_writer)),
            asyncio.create_task(self.pump(backend_reader, writer)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        self.connections[port] -= 1
        backend_writer.close()
        writer.close()
        await asyncio.wait(pumps)

    async def pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()


async def read_stream(url: str, started: asyncio.Semaphore) -> bytes:
    """A whole stream, over a connection of its own. Says when its first bytes are here."""
    async with aiohttp.ClientSession() as client:
        async with client.post(url + "/stream", json=HELLO) as response:
            first = await response.content.readany()
            started.release()
            return first + await response.read()


async def until_refused(port: int) -> None:
    """Waits until nobody listens on this port any more: the process is draining."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionError:
            return
        writer.transport.abort()
        await asyncio.sleep(0.01)


def port_of(program: Program) -> int:
    return urlsplit(program.url).port or 0


async def replace(
    old: Program, new: Program, balancer: Balancer, url: str, may_end: asyncio.Event
) -> str:
    """Replaces one process under load; gives a line that says how many streams it had."""
    may_end.clear()
    started = asyncio.Semaphore(0)
    streams = [asyncio.create_task(read_stream(url, started)) for _ in range(STREAMS)]
    for _ in streams:
        await started.acquire()
    running = balancer.connections[port_of(old)]
    assert running, "no stream runs in the process that is to be replaced"

    balancer.ports.append(port_of(new))
    balancer.ports.remove(port_of(old))
    old.signal(signal.SIGTERM)
    await until_refused(port_of(old))

    # A new stream finds a process, and the old streams end as if nothing had happened.
    streams.append(asyncio.create_task(read_stream(url, started)))
    await started.acquire()
    may_end.set()
    for body in await asyncio.gather(*streams):
        assert b"Once" in body, body
        assert b" upon a time" in body, body
        assert body.endswith(DONE), body
    end = await old.exit()
    assert end.status == 0, end.stderr
    return f"replaced while {running} of {len(streams)} streams ran in it"


async def main() -> None:
    may_end = asyncio.Event()

    async def script(call: Call) -> None:
        await call.send_head()
        await call.send(text("Once"))
        await may_end.wait()
        await call.send(text(" upon a time") + FINISH + DONE)

    async with scripted_upstream(script) as upstream, AsyncExitStack() as stack:
        balancer = Balancer()
        url = await balancer.start()
        stack.callback(balancer.server.close)

        async def start_process() -> Program:
            program = running_program(OPENAI_BASE_URL=upstream.url, OPENAI_MODEL="m")
            return await stack.enter_async_context(program)

        olds = [await start_process() for _ in range(PROCESSES)]
        balancer.ports = [port_of(program) for program in olds]
        for number, old in enumerate(olds, 1):
            new = await start_process()
            async with asyncio.timeout(PATIENCE):
                print(
                    f"process {number}:",
                    await replace(old, new, balancer, url, may_end),
                )


if __name__ == "__main__":
    asyncio.run(main())
