"""Starts the measured servers, each in a new process: ours, and `transformers serve`."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

OURS, SERVE = "ours", "transformers serve"
START_S = 120
START = re.compile(r"Serving (\S+) on (http://\S+)")


@dataclass(frozen=True)
class Server:
    """A running server that speaks OpenAI's protocol."""

    name: str
    model: str
    base_url: str
    process_id: int


@contextmanager
def our_server(model: str, *options: str, tree: Path | None = None) -> Iterator[Server]:
    """Runs our server in a new process.

    options: of the command line. tree: a checkout of another commit, to run its server.
    """
    command = [sys.executable, "-m", "server", "--port", "0", "--model", model]
    process = subprocess.Popen(
        [*command, "--log-level", "error", *options], stdout=subprocess.PIPE, text=True, cwd=tree
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := START.search(line):
                _until_answered(found[2], process)
                yield Server(OURS, found[1], f"{found[2]}/v1", process.pid)
                return
        raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait()


@contextmanager
def transformers_server(model: str) -> Iterator[Server]:
    """Runs `transformers serve` in a new process, with the model loaded."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", model]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        stdout=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _until_answered(url, process)
        yield Server(SERVE, model, f"{url}/v1", process.pid)
    finally:
        process.terminate()
        process.wait()


def _until_answered(url: str, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"{url}/health")
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"no server answers at {url}")
