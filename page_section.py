from __future__ import annotations

import asyncio
import base64
import functools
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
import unittest
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any

import aiohttp

from test_chatstream import (
    DONE,
    FINISH,
    HERE,
    PATIENCE,
    Call,
    Script,
    Server,
    breaks_off,
    chunk,
    event,
    eventually,
    hangs,
    responds,
    says_nothing,
    scripted_upstream,
    sends,
    serving,
    streams,
    text,
)

# ---- The page, in a real browser ---------------------------------------------------------
# The tests below act as a person does: they find things by role and accessible name, type,
# press keys, click, and read what is shown. They know none of the page's own variables.

CHROMIUM = (
    shutil.which("chromium-headless-shell")
    or shutil.which("chromium")
    or shutil.which("google-chrome")
)
# "required": a missing Chromium is a failure. "none": the page is not tested.
BROWSER = os.environ.get("CHATSTREAM_BROWSER", "")
# The path of axe.min.js, from the npm package axe-core.
AXE = os.environ.get("CHATSTREAM_AXE", "")
# A host name that leads to this machine but is not localhost, so that its pages are insecure.
INSECURE_HOST = "chatstream.test"
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    f"--host-resolver-rules=MAP {INSECURE_HOST} 127.0.0.1",
]


@functools.cache
def devtools_url() -> str:
    """Starts the one Chromium that all tests share; returns the address of its DevTools."""
    assert CHROMIUM
    profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    unittest.addModuleCleanup(profile.cleanup)
    command = [
        CHROMIUM,
        *CHROMIUM_FLAGS,
        f"--user-data-dir={profile.name}",
        "about:blank",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    unittest.addModuleCleanup(process.wait)
    unittest.addModuleCleanup(process.terminate)
    port_file = Path(profile.name, "DevToolsActivePort")
    deadline = time.monotonic() + 3 * PATIENCE
    # The file is complete once its second line, a path, is there.
    while not port_file.exists() or "/" not in port_file.read_text():
        assert process.poll() is None, "Chromium ended at once"
        assert time.monotonic() < deadline, "Chromium does not start"
        time.sleep(0.05)
    port = port_file.read_text().split()[0]
    return f"http://127.0.0.1:{port}/json"


class DevToolsError(Exception):
    """Chromium refused a command, often because an element has just gone."""


class DevTools:
    """A connection to a tab, over which commands go out, and answers and events come in."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.events: list[Any] = []
        self.pending: dict[int, asyncio.Future[Any]] = {}
        self.numbers = itertools.count(1)
        self.reader = asyncio.create_task(self.read())

    async def read(self) -> None:
        async for frame in self.socket:
            message = json.loads(frame.data)
            if "id" in message:
                answer = self.pending.pop(message["id"])
                answer.set_result(message)
            else:
                self.events.append(message)

    async def call(self, method: str, **params: Any) -> Any:
        number = next(self.numbers)
        answer = asyncio.get_running_loop().create_future()
        self.pending[number] = answer
        await self.socket.send_json({"id": number, "method": method, "params": params})
        # Shielded, so that an answer that comes late still finds its future.
        message = await asyncio.wait_for(asyncio.shield(answer), 2 * PATIENCE)
        if "error" in message:
            raise DevToolsError(f"{method}: {message['error']}")
        return message["result"]

    def events_of(self, method: str) -> list[Any]:
        return [event["params"] for event in self.events if event["method"] == method]


# Finds what is shown by role and accessible name. That the browser itself gives things these roles
# and names, a test below looks up in its accessibility tree, which is too slow for every step.
FIND_ALL = """(role, name) => {
    const ELEMENTS = {
        button: "button",
        combobox: "select",
        complementary: "aside",
        disclosure: "summary",
        group: "details",
        link: "a[href]",
        list: "ol",
        textbox: "textarea, input",
    };
    const nameOf = (element) =>
        element.ariaLabel ?? element.labels?.[0]?.textContent ?? element.innerText.trim();
    const found = document.querySelectorAll(`${ELEMENTS[role] ?? role}, [role=${role}]`);
    return [...found].filter((element) =>
        element.checkVisibility({ visibilityProperty: true })
            && (name === null || nameOf(element) === name));
}"""
# Returns a value as soon as it is true, and false if it takes unreasonably long.
WAIT = """(async () => {
    const deadline = performance.now() + %d;
    for (;;) {
        const value = %s;
        if (value || performance.now() > deadline) return value;
        await new Promise((resolve) => setTimeout(resolve, 20));
    }
})()"""


@dataclass
class Element:
    """What has this role and accessible name; the last one, or another by its index."""

    page: Page
    role: str
    name: str | None
    index: int

    @property
    def code(self) -> str:
        found = f"({FIND_ALL})({json.dumps(self.role)}, {json.dumps(self.name)})"
        return f"{found}.at({self.index})"

    async def read(self, expression: str) -> Any:
        """The value of a JavaScript expression about `element`."""
        return await self.page.run(f"((element) => {expression})({self.code})")

    async def text(self) -> str:
        return str(await self.read("element.innerText"))

    async def value(self) -> str:
        return str(await self.read("element.value"))

    async def focus(self) -> None:
        await self.read("element.focus()")

    async def click(self, times: int = 1) -> None:
        """Presses and releases the mouse in the middle of the element."""
        await self.read("element.scrollIntoViewIfNeeded()")
        box = await self.read("element.getBoundingClientRect().toJSON()")
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                await self.page.devtools.call(
                    "Input.dispatchMouseEvent",
                    type=kind,
                    x=box["x"] + box["width"] / 2,
                    y=box["y"] + box["height"] / 2,
                    button="left",
                    clickCount=count,
                )


# The codes that Windows gives to keys; browsers report them as `keyCode`.
KEY_CODES = {
    "Tab": 9,
    "Enter": 13,
    "Escape": 27,
    " ": 32,
    "PageUp": 33,
    "End": 35,
    "Home": 36,
    "ArrowUp": 38,
    "ArrowDown": 40,
    "v": 86,
}
KEY_TEXTS = {"Enter": "\r", " ": " "}
SHIFT = 8
CONTROL = 2


class Page:
    """A tab of the browser, and what a person does in it."""

    def __init__(self, devtools: DevTools) -> None:
        self.devtools = devtools

    # -- Looking

    async def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = await self.devtools.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def call_function(self, function: str, *values: Any) -> Any:
        """What a JavaScript function returns for these values."""
        return await self.run(f"({function})({', '.join(map(json.dumps, values))})")

    async def wait_until(self, condition: str, aim: str = "") -> Any:
        """The value of a JavaScript expression, as soon as it is true."""
        deadline = time.monotonic() + PATIENCE
        value = None
        while not value and time.monotonic() < deadline:
            # A reload ends what runs in the old page.
            with suppress(DevToolsError):
                value = await self.run(WAIT % (1000 * PATIENCE, condition))
        if not value:
            shown = await self.text()
            raise AssertionError(
                f"{aim or condition} never came; the page shows:\n{shown}"
            )
        return value

    def element(self, role: str, name: str | None = None, index: int = -1) -> Element:
        return Element(self, role, name, index)

    async def find(
        self, role: str, name: str | None = None, index: int = -1
    ) -> Element:
        """The last element of this role and name (or another by its index), once it is there."""
        element = self.element(role, name, index)
        await self.wait_until(f"Boolean({element.code})", f"{role} {name or ''}")
        return element

    async def count(self, role: str, name: str | None = None) -> int:
        every = f"({FIND_ALL})({json.dumps(role)}, {json.dumps(name)})"
        return int(await self.run(f"{every}.length"))

    async def has(self, role: str, name: str | None = None) -> bool:
        return await self.count(role, name) > 0

    async def text(self) -> str:
        """All the text that a person sees."""
        return str(await self.run("document.body.innerText"))

    async def text_of_answer(self) -> str:
        """The text of the last answer, with what stands below it."""
        return await self.element("article", "Assistant").text()

    async def text_of_conversation(self) -> str:
        return await self.element("log").text()

    async def status(self) -> str:
        """The status line, which a screen reader speaks."""
        return str(await self.element("status").read("element.textContent"))

    def urls_requested(self) -> list[str]:
        """The addresses of all requests that the page made or tried to make."""
        sent = self.devtools.events_of("Network.requestWillBeSent")
        return [request["request"]["url"] for request in sent]

    async def buttons(self) -> list[str]:
        """The names of all buttons that are shown."""
        names = f"({FIND_ALL})('button', null).map((button) => button.innerText)"
        return list(await self.run(names))

    async def wait_for_text(self, *texts: str) -> None:
        for each in texts:
            is_shown = f"document.body.innerText.includes({json.dumps(each)})"
            await self.wait_until(is_shown, f"the text {each!r}")

    async def wait_for_status(self, text: str) -> None:
        status = self.element("status").code
        await self.wait_until(
            f"{status}.textContent === {json.dumps(text)}", f"status {text!r}"
        )

    async def wait_for_end(self) -> None:
        """Waits until no answer is being streamed any more."""
        log = self.element("log").code
        await self.wait_until(f"{log}.ariaBusy === 'false'", "the end of the answer")

    # -- Acting

    async def focus(self, role: str, name: str, index: int = -1) -> None:
        element = await self.find(role, name, index)
        await element.focus()

    async def click(
        self, name: str, index: int = -1, role: str = "button", times: int = 1
    ) -> None:
        element = await self.find(role, name, index)
        await element.click(times)

    async def type(self, text: str) -> None:
        await self.devtools.call("Input.insertText", text=text)

    async def press(
        self,
        key: str,
        modifiers: int = 0,
        key_code: int = 0,
        commands: list[str] | None = None,
    ) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.devtools.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code="Space" if key == " " else key,
                text=KEY_TEXTS.get(key, "") if kind == "keyDown" else "",
                modifiers=modifiers,
                windowsVirtualKeyCode=key_code or KEY_CODES[key],
                commands=commands or [],
            )

    async def paste(self) -> None:
        await self.press("v", CONTROL, commands=["paste"])

    async def say(self, text: str) -> None:
        """Types a message and sends it."""
        await self.focus("textbox", "Message")
        await self.type(text)
        await self.press("Enter")

    async def ask(self, text: str = "Hello") -> None:
        """Sends a message and waits until its answer has ended."""
        await self.say(text)
        await self.wait_for_end()

    async def message(self) -> str:
        """What stands in the composer."""
        return await self.element("textbox", "Message").value()

    async def navigate(self, url: str) -> None:
        await self.devtools.call("Page.navigate", url=url)
        is_there = "document.readyState === 'complete' && location.protocol === 'http:'"
        await self.wait_until(is_there, url)

    async def reload(self) -> None:
        await self.run("window.isOld = true")
        await self.devtools.call("Page.reload")
        await self.wait_for_reload()

    async def wait_for_reload(self) -> None:
        await self.wait_until(
            "!window.isOld && document.readyState === 'complete'", "a new page"
        )

    async def emulate(self, **features: str) -> None:
        """Sets media features: `prefers_color_scheme="dark"`."""
        # An animation keeps the browser painting, which slows all tests.
        chosen = {"prefers_reduced_motion": "reduce"} | features
        pairs = [
            {"name": name.replace("_", "-"), "value": value}
            for name, value in chosen.items()
        ]
        await self.devtools.call("Emulation.setEmulatedMedia", features=pairs)


def says(words: str, finish_reason: str = "stop") -> Script:
    """An answer of one piece, which ends for this reason."""
    return sends(text(words), chunk({}, finish_reason=finish_reason), DONE)


# Answers that begin with "Once". One says nothing more, the other breaks off.
STALLS = sends(text("Once"), then=hangs)
BREAKS = sends(text("Once"), then=breaks_off)


class Steps:
    """A script in steps: each piece after the first waits until the test calls `next`."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.turns = asyncio.Semaphore(1)

    def next(self) -> None:
        self.turns.release()

    async def __call__(self, call: Call) -> None:
        await call.send_head()
        for piece in self.pieces:
            await self.turns.acquire()
            await call.send(piece)


MODELS = responds(200, {"data": [{"id": "m"}]})


def other_server(answer: Script) -> Script:
    """A web server that is not ours: it serves the page, and answers a message by a script."""
    page = (HERE / "index.html").read_bytes()

    async def script(call: Call) -> None:
        if call.request_line.startswith("POST"):
            await answer(call)
        elif "/models" in call.request_line:
            await MODELS(call)
        else:
            await sends(page, content_type="text/html; charset=utf-8")(call)

    return script


class PageCase(unittest.IsolatedAsyncioTestCase):
    """A test of the page: the real server, and an upstream that says "Hello."."""

    @classmethod
    def setUpClass(cls) -> None:
        if BROWSER == "none":
            raise unittest.SkipTest(
                "CHATSTREAM_BROWSER is none: the page is not tested"
            )
        if not CHROMIUM and BROWSER != "required":
            raise unittest.SkipTest("no Chromium was found: the page is not tested")
        assert CHROMIUM, "CHATSTREAM_BROWSER is required, but no Chromium was found"

    async def asyncSetUp(self) -> None:
        # What asyncio looks for in its debug mode, the tests of the server look for, too.
        asyncio.get_running_loop().set_debug(False)
        self.http = await self.enterAsyncContext(aiohttp.ClientSession())

    async def open(
        self,
        script: Script | None = None,
        fragment: str = "",
        width: int = 1000,
        **settings: object,
    ) -> Page:
        """The page of a server whose upstream follows the script, with nothing stored."""
        server = serving(script or says("Hello."), **settings)
        self.server = await self.enterAsyncContext(server)
        return await self.open_url(f"{self.server.url}/{fragment}", width)

    async def open_other_server(self, answer: Script, path: str = "/") -> Page:
        """The page of a web server that answers messages by this script."""
        upstream = await self.enterAsyncContext(scripted_upstream(other_server(answer)))
        self.server = Server(upstream.url.removesuffix("/v1"), upstream)
        return await self.open_url(self.server.url + path)

    async def open_url(self, url: str, width: int = 1000) -> Page:
        """Shows this address in the one tab that all tests share: a new one takes long."""
        async with self.http.get(devtools_url()) as response:
            tabs = [tab for tab in await response.json() if tab["type"] == "page"]
        page = await self.attach(tabs[0], width)
        # The origin's port, and with it something stored, may be that of an earlier test.
        script = await page.devtools.call(
            "Page.addScriptToEvaluateOnNewDocument", source="sessionStorage.clear()"
        )
        await page.navigate(url)
        await page.devtools.call("Page.removeScriptToEvaluateOnNewDocument", **script)
        return page

    async def open_second_tab(self, url: str) -> Page:
        async with self.http.put(devtools_url() + "/new") as response:
            tab = await response.json()
        self.addAsyncCleanup(self.close_tab, tab)
        page = await self.attach(tab)
        await page.navigate(url)
        return page

    async def close_tab(self, tab: Any) -> None:
        async with self.http.get(f"{devtools_url()}/close/{tab['id']}") as response:
            self.assertEqual(response.status, 200)

    async def attach(self, tab: Any, width: int = 1000) -> Page:
        """What a test emulates in the tab ends with its connection."""
        socket = self.http.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
        page = Page(DevTools(await self.enterAsyncContext(socket)))
        self.addAsyncCleanup(self.leave, page)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            await page.devtools.call(f"{domain}.enable")
        await page.devtools.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=700,
            deviceScaleFactor=1,
            mobile=False,
        )
        await page.devtools.call("Emulation.setFocusEmulationEnabled", enabled=True)
        await page.emulate()
        return page

    async def leave(self, page: Page) -> None:
        """Leaves the page before its server ends, and checks that it had no accident."""
        exceptions = page.devtools.events_of("Runtime.exceptionThrown")
        await page.devtools.call("Page.navigate", url="about:blank")
        self.assertEqual(exceptions, [])

    @property
    def upstream(self) -> Any:
        return self.server.upstream

    def answer_by(self, script: Script) -> None:
        """From now on the upstream follows this script."""
        self.server.upstream.script = script

    @property
    def calls(self) -> list[Call]:
        """The requests for an answer that the upstream got."""
        calls = self.server.upstream.calls
        return [call for call in calls if call.request_line.startswith("POST")]

    def messages_sent(self, call: int = -1) -> list[Any]:
        """The messages of a request to the upstream, without the system prompt."""
        messages = self.calls[call].json["messages"]
        return [message for message in messages if message["role"] != "system"]

    def texts_sent(self, call: int = -1) -> list[str]:
        return [message["content"] for message in self.messages_sent(call)]


# -- First sight


class FirstSight(PageCase):
    async def test_how_to_send(self) -> None:
        """The composer's placeholder says that Enter sends."""
        page = await self.open()
        composer = page.element("textbox", "Message")
        self.assertIn("Enter", await composer.read("element.placeholder"))

    async def test_first_messages(self) -> None:
        """The empty page offers two or three messages, and a click sends one."""
        page = await self.open()
        offered = await page.buttons()
        await page.ask()
        offered = [name for name in offered if not await page.has("button", name)]
        self.assertIn(len(offered), (2, 3))
        await page.click("New chat")
        await page.click(offered[0])
        await page.wait_for_end()
        self.assertEqual(self.texts_sent(), [offered[0]])

    async def test_demo(self) -> None:
        """In the demo the empty page says that it is one, and what its other models show."""
        page = await self.open(model="demo,demo-cut-off,demo-error")
        await page.wait_for_text("demo", "cut off")

    async def test_no_demo(self) -> None:
        """In front of a model, nothing on the page speaks of a demo."""
        page = await self.open()
        self.assertNotIn("demo", (await page.text()).lower())

    async def test_no_complaint(self) -> None:
        """The browser's console stays empty while the page loads and a message is answered."""
        page = await self.open()
        await page.ask()
        for method in ("Log.entryAdded", "Runtime.consoleAPICalled"):
            self.assertEqual(page.devtools.events_of(method), [])

    async def test_path_prefix(self) -> None:
        """Behind a proxy that serves it under a path, the page asks below that path."""
        page = await self.open_other_server(says("Hello."), path="/chat/here/")
        await page.ask()
        await page.wait_for_text("Hello.")
        self.assertIn("POST /chat/here/stream ", self.calls[0].request_line)

    async def test_one_file(self) -> None:
        """The page is the only thing that is loaded, and its icon is part of it."""
        page = await self.open()
        await page.ask()
        allowed = (self.server.url, "data:")
        self.assertEqual(
            [url for url in page.urls_requested() if not url.startswith(allowed)], []
        )
        paths = {url.removeprefix(self.server.url) for url in page.urls_requested()}
        paths = {path for path in paths if not path.startswith("data:")}
        self.assertEqual(paths, {"/", "/stream", "/v1/models"})


class Looks(PageCase):
    async def test_dark(self) -> None:
        """The page is light or dark as the system is."""
        page = await self.open()
        brightness = """(() => {
            const color = getComputedStyle(document.body).backgroundColor;
            return Math.max(...color.match(/[0-9.]+/g).map(Number));
        })()"""
        await page.emulate(prefers_color_scheme="light")
        self.assertGreater(await page.run(brightness), 200)
        await page.emulate(prefers_color_scheme="dark")
        self.assertLess(await page.run(brightness), 80)

    async def test_narrow(self) -> None:
        """At 360 px nothing is wider than the screen, the wire neither."""
        table = "| a | b |\n|-|-|\n| " + "wide " * 9 + " | " + "x" * 99 + " |\n\n"
        code = "```\n" + "x" * 200 + "\n```\n"
        page = await self.open(says(table + code + "y" * 300), width=360)
        await page.ask("z" * 300)
        overflow = """[document.documentElement, document.querySelector("[role=log]")].map(
            (box) => box.scrollWidth - box.clientWidth)"""
        self.assertEqual(await page.run(overflow), [0, 0])
        await page.click("Wire")
        self.assertEqual(await page.run(overflow), [0, 0])

    async def test_reduced_motion(self) -> None:
        """Nothing moves for those who asked their system for that."""
        page = await self.open(STALLS)
        await page.say("Hello")
        await page.wait_for_text("Once")
        animations = "document.getAnimations({ subtree: true }).length"
        await page.emulate(prefers_reduced_motion="no-preference")
        self.assertGreater(await page.run(animations), 0)
        await page.emulate(prefers_reduced_motion="reduce")
        self.assertEqual(await page.run(animations), 0)

    async def test_touch(self) -> None:
        """What a finger can press is at least 40 px high."""
        page = await self.open(
            says("Hello [link](https://a.example) `x`\n\n```\ncode\n```")
        )
        await page.devtools.call("Emulation.setTouchEmulationEnabled", enabled=True)
        await page.wait_until("matchMedia('(pointer: coarse)').matches", "touch")
        small = """[...document.querySelectorAll("button, select, summary, textarea, input, a")]
            .filter((target) => target.checkVisibility() && target.offsetHeight < 40)
            .map((target) => target.textContent)"""
        self.assertEqual(await page.run(small), [])
        await page.ask()
        self.assertEqual(await page.run(small), [])

    async def test_print(self) -> None:
        """Print shows the whole conversation, on as many sheets as it needs, without buttons."""
        page = await self.open(says("".join(f"Paragraph {i}.\n\n" for i in range(120))))
        await page.ask()
        printed = await page.devtools.call("Page.printToPDF")
        sheets = re.findall(rb"/Type\s*/Page\b", base64.b64decode(printed["data"]))
        self.assertGreater(len(sheets), 2)
        await page.devtools.call("Emulation.setEmulatedMedia", media="print")
        self.assertEqual(await page.buttons(), [])
        self.assertIn("Paragraph 119.", await page.text())

    async def test_text_direction(self) -> None:
        """Arabic text runs from right to left, and code within it from left to right."""
        page = await self.open(says("مرحبا بالعالم\n\n```\nx = 1\n```"))
        await page.ask()
        side = """(selector) => {
            const range = document.createRange();
            const node = document.querySelector("[role=log] article:last-child " + selector);
            range.selectNodeContents(node);
            const text = range.getBoundingClientRect();
            const box = node.getBoundingClientRect();
            return text.left - box.left > box.right - text.right ? "right" : "left";
        }"""
        self.assertEqual(await page.call_function(side, "p"), "right")
        self.assertEqual(await page.call_function(side, "pre"), "left")


# -- The composer


class Composer(PageCase):
    async def test_enter(self) -> None:
        """Enter sends what was typed, and empties the composer."""
        page = await self.open()
        await page.ask("Hello there")
        self.assertEqual(self.texts_sent(), ["Hello there"])
        self.assertEqual(await page.message(), "")

    async def test_shift_enter(self) -> None:
        """Shift+Enter breaks the line and sends nothing."""
        page = await self.open()
        await page.type("one")
        await page.press("Enter", SHIFT)
        await page.type("two")
        self.assertEqual(await page.message(), "one\ntwo")
        self.assertEqual(self.calls, [])

    async def test_composition(self) -> None:
        """An Enter that ends the composition of a word never sends."""
        page = await self.open()
        await page.focus("textbox", "Message")
        await page.devtools.call(
            "Input.imeSetComposition", text="にほん", selectionStart=3, selectionEnd=3
        )
        await page.press("Enter")
        self.assertEqual(await page.status(), "")
        self.assertEqual(self.calls, [])

    async def test_composition_in_safari(self) -> None:
        """Safari ends a composition before its Enter, whose key code 229 says what it was."""
        page = await self.open()
        await page.type("にほん")
        await page.press("Enter", key_code=229)
        self.assertEqual(await page.status(), "")
        self.assertEqual(self.calls, [])

    async def test_nothing_to_send(self) -> None:
        """Blanks alone are not sent."""
        page = await self.open()
        await page.say(" \n ")
        self.assertEqual(await page.status(), "")
        self.assertEqual(self.calls, [])

    async def test_send_becomes_stop(self) -> None:
        """While an answer runs, the button "Send" is "Stop"."""
        page = await self.open(STALLS)
        self.assertTrue(await page.has("button", "Send"))
        await page.type("Hello")
        await page.click("Send")
        await page.wait_for_text("Once")
        self.assertTrue(await page.has("button", "Stop"))
        self.assertFalse(await page.has("button", "Send"))
        await page.click("Stop")
        await page.wait_for_end()
        self.assertTrue(await page.has("button", "Send"))

    async def test_enter_while_an_answer_runs(self) -> None:
        """While an answer runs, Enter sends nothing and loses nothing."""
        page = await self.open(STALLS)
        await page.say("Hello")
        await page.wait_for_text("Once")
        await page.say("next")
        self.assertEqual(await page.message(), "next")
        self.assertEqual(len(self.calls), 1)

    async def test_double_click(self) -> None:
        """A double click on "Send" sends, and does not stop at once."""
        page = await self.open(STALLS)
        await page.type("Hello")
        await page.click("Send", times=2)
        await page.wait_for_text("Once")
        self.assertEqual(await page.status(), "Answering…")

    async def test_grows(self) -> None:
        """The composer grows with its text."""
        page = await self.open()
        composer = page.element("textbox", "Message")
        low = await composer.read("element.offsetHeight")
        await page.type("one\ntwo\nthree\nfour")
        self.assertGreater(await composer.read("element.offsetHeight"), 2 * low)

    async def test_draft(self) -> None:
        """A draft survives a reload."""
        page = await self.open()
        await page.type("half a thought")
        await page.reload()
        self.assertEqual(await page.message(), "half a thought")

    async def test_long_text(self) -> None:
        """400 KB in the composer cost about what a bare text box costs, not twenty times that."""
        page = await self.open()
        # Both are measured in the same page and moment, so that a busy machine slows both.
        ratio = await page.run(
            """(() => {
                const composer = document.activeElement;
                const bare = composer.cloneNode();
                bare.removeAttribute("id");
                bare.style.cssText = "all: revert; overflow-wrap: anywhere";
                const label = composer.parentNode.appendChild(document.createElement("label"));
                label.append(bare);
                const text = "Some words that fill a line. ".repeat(14000);
                const cost = (box) => {
                    const begin = performance.now();
                    box.value = text;
                    box.scrollHeight;
                    const time = performance.now() - begin;
                    box.value = "";
                    box.scrollHeight;
                    return time;
                };
                const least = (box) => Math.min(cost(box), cost(box), cost(box));
                return least(composer) / least(bare);
            })()"""
        )
        self.assertLess(ratio, 5)


# -- A conversation


class Conversation(PageCase):
    async def test_log(self) -> None:
        """The conversation is a log, whose messages are labelled "You" and "Assistant"."""
        page = await self.open()
        await page.ask("How are you?")
        self.assertIn("How are you?", await page.text_of_conversation())
        self.assertIn("How are you?", await page.element("article", "You").text())
        self.assertIn("Hello.", await page.element("article", "Assistant").text())

    async def test_the_whole_conversation_is_sent(self) -> None:
        """Each message is sent with all that was said before, after the system prompt."""
        page = await self.open(says("**Hello**"))
        await page.ask("One")
        await page.ask("Two")
        self.assertEqual(
            self.calls[-1].json["messages"],
            [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "One"},
                {"role": "assistant", "content": "**Hello**"},
                {"role": "user", "content": "Two"},
            ],
        )

    async def test_system_prompt(self) -> None:
        """The system prompt can be edited."""
        page = await self.open()
        await page.click("System prompt", role="disclosure")
        await page.focus("textbox", "System prompt")
        await page.type("Be brief. ")
        await page.ask()
        system = self.calls[0].json["messages"][0]
        self.assertEqual(system["role"], "system")
        self.assertEqual(system["content"], "Be brief. You are a helpful assistant.")

    async def test_model(self) -> None:
        """With several models, the one chosen in the picker "Model" is asked."""
        page = await self.open(model="small,large")
        await page.focus("combobox", "Model")
        await page.press("ArrowDown")
        await page.ask()
        self.assertEqual(self.calls[0].json["model"], "large")

    async def test_one_model(self) -> None:
        """With one model there is nothing to pick."""
        page = await self.open(model="small")
        await page.ask()
        self.assertFalse(await page.has("combobox", "Model"))

    async def test_models_are_asked_for_again(self) -> None:
        """A list of models that could not be loaded is asked for again before the next message."""
        models = responds(503, b"not ready")

        async def script(call: Call) -> None:
            is_model_list = call.request_line.startswith("GET")
            await (models if is_model_list else says("Hello."))(call)

        page = await self.open(script, model="*")
        await page.ask("One")
        models = responds(
            200, {"object": "list", "data": [{"id": "late", "object": "model"}]}
        )
        await page.ask("Two")
        await page.wait_for_text("Hello.")
        self.assertEqual(self.calls[-1].json["model"], "late")

    async def test_title(self) -> None:
        """The tab's title begins with the first message."""
        page = await self.open()
        await page.ask("Why is the sky blue?")
        await page.ask("And the sea?")
        self.assertTrue(
            (await page.run("document.title")).startswith("Why is the sky blue?")
        )

    async def test_save(self) -> None:
        """ "Save" downloads the conversation as Markdown."""
        page = await self.open(says("**Hello**"))
        await page.ask("One")
        with tempfile.TemporaryDirectory() as folder:
            await page.devtools.call(
                "Browser.setDownloadBehavior", behavior="allow", downloadPath=folder
            )
            await page.click("Save")
            await eventually(lambda: list(Path(folder).glob("*.md")))
            (file,) = Path(folder).iterdir()
            saved = file.read_text(encoding="utf-8")
        for words in ("You\n\nOne\n", "Assistant\n\n**Hello**\n"):
            self.assertIn(words, saved)

    async def test_first_token_before_the_last(self) -> None:
        """What has arrived is shown while the rest has not."""
        steps = Steps(text("**Hel"), text("lo**") + FINISH + DONE)
        page = await self.open(steps)
        await page.say("Go")
        await page.wait_for_text("Hel")
        self.assertEqual(await page.status(), "Answering…")
        steps.next()
        await page.wait_for_text("Hello")

    async def test_numbers(self) -> None:
        """Below an answer stand its time to the first token, its tokens and its model."""
        page = await self.open(streams("Hello", usage={"completion_tokens": 7}))
        await page.ask()
        self.assertRegex(
            await page.text_of_answer(), r"First token \d+ ms · 7 tokens.* · m"
        )

    async def test_rate(self) -> None:
        """Where the upstream reports no tokens, the chunks a second are shown."""
        page = await self.open(sends(*[text("Hello ")] * 3, FINISH, DONE, pause=0.1))
        await page.ask()
        self.assertRegex(await page.text_of_answer(), r"\d chunks/s")

    async def test_reasoning(self) -> None:
        """Reasoning, under either name, is folded, shown once, and not sent back."""
        both = chunk({"reasoning_content": "hm", "reasoning": "hm"})
        page = await self.open(
            sends(both, chunk({"reasoning": ", so"}), text("Hi"), FINISH, DONE)
        )
        await page.ask()
        details = page.element("group")
        self.assertFalse(await details.read("element.open"))
        await page.click("Reasoning", role="disclosure")
        self.assertTrue(await details.read("element.open"))
        answer = await page.text_of_answer()
        self.assertEqual(answer.count("hm"), 1)
        self.assertIn("hm, so", answer)
        await page.ask("Two")
        self.assertNotIn("hm", self.calls[-1].body.decode())

    async def test_refusal(self) -> None:
        """What a model says in refusal is shown."""
        page = await self.open(
            sends(
                chunk({"refusal": "I will "}), chunk({"refusal": "not."}), FINISH, DONE
            )
        )
        await page.ask()
        self.assertIn("I will not.", await page.text_of_answer())

    async def test_content_in_parts(self) -> None:
        """Content that is a list of parts is shown as their text."""
        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
        page = await self.open(sends(chunk({"content": parts}), FINISH, DONE))
        await page.ask()
        self.assertIn("Hello.", await page.text_of_answer())


def tool_call(index: int, name: object) -> bytes:
    call = {"index": index, "function": {"name": name, "arguments": "{}"}}
    return chunk({"tool_calls": [call]})


class ToolCalls(PageCase):
    async def shown(self, *chunks: bytes) -> str:
        page = await self.open(
            sends(*chunks, chunk({}, finish_reason="tool_calls"), DONE)
        )
        await page.ask()
        self.assertEqual(await page.status(), "Answer complete")
        return await page.text_of_answer()

    async def test_named(self) -> None:
        """Each tool that the model calls is named."""
        shown = await self.shown(tool_call(0, "weather"), tool_call(1, "clock"))
        self.assertIn("weather, clock", shown)

    async def test_a_name_in_each_chunk(self) -> None:
        """A tool whose name comes in each chunk of its call is named once."""
        shown = await self.shown(*[tool_call(0, "read_file")] * 3)
        self.assertEqual(shown.count("read_file"), 1)

    async def test_a_name_in_pieces(self) -> None:
        """A tool's name that comes in pieces is put together."""
        shown = await self.shown(tool_call(0, "read_"), tool_call(0, "file"))
        self.assertIn("read_file", shown)


# -- Endings


@dataclass
class FinishReason:
    name: str
    shown: str
    is_complete: bool = False
    offers_continue: bool = False


FINISH_REASONS = [
    FinishReason("stop", "", is_complete=True),
    FinishReason("STOP", "", is_complete=True),
    FinishReason("eos", "", is_complete=True),
    FinishReason("end", "", is_complete=True),
    FinishReason("end_turn", "", is_complete=True),
    FinishReason("tool_calls", "", is_complete=True),
    FinishReason("function_call", "", is_complete=True),
    FinishReason("length", "limit", offers_continue=True),
    FinishReason("max_tokens", "limit", offers_continue=True),
    FinishReason("MAX_TOKENS", "limit", offers_continue=True),
    FinishReason("content_filter", "content_filter", offers_continue=True),
    FinishReason("weird", "weird", offers_continue=True),
]


class Endings(PageCase):
    async def end_of(self, script: Script) -> Page:
        """The page after an answer by this script has ended."""
        page = await self.open(script)
        await page.ask()
        return page

    async def test_finish_reasons(self) -> None:
        """A complete answer says nothing of its end; a cut one and any other say why."""
        page = await self.open()
        for reason in FINISH_REASONS:
            with self.subTest(reason.name):
                await page.click("New chat")
                self.answer_by(says("Part", reason.name))
                await page.ask()
                status = await page.status()
                self.assertEqual(status == "Answer complete", reason.is_complete)
                answer = await page.text_of_answer()
                self.assertIn(reason.shown, answer)
                self.assertNotIn("broke off", answer)
                self.assertEqual(
                    await page.has("button", "Continue"), reason.offers_continue
                )

    async def test_cut_at_the_token_limit(self) -> None:
        """ "Continue" sends the part as the assistant's message and joins what comes."""
        page = await self.end_of(says("Part", "length"))
        self.answer_by(says("ner."))
        await page.click("Continue")
        await page.wait_for_end()
        self.assertIn("Partner.", await page.text_of_answer())
        self.assertEqual(
            self.messages_sent(),
            [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Part"},
            ],
        )

    async def test_continue_without_blanks_at_the_end(self) -> None:
        """The part that is to be continued is sent without blanks at its end."""
        page = await self.end_of(says("Part \n ", "length"))
        await page.click("Continue")
        await page.wait_for_end()
        self.assertEqual(self.texts_sent(), ["Hello", "Part"])

    async def test_broken(self) -> None:
        """A broken answer keeps its part, and offers "Retry" and "Continue"."""
        page = await self.end_of(BREAKS)
        answer = await page.text_of_answer()
        self.assertLess(answer.index("Once"), answer.index("broke off"))
        self.assertTrue(await page.has("button", "Retry"))
        self.assertTrue(await page.has("button", "Continue"))
        self.assertEqual(await page.status(), "Answer not complete")

    async def test_error_in_mid_answer(self) -> None:
        """An error in mid-answer is said below the part, in the model server's words."""
        error = event({"error": {"message": "GPU lost"}})
        page = await self.end_of(sends(text("Once"), error))
        answer = await page.text_of_answer()
        self.assertIn("GPU lost", answer)
        self.assertLess(answer.index("Once"), answer.index("broke off"))

    async def test_an_error_is_announced(self) -> None:
        """A screen reader announces an error at once."""
        page = await self.end_of(BREAKS)
        alert = await page.find("alert")
        self.assertIn("broke off", await alert.text())

    async def test_no_answer(self) -> None:
        """A request that fails before any text says so, then why."""
        page = await self.end_of(responds(400, {"error": {"message": "Too long."}}))
        self.assertIn("No answer: Too long.", await page.text_of_answer())
        self.assertTrue(await page.has("button", "Retry"))
        self.assertFalse(await page.has("button", "Continue"))

    async def test_retry(self) -> None:
        """ "Retry" sends the same again, and its answer stands instead of the error."""
        page = await self.end_of(responds(400, {"error": {"message": "Too long."}}))
        self.answer_by(says("Now."))
        await page.click("Retry")
        await page.wait_for_text("Now.")
        self.assertEqual(self.texts_sent(), ["Hello"])
        self.assertNotIn("Too long.", await page.text())

    async def test_empty_answer(self) -> None:
        """An answer without any text says so, and offers "Retry"."""
        page = await self.end_of(sends(FINISH, DONE))
        self.assertIn("The model sent an empty answer.", await page.text_of_answer())
        self.assertTrue(await page.has("button", "Retry"))

    async def test_empty_answer_after_regenerate(self) -> None:
        """An empty answer after "Regenerate" says so, too."""
        page = await self.end_of(says("Good."))
        self.answer_by(sends(FINISH, DONE))
        await page.click("Regenerate")
        await page.wait_for_text("The model sent an empty answer.")

    async def test_stopped(self) -> None:
        """An answer that was stopped keeps its part and says who stopped it."""
        page = await self.open(STALLS)
        await page.say("Hello")
        await page.wait_for_text("Once")
        await page.click("Stop")
        await page.wait_for_text("Stopped by you")
        self.assertIn("Once", await page.text_of_answer())
        self.assertTrue(await page.has("button", "Continue"))
        self.assertFalse(await page.has("alert"))

    async def test_a_failure_after_a_part(self) -> None:
        """What "Continue" cannot add does not cost the part."""
        page = await self.end_of(says("Part", "length"))
        self.answer_by(responds(400, {"error": {"message": "Full."}}))
        await page.click("Continue")
        await page.wait_for_text("Full.")
        self.assertIn("Part", await page.text_of_answer())

    async def test_end_of_the_body(self) -> None:
        """An answer whose body ends without an end mark is broken, never complete."""
        page = await self.open_other_server(sends(text("Once")))
        await page.ask()
        self.assertIn("broke off", await page.text_of_answer())
        self.assertEqual(await page.status(), "Answer not complete")

    async def test_a_lost_connection(self) -> None:
        """A connection that breaks in mid-answer is called that."""
        page = await self.open_other_server(BREAKS)
        await page.ask()
        self.assertRegex(
            await page.text_of_answer(), r"Once[\s\S]*broke off.*connection"
        )

    async def test_a_server_that_cannot_be_reached(self) -> None:
        """A server that is gone is called that."""
        page = await self.open_other_server(breaks_off)
        await page.ask()
        self.assertRegex(await page.text_of_answer(), "No answer: .*cannot be reached")

    async def test_a_login_page(self) -> None:
        """A proxy's login page with status 200 is named as no event stream."""
        login = sends(b"<html>Please log in</html>", content_type="text/html")
        page = await self.open_other_server(login)
        await page.ask()
        answer = await page.text_of_answer()
        self.assertIn("No answer: ", answer)
        self.assertRegex(answer, "not an? (event )?stream|no event stream|not a stream")

    async def test_a_proxy_s_error_page(self) -> None:
        """A failure that is no JSON is told by its status."""
        error = sends(b"<html>Bad gateway</html>", status=502, content_type="text/html")
        page = await self.open_other_server(error)
        await page.ask()
        self.assertRegex(await page.text_of_answer(), "No answer: .*502")

    async def test_two_failures_in_a_row(self) -> None:
        """After a failure, two messages in a row are sent as one: some models refuse two."""
        page = await self.end_of(responds(400, {"error": {"message": "Busy."}}))
        self.answer_by(says("Now."))
        await page.ask("Again")
        (message,) = self.messages_sent()
        self.assertRegex(message["content"], r"Hello\s+Again")


class RetryAfter(PageCase):
    def too_many(self, retry_after: str) -> Script:
        error = {"error": {"message": "Slow down."}}
        return responds(429, error, headers={"Retry-After": retry_after})

    async def is_enabled(self, page: Page) -> bool:
        return not await page.element("button", "Retry").read("element.disabled")

    async def test_countdown(self) -> None:
        """After a 429, "Retry" is disabled while the seconds count down."""
        page = await self.open(self.too_many("1000"))
        await page.ask()
        self.assertRegex(
            await page.text_of_answer(), r"Slow down\.[\s\S]*\b(99\d|1000) s"
        )
        self.assertFalse(await self.is_enabled(page))

    async def test_end_of_the_countdown(self) -> None:
        """Then "Retry" is enabled, and nothing is sent by itself."""
        page = await self.open(self.too_many("1"))
        await page.ask()
        retry = page.element("button", "Retry").code
        await page.wait_until(f"!{retry}.disabled", "an enabled Retry")
        self.assertEqual(len(self.calls), 1)

    async def test_a_date(self) -> None:
        """Retry-After may be a date."""
        page = await self.open(
            self.too_many(formatdate(time.time() + 1000, usegmt=True))
        )
        await page.ask()
        self.assertRegex(await page.text_of_answer(), r"\b(99\d|1000) s")
        self.assertFalse(await self.is_enabled(page))

    async def test_neither(self) -> None:
        """A Retry-After that is neither holds nobody up."""
        page = await self.open(self.too_many("soon"))
        await page.ask()
        self.assertTrue(await self.is_enabled(page))


class Stop(PageCase):
    async def begin(self, script: Script) -> Page:
        page = await self.open(script)
        await page.say("Hello")
        await eventually(lambda: self.calls)
        if script is STALLS:
            await page.wait_for_text("Once")
        return page

    async def check_stopped(self, page: Page) -> None:
        await asyncio.wait_for(self.calls[0].gone.wait(), PATIENCE)
        await page.wait_for_text("Stopped by you")

    async def test_button(self) -> None:
        """ "Stop" ends the upstream's request in mid-answer."""
        page = await self.begin(STALLS)
        await page.click("Stop")
        await self.check_stopped(page)

    async def test_escape(self) -> None:
        """Escape stops, too."""
        page = await self.begin(STALLS)
        await page.press("Escape")
        await self.check_stopped(page)

    async def test_before_the_first_token(self) -> None:
        """ "Stop" ends a request whose answer has not begun."""
        page = await self.begin(says_nothing)
        await page.click("Stop")
        await self.check_stopped(page)

    async def test_new_chat(self) -> None:
        """ "New chat" ends a request, too."""
        page = await self.begin(STALLS)
        await page.click("New chat")
        await asyncio.wait_for(self.calls[0].gone.wait(), PATIENCE)

    async def test_closed_tab(self) -> None:
        """Leaving the page ends the upstream's request."""
        page = await self.begin(STALLS)
        await page.devtools.call("Page.navigate", url="about:blank")
        await asyncio.wait_for(self.calls[0].gone.wait(), PATIENCE)

    async def test_half_a_character(self) -> None:
        """Stopped after half of an emoji, the next request holds no half: servers refuse it."""
        page = await self.open(sends(text("Once "), event(HALF_AN_EMOJI), then=hangs))
        await page.say("Hello")
        await page.wait_for_text("Once")
        await page.click("Wire")
        await page.wait_for_text("d83d")
        await page.click("Stop")
        await page.wait_for_end()
        self.answer_by(says("Good."))
        await page.ask("Two")
        for content in self.texts_sent():
            self.assertNotRegex(content, r"[\ud800-\udfff]")


# JSON may hold half of a surrogate pair, which is no character and has no bytes in UTF-8.
HALF_AN_EMOJI = (
    b'{"choices":[{"index":0,"delta":{"content":"\\ud83d"},"finish_reason":null}]}'
)


# -- What comes from outside


ODD_VALUES: list[Any] = [None, 5, True, "text", [], [None], {}, {"a": None}]


def odd_chunks(value: Any) -> list[bytes]:
    """A chunk for each of its fields, in which this field has this value."""
    deltas = [
        "reasoning_content",
        "reasoning",
        "refusal",
        "tool_calls",
        "role",
        "unknown",
    ]
    choices = ["delta", "index", "logprobs"]
    chunks = ["usage", "model", "id", "object", "created"]
    payloads: list[Any] = [{"choices": [{"delta": {field: value}}]} for field in deltas]
    payloads += [{"choices": [{field: value}]} for field in choices]
    payloads += [{"choices": [], field: value} for field in chunks]
    payloads.append({"choices": [value]})
    payloads.append({"choices": [{"delta": {"tool_calls": [value]}}]})
    payloads.append({"choices": [{"delta": {"tool_calls": [{"function": value}]}}]})
    if not isinstance(value, str):
        payloads.append({"choices": [{"delta": {"content": value}}]})
        payloads.append({"choices": [{"delta": {}, "finish_reason": value}]})
    return [event(payload) for payload in payloads]


NOT_FOR_PEOPLE = (
    "[object",
    "undefined",
    "NaN",
    "Unexpected token",
    "is not a function",
)


class FromOutside(PageCase):
    async def test_odd_fields(self) -> None:
        """Whatever type a field of a chunk has, the answer is shown and complete."""
        page = await self.open()
        for value in ODD_VALUES:
            with self.subTest(json.dumps(value)):
                self.answer_by(
                    sends(text("Part"), *odd_chunks(value), text("ner."), FINISH, DONE)
                )
                await page.click("New chat")
                await page.ask()
                answer = await page.text_of_answer()
                self.assertIn("Part", answer)
                self.assertIn("ner.", answer)
                self.assertEqual(await page.status(), "Answer complete")
                for words in NOT_FOR_PEOPLE:
                    self.assertNotIn(words, answer)

    async def test_a_token_count_that_is_text(self) -> None:
        """A token count that is text is no reason to show nonsense, or to lose the answer."""
        page = await self.open(streams("Whole.", usage={"completion_tokens": "7"}))
        await page.ask()
        self.assertNotIn("07", await page.text_of_answer())
        await page.reload()
        self.assertIn("Whole.", await page.text_of_answer())

    async def test_odd_errors(self) -> None:
        """Whatever an error looks like, it is told in words for people."""
        errors: list[Any] = [
            5,
            True,
            [],
            ["a"],
            {},
            {"message": None},
            {"message": {"a": 1}},
        ]
        page = await self.open_other_server(says("Hello."))
        for error in errors:
            with self.subTest(json.dumps(error)):
                self.answer_by(
                    other_server(sends(text("Part"), event({"error": error})))
                )
                await page.click("New chat")
                await page.ask()
                answer = await page.text_of_answer()
                self.assertIn("broke off", answer)
                for words in NOT_FOR_PEOPLE:
                    self.assertNotIn(words, answer)

    async def test_an_event_that_is_no_json(self) -> None:
        """An event that is no JSON is told in words for people, below the part."""
        page = await self.open_other_server(sends(text("Part"), b"data: <html>\n\n"))
        await page.ask()
        answer = await page.text_of_answer()
        self.assertRegex(answer, r"Part[\s\S]*not (valid )?JSON")
        self.assertNotIn("Unexpected token", answer)

    async def test_a_fault_of_the_page(self) -> None:
        """A slip in the page's own code is called a fault of the page, not a lost connection."""
        page = await self.open()
        await page.run(
            """{
                const original = TextDecoder.prototype.decode;
                TextDecoder.prototype.decode = function () {
                    TextDecoder.prototype.decode = original;
                    throw new TypeError("slip");
                };
            }"""
        )
        await page.ask()
        answer = await page.text_of_answer()
        self.assertIn("fault", answer)
        self.assertNotIn("connection", answer)
        await page.ask("Two")
        await page.wait_for_text("Hello.")

    async def translate_code(self, page: Page) -> None:
        """Replaces the text node of a code block, as a browser's translator does."""
        await page.run(
            """{
                const text = document.querySelector("article pre code").firstChild;
                const font = document.createElement("font");
                text.replaceWith(font);
                font.append(text.data);
            }"""
        )

    async def test_translator_in_mid_answer(self) -> None:
        """A translator that replaces text nodes costs no more than that block."""
        steps = Steps(
            text("```\nx = 1\n"), text("y = 2\n```\n\nThe end."), FINISH + DONE
        )
        page = await self.open(steps)
        await page.say("Hello")
        await page.wait_for_text("x = 1")
        await self.translate_code(page)
        steps.next()
        steps.next()
        await page.wait_for_end()
        self.answer_by(says("Good."))
        await page.ask("Two")
        await page.wait_for_text("Good.")

    async def test_stop_after_a_translator(self) -> None:
        """Stop works after a translator has replaced text nodes in mid-answer."""
        lines = [text("```\nx = 1\n"), *[text("y\n")] * 50]
        page = await self.open(sends(*lines, then=hangs, pause=0.01))
        await page.say("Hello")
        await page.wait_for_text("x = 1")
        await self.translate_code(page)
        await page.click("Stop")
        await asyncio.wait_for(self.calls[0].gone.wait(), PATIENCE)
        await page.wait_for_text("Stopped by you")


# -- What can be done with a message


class Copy(PageCase):
    async def copy_and_paste(self, page: Page, index: int = -1) -> str:
        """What the composer holds after a click on "Copy" and a paste."""
        await page.click("Copy", index)
        await page.find("button", "Copied")
        await page.focus("textbox", "Message")
        await page.paste()
        return await page.message()

    async def test_answer(self) -> None:
        """An answer's "Copy" takes its Markdown and says "Copied"."""
        page = await self.open(says("**Hello** `you`"))
        await page.ask()
        self.assertEqual(await self.copy_and_paste(page), "**Hello** `you`")

    async def test_code(self) -> None:
        """A code block's "Copy" takes its code alone."""
        page = await self.open(says("Look:\n\n```py\nif x:\n    y()\n```"))
        await page.ask()
        self.assertEqual(await self.copy_and_paste(page, index=0), "if x:\n    y()")

    async def test_refused(self) -> None:
        """Where the browser refuses the clipboard, the older way is tried."""
        page = await self.open(says("Hello."))
        await page.run(
            "navigator.clipboard.writeText = () => Promise.reject(new Error('no'))"
        )
        await page.ask()
        self.assertEqual(await self.copy_and_paste(page), "Hello.")

    async def test_insecure(self) -> None:
        """On plain http, where browsers offer no clipboard, "Copy" works all the same."""
        page = await self.open(says("Hello."), allowed_hosts=INSECURE_HOST)
        await page.navigate(self.server.url.replace("127.0.0.1", INSECURE_HOST))
        self.assertEqual(await page.run("typeof navigator.clipboard"), "undefined")
        await page.ask()
        self.assertEqual(await self.copy_and_paste(page), "Hello.")


class Changes(PageCase):
    async def conversation(self) -> Page:
        """A page with two messages and their answers."""
        page = await self.open(says("One."))
        await page.ask("First")
        self.answer_by(says("Two."))
        await page.ask("Second")
        return page

    async def test_regenerate(self) -> None:
        """ "Regenerate" asks again for an answer, without the old one."""
        page = await self.conversation()
        self.answer_by(says("Better."))
        await page.click("Regenerate")
        await page.wait_for_text("Better.")
        self.assertEqual(self.texts_sent(), ["First", "One.", "Second"])
        self.assertNotIn("Two.", await page.text())

    async def test_edit(self) -> None:
        """ "Edit" puts a sent message into the composer, and sending replaces what followed."""
        page = await self.conversation()
        self.answer_by(says("New."))
        await page.click("Edit", index=0)
        self.assertEqual(await page.message(), "First")
        await page.type(", please")
        await page.press("Enter")
        await page.wait_for_text("New.")
        self.assertEqual(self.texts_sent(), ["First, please"])
        self.assertNotIn("Second", await page.text_of_conversation())

    async def test_edit_keeps_the_draft(self) -> None:
        """A draft comes back after an edit, sent or given up."""
        page = await self.conversation()
        await page.type("draft")
        await page.click("Edit", index=0)
        await page.press("Escape")
        self.assertEqual(await page.message(), "draft")
        await page.click("Edit", index=0)
        await page.press("Enter")
        await page.wait_for_end()
        self.assertEqual(await page.message(), "draft")

    async def test_new_chat(self) -> None:
        """ "New chat" clears the conversation."""
        page = await self.conversation()
        await page.click("New chat")
        self.assertNotIn("First", await page.text())
        await page.ask("Anew")
        self.assertEqual(self.texts_sent(), ["Anew"])

    async def check_undo(self, page: Page, before: str) -> None:
        await page.click("Undo")
        self.assertEqual(await page.text_of_conversation(), before)
        self.assertFalse(await page.has("button", "Stop"))
        self.assertFalse(await page.has("button", "Undo"))

    async def test_undo_new_chat(self) -> None:
        """ "Undo" brings back what "New chat" took away."""
        page = await self.conversation()
        before = await page.text_of_conversation()
        await page.click("New chat")
        await self.check_undo(page, before)

    async def test_undo_regenerate(self) -> None:
        """ "Undo" stops a new answer and brings back the old one."""
        page = await self.conversation()
        before = await page.text_of_conversation()
        self.answer_by(STALLS)
        await page.click("Regenerate")
        await page.wait_for_text("Once")
        await self.check_undo(page, before)
        await asyncio.wait_for(self.calls[-1].gone.wait(), PATIENCE)

    async def test_undo_a_regenerate_that_failed(self) -> None:
        """ "Undo" brings back an answer whose replacement failed."""
        page = await self.conversation()
        self.answer_by(responds(400, {"error": {"message": "Busy."}}))
        await page.click("Regenerate")
        await page.wait_for_text("Busy.")
        if await page.has("button", "Undo"):
            await page.click("Undo")
        self.assertIn("Two.", await page.text_of_answer())

    async def test_undo_edit(self) -> None:
        """ "Undo" brings back what an edit replaced."""
        page = await self.conversation()
        before = await page.text_of_conversation()
        await page.click("Edit", index=0)
        await page.press("Enter")
        await page.wait_for_end()
        await self.check_undo(page, before)

    async def test_undo_after_a_reload(self) -> None:
        """ "Undo" works after a reload, too."""
        page = await self.conversation()
        before = await page.text_of_conversation()
        await page.click("New chat")
        await page.reload()
        await self.check_undo(page, before)

    async def test_undo_ends_with_the_next_message(self) -> None:
        """After the next message there is nothing to undo any more."""
        page = await self.conversation()
        await page.click("New chat")
        self.assertTrue(await page.has("button", "Undo"))
        await page.ask("Anew")
        self.assertFalse(await page.has("button", "Undo"))


# -- What is stored


# Runs before the page's own script, and damages what the page stored: each text of sessionStorage.
DAMAGE = """
for (const key of Object.keys(sessionStorage)) {
    sessionStorage[key] = (%s)(sessionStorage[key]);
}
"""
# Changes the stored answer "Hello.", wherever it is stored: every field but its text and role.
CHANGE_FIELDS = """(stored) => {
    const change = (value) => {
        if (typeof value !== "object" || value === null) return value;
        const isAnswer = Object.values(value).includes("Hello.");
        for (const field of Object.keys(value)) {
            if (!isAnswer) value[field] = change(value[field]);
            else if (value[field] !== "Hello." && field !== "role") %s;
        }
        return value;
    };
    return JSON.stringify(change(JSON.parse(stored)));
}"""


class Storage(PageCase):
    async def reload_damaged(self, page: Page, damage: str) -> None:
        """Reloads the page, whose stored state is damaged in between."""
        script = await page.devtools.call(
            "Page.addScriptToEvaluateOnNewDocument", source=DAMAGE % damage
        )
        await page.reload()
        await page.devtools.call("Page.removeScriptToEvaluateOnNewDocument", **script)

    async def test_conversation(self) -> None:
        """The conversation survives a reload, and goes on."""
        page = await self.open()
        await page.ask("First")
        before = await page.text_of_conversation()
        await page.reload()
        self.assertEqual(await page.text_of_conversation(), before)
        await page.ask("Second")
        self.assertEqual(self.texts_sent(), ["First", "Hello.", "Second"])

    async def test_reload_in_mid_answer(self) -> None:
        """A reload in mid-answer keeps the part and marks it "Interrupted"."""
        page = await self.open(STALLS)
        await page.say("Hello")
        await page.wait_for_text("Once")
        await page.reload()
        answer = await page.text_of_answer()
        self.assertIn("Once", answer)
        self.assertIn("Interrupted", answer)
        self.assertTrue(await page.has("button", "Continue"))

    async def test_reload_that_breaks_the_request_first(self) -> None:
        """Firefox and WebKit break the request before they leave: "Interrupted", too."""
        page = await self.open(STALLS)
        await page.say("Hello")
        await page.wait_for_text("Once")
        # `stop` breaks requests at once, as those browsers do when a reload begins.
        await page.run("window.isOld = true; window.stop(); location.reload()")
        await page.wait_for_reload()
        answer = await page.text_of_answer()
        self.assertIn("Once", answer)
        self.assertIn("Interrupted", answer)

    async def test_two_tabs(self) -> None:
        """Two tabs have a conversation each."""
        page = await self.open()
        await page.ask("First")
        second = await self.open_second_tab(self.server.url)
        self.assertNotIn("First", await second.text())

    async def test_damaged(self) -> None:
        """Damaged stored state does not stop the page."""
        page = await self.open()
        for junk in (
            "{",
            "7",
            "null",
            "[]",
            '"text"',
            '{"turns":7}',
            '{"turns":[null,7,{}]}',
        ):
            with self.subTest(junk):
                await self.reload_damaged(page, f"() => {json.dumps(junk)}")
                await page.click("New chat")
                await page.ask()
                self.assertIn("Hello.", await page.text_of_answer())

    async def check_repaired(self, *changes: str) -> None:
        page = await self.open()
        await page.ask("First")
        for change in changes:
            with self.subTest(change):
                await self.reload_damaged(page, CHANGE_FIELDS % change)
                self.assertIn("Hello.", await page.text_of_conversation())
                for words in NOT_FOR_PEOPLE:
                    self.assertNotIn(words, await page.text())

    async def test_a_message_of_another_version(self) -> None:
        """A stored message that lacks fields is shown all the same."""
        await self.check_repaired("delete value[field]")

    async def test_a_damaged_message(self) -> None:
        """A stored message whose other fields are damaged is shown all the same."""
        await self.check_repaired(
            "value[field] = null",
            "value[field] = {}",
            "value[field] = [null]",
            "value[field] = 'text'",
            "value[field] = -1",
        )

    async def test_a_full_storage(self) -> None:
        """A storage that is full stops no answer."""
        page = await self.open()
        await page.run(
            """{
                for (let size = 2 ** 23; size >= 1; size /= 2) {
                    try {
                        sessionStorage["filler" + size] = " ".repeat(size);
                    } catch {
                        // This was too much; half of it may fit.
                    }
                }
            }"""
        )
        await page.ask("x" * 10_000)
        self.assertIn("Hello.", await page.text_of_answer())


# -- The access token


class Token(PageCase):
    async def test_asked_for(self) -> None:
        """A 401 asks for the access token, then sends what was asked."""
        page = await self.open(token="right+1")
        await page.say("Secret question")
        await page.focus("textbox", "Access token")
        await page.type("right+1")
        await page.press("Enter")
        await page.wait_for_text("Hello.")
        self.assertEqual(self.texts_sent(), ["Secret question"])

    async def test_wrong(self) -> None:
        """A wrong token is asked for again."""
        page = await self.open(token="right+1")
        await page.say("Secret question")
        for token in ("wrong", "right+1"):
            field = await page.find("textbox", "Access token")
            await page.wait_until(f"{field.code}?.value === ''", "an empty field")
            await field.focus()
            await page.type(token)
            await page.press("Enter")
        await page.wait_for_text("Hello.")

    async def test_cancelled(self) -> None:
        """Whoever gives no token reads why there is no answer, and can retry."""
        page = await self.open(token="right+1")
        await page.say("Secret question")
        await page.click("Cancel")
        await page.wait_for_text("No answer: ")
        self.assertTrue(await page.has("button", "Retry"))

    async def test_in_the_address(self) -> None:
        """A token after the # of the address is used, and leaves the address bar at once."""
        page = await self.open(fragment="#token=right+1", token="right+1")
        self.assertEqual(await page.run("location.href"), self.server.url + "/")
        await page.ask()
        self.assertIn("Hello.", await page.text_of_answer())

    async def test_in_the_address_of_an_open_page(self) -> None:
        """That works in a page that is already open, too."""
        page = await self.open(token="right+1")
        await page.devtools.call(
            "Page.navigate", url=self.server.url + "/#token=right+1"
        )
        await page.wait_until("location.hash === ''", "a clean address")
        await page.ask()
        self.assertIn("Hello.", await page.text_of_answer())

    async def test_kept_for_the_tab(self) -> None:
        """A token survives a reload, and no other tab gets it."""
        page = await self.open(fragment="#token=right+1", token="right+1")
        await page.reload()
        await page.ask()
        self.assertIn("Hello.", await page.text_of_answer())
        second = await self.open_second_tab(self.server.url)
        await second.say("Hello")
        await second.find("textbox", "Access token")

    async def test_never_in_a_url(self) -> None:
        """No request has the token in its address."""
        page = await self.open(fragment="#token=right+1", token="right+1")
        await page.ask()
        for url in page.urls_requested():
            self.assertNotIn("right", url)


# -- The wire


class Wire(PageCase):
    async def lines(self, page: Page) -> list[str]:
        panel = page.element("complementary", "Wire")
        lines: list[str] = await panel.read(
            "[...element.querySelectorAll('li')].map((line) => line.textContent)"
        )
        return lines

    async def open_wire(self, *chunks: bytes) -> Page:
        """A page that shows the wire of one answer."""
        page = await self.open(sends(*chunks, FINISH, DONE))
        await page.click("Wire")
        await page.ask()
        return page

    async def test_closed_at_first(self) -> None:
        """The wire is closed until the button "Wire" opens it, outside of the log."""
        page = await self.open()
        self.assertFalse(await page.has("complementary", "Wire"))
        await page.click("Wire")
        panel = page.element("complementary", "Wire")
        self.assertIsNone(await panel.read("element.closest('[role=log]')"))
        await page.click("Wire")
        self.assertFalse(await page.has("complementary", "Wire"))

    async def test_lines(self) -> None:
        """Every line is shown as it arrived, with the milliseconds since sending."""
        page = await self.open_wire(text("Hello"))
        first, _, last = await self.lines(page)
        line = text("Hello").decode().strip()
        self.assertRegex(first, r"^\s*\d+ ms\s+" + re.escape(line))
        self.assertRegex(last, r"^\s*\d+ ms\s+data: \[DONE\]")

    async def test_what_the_token_adds(self) -> None:
        """What a token adds stands out from what repeats."""
        page = await self.open_wire(text("Hello"))
        panel = page.element("complementary", "Wire")
        look = """((line) => {
            const walker = document.createTreeWalker(line, NodeFilter.SHOW_TEXT);
            const looks = {};
            while (walker.nextNode()) {
                const { data, parentNode } = walker.currentNode;
                const { color, fontWeight } = getComputedStyle(parentNode);
                looks[data.includes("Hello") ? "token" : "rest"] = color + fontWeight;
            }
            return looks;
        })(element.querySelector("li"))"""
        looks = await panel.read(look)
        self.assertNotEqual(looks["token"], looks["rest"])

    async def test_long_lines(self) -> None:
        """A line is cut at 400 characters and stands in one row."""
        page = await self.open_wire(text("a"), text("b" * 1000))
        panel = page.element("complementary", "Wire")
        heights = await panel.read(
            "[...element.querySelectorAll('li')].map((line) => line.offsetHeight)"
        )
        self.assertEqual(len(set(heights)), 1)
        lines = await self.lines(page)
        self.assertIn("bbb", lines[1])
        self.assertLess(max(map(len, lines)), 430)

    async def test_many_lines(self) -> None:
        """The last 500 lines are kept."""
        page = await self.open_wire(*[text("y")] * 600)
        lines = await self.lines(page)
        self.assertEqual(len(lines), 500)
        self.assertIn("[DONE]", lines[-1])

    async def test_opened_late(self) -> None:
        """Opened in mid-answer, the wire shows what has come, and follows the end."""
        steps = Steps(text("y") * 300, text("z") * 300, FINISH + DONE)
        page = await self.open(steps)
        await page.say("Hello")
        await page.wait_for_text("yyyy")
        await page.click("Wire")
        panel = await page.find("list", "Lines")
        below = "element.scrollHeight - element.scrollTop - element.clientHeight"
        self.assertLess(await panel.read(below), 2)
        steps.next()
        steps.next()
        await page.wait_for_text("[DONE]")
        self.assertLess(await panel.read(below), 2)

    async def test_plot(self) -> None:
        """A plot shows the gaps between events, with its scale in words and as its name."""
        page = await self.open_wire(text("a"), text("b"), text("c"))
        plot = page.element("img")
        name = await plot.read("element.ariaLabel")
        self.assertRegex(name, r"(?i)gaps? between events.*longest \d.* ms.*median \d")
        panel = page.element("complementary", "Wire")
        self.assertIn(name, await panel.text())

    async def test_failure(self) -> None:
        """The wire shows an error event, too."""
        page = await self.open_wire(
            text("a"), event({"error": {"message": "GPU lost"}})
        )
        self.assertIn("GPU lost", "".join(await self.lines(page)))


# -- Scrolling


LINES = "".join(f"line {number}\n\n" for number in range(40))


async def streams_lines(call: Call) -> None:
    """An answer of a line every few milliseconds, without end."""
    await call.send_head()
    await call.send(text(LINES))
    for number in itertools.count(40):
        await call.send(text(f"line {number}\n\n"))
        await asyncio.sleep(0.02)


class Scrolling(PageCase):
    async def begin(self) -> Page:
        """A page with a long answer that goes on and on."""
        page = await self.open(streams_lines)
        await page.say("Hello")
        await page.wait_for_text("line 50")
        return page

    async def distance_to_the_end(self, page: Page) -> float:
        below = "element.scrollHeight - element.scrollTop - element.clientHeight"
        return float(await page.element("log").read(below))

    async def wait_for_more(self, page: Page) -> None:
        """Waits until some more lines are on the page."""
        lines = "document.querySelectorAll('[role=log] p').length"
        wanted = await page.run(lines) + 10
        await page.wait_until(f"{lines} >= {wanted}", "more lines")

    async def check_let_go(self, page: Page) -> None:
        await page.find("button", "Latest")
        before = await self.distance_to_the_end(page)
        await self.wait_for_more(page)
        self.assertGreater(await self.distance_to_the_end(page), before)

    async def test_follows(self) -> None:
        """The page follows the answer while the reader is at its end."""
        page = await self.begin()
        await self.wait_for_more(page)
        # What has come since it was last painted may be below.
        self.assertLess(await self.distance_to_the_end(page), 100)
        self.assertFalse(await page.has("button", "Latest"))

    async def test_wheel(self) -> None:
        """One notch of the wheel up lets go."""
        page = await self.begin()
        await page.devtools.call(
            "Input.dispatchMouseEvent",
            type="mouseWheel",
            x=400,
            y=300,
            deltaX=0,
            deltaY=-100,
        )
        await self.check_let_go(page)

    async def check_key(self, key: str, modifiers: int = 0) -> None:
        page = await self.begin()
        await page.focus("log", "Conversation")
        await page.press(key, modifiers)
        await self.check_let_go(page)

    async def test_page_up(self) -> None:
        """Page Up lets go."""
        await self.check_key("PageUp")

    async def test_arrow_up(self) -> None:
        """The arrow up lets go."""
        await self.check_key("ArrowUp")

    async def test_home(self) -> None:
        """Home lets go."""
        await self.check_key("Home")

    async def test_shift_space(self) -> None:
        """Shift+Space lets go."""
        await self.check_key(" ", SHIFT)

    async def test_latest(self) -> None:
        """The button "Latest" returns to the end and follows it again."""
        page = await self.begin()
        await page.focus("log", "Conversation")
        await page.press("PageUp")
        await page.click("Latest")
        await self.wait_for_more(page)
        self.assertLess(await self.distance_to_the_end(page), 100)
        self.assertFalse(await page.has("button", "Latest"))


# -- Keyboard and screen reader


class Accessibility(PageCase):
    async def test_keyboard_alone(self) -> None:
        """The Tab key reaches every button and field that is shown."""
        page = await self.open(says("Hello\n\n```\ncode\n```"), model="small,large")
        await page.ask()
        await page.click("Wire")
        wanted = """[...document.querySelectorAll("button, select, textarea, summary, a, input")]
            .filter((target) => target.checkVisibility() && !target.disabled)"""
        await page.run(
            f"window.unreached = new Set({wanted}); document.activeElement.blur()"
        )
        self.assertGreater(await page.run("unreached.size"), 8)
        for _ in range(40):
            await page.press("Tab")
            await page.run("unreached.delete(document.activeElement)")
        self.assertEqual(
            await page.run(
                "[...unreached].map((each) => each.outerHTML.slice(0, 100))"
            ),
            [],
        )

    async def test_names(self) -> None:
        """The browser gives everything the role and name by which these tests find it."""
        page = await self.open(says("Hello\n\n```\ncode\n```"), model="small,large")
        await page.ask()
        await page.click("Wire")
        tree = await page.devtools.call("Accessibility.getFullAXTree")
        found = {
            (node["role"]["value"], node["name"]["value"])
            for node in tree["nodes"]
            if "name" in node and not node["ignored"]
        }
        wanted = {
            ("textbox", "Message"),
            ("combobox", "Model"),
            ("log", "Conversation"),
        }
        wanted |= {("complementary", "Wire"), ("list", "Lines")}
        wanted |= {("article", "You"), ("article", "Assistant")}
        for name in ("Send", "Wire", "Save", "New chat", "Copy", "Regenerate", "Edit"):
            wanted.add(("button", name))
        self.assertEqual(wanted - found, set())
        roles_that_need_a_name = {"button", "textbox", "combobox", "image", "link"}
        nameless = {role for role, name in found if not name}
        self.assertEqual(nameless & roles_that_need_a_name, set())

    async def test_busy(self) -> None:
        """The log is busy while an answer runs, so that no screen reader is flooded."""
        page = await self.open(STALLS)
        log = page.element("log")
        self.assertNotEqual(await log.read("element.ariaBusy"), "true")
        await page.say("Hello")
        await page.wait_for_text("Once")
        self.assertEqual(await log.read("element.ariaBusy"), "true")
        await page.press("Escape")
        await page.wait_for_end()
        self.assertEqual(await log.read("element.ariaBusy"), "false")

    async def test_status(self) -> None:
        """A polite status line says "Answering…", then "Answer complete"."""
        steps = Steps(text("Hello."), FINISH + DONE)
        page = await self.open(steps)
        await page.say("Hello")
        await page.wait_for_status("Answering…")
        steps.next()
        await page.wait_for_status("Answer complete")

    async def test_focus_stays(self) -> None:
        """The focus is never lost: where its button goes, it returns to the composer."""
        page = await self.open()
        await page.ask()
        for name in ("Regenerate", "New chat", "Undo"):
            await page.focus("button", name)
            await page.press("Enter")
            await page.wait_for_end()
            self.assertNotEqual(
                await page.run("document.activeElement.localName"), "body"
            )

    @unittest.skipUnless(AXE, "CHATSTREAM_AXE does not name an axe.min.js")
    async def test_axe(self) -> None:
        """axe-core finds nothing in any state of the page, light or dark."""
        page = await self.open(says(SAMPLE), model="demo,demo-cut-off")
        await page.run(Path(AXE).read_text(encoding="utf-8") + ";0")
        for scheme in ("light", "dark"):
            await page.emulate(prefers_color_scheme=scheme)
            self.answer_by(says(SAMPLE))
            await self.check_axe(page, f"{scheme}, empty")
            await page.ask()
            await self.check_axe(page, f"{scheme}, answered")
            await page.click("Wire")
            await page.click("Edit")
            await self.check_axe(page, f"{scheme}, wire and edit")
            await page.press("Escape")
            self.answer_by(STALLS)
            await page.say("Two")
            await page.wait_for_text("Once")
            await self.check_axe(page, f"{scheme}, streaming")
            await page.press("Escape")
            self.answer_by(responds(429, {"error": {}}, headers={"Retry-After": "60"}))
            await page.ask("Three")
            await self.check_axe(page, f"{scheme}, failed")
            await page.click("Wire")
            await page.click("New chat")

    async def check_axe(self, page: Page, state: str) -> None:
        found = await page.run(
            """axe.run().then(({ violations }) => violations.map(
                ({ id, nodes }) => [id, ...nodes.map((node) => node.html)]))"""
        )
        with self.subTest(state):
            self.assertEqual(found, [])


# -- Safety


EVIL = (
    "<script>hit()</script> <img src=x onerror=hit()> <svg/onload=hit()> \0000\0\n\n"
    "[x](javascript:hit()) [x](JaVaScRiPt:hit()) <javascript:hit()> [x](//evil.example)\n"
    '[x](data:text/html,<script>hit()</script>) [x](https://a.example/"onmouseover=hit())\n'
    "[x](&#106;avascript:hit()) [x](java\tscript:hit()) [x](<javascript:hit()>)\n"
    "![x](https://evil.example/x.png) ![x](data:image/png;base64,AAAA)\n\n"
    "```<img src=x onerror=hit()>\n</code><script>hit()</script>\n```\n\n"
    "|<img src=x onerror=hit()>|\n|-|\n|<iframe src=//evil.example>|\n\n"
    "<meta http-equiv=refresh content=0;url=https://evil.example>\n"
    "<link rel=prefetch href=https://evil.example><style>@import '//evil.example'</style>"
)


class Safety(PageCase):
    """Nothing from outside becomes markup or a request."""

    async def open_watched(self, script: Script, model: str = "m") -> Page:
        page = await self.open(script, model=model)
        await page.run("window.hits = 0; window.hit = () => { window.hits += 1; }; 0")
        return page

    async def check_harmless(self, page: Page) -> None:
        """No script ran, nothing was requested, and no element is of a kind that could do it."""
        await page.click("Wire")
        self.assertEqual(await page.run("window.hits"), 0)
        allowed = (self.server.url + "/", "data:image/svg+xml")
        requested = page.urls_requested()
        self.assertEqual([url for url in requested if not url.startswith(allowed)], [])
        dangerous = """[...document.body.querySelectorAll(
            "img, iframe, object, embed, link, meta, base, style, video, audio, form[action]")]
            .map((element) => element.outerHTML)"""
        self.assertEqual(await page.run(dangerous), [])
        handlers = """[...document.querySelectorAll("*")].flatMap((element) =>
            [...element.attributes].map(({ name }) => name)).filter((name) => /^on/.test(name))"""
        self.assertEqual(await page.run(handlers), [])
        targets = "[...document.querySelectorAll('a')].map((link) => link.protocol)"
        self.assertLessEqual(
            set(await page.run(targets)), {"https:", "http:", "mailto:"}
        )

    async def test_answer(self) -> None:
        """What a model writes stays text."""
        page = await self.open_watched(says(EVIL))
        await page.ask()
        self.assertIn("<script>hit()</script>", await page.text_of_answer())
        await self.check_harmless(page)

    async def test_answer_in_pieces(self) -> None:
        """What a model writes stays text when it comes a character at a time."""
        page = await self.open_watched(streams(*EVIL))
        await page.ask()
        await self.check_harmless(page)

    async def test_other_fields(self) -> None:
        """Reasoning, a refusal, a tool's name, a model's name and a finish reason stay text."""
        delta = {"reasoning": EVIL, "refusal": EVIL}
        named = event({"model": EVIL, "choices": [{"delta": delta}]})
        ending = chunk({"content": "x"}, finish_reason=EVIL[:200])
        page = await self.open_watched(sends(named, tool_call(0, EVIL), ending, DONE))
        await page.ask()
        await page.click("Reasoning", role="disclosure")
        await self.check_harmless(page)

    async def test_error(self) -> None:
        """An error's message stays text."""
        page = await self.open_watched(
            responds(400, {"error": {"message": EVIL[:400]}})
        )
        await page.ask()
        self.assertIn("<script>hit()</script>", await page.text_of_answer())
        await self.check_harmless(page)

    async def test_own_message(self) -> None:
        """What a person types stays text, also as the tab's title."""
        page = await self.open_watched(says("Hello."))
        await page.ask(EVIL.replace("\n", " ").replace("\0", ""))
        await self.check_harmless(page)

    async def test_name_of_a_model(self) -> None:
        """The name of a model in the list stays text."""
        page = await self.open_watched(
            says("Hello."), model="<img src=x onerror=hit()>,b"
        )
        await page.ask()
        await self.check_harmless(page)

    async def test_links_leave_no_trace(self) -> None:
        """A link opens elsewhere, and that page learns neither opener nor referrer."""
        page = await self.open(says("[x](https://a.example)"))
        await page.ask()
        link = await page.find("link", "x")
        self.assertEqual(await link.read("element.rel"), "noopener noreferrer")
        self.assertEqual(await link.read("element.target"), "_blank")

    def test_source(self) -> None:
        """The page has no inline handler, nothing that makes markup of text, no outside address."""
        source = (HERE / "index.html").read_text(encoding="utf-8")
        self.assertEqual(re.findall(r"<\w[^<>]*\son\w+\s*=", source), [])
        sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
        self.assertEqual(re.findall(sinks, source), [])
        self.assertEqual(re.findall(r"(?:src|href)=[\"'](?!data:)", source), [])


# -- Markdown


# Shows each piece of a text as it comes; returns the elements that were made, without those that
# only wrap others (`div` and so on), and without attributes but `href` and `start`.
OUTLINE = """(...pieces) => {
    const KEPT = /^(h[1-6]|p|ul|ol|li|blockquote|pre|code|table|tr|th|td|a|strong|em|del|br|hr)$/;
    const root = document.createElement("div");
    const show = markdownInto(root);
    let source = "";
    for (const piece of pieces) show(source += piece);
    return outline(root);

    function outline(node) {
        if (node.nodeType === Node.TEXT_NODE) return node.data.replaceAll("<", "&lt;");
        const inner = [...node.childNodes].map(outline).join("");
        const name = node.localName;
        if (name === "button") return "";
        if (!KEPT.test(name)) return inner;
        if (/^[bh]r$/.test(name)) return `<${name}>`;
        const target = node.hasAttribute("href") ? ` href="${node.getAttribute("href")}"` : "";
        const start = node.hasAttribute("start") ? ` start="${node.start}"` : "";
        return `<${name}${target}${start}>${inner}</${name}>`;
    }
}"""


@dataclass
class Row:
    """A text in Markdown, and the elements that a person expects."""

    source: str
    html: str


HEADINGS = [
    Row("# One", "<h1>One</h1>"),
    Row("### Three ###", "<h3>Three</h3>"),
    Row("## C#", "<h2>C#</h2>"),
    Row("###### **Six**", "<h6><strong>Six</strong></h6>"),
    Row("####### Seven", "<p>####### Seven</p>"),
    Row("#hashtag", "<p>#hashtag</p>"),
]
PARAGRAPHS = [
    Row("one\n\ntwo", "<p>one</p><p>two</p>"),
    Row("one\ntwo", "<p>one<br>two</p>"),
    Row("one  \ntwo", "<p>one<br>two</p>"),
    Row("one\\\ntwo", "<p>one<br>two</p>"),
    Row("one\r\ntwo\r\n\r\nthree", "<p>one<br>two</p><p>three</p>"),
    Row("one\n\n---\n\ntwo", "<p>one</p><hr><p>two</p>"),
    Row("***\n- - -\n___", "<hr><hr><hr>"),
    Row(r"\*no\* \# c:\dir \_", r"<p>*no* # c:\dir _</p>"),
]
EMPHASIS = [
    Row("*a* **b** ~~c~~", "<p><em>a</em> <strong>b</strong> <del>c</del></p>"),
    Row("_a_ __b__", "<p><em>a</em> <strong>b</strong></p>"),
    Row("***a***", "<p><em><strong>a</strong></em></p>"),
    Row("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    Row(
        "**this is *very important***",
        "<p><strong>this is <em>very important</em></strong></p>",
    ),
    Row(
        "***Warning:* do not** do it",
        "<p><strong><em>Warning:</em> do not</strong> do it</p>",
    ),
    Row("**one\ntwo**", "<p><strong>one<br>two</strong></p>"),
    Row("un*believ*able", "<p>un<em>believ</em>able</p>"),
    Row("_snake_case_", "<p><em>snake_case</em></p>"),
    Row("(**a**)", "<p>(<strong>a</strong>)</p>"),
    Row("**`a`**", "<p><strong><code>a</code></strong></p>"),
    Row(
        "**[a](https://a.example)**",
        '<p><strong><a href="https://a.example">a</a></strong></p>',
    ),
]
NO_EMPHASIS = [
    Row("**open *too", "<p>**open *too</p>"),
    Row("a * b * c ** d", "<p>a * b * c ** d</p>"),
    Row("snake_case_name", "<p>snake_case_name</p>"),
    Row("имя_переменной_здесь", "<p>имя_переменной_здесь</p>"),
    Row(
        "f(*args, **kwargs) and g(**kwargs)",
        "<p>f(*args, **kwargs) and g(**kwargs)</p>",
    ),
    Row("`**a**` **b", "<p><code>**a**</code> **b</p>"),
]
# A later star once destroyed what was bold before it.
STRAY_STARS = [
    Row("**Pro**: $20* per month", "<p><strong>Pro</strong>: $20* per month</p>"),
    Row("**Area** = 2*(3+4)", "<p><strong>Area</strong> = 2*(3+4)</p>"),
    Row(
        "**SQL**: COUNT(*) counts rows",
        "<p><strong>SQL</strong>: COUNT(*) counts rows</p>",
    ),
    Row("**Name** (*название*)", "<p><strong>Name</strong> (<em>название</em>)</p>"),
    Row(
        "The **price** excludes tax*.",
        "<p>The <strong>price</strong> excludes tax*.</p>",
    ),
]
CHINESE_EMPHASIS = [
    Row("**重点**，*强调*。", "<p><strong>重点</strong>，<em>强调</em>。</p>"),
    Row(
        "**复现：**10 轮对话，**建议：**页",
        "<p><strong>复现：</strong>10 轮对话，<strong>建议：</strong>页</p>",
    ),
    Row("这是**“重要”**的", "<p>这是<strong>“重要”</strong>的</p>"),
]
DOLLARS = [
    Row(
        "Set **$HOME** and **$PATH** before",
        "<p>Set <strong>$HOME</strong> and <strong>$PATH</strong> before</p>",
    ),
    Row("**5$** and **6$**", "<p><strong>5$</strong> and <strong>6$</strong></p>"),
    Row("$5 and *$6*", "<p>$5 and <em>$6</em></p>"),
]
FORMULAS = [
    Row(r"\(a_1*b_2*c\)", r"<p>\(a_1*b_2*c\)</p>"),
    Row("$x_1*y*z_2$", "<p>$x_1*y*z_2$</p>"),
    Row("$$a*b*c$$", "<p>$$a*b*c$$</p>"),
    Row("\\[\nx = a\n+ b\n\\]", r"<p>\[<br>x = a<br>+ b<br>\]</p>"),
    Row(r"array\[0\] and f\(x\)", r"<p>array[0] and f\(x\)</p>"),
]
LISTS = [
    Row("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
    Row("* a\n* b", "<ul><li>a</li><li>b</li></ul>"),
    Row("1. a\n2. b", "<ol><li>a</li><li>b</li></ol>"),
    Row("7. a\n8. b", '<ol start="7"><li>a</li><li>b</li></ol>'),
    Row(
        "- a\n  - b\n    - c\n- d",
        "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>",
    ),
    Row("1. a\n   - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    Row("- a\nb", "<ul><li>a<br>b</li></ul>"),
    Row("- a\n\n\nb", "<ul><li>a</li></ul><p>b</p>"),
    Row("In the year\n2024. it was", "<p>In the year<br>2024. it was</p>"),
    Row("- **a**: `b`", "<ul><li><strong>a</strong>: <code>b</code></li></ul>"),
    Row("- [ ] a\n- [x] b\n- [y] c", "<ul><li>☐ a</li><li>☑ b</li><li>[y] c</li></ul>"),
    Row(
        "- a\n  ```\n   b\n  ```\n- c",
        "<ul><li>a<pre><code> b</code></pre></li><li>c</li></ul>",
    ),
]
TABBED_LISTS = [
    Row(
        "- a\n\t- b\n\t\t- c",
        "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li></ul>",
    ),
    Row("1. a\n\t- b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    Row("-\ta\n-\tb", "<ul><li>a</li><li>b</li></ul>"),
    Row(
        "1.\ta\n\t```\n\tif x:\n\t\ty\n\t```",
        "<ol><li>a<pre><code>if x:\n\ty</code></pre></li></ol>",
    ),
]
QUOTES = [
    Row("> a\n> b", "<blockquote><p>a<br>b</p></blockquote>"),
    Row("> a\n>\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
    Row("> > a", "<blockquote><blockquote><p>a</p></blockquote></blockquote>"),
    Row("> a\n\nb", "<blockquote><p>a</p></blockquote><p>b</p>"),
    Row("> ```\n> a\n> ```", "<blockquote><pre><code>a</code></pre></blockquote>"),
]
TABLES = [
    Row(
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>",
    ),
    Row(
        "a | b\n--- | ---\n1 | 2\n\nend",
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table><p>end</p>",
    ),
    Row(
        "|a|b|\n|-|-|\n|`x\\|y`|",
        "<table><tr><th>a</th><th>b</th></tr><tr><td><code>x|y</code></td><td></td></tr></table>",
    ),
    Row(
        "|a|\n|-|\n|one<br>two &lt; **three**|",
        "<table><tr><th>a</th></tr>"
        "<tr><td>one<br>two &lt; <strong>three</strong></td></tr></table>",
    ),
    Row("a | b, and nothing below", "<p>a | b, and nothing below</p>"),
]
CODE = [
    Row("`a` and ``b`c``", "<p><code>a</code> and <code>b`c</code></p>"),
    Row("`open", "<p>`open</p>"),
    Row("`&lt;<b>`", "<p><code>&amp;lt;&lt;b></code></p>".replace("&amp;", "&")),
    Row("```\na\n\n  *b*\n```\nc", "<pre><code>a\n\n  *b*</code></pre><p>c</p>"),
    Row("```py\nx\n```", "py<pre><code>x</code></pre>"),
    Row("~~~\n```\n~~~", "<pre><code>```</code></pre>"),
    Row("````\n```\n````", "<pre><code>```</code></pre>"),
    Row("```\nopen", "<pre><code>open</code></pre>"),
]
LINKS = [
    Row(
        "[a *b*](https://a.example/c?d#e)",
        '<p><a href="https://a.example/c?d#e">a <em>b</em></a></p>',
    ),
    Row('[a](https://a.example "title")', '<p><a href="https://a.example">a</a></p>'),
    Row("[a](https://a.example (title))", '<p><a href="https://a.example">a</a></p>'),
    Row("[a](<https://a.example/>)", '<p><a href="https://a.example/">a</a></p>'),
    Row(
        "[a](https://a.example/x_(y_(z)))",
        '<p><a href="https://a.example/x_(y_(z))">a</a></p>',
    ),
    Row(r"[a](https://a.example/b\_c)", '<p><a href="https://a.example/b_c">a</a></p>'),
    Row(
        "[a](https://a.example/?b&amp;c)",
        '<p><a href="https://a.example/?b&c">a</a></p>',
    ),
    Row("[a](mailto:b@c.example)", '<p><a href="mailto:b@c.example">a</a></p>'),
    Row(
        "![a](https://a.example/b.png)",
        '<p><a href="https://a.example/b.png">a</a></p>',
    ),
]
BARE_LINKS = [
    Row(
        "<https://a.example>",
        '<p><a href="https://a.example">https://a.example</a></p>',
    ),
    Row("<me@a.example>", '<p><a href="mailto:me@a.example">me@a.example</a></p>'),
    Row(
        "See https://a.example/b.",
        '<p>See <a href="https://a.example/b">https://a.example/b</a>.</p>',
    ),
    Row(
        "(http://a.example)", '<p>(<a href="http://a.example">http://a.example</a>)</p>'
    ),
    Row(
        "见https://a.example。好",
        '<p>见<a href="https://a.example">https://a.example</a>。好</p>',
    ),
    Row(
        "见 https://a.example/b中文",
        '<p>见 <a href="https://a.example/b">https://a.example/b</a>中文</p>',
    ),
]
NO_LINKS = [
    Row("[a](/b)", "<p>[a](/b)</p>"),
    Row("[a](//evil.example)", "<p>[a](//evil.example)</p>"),
    Row("[a](javascript:alert(1))", "<p>[a](javascript:alert(1))</p>"),
    Row("[a](data:text/html,b)", "<p>[a](data:text/html,b)</p>"),
    Row("[a](ftp://a.example)", "<p>[a](ftp://a.example)</p>"),
    Row("[a](https://evil.com%2f.example)", "<p>[a](https://evil.com%2f.example)</p>"),
    Row("![a](data:image/png;base64,b)", "<p>![a](data:image/png;base64,b)</p>"),
]
RAW_HTML = [
    Row("<b onclick=x>hi</b>", "<p>&lt;b onclick=x>hi&lt;/b></p>"),
    Row("a<br>b<br/>c", "<p>a<br>b<br>c</p>"),
    Row("<!-- a -->", "<p>&lt;!-- a --></p>"),
    Row("&lt;div&gt; &amp; &#39;a&#x27; b&nbsp;c", "<p>&lt;div> & 'a' b\u00a0c</p>"),
    Row("AT&T &unknown; &", "<p>AT&T &unknown; &</p>"),
]
ALL_ROWS = [
    *HEADINGS, *PARAGRAPHS, *EMPHASIS, *NO_EMPHASIS, *STRAY_STARS, *CHINESE_EMPHASIS, *DOLLARS,
    *FORMULAS, *LISTS, *TABBED_LISTS, *QUOTES, *TABLES, *CODE, *LINKS, *BARE_LINKS, *NO_LINKS,
    *RAW_HTML,
]  # fmt: skip
SAMPLE = "\n\n".join(row.source for row in ALL_ROWS if "open" not in row.source)


class Markdown(PageCase):
    maxDiff = None

    async def check(self, rows: list[Row]) -> None:
        page = await self.open()
        for row in rows:
            with self.subTest(row.source):
                self.assertEqual(
                    await page.call_function(OUTLINE, row.source), row.html
                )

    async def test_headings(self) -> None:
        """One to six # and a blank begin a heading."""
        await self.check(HEADINGS)

    async def test_paragraphs(self) -> None:
        """A single newline breaks the line, a blank line ends the paragraph."""
        await self.check(PARAGRAPHS)

    async def test_emphasis(self) -> None:
        """Emphasis, strong emphasis and strikethrough may be nested and stand inside words."""
        await self.check(EMPHASIS)

    async def test_no_emphasis(self) -> None:
        """Stars and underscores that emphasise nothing stay as they are."""
        await self.check(NO_EMPHASIS)

    async def test_stray_stars(self) -> None:
        """A stray star leaves the emphasis before it alone."""
        await self.check(STRAY_STARS)

    async def test_chinese_emphasis(self) -> None:
        """Beside Chinese text, which has no blanks, ** works as people mean it."""
        await self.check(CHINESE_EMPHASIS)

    async def test_dollars(self) -> None:
        """A $ that opens no formula swallows nothing."""
        await self.check(DOLLARS)

    async def test_formulas(self) -> None:
        """Formulas stay as they were written."""
        await self.check(FORMULAS)

    async def test_lists(self) -> None:
        """Lists nest, keep their start number, and hold tasks and code."""
        await self.check(LISTS)

    async def test_tabbed_lists(self) -> None:
        """Lists indented by tabs nest as columns say, and keep their code's indentation."""
        await self.check(TABBED_LISTS)

    async def test_quotes(self) -> None:
        """A quote holds any blocks."""
        await self.check(QUOTES)

    async def test_tables(self) -> None:
        """A table has as many columns as its head; its cells hold inline Markdown."""
        await self.check(TABLES)

    async def test_code(self) -> None:
        """Code stands as it was written."""
        await self.check(CODE)

    async def test_links(self) -> None:
        """A link's target may hold escapes, entities and brackets, and have a title."""
        await self.check(LINKS)

    async def test_bare_links(self) -> None:
        """A bare address is a link, without the punctuation and the Chinese text after it."""
        await self.check(BARE_LINKS)

    async def test_no_links(self) -> None:
        """What leads nowhere, or to a script, stays text."""
        await self.check(NO_LINKS)

    async def test_raw_html(self) -> None:
        """HTML shows as text, but a <br> is a line break, and entities are read."""
        await self.check(RAW_HTML)

    async def test_code_in_a_link_target(self) -> None:
        """Code in a link's target leaves no odd character behind."""
        page = await self.open()
        outline = await page.call_function(
            OUTLINE, "[a](https://a.example/`b`) and `c`"
        )
        self.assertNotRegex(outline, r"[\0\ufffd]|href=\"[^\"]*<")
        self.assertIn("<code>c</code>", outline)

    async def test_alignment(self) -> None:
        """A table's columns are aligned as its rule says."""
        page = await self.open(says("|a|b|c|\n|:-|:-:|-:|\n|1|2|3|"))
        await page.ask()
        aligned = """[...document.querySelectorAll("article td")].map((cell) =>
            getComputedStyle(cell).textAlign)"""
        _, center, right = await page.run(aligned)
        self.assertEqual((center, right), ("center", "right"))

    async def test_an_image_is_not_loaded(self) -> None:
        """An image shows as a link, and is never loaded: that would tell who reads it."""
        page = await self.open(says("![a](http://127.0.0.1:1/b.png)"))
        await page.ask()
        await page.find("link", "a")
        self.assertFalse([url for url in page.urls_requested() if "b.png" in url])

    async def test_colours(self) -> None:
        """Code is coloured by its comments, strings, numbers and keywords, without a node more."""
        code = 'def f(x):  # why\n    return "a" + 12'
        page = await self.open(says(f"```py\n{code}\n```"))
        await page.ask()
        coloured = """[...CSS.highlights.values()].map((ranges) => [...ranges].map((range) =>
            range.startContainer.data.slice(range.startOffset, range.endOffset)).join(" "))"""
        self.assertCountEqual(
            await page.run(coloured), ["def return", "# why", '"a"', "12"]
        )
        nodes = "document.querySelector('article pre code').childNodes.length"
        self.assertEqual(await page.run(nodes), 1)

    async def test_colours_go_with_their_code(self) -> None:
        """The colours of code that has gone are forgotten."""
        page = await self.open(says("```py\nreturn 1\n```"))
        await page.ask()
        await page.click("New chat")
        self.answer_by(says("```\nnone\n```"))
        await page.ask()
        sizes = "[...CSS.highlights.values()].map((ranges) => ranges.size)"
        self.assertEqual(set(await page.run(sizes)), {0})

    async def test_no_colours(self) -> None:
        """A browser that cannot colour ranges shows code plain."""
        page = await self.open(says("```py\nreturn 1\n```"))
        await page.run("delete window.Highlight")
        await page.ask()
        self.assertIn("return 1", await page.text_of_answer())
        self.assertEqual(await page.status(), "Answer complete")


# -- Markdown that is still coming


# Shows a text in each of these ways of cutting it; returns those whose DOM differs from the whole.
CUT_TEXTS = """(text, listsOfCuts) => {
    function render(ends) {
        const root = document.createElement("div");
        const show = markdownInto(root);
        for (const end of [...ends, text.length]) show(text.slice(0, end));
        return root.innerHTML;
    }
    const whole = render([]);
    return listsOfCuts.filter((cuts) => render(cuts) !== whole);
}"""
# Shows a text a character at a time; returns how many blocks were finished, and how many stayed.
KEPT_NODES = """(text) => {
    const root = document.createElement("div");
    const show = markdownInto(root);
    const finished = new Set();
    for (let end = 1; end <= text.length; end += 1) {
        show(text.slice(0, end));
        if (!text.slice(0, end).endsWith("\\n")) continue;
        for (const node of [...root.childNodes].slice(0, -1)) finished.add(node);
    }
    const kept = [...finished].filter((node) => node.parentNode === root);
    return [finished.size, kept.length];
}"""
# Each is repeated to 50,000 characters, and invites a parser to look back again and again.
HOSTILE = [
    "*", "**a", "*a_", "[", "![", "](", "[a](b", '[](a "', "`", "`a``", "<https://", "> ", "- a ",
    "|", "~~", "\\", "http://", "_https:///", "(http://a", "\n> ", "\n- ", "```\n", "\n1. ",
    "\n" + " " * 40 + "- a", "\n|a|\n|-|", "*a **b ", "a**_", " ", "\t", "\n\n", "-", "[http://b ",
    "&", "&amp", "$a", "$$", "\\(", "\\[\n", "<br", "<a@", "***a", "[a](<", "[a](https://a.example/(",
]  # fmt: skip


class Streaming(PageCase):
    async def test_one_character_at_a_time(self) -> None:
        """A text that comes a character at a time makes the same DOM as the whole."""
        page = await self.open()
        for row in ALL_ROWS:
            with self.subTest(row.source):
                cuts = [list(range(1, len(row.source)))]
                self.assertEqual(
                    await page.call_function(CUT_TEXTS, row.source, cuts), []
                )

    async def test_any_pieces(self) -> None:
        """A long text makes the same DOM whatever the pieces in which it comes."""
        page = await self.open()
        chance = random.Random(3)
        positions = range(len(SAMPLE))
        cuts = [
            sorted(chance.sample(positions, count)) for count in (1, 5, 50, 500) * 5
        ]
        self.assertEqual(await page.call_function(CUT_TEXTS, SAMPLE, cuts), [])

    async def test_finished_blocks_keep_their_nodes(self) -> None:
        """A finished block keeps its node while the rest comes."""
        page = await self.open()
        finished, kept = await page.call_function(KEPT_NODES, SAMPLE)
        self.assertGreater(finished, 50)
        self.assertEqual(kept, finished)

    async def test_a_selection_stays(self) -> None:
        """What a reader has selected stays selected while the answer goes on."""
        steps = Steps(text("Select me\n\nand"), text(" more\n\n" * 50), FINISH + DONE)
        page = await self.open(steps)
        await page.say("Hello")
        await page.wait_for_text("Select me")
        await page.run(
            "getSelection().selectAllChildren(document.querySelector('article p'))"
        )
        selected = await page.run("getSelection().toString()")
        self.assertEqual(selected.strip(), "Select me")
        steps.next()
        steps.next()
        await page.wait_for_end()
        self.assertEqual(await page.run("getSelection().toString()"), selected)

    async def test_hostile_texts(self) -> None:
        """No text takes long or overflows the stack, however its marks are nested or left open."""
        page = await self.open()
        for unit in HOSTILE:
            with self.subTest(unit):
                text = (unit * 50_000)[:50_000]
                # It is the limit of a DevTools command that makes this fail, PATIENCE seconds.
                length = await page.run(
                    f"(({OUTLINE})({json.dumps(text)}, 'x')).length"
                )
                self.assertGreater(length, 0)

    async def work(self, page: Page, text: str, size: int) -> int:
        """How many blocks of the page's code run while this text comes in pieces of this size."""
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        await page.devtools.call("Profiler.enable")
        await page.devtools.call(
            "Profiler.startPreciseCoverage", callCount=True, detailed=True
        )
        await page.call_function(
            "(...pieces) => { (" + OUTLINE + ")(...pieces); }", *pieces
        )
        coverage = await page.devtools.call("Profiler.takePreciseCoverage")
        await page.devtools.call("Profiler.disable")
        return sum(
            block["count"]
            for script in coverage["result"]
            for function in script["functions"]
            for block in function["ranges"]
        )

    async def check_linear(self, unit: str, start: str = "") -> None:
        """Twice the text is about twice the work: four times would be quadratic."""
        page = await self.open()
        once = await self.work(page, start + unit * 100, 50)
        twice = await self.work(page, start + unit * 200, 50)
        self.assertLess(twice, 3 * once)

    async def test_cost_of_paragraphs(self) -> None:
        """The work for a paragraph does not grow with what stands above it."""
        await self.check_linear(
            "Some *words* in a `paragraph`, and [a link](https://a.example).\n\n"
        )

    async def test_cost_of_lists(self) -> None:
        """The work for an item does not grow with what stands above it."""
        await self.check_linear("- an item with **bold**\n")

    async def test_cost_of_code(self) -> None:
        """The work for a line of code does not grow with what stands above it."""
        await self.check_linear("x = 1  # why\n", start="```py\n")

    async def test_cost_of_code_blocks(self) -> None:
        """The work for a code block does not grow with the code blocks above it."""
        await self.check_linear("```py\nreturn 'a' + 1  # why\n```\n\n")

    async def test_a_long_paragraph_is_there_once(self) -> None:
        """After many blocks, a paragraph of 25,000 characters is shown once."""
        words = ["word " * 100] * 50
        page = await self.open(streams("block\n\n" * 98, *words))
        await page.ask()
        answer = await page.text_of_answer()
        self.assertEqual(answer.count("word"), 5000)

    async def test_a_burst(self) -> None:
        """600 KB in one event come in, in steps, and the page can be used."""
        page = await self.open(says("Some words in a paragraph.\n\n" * 21_000))
        await page.run(
            """{
                window.steps = 0;
                const observer = new MutationObserver(() => { window.steps += 1; });
                const log = document.querySelector("[role=log]");
                observer.observe(log, { childList: true, subtree: true });
            }"""
        )
        await page.ask()
        self.assertEqual(
            await page.run("document.querySelectorAll('article p').length"), 21_000
        )
        self.assertGreater(await page.run("steps"), 5)
        await page.click("New chat")
        self.answer_by(says("Good."))
        await page.ask("Two")
        await page.wait_for_text("Good.")


# -- The parser of server-sent events


# Reads a body, cut in two at every byte; returns each different list of payloads.
READ_BODY = """async (text) => {
    const bytes = new TextEncoder().encode(text);
    const found = new Set();
    for (let cut = 0; cut <= bytes.length; cut += 1) {
        const pieces = [bytes.slice(0, cut), new Uint8Array(), bytes.slice(cut)];
        const body = new ReadableStream({
            pull(controller) {
                if (pieces.length) controller.enqueue(pieces.shift());
                else controller.close();
            },
        });
        const payloads = [];
        for await (const { data } of sseLines(body)) {
            if (data !== null) payloads.push(data);
        }
        found.add(JSON.stringify(payloads));
    }
    return [...found].map(JSON.parse);
}"""


@dataclass
class Body:
    name: str
    text: str
    payloads: list[str]


BODIES = [
    Body("LF", "data: a\n\ndata: b\n\n", ["a", "b"]),
    Body("CRLF", "data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
    Body("CR", "data: a\r\rdata: b\r\r", ["a", "b"]),
    Body("a byte order mark", "\ufeffdata: a\n\n", ["a"]),
    Body("no blank after the colon", "data:a\n\ndata:  b\n\n", ["a", " b"]),
    Body("several data lines", "data: a\ndata: b\n\n", ["a\nb"]),
    Body(
        "comments and other fields",
        ": c\nid: 7\nevent: e\ndata: a\nretry: 1\n\n",
        ["a"],
    ),
    Body("no data", "data\n\ndata:\n\nid: 7\n\n", []),
    Body("no blank line at the end", "data: a\n\ndata: b\n", ["a", "b"]),
    Body("no line end at the end", "data: a\n\ndata: b", ["a", "b"]),
    Body("characters of several bytes", "data: é😀\n\n", ["é😀"]),
    Body(
        "line ends of other standards",
        "data: a\u2028b\u2029c\u0085d\n\n",
        ["a\u2028b\u2029c\u0085d"],
    ),
]


class ServerSentEvents(PageCase):
    async def test_framings(self) -> None:
        """`sseLines` finds the same payloads wherever the bytes are cut."""
        page = await self.open()
        for body in BODIES:
            with self.subTest(body.name):
                found = await page.call_function(READ_BODY, body.text)
                self.assertEqual(found, [body.payloads])

    async def test_one_huge_event(self) -> None:
        """An event in many small pieces is read in time that grows with its length."""
        page = await self.open()
        # Seconds of the page's own thread, whatever else the machine does.
        await page.devtools.call("Performance.enable", timeDomain="threadTicks")

        async def seconds(pieces: int) -> float:
            before = await self.script_seconds(page)
            await page.call_function(READ_PIECES, pieces)
            return await self.script_seconds(page) - before

        await seconds(500)
        short = min([await seconds(1000) for _ in range(3)])
        long = min([await seconds(8000) for _ in range(3)])
        self.assertLess(long, 24 * short)

    async def script_seconds(self, page: Page) -> float:
        answer = await page.devtools.call("Performance.getMetrics")
        metrics = {metric["name"]: metric["value"] for metric in answer["metrics"]}
        return float(metrics["TaskDuration"])


# Reads one event that comes in pieces of 100 bytes.
READ_PIECES = """async (count) => {
    let left = count;
    const piece = new TextEncoder().encode("x".repeat(100));
    const body = new ReadableStream({
        start(controller) { controller.enqueue(new TextEncoder().encode("data: ")); },
        pull(controller) {
            left -= 1;
            if (left >= 0) controller.enqueue(piece);
            else controller.close();
        },
    });
    for await (const { data } of sseLines(body)) {
        if (data !== null && data.length !== 100 * count) throw new Error("lost bytes");
    }
}"""


if __name__ == "__main__":
    unittest.main()
