"""Fixtures shared by the tests. Nothing needs a network.

Fixtures import what loads torch themselves, so that unit tests start without it.
"""

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from server.config import Settings
    from server.core.text.tokenizer import ChatTokenizer
    from tests.servers import LiveServer


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of judges for all servers of this run, also those in other processes."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    if "PYTEST_XDIST_WORKER" in os.environ:  # shared by the workers
        folder = tmp_path_factory.getbasetemp().parent / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def certificates_read_once() -> Iterator[None]:
    """Otherwise each new httpx client, and so each `httpx.post`, reads them for some 20 ms."""
    with pytest.MonkeyPatch.context() as patch:
        for name in {"httpx", "httpx2"} & sys.modules.keys():
            module = sys.modules[name]._transports.default
            patch.setattr(module, "create_ssl_context", functools.cache(module.create_ssl_context))
        yield


@pytest.fixture(scope="session")
def tokenizer() -> "ChatTokenizer":
    """The bundled model's tokenizer, read without torch."""
    from transformers import Qwen2Tokenizer

    from server.core.engine.checkpoint import BUNDLED_FOLDER
    from server.core.text.tokenizer import ChatTokenizer

    return ChatTokenizer(Qwen2Tokenizer.from_pretrained(BUNDLED_FOLDER))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: "ChatTokenizer") -> Path:
    """A random two-layer Qwen2 with the bundled tokenizer; it generates random text."""
    from server.core.engine.checkpoint import BUNDLED_FOLDER
    from server.core.roles.task_files import BUILTIN_FOLDER
    from tests.servers import save_random_model, write_few_examples

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-random"
    save_random_model(folder, tokenizer.vocab_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED_FOLDER / name, folder)
    shutil.copy(BUILTIN_FOLDER / "tasks.toml", folder)
    write_few_examples(folder)
    return folder


@pytest.fixture(scope="session")
def mini() -> "Iterator[LiveServer]":
    """The bundled model, served."""
    from server.config import Settings
    from tests.servers import run_live

    with run_live(Settings(model="mini")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path) -> "Iterator[LiveServer]":
    """The random model, served."""
    from server.config import Settings
    from tests.servers import run_live

    with run_live(Settings(model=str(tiny_checkpoint))) as server:
        yield server


@pytest.fixture(params=["mini", "tiny"])
def live(request: pytest.FixtureRequest) -> "LiveServer":
    """Each of the two servers in turn, so that a test holds for both models."""
    server: LiveServer = request.getfixturevalue(request.param)
    return server


@pytest.fixture(scope="session")
def serve() -> "Callable[[Settings], AbstractContextManager[LiveServer]]":
    """Starts a server with the given settings."""
    from tests.servers import run_live

    return run_live
