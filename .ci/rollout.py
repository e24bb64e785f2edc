"""A rolling restart, as Kubernetes does it: three processes behind a balancer are replaced one
after the other while they stream, and every stream ends whole.

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

from test_chatstream import DONE, HELLO, PATIENCE, Call, Program, delta, program, upstream


class Balancer:
    """A TCP load balancer: each connection goes to the backend that has the fewest. That is
    what a Service does for pods, and a backend taken out of `ports` is a pod that is ending:
    no new connections, the old ones go on."""

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.open: Counter[int] = Counter()  # connections now, by port

    async def start(self) -> str:
        self.server = await asyncio.start_server(self.connected, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def connected(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        port = min(self.ports, key=self.open.__getitem__)
        self.open[port] += 1
        answer, forth = await asyncio.open_connection("127.0.0.1", port)
        ways = [asyncio.create_task(self.pump(client, forth))]
        ways.append(asyncio.create_task(self.pump(answer, back)))
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        self.open[port] -= 1
        for end in (forth, back):
            end.close()
        await asyncio.wait(ways)

    async def pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()


async def until_drains(run: Program) -> None:
    assert run.process.stdout
    while b"draining" not in (line := await run.process.stdout.readline()):
        assert line, "the program ended without a word about draining"


async def read(address: str, begun: asyncio.Queue[None]) -> bytes:
    """One stream, over a connection of its own; tells when its first bytes are here."""
    client = aiohttp.ClientSession()
    async with client, client.post(address + "/stream", json=HELLO) as response:
        first = await response.content.readany()
        begun.put_nowait(None)
        return first + await response.read()


async def main() -> None:
    go_on = asyncio.Event()

    async def reply(call: Call) -> None:
        may_end = go_on
        await call.start()
        await call.send(delta(content="Once"))
        await may_end.wait()
        await call.send(delta("stop", content=" upon a time") + DONE)

    async with upstream(reply) as up, AsyncExitStack() as stack:
        balancer = Balancer()
        address = await balancer.start()
        stack.callback(balancer.server.close)

        async def add() -> tuple[Program, int]:
            run = await stack.enter_async_context(program("--model=m", OPENAI_BASE_URL=up.url))
            balancer.ports.append(urlsplit(run.url).port or 0)
            return run, balancer.ports[-1]

        for number, (old, port) in enumerate([await add() for _ in range(3)], 1):
            go_on = asyncio.Event()
            begun: asyncio.Queue[None] = asyncio.Queue()
            async with asyncio.timeout(PATIENCE):
                streams = [asyncio.create_task(read(address, begun)) for _ in range(6)]
                for _ in streams:
                    await begun.get()
                running = balancer.open[port]
                assert running, "nothing streams there"
                await add()
                balancer.ports.remove(port)
                old.process.send_signal(signal.SIGTERM)
                await until_drains(old)
                streams.append(asyncio.create_task(read(address, begun)))
                await begun.get()
                go_on.set()
                for body in await asyncio.gather(*streams):
                    assert b" upon a time" in body, body
                    assert body.endswith(DONE), body
                assert await old.end() == 0, old.err
            assert "Traceback" not in old.err, old.err
            print(f"process {number}: replaced while {running} of {len(streams)} streams ran in it")


if __name__ == "__main__":
    asyncio.run(main())
