"""Connecting and waiting: with a scripted command in place of a server."""

import asyncio
import contextlib
import time

import pytest
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

from services.contracts.config import ConfigError
from services.contracts.store import PatientRetry, connect, masked, refusal


async def _nothing(_: Exception) -> None:
    pass


async def test_a_lost_connection_is_tried_again_until_it_works() -> None:
    errors = [ConnectionError("gone"), BusyLoadingError("reading its file")]

    async def command() -> str:
        if errors:
            raise errors.pop()
        return "answer"

    assert await PatientRetry(5.0).call_with_retry(command, _nothing) == "answer"


async def test_patience_is_bounded_by_the_clock_even_when_retries_are_nested() -> None:
    async def command() -> str:
        raise ConnectionError("gone")

    async def connecting() -> str:
        return await PatientRetry(0.3).call_with_retry(command, _nothing)

    began = time.monotonic()
    with pytest.raises(ConnectionError, match="gone"):
        await PatientRetry(0.3).call_with_retry(connecting, _nothing)
    assert time.monotonic() - began < 1.0


async def test_a_wrong_password_is_not_tried_again() -> None:
    tries = []

    async def command() -> str:
        tries.append(1)
        raise AuthenticationError("wrong password")

    with pytest.raises(AuthenticationError):
        await PatientRetry(5.0).call_with_retry(command, _nothing)
    assert len(tries) == 1


async def test_a_cancellation_that_the_client_forgets_still_cancels() -> None:
    async def forgetful() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(5)
        return "answer"

    task = asyncio.create_task(PatientRetry(5.0).call_with_retry(forgetful, _nothing))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_forgotten_cancellation_cancels_though_the_command_is_refused() -> None:
    async def forgetful() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(5)
        raise ResponseError("BUSYGROUP there is one")

    task = asyncio.create_task(PatientRetry(5.0).call_with_retry(forgetful, _nothing))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "passing",
    [ResponseError("MISCONF Errors writing to the AOF file"), ReadOnlyError("a replica"), OutOfMemoryError("")],
)
async def test_a_server_that_refuses_to_write_for_now_is_waited_for(passing: ResponseError) -> None:
    errors = [passing]

    async def command() -> str:
        if errors:
            raise errors.pop()
        return "answer"

    assert await PatientRetry(5.0).call_with_retry(command, _nothing) == "answer"


@pytest.mark.parametrize("full", [ResponseError("MISCONF Errors writing to the AOF file"), OutOfMemoryError("")])
async def test_a_server_without_room_is_waited_for_until_there_is_some(
    full: ResponseError, caplog: pytest.LogCaptureFixture
) -> None:
    errors, said = [full] * 4, []  # the pauses between them are longer than the patience

    async def command() -> str:
        said.append(refusal())
        if errors:
            raise errors.pop()
        return "answer"

    assert await PatientRetry(0.1).call_with_retry(command, _nothing) == "answer"
    assert "Redis has no room left" in caplog.text
    assert [bool(one) for one in said] == [False, True, True, True, True]
    assert refusal() is None


async def test_one_that_may_not_be_written_to_is_given_up_after_a_while() -> None:
    async def command() -> str:
        raise ReadOnlyError("a replica")

    with pytest.raises(ReadOnlyError):
        await PatientRetry(0.1).call_with_retry(command, _nothing)


async def test_a_mistake_of_ours_is_not_tried_again() -> None:
    tries = []

    async def command() -> str:
        tries.append(1)
        raise ResponseError("WRONGTYPE")

    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await PatientRetry(5.0).call_with_retry(command, _nothing)
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("rediss://me:se%40cret@h:1/0?ssl_ca_certs=/etc/ca.pem", "rediss://me:***@h:1/0?ssl_ca_certs=/etc/ca.pem"),
        ("redis://h:1/0?password=secret", "redis://h:1/0?password=***"),
        ("rediss://h/0?ssl_ca_certs=/c.pem&ssl_password=secret", "rediss://h/0?ssl_ca_certs=/c.pem&ssl_password=***"),
    ],
)
def test_a_url_is_shown_without_its_passwords(url: str, shown: str) -> None:
    assert masked(url) == shown


async def test_cleaning_up_after_a_cancellation_may_use_the_client() -> None:
    cleaned = []

    async def command() -> str:
        await asyncio.sleep(0)
        return "released"

    async def service() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            cleaned.append(await PatientRetry(5.0).call_with_retry(command, _nothing))

    task = asyncio.create_task(service())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == ["released"]


async def test_no_server_is_one_line_that_names_the_url_and_hides_the_password() -> None:
    with pytest.raises(ConfigError) as caught:
        await connect("redis://user:secret@127.0.0.1:1/0", start_patience_s=0)
    message = str(caught.value)
    assert message.startswith("no Redis at redis://user:***@127.0.0.1:1/0: ")
    assert "secret" not in message
    assert "\n" not in message


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://localhost:port"])
async def test_a_malformed_url_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis\.url"):
        await connect(url)
