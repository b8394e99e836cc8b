"""The transport against a server that sends what it is told to, byte for byte."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest

from services.grader.plain_http import PlainTransport

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
BREATH_S = 0.05


class Server:
    """Answers the requests of each connection with the next of its answers; None: not at all."""

    def __init__(self, *answers: bytes | None) -> None:
        self.answers, self.requests = list(answers), []
        self.num_connections = self.num_open = self.most_open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections, self.num_open = self.num_connections + 1, self.num_open + 1
        self.most_open = max(self.most_open, self.num_open)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:")
                self.requests.append(head + await reader.readexactly(length))
                answer = self.answers.pop(0)
                if answer is None:
                    continue
                await asyncio.sleep(BREATH_S)
                writer.write(answer)
                if b"close" in answer or not answer:
                    break
        self.num_open -= 1
        writer.close()


@contextlib.asynccontextmanager
async def talking(server: Server, *, max_connections: int = 8) -> AsyncIterator[httpx.AsyncClient]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    transport = PlainTransport(max_connections=max_connections)
    async with listening, httpx.AsyncClient(base_url=url, transport=transport) as client:
        yield client
        await transport.aclose()
        while server.num_open:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nh\r\n1\r\ni\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhi",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    ],
)
async def test_an_answer_is_read_whole_however_its_end_is_marked(answer: bytes) -> None:
    server = Server(answer)
    async with talking(server) as client:
        found = await client.post("/v1/grade?x=1", content="caf\N{LATIN SMALL LETTER E WITH ACUTE}")
    assert (found.status_code, found.content) == (200, b"hi")
    assert server.requests[0].startswith(b"POST /v1/grade?x=1 HTTP/1.1\r\n")
    assert server.requests[0].endswith("\r\n\r\ncaf\N{LATIN SMALL LETTER E WITH ACUTE}".encode())


async def test_status_and_headers_come_through() -> None:
    async with talking(Server(b"HTTP/1.1 503 Busy\r\nRetry-After: 2\r\ncontent-length: 0\r\n\r\n")) as client:
        found = await client.post("/", content="x")
    assert (found.status_code, found.headers["retry-after"]) == (503, "2")


async def test_a_connection_is_used_again_until_the_server_closes_it() -> None:
    server = Server(OK, OK, b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi", OK)
    async with talking(server) as client:
        for _ in range(3):
            await client.post("/", content="x")
        assert server.num_connections == 1
        await client.post("/", content="x")
    assert server.num_connections == 2


async def test_requests_beside_one_another_have_a_connection_each_up_to_the_limit() -> None:
    server = Server(*[OK] * 6)
    async with talking(server, max_connections=2) as client:
        found = await asyncio.gather(*(client.post("/", content="x") for _ in range(6)))
    assert [one.content for one in found] == [b"hi"] * 6
    assert server.most_open == server.num_connections == 2


async def test_an_answer_that_comes_too_late_is_not_taken_for_that_of_the_next_request() -> None:
    late = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlate"
    server = Server(late, OK)
    async with talking(server) as client:
        with pytest.raises(httpx.ReadTimeout, match="within"):
            await client.post("/", content="x", timeout=BREATH_S / 2)
        assert (await client.post("/", content="x")).content == b"hi"
    assert server.num_connections == 2


async def test_a_request_that_is_given_up_leaves_its_connection_to_nobody() -> None:
    server = Server(None, OK)
    async with talking(server) as client:
        asking = asyncio.create_task(client.post("/", content="x"))
        await asyncio.sleep(BREATH_S)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (await client.post("/", content="x")).content == b"hi"
    assert server.num_connections == 2


HALF = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 9\r\n\r\nhi"


@pytest.mark.parametrize("answer", [b"", HALF, b"?\r\n\r\n"])
async def test_half_an_answer_is_none(answer: bytes) -> None:
    async with talking(Server(answer)) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/", content="x")


async def test_where_nobody_listens_the_connection_is_what_fails() -> None:
    async with httpx.AsyncClient(transport=PlainTransport(max_connections=1)) as client:
        with pytest.raises(httpx.ConnectError):
            await client.post("http://127.0.0.1:1/", content="x")
