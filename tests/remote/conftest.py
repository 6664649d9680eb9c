"""Servers with an upstream: another server of ours, or a stand-in for vLLM."""

from collections.abc import Iterator

import pytest

from server.config import Settings
from server.loading import LOCAL_ENGINE_SETTINGS
from server.remote import engine
from tests.remote.standin import StandIn
from tests.servers import LiveServer, run_app, run_live


@pytest.fixture(scope="session", autouse=True)
def no_settings_of_an_engine() -> Iterator[None]:
    """Removes them from the environment: a server with an upstream would refuse them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in LOCAL_ENGINE_SETTINGS:
            patch.delenv(f"QWEN_{name.upper()}", raising=False)
        yield


@pytest.fixture(scope="module")
def front(mini: LiveServer) -> Iterator[LiveServer]:
    """A server whose upstream is the bundled model's server."""
    with run_live(Settings(model="mini", engine=mini.base_url, ui=False)) as server:
        yield server


@pytest.fixture(scope="module")
def vllm() -> Iterator[tuple[StandIn, LiveServer]]:
    """The stand-in, and a server whose upstream it is."""
    stand_in = StandIn()
    with (
        pytest.MonkeyPatch.context() as patch,
        run_app(stand_in.app) as url,
        run_live(Settings(model="mini", engine=url, ui=False)) as server,
    ):
        patch.setattr(engine, "WATCH_INTERVAL_S", 0.05)
        yield stand_in, server
