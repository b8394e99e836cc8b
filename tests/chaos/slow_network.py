"""A TCP proxy that makes every byte late, as a far network does: latency, not bandwidth."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, latency_s: float) -> None:
    """Pass bytes on in order, each `latency_s` after it came, while more come in."""
    loop, late = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes]]()

    async def read() -> None:
        data = b"-"
        while data:
            data = await reader.read(65536)
            late.put_nowait((loop.time() + latency_s, data))

    reading = asyncio.create_task(read())
    try:
        while True:
            due, data = await late.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                return
            writer.write(data)
            await writer.drain()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        writer.close()


async def _serve(listener: socket.socket, target: tuple[str, int], latency_s: float, ended: asyncio.Event) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            back, forth = await asyncio.open_connection(*target)
            pumps = _pump(reader, forth, latency_s), _pump(back, writer, latency_s)
            await asyncio.gather(*pumps, return_exceptions=True)
        writer.close()

    server = await asyncio.start_server(connected, sock=listener)
    await ended.wait()
    server.close()


@contextlib.contextmanager
def far(host: str, port: int, *, latency_s: float, at: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[int]:
    """The server at host:port, from far away: at the port yielded. Each direction takes `latency_s`."""
    with socket.create_server(at) as listener:
        loop = asyncio.new_event_loop()
        ended = asyncio.Event()
        serving = loop.create_task(_serve(listener, (host, port), latency_s, ended))

        def run() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(serving)
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0.05))
            loop.close()

        thread = threading.Thread(target=run, name="far", daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            loop.call_soon_threadsafe(ended.set)
            thread.join(10)
