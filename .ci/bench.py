"""Measures what chatstream adds: the same streams straight from a scripted upstream and through
chatstream, each end a process of its own. The upstream writes the time into each event, so that
the delay of each is read off one clock. Run by hand, on Linux (it reads /proc):

    python .ci/bench.py
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_chatstream import DONE, Call, Program, delta, program, running, upstream

WORK = {  # name: (streams at once, events in each, seconds between two)
    "paced": (100, 100, 0.02),
    "saturated": (20, 5000, 0.0),
}


async def paced_reply(call: Call) -> None:
    """Events that carry the nanosecond at which they were written, at the pace asked for."""
    events, pause = json.loads(call.body["messages"][0]["content"])
    due = time.monotonic()
    await call.start()
    for number in range(events):
        await call.send(delta(content=f"t{time.monotonic_ns()} "))
        due += pause
        if pause or number % 16 == 15:
            await asyncio.sleep(max(0, due - time.monotonic()) if pause else 0)
    await call.send(delta("stop"))
    await call.send(DONE)


async def serve_upstream() -> None:
    async with upstream(paced_reply) as up:
        print(up.url, flush=True)
        await asyncio.Event().wait()


async def read(client: aiohttp.ClientSession, url: str, work: str) -> list[float]:
    """The delay of each event of one stream in ms, and, at the end, the time to the first."""
    content = json.dumps(WORK[work][1:])
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    started, delays = time.monotonic_ns(), []
    async with client.post(url, json=body) as response:
        async for line in response.content:
            if found := re.search(rb'"t(\d+) "', line):
                delays.append((time.monotonic_ns() - int(found[1])) / 1e6)
                if len(delays) == 1:
                    first = (time.monotonic_ns() - started) / 1e6
    assert len(delays) == WORK[work][1], f"a stream of {len(delays)} events"
    return [*delays, first]


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(work: str, url: str, run: Program | None) -> None:
    """One row: the streams of this work, straight (no `run`) or through chatstream."""
    streams = WORK[work][0]
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:
        await read(client, url, work)  # what a first stream costs is not the question
        before = (processor_seconds(run.process.pid), run.memory()) if run else (0.0, 0)
        tasks = [asyncio.create_task(read(client, url, work)) for _ in range(streams)]
        await asyncio.wait(tasks, timeout=1)
        memory = (run.memory() - before[1]) / 1024 / streams if run else 0
        results = await asyncio.gather(*tasks)
        used = processor_seconds(run.process.pid) - before[0] if run else 0
    firsts = sorted(result.pop() for result in results)
    delays = sorted(itertools.chain(*results))
    row = f"{work:10} {'through' if run else 'straight':9} {len(delays):7}"
    row += f" {delays[len(delays) // 2]:8.2f} {delays[len(delays) * 99 // 100]:8.2f}"
    row += f" {firsts[streams // 2]:8.2f}"
    print(row + (f" {1e6 * used / len(delays):8.1f} {memory:8.0f}" if run else ""), flush=True)


async def main() -> None:
    print(f"Python {sys.version.split()[0]}, aiohttp {aiohttp.__version__}, {os.cpu_count()} cores")
    print("work       way        events   p50 ms   p99 ms first ms   CPU µs KB/stream")
    environment = {"PYTHONDEVMODE": ""}
    async with running([str(Path(__file__).resolve()), "upstream"], environment) as up:
        base = up.out.strip()
        environment |= {"OPENAI_BASE_URL": base, "OPENAI_MODEL": "m"}
        async with program(**environment) as run:
            for work in WORK:
                await measure(work, base + "/chat/completions", None)
                await measure(work, run.url + "/stream", run)


if __name__ == "__main__":
    asyncio.run(serve_upstream() if sys.argv[1:] == ["upstream"] else main())
