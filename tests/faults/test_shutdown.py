"""How the server stops: by one signal or two, killed, or because its engine has broken down."""

import asyncio
import dataclasses
import gc
import json
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from server.__main__ import EXIT_BROKEN, EXIT_FORCED, Server, _serve
from server.app import create_app
from server.config import Settings
from server.core.engine.local import LocalEngine
from server.listener import bind
from server.loading import load_services
from server.metrics import Metrics
from tests.faults.conftest import BOUND_S, endless, events_of, held, until_inside
from tests.live.test_errors import assert_error
from tests.processes import Running, environment, started
from tests.servers import LiveServer, local_engine

NUM_STREAMS = 8
MODEL = "qwen-mini"


class Stream:
    """An endless reply that is being read."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()

    async def next_event(self) -> str:
        async for line in self._lines:
            if line.startswith("data: "):
                return line.removeprefix("data: ")
        raise EOFError

    async def rest(self) -> list[str]:
        """All events that are left, up to the end of the connection."""
        events = []
        async for line in self._lines:
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
        return events


@asynccontextmanager
async def streams(server: Running, max_tokens: int) -> AsyncIterator[list[Stream]]:
    """Eight replies of that length, each with some text behind it already."""
    body = {
        "model": f"{MODEL}:plain",
        "messages": [{"role": "user", "content": "never stop"}],
        "logit_bias": {"0": -100, "2": -100},
        "stream": True,
        "max_tokens": max_tokens,
    }
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=BOUND_S))
        url = f"{server.url}/v1/chat/completions"
        responses = [
            await stack.enter_async_context(client.stream("POST", url, json=body))
            for _ in range(NUM_STREAMS)
        ]
        read = [Stream(response) for response in responses]
        for stream in read:
            while not json.loads(await stream.next_event())["choices"][0]["delta"].get("content"):
                pass
        yield read


async def exit_code(server: Running) -> int:
    return await asyncio.to_thread(server.process.wait, BOUND_S)


async def until_closed(server: Running) -> None:
    """Waits until the server has taken notice of a signal."""
    async with asyncio.timeout(BOUND_S), httpx.AsyncClient() as client:
        while (await client.get(f"{server.url}/ready")).status_code != 503:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_sigterm_lets_streams_finish_and_nobody_new_in(tmp_path: Path) -> None:
    with started(environment(tmp_path), "--model", "mini", "--grace-period", "25") as server:
        async with streams(server, max_tokens=150) as running:
            server.process.send_signal(signal.SIGTERM)
            await until_closed(server)
            async with httpx.AsyncClient() as client:
                refused = await client.post(f"{server.url}/v1/classify", json={"input": "late"})
                assert_error(refused, 503, "server_error", None)
                assert int(refused.headers["retry-after"]) > 0
                # The engine still works.
                assert (await client.get(f"{server.url}/health")).status_code == 200
            for stream in running:
                *_, last, end = await stream.rest()
                assert json.loads(last)["choices"][0]["finish_reason"] == "length"
                assert end == "[DONE]"
        assert await exit_code(server) == 0
    assert_clean(server)


async def test_streams_that_outlast_the_grace_period_get_an_error(tmp_path: Path) -> None:
    with started(environment(tmp_path), "--model", "mini", "--grace-period", "0") as server:
        async with streams(server, max_tokens=1900) as running:
            server.process.send_signal(signal.SIGTERM)
            for stream in running:
                *_, error, end = await stream.rest()
                assert "shutting down" in json.loads(error)["error"]["message"]
                assert end == "[DONE]"
        assert await exit_code(server) == 0
    assert_clean(server)


async def test_after_a_kill_the_port_is_free_and_a_second_signal_ends_at_once(
    tmp_path: Path,
) -> None:
    env = environment(tmp_path)
    with started(env, "--model", "mini") as server:
        async with streams(server, max_tokens=1900) as running:
            server.process.kill()
            for stream in running:
                with pytest.raises(httpx.RemoteProtocolError):
                    await stream.rest()
    port = int(server.url.rsplit(":", 1)[1])
    with started(env, "--model", "mini", port=port) as again:
        async with streams(again, max_tokens=1900) as running:
            again.process.send_signal(signal.SIGTERM)
            await until_closed(again)
            again.process.send_signal(signal.SIGTERM)
            assert await exit_code(again) == EXIT_FORCED
            for stream in running:
                with pytest.raises(httpx.RemoteProtocolError):
                    await stream.rest()
    assert "Traceback" not in "".join(again.output)


@pytest.fixture
def breakable(
    tiny_checkpoint: Path, serve: Callable[[Settings], AbstractContextManager[LiveServer]]
) -> Iterator[LiveServer]:
    with serve(Settings(model=str(tiny_checkpoint), max_num_seqs=4)) as server:
        yield server


async def until_submitted(engine: LocalEngine, number: int) -> None:
    """Waits until so many sequences are the engine's, taken up or not."""

    def num_submitted() -> int:
        return engine.num_running + engine.num_waiting + engine._thread._commands.qsize()

    while num_submitted() != number:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def break_down(engine: LocalEngine) -> None:
    """From the next step on; whatever a sequence or a step does wrong is another matter."""

    def schedule() -> Any:
        raise ArithmeticError("broken on purpose")

    engine._scheduler.schedule = schedule  # type: ignore[method-assign]


async def test_a_breakdown_ends_every_request_and_is_told(
    client: httpx.AsyncClient, breakable: LiveServer
) -> None:
    url = f"{breakable.base_url}/chat/completions"
    async with asyncio.timeout(BOUND_S):
        with held(breakable.services):
            # More than are computed together: some only wait.
            asked = [
                asyncio.create_task(client.post(url, json=endless(breakable, stream=i % 2 == 0)))
                for i in range(8)
            ]
            await until_submitted(breakable.engine, 8)
            break_down(breakable.engine)
        for i, request in enumerate(asked):
            response = await request
            if i % 2:
                assert_error(response, 500, "server_error", None)
                assert response.headers["x-should-retry"] == "false"
            else:
                *_, error, end = events_of(response.text)
                assert json.loads(error)["error"]["type"] == "server_error"
                assert end == "[DONE]"
            assert "on purpose" not in response.text
        await until_inside(client, breakable, 0)
        health = await client.get(f"{breakable.url}/health")
        assert health.status_code == 503
        assert "ArithmeticError" in health.json()["reason"]
        assert (await client.get(f"{breakable.url}/ready")).status_code == 503
        late = await client.post(url, json=endless(breakable))
        assert_error(late, 503, "server_error", None)


async def test_a_breakdown_ends_the_process_with_a_code_of_its_own(
    client: httpx.AsyncClient, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(model=str(tiny_checkpoint), log_level="error")
    services = load_services(settings)
    monkeypatch.setattr("server.__main__.load_services", lambda settings: services)
    with bind("127.0.0.1", 0) as listener:
        listener.listen()  # early, so that no request is refused while the server starts
        host, port = listener.getsockname()
        serving = asyncio.create_task(asyncio.to_thread(_exit_code, settings, listener))
        url = f"http://{host}:{port}/v1/chat/completions"
        body = {"model": services.model_id, "messages": [{"role": "user", "content": "hi"}]}
        async with asyncio.timeout(BOUND_S):
            first = await client.post(url, json=body | {"max_tokens": 1})
            break_down(local_engine(services))
            assert first.status_code == 200
            assert (await client.post(url, json=body)).status_code in (500, 503)
            assert await serving == EXIT_BROKEN


async def test_a_model_that_fails_from_the_start_ends_the_process_in_the_same_way(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(model=str(tiny_checkpoint), log_level="error")
    services = load_services(settings)
    monkeypatch.setattr("server.__main__.load_services", lambda settings: services)
    monkeypatch.setattr(local_engine(services)._runner, "step", lambda chunks: 1 / 0)
    with bind("127.0.0.1", 0) as listener:
        async with asyncio.timeout(BOUND_S):
            assert await asyncio.to_thread(_exit_code, settings, listener) == EXIT_BROKEN
    await asyncio.to_thread(services.engine.close)


def _exit_code(settings: Settings, listener: socket.socket) -> object:
    with pytest.raises(SystemExit) as exit_:
        _serve(settings, listener)
    return exit_.value.code


def assert_clean(server: Running) -> None:
    output = "".join(server.output)
    assert "Application shutdown complete" in output
    assert "Traceback" not in output


# --- the start ------------------------------------------------------------------------


async def test_the_garbage_collector_ignores_what_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tiny: LiveServer
) -> None:
    """A collection over it would hold the event loop for a quarter of a second."""
    order: list[str] = []

    async def startup(self: uvicorn.Server, sockets: Any = None) -> None:
        order.append("started")

    monkeypatch.setattr(uvicorn.Server, "startup", startup)
    monkeypatch.setattr(gc, "collect", lambda: order.append("collected"))
    monkeypatch.setattr(gc, "freeze", lambda: order.append("frozen"))
    app = create_app(Settings(ui=False), dataclasses.replace(tiny.services, metrics=Metrics()))
    await Server(uvicorn.Config(app), app, tiny.engine, 1.0).startup()
    assert order == ["started", "collected", "frozen"]
