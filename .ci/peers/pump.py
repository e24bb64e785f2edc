"""The floor: bytes go through as they come, and nothing is parsed, checked or limited."""

import asyncio
import os

import aiohttp
from aiohttp import web

UPSTREAM = os.environ["OPENAI_BASE_URL"] + "/chat/completions"


async def main() -> None:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def pump(request: web.BaseRequest) -> web.StreamResponse:
            body = await request.read()
            headers = {
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",
            }
            async with session.post(UPSTREAM, data=body, headers=headers) as upstream:
                response = web.StreamResponse(
                    headers={"Content-Type": "text/event-stream"}
                )
                await response.prepare(request)
                async for data in upstream.content.iter_any():
                    await response.write(data)
                return response

        runner = web.ServerRunner(
            web.Server(pump, handler_cancellation=True, access_log=None)
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", int(os.environ["PORT"])).start()
        await asyncio.Event().wait()


asyncio.run(main())
