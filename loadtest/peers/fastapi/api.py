"""The plain way to build it: FastAPI in front, aio-pika to a durable queue, redis-py pub/sub for the tokens.

One subscription per process, one asyncio queue per request; nothing is recovered, counted, cached or written to a
database. Kept as the peer that the fleet's own cost is measured against.
"""

import asyncio
import json
import os
import uuid
from contextlib import asynccontextmanager

import aio_pika
import redis.asyncio as redis
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

AMQP_URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost:5672/%2f")
REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
CHANNEL = f"peer.tokens.{uuid.uuid4()}"

waiting: dict[str, asyncio.Queue] = {}


class Options(BaseModel):
    maxTokens: int = 100


class Request(BaseModel):
    prompt: str
    options: Options = Options()


async def listen(pubsub):
    async for message in pubsub.listen():
        if message["type"] == "message":
            frame = json.loads(message["data"])
            if (queue := waiting.get(frame["id"])) is not None:
                queue.put_nowait(frame)


@asynccontextmanager
async def lifespan(app):
    connection = await aio_pika.connect_robust(AMQP_URL)
    channel = await connection.channel(publisher_confirms=True)
    await channel.declare_queue("peer.requests", durable=True)
    app.state.exchange = channel.default_exchange
    pubsub = redis.from_url(REDIS_URL).pubsub()
    await pubsub.subscribe(CHANNEL)
    task = asyncio.create_task(listen(pubsub))
    yield
    task.cancel()
    await connection.close()


app = FastAPI(lifespan=lifespan)


@app.post("/api/stream")
async def stream(request: Request):
    job_id = str(uuid.uuid4())
    queue = waiting[job_id] = asyncio.Queue()
    body = {"id": job_id, "prompt": request.prompt, "maxTokens": request.options.maxTokens, "streamTo": CHANNEL}
    message = aio_pika.Message(json.dumps(body).encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)

    async def events():
        try:
            await app.state.exchange.publish(message, routing_key="peer.requests")
            while True:
                frame = await queue.get()
                if frame.get("done"):
                    break
                yield f"data: {json.dumps({'token': frame['text']})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            del waiting[job_id]

    return StreamingResponse(events(), media_type="text/event-stream")
