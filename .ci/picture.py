"""Makes `.github/chatstream.png`: the page in the middle of the demo's answer, with the wire open.

    python .ci/picture.py

It needs aiohttp and Chromium, whose path may be given in CHATSTREAM_CHROMIUM.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / ".github" / "chatstream.png"
WIDTH, HEIGHT = 1024, 640
LARGEST_BYTES = 200_000
PATIENCE = 120
QUESTION = "How does a token get from the model to this page?"

CHROMIUM_ARGUMENTS = [
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    # Grey edges of letters compress better than coloured ones.
    "--disable-lcd-text",
    "--remote-debugging-port=0",
]

# Each of these is evaluated in the page.
OPEN_THE_WIRE = """
[...document.querySelectorAll("button")].find((each) => each.textContent === "Wire").click()
"""
ASK = """
const message = document.querySelector("[aria-label=Message]");
message.value = QUESTION;
message.dispatchEvent(new Event("input", { bubbles: true }));
[...document.querySelectorAll("button")].find((each) => each.textContent === "Send").click();
"""
# In mid-answer: the table stands, and the button still says Stop.
IS_IN_MID_ANSWER = """
document.querySelector("[role=log] tr:nth-child(3)") !== null &&
[...document.querySelectorAll("button")].some((each) => each.textContent === "Stop")
"""


class Page:
    """A tab of Chromium, driven over the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.session = ""
        self.last_id = 0

    async def call(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol, and its result."""
        self.last_id += 1
        command = {"id": self.last_id, "method": method, "params": parameters}
        if self.session:
            command["sessionId"] = self.session
        await self.socket.send_json(command)
        while True:
            message = await self.socket.receive_json()
            if message.get("id") == self.last_id:
                assert "error" not in message, message["error"]
                return message["result"]

    async def open(self, url: str) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self.session = attached["sessionId"]
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=WIDTH,
            height=HEIGHT,
            deviceScaleFactor=1,
            mobile=False,
        )
        await self.call("Page.navigate", url=url)
        await self.until(
            "document.readyState === 'complete' && location.href !== 'about:blank'"
        )

    async def evaluate(self, expression: str) -> Any:
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str) -> None:
        """Waits until the expression is true in the page."""
        async with asyncio.timeout(PATIENCE):
            while not await self.evaluate(expression):
                await asyncio.sleep(0.02)

    async def screenshot(self) -> bytes:
        answer = await self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(answer["data"])


def compressed(png: bytes) -> bytes:
    """The same picture in fewer bytes: Chromium compresses for speed."""
    signature = png[:8]
    chunks = []
    data = b""
    position = len(signature)
    while position < len(png):
        length, kind = struct.unpack_from(">I4s", png, position)
        body = png[position + 8 : position + 8 + length]
        # Each chunk has a length and a kind before its body, and a checksum after it.
        position += length + 12
        if kind == b"IDAT":
            data += body
        else:
            chunks.append((kind, body))
    chunks.insert(-1, (b"IDAT", zlib.compress(zlib.decompress(data), level=9)))
    parts = [signature]
    for kind, body in chunks:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        parts += [struct.pack(">I", len(body)), kind, body, checksum]
    return b"".join(parts)


@asynccontextmanager
async def running(
    *command: str, pattern: str, environment: Any = None
) -> AsyncIterator[str]:
    """A program, until the block ends; gives what the pattern finds in its output."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    assert process.stdout
    try:
        async with asyncio.timeout(PATIENCE):
            found = None
            while not found:
                line = await process.stdout.readline()
                assert line, f"{command[0]} ended before it was ready"
                found = re.search(pattern, line.decode())
        yield found[0]
    finally:
        process.kill()
        await process.communicate()


@asynccontextmanager
async def chromium() -> AsyncIterator[Page]:
    path = os.environ.get("CHATSTREAM_CHROMIUM") or shutil.which("chromium")
    assert path, "missing: Chromium"
    # A root user has no sandbox.
    sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [path, *CHROMIUM_ARGUMENTS, *sandbox, f"--user-data-dir={profile}"]
        async with running(*command, pattern=r"ws://\S+") as address:
            async with aiohttp.ClientSession() as client:
                async with client.ws_connect(address, max_msg_size=0) as socket:
                    yield Page(socket)


@asynccontextmanager
async def demo() -> AsyncIterator[str]:
    """chatstream with neither key nor base URL; gives its address."""
    ours = ("OPENAI_", "CHATSTREAM_")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(ours)
    }
    environment |= {"PYTHONUNBUFFERED": "1"}
    command = (sys.executable, str(ROOT / "chatstream.py"), "--port", "0")
    async with running(*command, pattern=r"http://\S+", environment=environment) as url:
        yield url


async def main() -> None:
    async with demo() as url, chromium() as page:
        await page.open(url)
        await page.evaluate(OPEN_THE_WIRE)
        await page.evaluate(ASK.replace("QUESTION", repr(QUESTION)))
        await page.until(IS_IN_MID_ANSWER)
        picture = compressed(await page.screenshot())
    assert len(picture) < LARGEST_BYTES, (
        f"{len(picture)} bytes are too many for a README"
    )
    PICTURE.write_bytes(picture)
    print(f"{PICTURE.relative_to(ROOT)}: {WIDTH} × {HEIGHT}, {len(picture)} bytes")


if __name__ == "__main__":
    asyncio.run(main())
