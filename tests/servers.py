"""Checkpoints and live servers for tests. Imports torch, unlike `tests/conftest.py`."""

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
from starlette.types import ASGIApp
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from server.app import create_app
from server.config import Settings
from server.core.engine.local import LocalEngine
from server.core.roles.task_files import BUILTIN_FOLDER
from server.loading import load_services
from server.services import Services

START_TIMEOUT_S = 60
NUM_EXAMPLES = 12  # of each label


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


def write_few_examples(folder: Path) -> None:
    """Some of the built-in tasks' examples, in files of the same names: soon fitted to."""
    for path in BUILTIN_FOLDER.glob("*.jsonl"):
        rows: dict[str, list[str]] = defaultdict(list)
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            rows[json.loads(line)["label"]].append(line)
        kept = [row for each in rows.values() for row in each[:: len(each) // NUM_EXAMPLES]]
        (folder / path.name).write_text("".join(kept), encoding="utf-8")


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
