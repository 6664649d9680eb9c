"""`python -m server` as a process: what it prints, where models come from, how it fails."""

import asyncio
import errno
import hashlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import urlsplit

import httpx
import pytest
from huggingface_hub import constants
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from server.__main__ import main
from server.core.engine import checkpoint
from server.core.engine.checkpoint import (
    BUNDLED_FOLDER,
    DEFAULT_MODEL,
    DEFAULT_REVISION,
    CheckpointError,
    find_checkpoint,
)
from server.listener import bind
from tests.processes import (
    START_TIMEOUT_S,
    closed_port,
    environment,
    run_until_exit,
    self_signed,
    started,
)
from tests.servers import run_app

REVISIONS = {"main": "0123456789abcdef0123456789abcdef01234567", "v1": "1" * 40}
COMMITS = {DEFAULT_REVISION, *REVISIONS.values()}


@dataclass
class Hub:
    """Stands in for the Hugging Face hub: one model repository, made of the bundled model."""

    url: str = ""
    breaks_off: bool = False
    downloaded: list[str] = field(default_factory=list)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/api/models/{repo:path}/revision/{revision}", self._info),
                Route("/api/models/{repo:path}/tree/{commit}", self._tree),
                Route("/{repo:path}/resolve/{commit}/{name}", self._file, methods=["GET", "HEAD"]),
            ]
        )

    def _info(self, request: Request) -> Response:
        if request.path_params["repo"] != DEFAULT_MODEL:
            return JSONResponse(
                {"error": "Repository not found"},
                status_code=404,
                headers={"x-error-code": "RepoNotFound", "x-error-message": "Repository not found"},
            )
        revision = request.path_params["revision"]
        commit = revision if revision in COMMITS else REVISIONS.get(revision)
        if commit is None:
            return JSONResponse(
                {"error": "Invalid rev id"},
                status_code=404,
                headers={"x-error-code": "RevisionNotFound", "x-error-message": "Invalid rev id"},
            )
        siblings = [{"rfilename": path.name} for path in _files()]
        return JSONResponse(
            {
                "id": DEFAULT_MODEL,
                "modelId": DEFAULT_MODEL,
                "siblings": siblings,
                "sha": commit,
            }
        )

    def _tree(self, request: Request) -> Response:
        return JSONResponse(
            [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _etag(p)}
                for p in _files()
            ]
        )

    def _file(self, request: Request) -> Response:
        path = BUNDLED_FOLDER / request.path_params["name"]
        content = path.read_bytes()
        headers = {
            "x-repo-commit": request.path_params["commit"],
            "etag": f'"{_etag(path)}"',
            "content-length": str(len(content)),
        }
        if request.method == "HEAD":
            return Response(headers=headers)
        self.downloaded.append(path.name)
        if self.breaks_off and path.suffix == ".safetensors":
            return StreamingResponse(_begin(content), headers=headers)
        return Response(content, headers=headers)


def _files() -> list[Path]:
    return [path for path in BUNDLED_FOLDER.iterdir() if path.suffix != ".md"]


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


async def _begin(content: bytes) -> AsyncIterator[bytes]:
    # Less than huggingface_hub reads at once: as long as there is progress, it tries again.
    yield content[:1_000_000]
    raise ConnectionResetError("the hub goes away")


@pytest.fixture
def hub() -> Iterator[Hub]:
    stand_in = Hub()
    with run_app(stand_in.app()) as stand_in.url:
        yield stand_in


AskHub = Callable[..., None]


@pytest.fixture
def ask_hub(monkeypatch: pytest.MonkeyPatch) -> AskHub:
    """Has this process ask a hub of the test's own, or none, with its cache in `home`."""

    def ask(home: Path, url: str | None = None) -> None:
        endpoint = url or f"http://127.0.0.1:{closed_port()}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    return ask


def test_the_default_model_comes_from_the_hub_once_then_from_the_cache(
    hub: Hub, tmp_path: Path
) -> None:
    with started(environment(tmp_path, hub.url)) as server:
        assert server.get("/v1/models").json()["data"][0]["id"] == DEFAULT_MODEL
        assert server.get("/health").json()["warning"] is None
    assert "model.safetensors" in hub.downloaded
    with started(environment(tmp_path)) as server:
        assert server.get("/v1/models").json()["data"][0]["id"] == DEFAULT_MODEL


@pytest.mark.parametrize(
    ("model", "revision", "commit"),
    [
        ("auto", None, DEFAULT_REVISION),
        ("auto", "v1", REVISIONS["v1"]),
        (DEFAULT_MODEL, None, REVISIONS["main"]),
        (DEFAULT_MODEL, "v1", REVISIONS["v1"]),
        (DEFAULT_MODEL, REVISIONS["v1"], REVISIONS["v1"]),
    ],
)
def test_the_revision_asked_for_is_downloaded_and_found_in_the_cache_without_the_hub(
    ask_hub: AskHub, hub: Hub, tmp_path: Path, model: str, revision: str | None, commit: str
) -> None:
    ask_hub(tmp_path, hub.url)
    assert find_checkpoint(model, revision).path.name == commit
    ask_hub(tmp_path)
    assert find_checkpoint(model, revision).path.name == commit


@pytest.mark.parametrize("model", ["auto", DEFAULT_MODEL])
def test_an_unknown_revision_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, ask_hub: AskHub, hub: Hub, tmp_path: Path, model: str
) -> None:
    ask_hub(tmp_path, hub.url)
    says = in_process(monkeypatch, "--model", model, "--revision", "v9", "--port", "0")
    assert f"'{DEFAULT_MODEL}' has no revision 'v9' on the Hugging Face hub" in says


def test_a_revision_of_a_local_model_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for model in ("mini", str(tmp_path), str(file)):
        with pytest.raises(CheckpointError, match="--revision is for models of the hub"):
            find_checkpoint(model, "main")


def test_without_hub_and_cache_the_bundled_model_answers_and_says_so(tmp_path: Path) -> None:
    with started(environment(tmp_path)) as server:
        health = server.get("/health").json()
        assert health["model"] == "qwen-mini-fallback"
        assert DEFAULT_MODEL in health["warning"]
        output = "".join(server.output)
        assert "WARNING" in output
        assert "Traceback" not in output
        # The line to try works as it is printed.
        curl = re.search(r"(http://\S+/v1/chat/completions) .*-d '(\{.*?\})'", output, re.DOTALL)
        assert curl
        reply = httpx.post(curl[1], content=curl[2].encode(), timeout=60).json()
        assert reply["sentiment"]["label"]
        assert reply["choices"][0]["message"]["content"]


def test_a_server_that_only_poses_as_the_hub_is_reported_and_the_bundled_model_used(
    monkeypatch: pytest.MonkeyPatch, ask_hub: AskHub, tmp_path: Path
) -> None:
    """As where a network wants a login first."""

    async def log_in(request: Request) -> Response:
        return HTMLResponse("<html>log in</html>")

    with run_app(Starlette(routes=[Route("/{path:path}", log_in)])) as url:
        ask_hub(tmp_path, url)
        says = in_process(monkeypatch, "--model", DEFAULT_MODEL, "--port", "0")
        assert "does not come from the Hugging Face hub" in says
        assert find_checkpoint("auto").model_id == "qwen-mini-fallback"


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # If it waits for ever, the server that goes away ends it, and then the pool does.
    with ThreadPoolExecutor(1) as pool, socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}"
        )
        monkeypatch.setattr(checkpoint, "HUB_TIMEOUT_S", 0.3)
        found = pool.submit(find_checkpoint, "auto").result(START_TIMEOUT_S)
    assert found.model_id == "qwen-mini-fallback"


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "config.json"])
def test_without_an_essential_file_in_the_cache_the_bundled_model_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    for name in {"model.safetensors", "tokenizer.json", "config.json"} - {missing}:
        (tmp_path / name).touch()
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert find_checkpoint("auto").model_id == "qwen-mini-fallback"
    (tmp_path / missing).touch()
    assert find_checkpoint("auto").model_id == DEFAULT_MODEL


def test_a_broken_download_is_not_taken_for_a_complete_model(
    monkeypatch: pytest.MonkeyPatch, ask_hub: AskHub, hub: Hub, tmp_path: Path
) -> None:
    hub.breaks_off = True
    ask_hub(tmp_path, hub.url)
    # It tries again five times, a second after each.
    patient = Mock(wraps=time, sleep=lambda _: None)
    monkeypatch.setattr("huggingface_hub.file_download.time", patient)
    says = in_process(monkeypatch, "--model", DEFAULT_MODEL, "--port", "0")
    assert "cannot be reached" in says
    assert "model.safetensors" in hub.downloaded
    ask_hub(tmp_path)
    assert find_checkpoint("auto").model_id == "qwen-mini-fallback"


@pytest.mark.parametrize("model", ["auto", DEFAULT_MODEL])
def test_a_cache_that_cannot_be_written_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, ask_hub: AskHub, hub: Hub, tmp_path: Path, model: str
) -> None:
    (tmp_path / "file").touch()
    ask_hub(tmp_path / "file" / "cache", hub.url)
    says = in_process(monkeypatch, "--model", model, "--port", "0")
    assert f"cannot store '{DEFAULT_MODEL}' in the cache" in says


@pytest.mark.parametrize("model", ["auto", DEFAULT_MODEL])
def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    def fill(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("server.core.engine.checkpoint.snapshot_download", fill)
    says = in_process(monkeypatch, "--model", model, "--port", "0")
    assert f"cannot store '{DEFAULT_MODEL}'" in says and "No space left on device" in says


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("is_all_full", [False, True])
def test_a_server_whose_log_cannot_be_written_goes_on(tmp_path: Path, is_all_full: bool) -> None:
    port = closed_port()
    # Falls back, which it warns of.
    command = [sys.executable, "-m", "server", "--port", str(port), "--model", "auto"]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            command,
            env=environment(tmp_path),
            stdout=full if is_all_full else subprocess.PIPE,
            stderr=full,
            text=True,
        )
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=60) as client:
            url = f"http://127.0.0.1:{port}"
            model = client.get(f"{url}/health").json()["model"]
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
            for _ in range(2):
                reply = client.post(f"{url}/v1/chat/completions", json=body | {"max_tokens": 2})
                assert reply.status_code == 200, reply.text
        process.terminate()
        said, _ = process.communicate(timeout=START_TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    if not is_all_full:
        assert process.returncode == 0
        assert said.count("the log cannot be written") == 1
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("model", "says"),
    [("nobody/nothing", "no public model 'nobody/nothing'"), ("./not/here/", "neither a folder")],
)
def test_an_explicit_model_never_falls_back(
    monkeypatch: pytest.MonkeyPatch,
    ask_hub: AskHub,
    hub: Hub,
    tmp_path: Path,
    model: str,
    says: str,
) -> None:
    ask_hub(tmp_path, hub.url)
    assert says in in_process(monkeypatch, "--model", model, "--port", "0")


def test_an_explicit_model_reports_an_unreachable_hub(
    monkeypatch: pytest.MonkeyPatch, ask_hub: AskHub, tmp_path: Path
) -> None:
    ask_hub(tmp_path)
    says = in_process(monkeypatch, "--model", DEFAULT_MODEL, "--port", "0")
    assert "--model mini" in says


def test_check_answers_once_and_exits(tmp_path: Path) -> None:
    done = run_until_exit(environment(tmp_path), "--check")
    assert done.returncode == 0, done.stderr
    assert "qwen-mini-fallback works: sentiment" in done.stdout
    assert f"WARNING: {DEFAULT_MODEL}" in done.stderr
    # No progress bar without a terminal.
    assert "layers" not in done.stderr
    assert "Serving" not in done.stdout


def in_process(monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """The sentence with which the command exits."""
    monkeypatch.setattr(sys, "argv", ["qwen-all-in-one", *options])
    with pytest.raises(SystemExit) as exit_:
        main()
    # Python writes a text to stderr, and exits with 1.
    assert isinstance(exit_.value.code, str)
    assert "\n" not in exit_.value.code
    return exit_.value.code


def test_idle_connections_are_kept_longer_than_clients_keep_them(tmp_path: Path) -> None:
    # httpx's, and so the openai client's. The side that closes first resets a request on its way.
    expiry_s = httpx.Limits().keepalive_expiry
    assert expiry_s is not None
    with started(environment(tmp_path), "--model", "mini") as server:
        address = urlsplit(server.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port)
        with closing(connection):
            for pause_s in (expiry_s + 1, 0):
                connection.request("GET", "/health")
                assert connection.getresponse().read()
                own_socket = connection.sock
                time.sleep(pause_s)
            assert connection.sock is own_socket


def test_a_port_that_is_taken_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"127.0.0.1:{port}" in in_process(monkeypatch, "--model", "mini", "--port", port)


async def test_small_packets_are_sent_at_once() -> None:
    no_delay = asyncio.Event()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted = writer.get_extra_info("socket")
        if accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY):
            no_delay.set()
        writer.close()

    with bind("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*address)
            await asyncio.wait_for(no_delay.wait(), 10)
            writer.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--port", "many"), "--port"),
        (("--max-num-seqs", "0"), "--max-num-seqs"),
        (("--tasks", "/no/such/file.toml", "--port", "0"), "/no/such/file.toml"),
        (("--model", __file__, "--port", "0"), "is a file"),
        (("--model", "no/such.gguf", "--port", "0"), "there is no file no/such.gguf"),
        (("--adapter", "poet", "--port", "0"), "--adapter 'poet': 'poet' is not NAME=FOLDER"),
        (("--adapter", "po et=/x", "--port", "0"), "is not NAME=FOLDER"),
        (("--adapter", "poet=", "--port", "0"), "is not NAME=FOLDER"),
        (("--adapter", "plain=/x", "--port", "0"), "the name 'plain' is reserved for chats"),
        (
            ("--adapter", "poet=/x", "--adapter", "poet=/y", "--port", "0"),
            "the name 'poet' is given twice",
        ),
        (
            ("--model", "mini", "--adapter", "poet=/no/such/folder", "--port", "0"),
            "there is no folder /no/such/folder with an adapter",
        ),
        (
            ("--api-key-file", "/no/such/file", "--port", "0"),
            "--api-key-file /no/such/file: No such",
        ),
        (("--api-key-file", "/dev/null", "--port", "0"), "no key in --api-key-file /dev/null"),
        (("--api-key-file", sys.executable, "--port", "0"), "it is not text in UTF-8"),
        (("--api-key", ",", "--port", "0"), "--api-key ',': there is no key in it"),
        (("--ssl-certfile", "/no/such/file.pem", "--port", "0"), "--ssl-certfile"),
        (("--ssl-certfile", __file__, "--port", "0"), "--ssl-certfile"),
        (("--ssl-keyfile", __file__, "--port", "0"), "--ssl-certfile"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], says: str
) -> None:
    assert says in in_process(monkeypatch, *options)


def test_a_folder_that_is_no_model_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    says = in_process(monkeypatch, "--model", str(tmp_path), "--port", "0")
    assert "Qwen" in says


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_with_a_certificate_it_speaks_https(tmp_path: Path) -> None:
    certificate, tls_options = self_signed(tmp_path)
    options = ("--model", "mini", *tls_options)
    trusted = ssl.create_default_context(cafile=str(certificate))
    with started(environment(tmp_path), *options) as server:
        assert server.url.startswith("https://")
        assert httpx.get(f"{server.url}/health", verify=trusted).status_code == 200
