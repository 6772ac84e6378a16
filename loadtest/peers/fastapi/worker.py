"""The peer's worker: takes a job, publishes the prompt's words as tokens, one by one, and acknowledges."""

import asyncio
import json
import os

import aio_pika
import redis.asyncio as redis
import uvloop

AMQP_URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost:5672/%2f")
REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")


async def main():
    bus = redis.from_url(REDIS_URL)
    connection = await aio_pika.connect_robust(AMQP_URL)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=256)
    queue = await channel.declare_queue("peer.requests", durable=True)

    async def serve(message):
        job = json.loads(message.body)
        words = job["prompt"].split()
        for i in range(job["maxTokens"]):
            text = ("" if i == 0 else " ") + words[i % len(words)]
            await bus.publish(job["streamTo"], json.dumps({"id": job["id"], "text": text}))
        await bus.publish(job["streamTo"], json.dumps({"id": job["id"], "done": True}))
        await message.ack()

    await queue.consume(serve)
    await asyncio.Event().wait()


uvloop.run(main())
