"""Starlette with httpx: line by line, each payload checked to be JSON."""
# mypy: ignore-errors

import json
import os

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

UPSTREAM = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
client = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=None)


async def relay(request_body):
    async with client.stream("POST", UPSTREAM, content=request_body) as upstream:
        async for line in upstream.aiter_lines():
            if not line.startswith("data: "):
                continue
            payload = line.removeprefix("data: ")
            if payload != "[DONE]":
                json.loads(payload)
            yield f"data: {payload}\n\n"


async def stream(request):
    return StreamingResponse(
        relay(await request.body()), media_type="text/event-stream"
    )


app = Starlette(routes=[Route("/stream", stream, methods=["POST"])])
uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False, log_level="error")
