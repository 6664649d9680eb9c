"""Runs `python -m server` in its own process."""

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_TIMEOUT_S = 120


@dataclass
class Running:
    """A server process that has printed its address."""

    process: subprocess.Popen[str]
    url: str
    output: list[str]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path)


@dataclass(frozen=True)
class Footprint:
    """The resources that a process holds."""

    resident_kib: int
    num_threads: int
    num_descriptors: int

    @classmethod
    def of(cls, process_id: int) -> "Footprint":
        status = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
        values = dict(line.split(":", 1) for line in status.splitlines())
        return cls(
            resident_kib=int(values["VmRSS"].split()[0]),
            num_threads=int(values["Threads"]),
            num_descriptors=len(list(Path(f"/proc/{process_id}/fd").iterdir())),
        )


@contextmanager
def started(
    env: dict[str, str],
    *options: str,
    port: int = 0,
    cwd: Path | None = None,
    command: Sequence[str] = (sys.executable, "-m", "server"),
) -> Iterator[Running]:
    """Runs a server that is ready; kills it at the end of the block."""
    process = subprocess.Popen(
        [*command, "--port", str(port), *options],
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with announced(process) as output:
        found = re.search(r"Serving .* on (https?://127\.0\.0\.1:\d+)", "".join(output))
        assert found, "".join(output)
        yield Running(process, found[1], output)


@contextmanager
def announced(
    process: subprocess.Popen[str], timeout_s: float = START_TIMEOUT_S
) -> Iterator[list[str]]:
    """Waits until the server says that it is ready; kills it at the end of the block.

    Yields the lines of its output, also those that follow.
    """
    output: list[str] = []
    is_ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if "Application startup complete" in line:
                is_ready.set()
        is_ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert is_ready.wait(timeout_s), "".join(output)
        yield output
    finally:
        process.kill()
        process.wait()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()


def run_until_exit(env: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """Runs a server that exits by itself."""
    return subprocess.run(
        [sys.executable, "-m", "server", "--port", "0", *options],
        env=env,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )


def environment(home: Path, hub_url: str | None = None) -> dict[str, str]:
    """The environment of this process with the given hub, or none, and its cache in `home`."""
    unreachable = f"http://127.0.0.1:{closed_port()}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "QWEN_"))}
    return {
        **kept,
        # All servers of this run share the fitted judges.
        "QWEN_CACHE_DIR": os.environ["QWEN_CACHE_DIR"],
        "HF_ENDPOINT": hub_url or unreachable,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # The page takes seconds of every start; its tests pass --ui.
        "QWEN_UI": "false",
    }


def closed_port() -> int:
    """A port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def self_signed(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """A certificate for 127.0.0.1, and the options to serve with it."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*make.split(), *names, *files], check=True, capture_output=True)
    return certificate, ("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
