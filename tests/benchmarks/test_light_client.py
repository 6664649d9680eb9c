"""The client that reads bytes without parsing them."""

import dataclasses

import pytest

from benchmarks import light_client
from benchmarks.servers import Server
from tests.servers import LiveServer


def as_measured(live: LiveServer) -> Server:
    return Server("ours", live.model, live.base_url, process_id=0)


async def test_every_token_of_every_stream_is_a_chunk(live: LiveServer) -> None:
    assert await light_client.tokens_per_s(as_measured(live), range(3)) > 0


async def test_an_error_is_not_taken_for_a_stream(tiny: LiveServer) -> None:
    unknown = dataclasses.replace(as_measured(tiny), model="unknown")
    with pytest.raises(RuntimeError, match="does not exist"):
        await light_client.tokens_per_s(unknown, [0])
