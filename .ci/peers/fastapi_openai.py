"""FastAPI with OpenAI's SDK: what most tutorials show."""
# mypy: ignore-errors

import json
import os

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI

# The SDK's own limit of connections would hold the streams back.
http_client = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=None)
client = AsyncOpenAI(api_key="any", http_client=http_client)
app = FastAPI()


async def relay(body):
    chunks = await client.chat.completions.create(
        model=body["model"], messages=body["messages"], stream=True
    )
    async for chunk in chunks:
        content = chunk.choices[0].delta.content
        if content:
            yield f"data: {json.dumps({'content': content})}\n\n"
    yield "data: [DONE]\n\n"


@app.post("/stream")
async def stream(request: Request):
    return StreamingResponse(
        relay(await request.json()), media_type="text/event-stream"
    )


uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False, log_level="error")
