"""Plain HTTP/1.1 for `httpx` on asyncio's own streams: half the CPU time of the transport that httpx brings.

Beside a busy engine a verdict costs its asker more for the request than for all else: here that is one write and one
read. What is left out: TLS, proxies, HTTP/2, and answers in pieces (an answer is read whole).
"""

import asyncio

import h11
import httpx

READ_BYTES = 65_536


class _Connection:
    """One connection, kept between requests."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._protocol = h11.Connection(h11.CLIENT)

    @property
    def is_free(self) -> bool:
        """Whether another request may be sent: nothing is left of the last, and the server has not gone."""
        return self._protocol.our_state is h11.IDLE and not (self._reader.at_eof() or self._writer.is_closing())

    async def exchange(self, request: httpx.Request, body: bytes) -> httpx.Response:
        """Send a request and read its answer. Raises OSError, h11.RemoteProtocolError."""
        send = self._protocol.send
        head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        self._writer.write(b"".join(send(part) or b"" for part in (head, h11.Data(data=body), h11.EndOfMessage())))
        await self._writer.drain()
        response, content = h11.Response(status_code=200, headers=[]), bytearray()
        while not isinstance(event := await self._next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                content += event.data
        if self._protocol.our_state is h11.DONE and self._protocol.their_state is h11.DONE:
            self._protocol.start_next_cycle()
        headers = response.headers.raw_items()
        return httpx.Response(response.status_code, headers=headers, content=bytes(content), request=request)

    def close(self) -> None:
        """At once."""
        self._writer.transport.abort()

    async def _next_event(self) -> h11.Event:
        while True:
            event = self._protocol.next_event()
            if isinstance(event, h11.Event):
                return event
            self._protocol.receive_data(await self._reader.read(READ_BYTES))  # nothing at its end: h11 then raises


class PlainTransport(httpx.AsyncBaseTransport):
    """Give it to `httpx.AsyncClient`. Of its time-outs `read` counts, and for the whole exchange."""

    def __init__(self, *, max_connections: int) -> None:
        self._places = asyncio.Semaphore(max_connections)
        self._free: list[_Connection] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Part of httpx.AsyncBaseTransport. Raises httpx.TransportError."""
        body = await request.aread()
        timeout_s = request.extensions.get("timeout", {}).get("read")
        try:
            async with asyncio.timeout(timeout_s), self._places:
                connection = await self._connection(request)
                try:
                    return await connection.exchange(request, body)
                finally:
                    self._keep(connection)
        except TimeoutError as error:  # an OSError too
            raise httpx.ReadTimeout(f"no answer within {timeout_s:g} s", request=request) from error
        except OSError as error:
            raise httpx.ReadError(str(error), request=request) from error
        except h11.RemoteProtocolError as error:
            raise httpx.RemoteProtocolError(str(error), request=request) from error

    async def aclose(self) -> None:
        """Close the connections that are not in use."""
        while self._free:
            self._free.pop().close()

    async def _connection(self, request: httpx.Request) -> _Connection:
        """The one used last, if the server still has it; else a new one."""
        while self._free:
            connection = self._free.pop()
            if connection.is_free:
                return connection
            connection.close()
        try:
            return _Connection(*await asyncio.open_connection(request.url.host, request.url.port or 80))
        except TimeoutError:
            raise
        except OSError as error:
            raise httpx.ConnectError(str(error), request=request) from error

    def _keep(self, connection: _Connection) -> None:
        if connection.is_free:
            self._free.append(connection)
        else:
            connection.close()
