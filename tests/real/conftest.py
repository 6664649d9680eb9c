"""A real Qwen, if `QWEN_REAL` names the folder of its checkpoint."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import Settings
from tests.servers import LiveServer, run_live


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="QWEN_REAL names no checkpoint folder of a real Qwen")
    for item in items:
        if "real" in item.keywords and not os.environ.get("QWEN_REAL"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """The folder of the real model."""
    return Path(os.environ["QWEN_REAL"])


@pytest.fixture(scope="session")
def real() -> Iterator[LiveServer]:
    """The real model, served with the default settings."""
    with run_live(Settings(model=os.environ["QWEN_REAL"])) as server:
        yield server
