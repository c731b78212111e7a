"""A bridge as a user would write it in an afternoon: Braze posts to it, it answers 200, and a few tasks post to Mixpanel.

Honest work: batches, compression off the loop, retries with backoff, backpressure. But what it has said 200 to is in
memory: a crash loses the queue. msgspec and uvloop are there to make it as fast as an afternoon allows.

    python naive.py LISTEN_PORT MIXPANEL_URL
"""

import asyncio
import random
import signal
import sys
import zlib
from typing import Any

import aiohttp
import msgspec
import uvloop
from aiohttp import web

from bench.peers.mapping import mixpanel_event

TOKEN = "0123456789abcdef0123456789abcdef"
BATCH = 2000
QUEUE = 100_000
SENDERS = 4
FLUSH_S = 0.2

decode = msgspec.json.Decoder().decode
encode_lines = msgspec.json.Encoder().encode_lines


def compress(events: list[dict[str, Any]]) -> bytes:
    """A batch as gzip NDJSON."""
    packer = zlib.compressobj(1, wbits=31)
    return packer.compress(encode_lines(events)) + packer.flush()


class Bridge:
    """The queue between the requests that came in and the batches that go out."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/import?strict=1"
        self.queue: asyncio.Queue[list[dict[str, Any]]] = asyncio.Queue(QUEUE // 100)
        self.senders: list[asyncio.Task[None]] = []

    async def run(self, app: web.Application) -> Any:
        """A clean-up context of aiohttp: the senders live as long as the server, and then empty the queue."""
        async with aiohttp.ClientSession(auth=aiohttp.BasicAuth(TOKEN)) as session:
            self.senders = [asyncio.create_task(self.send(session)) for _ in range(SENDERS)]
            yield
            await self.queue.join()
            for sender in self.senders:
                sender.cancel()
            await asyncio.gather(*self.senders, return_exceptions=True)

    async def receive(self, request: web.Request) -> web.Response:
        """One request of Braze's; waits while the queue is full."""
        try:
            events = decode(await request.read())["events"]
            mapped = [mixpanel_event(event, TOKEN) for event in events]
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            return web.json_response({"error": str(error)}, status=400)
        await self.queue.put(mapped)
        return web.json_response({"accepted": len(mapped)})

    async def send(self, session: aiohttp.ClientSession) -> None:
        """Gathers up to a batch or for a while; delivers it, however often that takes."""
        while True:
            groups = [await self.queue.get()]
            count = len(groups[0])
            try:
                async with asyncio.timeout(FLUSH_S):
                    while count < BATCH:
                        groups.append(await self.queue.get())
                        count += len(groups[-1])
            except TimeoutError:
                pass
            events = [event for group in groups for event in group]
            for start in range(0, len(events), BATCH):
                await self.deliver(session, await asyncio.to_thread(compress, events[start : start + BATCH]))
            for _ in groups:
                self.queue.task_done()

    async def deliver(self, session: aiohttp.ClientSession, body: bytes) -> None:
        """Posts until Mixpanel takes it or refuses it for good."""
        headers = {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"}
        wait_s = 0.5
        while True:
            try:
                async with session.post(self.url, data=body, headers=headers) as answer:
                    if answer.status == 200:
                        return
                    text = await answer.text()
                    if answer.status != 429 and answer.status < 500:
                        print(f"Mixpanel refused a batch: {answer.status} {text[:500]}", file=sys.stderr)
                        return
            except (aiohttp.ClientError, TimeoutError) as error:
                print(f"Mixpanel can't be reached: {error}", file=sys.stderr)
            await asyncio.sleep(wait_s * random.uniform(0.5, 1))
            wait_s = min(60, wait_s * 2)


async def main(port: int, url: str) -> None:
    """Serves until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    bridge = Bridge(url)
    app = web.Application(client_max_size=16 * 2**20)
    app.cleanup_ctx.append(bridge.run)
    app.router.add_post("/v1/currents", bridge.receive)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
