"""Checkpoints and live servers shared by the tests. Nothing needs a network."""

import functools
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import httpx2
import pytest
import torch
import uvicorn
from starlette.types import ASGIApp
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from server.app import create_app
from server.config import Settings
from server.core.engine.checkpoint import BUNDLED_FOLDER
from server.core.engine.local import LocalEngine
from server.core.text.tokenizer import ChatTokenizer
from server.loading import load_services
from server.services import Services

START_TIMEOUT_S = 60


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of judges for all servers of this run, also those in other processes."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def certificates_read_once() -> Iterator[None]:
    """Otherwise each new httpx client, and so each `httpx.post`, reads them for some 20 ms."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (httpx._transports.default, httpx2._transports.default):
            patch.setattr(module, "create_ssl_context", functools.cache(module.create_ssl_context))
        yield


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    """The bundled model's tokenizer."""
    return ChatTokenizer.from_folder(BUNDLED_FOLDER)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2 with the bundled tokenizer; it generates random text."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-random"
    save_random_model(folder, AutoTokenizer.from_pretrained(BUNDLED_FOLDER).vocab_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED_FOLDER / name, folder)
    return folder


def save_random_model(folder: Path, vocab_size: int) -> None:
    """A random two-layer Qwen2 with the bundled tokenizer's stop tokens, without a tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=[2, 0])
    model.save_pretrained(folder)


@dataclass(frozen=True)
class LiveServer:
    """A running server and its services."""

    url: str
    services: Services

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def model(self) -> str:
        return self.services.model_id

    @property
    def engine(self) -> LocalEngine:
        return local_engine(self.services)


def local_engine(services: Services) -> LocalEngine:
    """The engine of this process, for tests that read or replace its parts."""
    assert isinstance(services.engine, LocalEngine)
    return services.engine


@contextmanager
def run_live(settings: Settings) -> Iterator[LiveServer]:
    """Runs a server on a thread until the block ends."""
    services = load_services(settings)
    try:
        with run_app(create_app(settings, services)) as url:
            yield LiveServer(url, services)
    finally:
        services.engine.close()


@contextmanager
def run_app(app: ASGIApp) -> Iterator[str]:
    """Runs the app with uvicorn on a thread and a free port; yields its URL."""
    config = uvicorn.Config(
        app,
        port=0,
        log_level="warning",
        timeout_graceful_shutdown=2,
        ws="none",
        loop="asyncio",
        http="h11",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        waited = threading.Event()
        for _ in range(START_TIMEOUT_S * 100):
            if server.started or not thread.is_alive():
                break
            waited.wait(0.01)
        assert server.started, "uvicorn did not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def mini() -> Iterator[LiveServer]:
    """The bundled model, served."""
    with run_live(Settings(model="mini")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path) -> Iterator[LiveServer]:
    """The random model, served."""
    with run_live(Settings(model=str(tiny_checkpoint))) as server:
        yield server


@pytest.fixture(params=["mini", "tiny"])
def live(request: pytest.FixtureRequest) -> LiveServer:
    """Each of the two servers in turn, so that a test holds for both models."""
    server: LiveServer = request.getfixturevalue(request.param)
    return server


@pytest.fixture(scope="session")
def serve() -> Callable[[Settings], AbstractContextManager[LiveServer]]:
    """Starts a server with the given settings."""
    return run_live
