"""The Dockerfile's RUN, HEALTHCHECK and CMD lines, in a fresh Debian root by chroot.

Not a container: no image is built, there are no layers and no network of its own, and the base is
Debian's Python (dockerfile.py says how). `make container` runs this; it downloads some 500 MB once.
"""

import http.client
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.container.dockerfile import Image, instructions, is_in_context, missing
from tests.processes import announced, closed_port

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
KEY = "a key of the test"
START_TIMEOUT_S = 600  # the first start compiles kernels and fits judges


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """What the Dockerfile of this checkout makes of a fresh root; removed at the end."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="container-") as folder:
        image = Image(Path(folder, "root"), CACHE / "qwen-all-in-one" / "container")
        image.build(ROOT)
        yield image


@contextmanager
def running(image: Image, **settings: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process of CMD and its port, once it has announced itself."""
    port = closed_port()
    process = image.start(image.command, {"QWEN_PORT": str(port), **settings})
    with announced(process, START_TIMEOUT_S) as output:
        assert process.poll() is None, "".join(output)
        yield process, port


def get(port: int, path: str, key: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"authorization": f"Bearer {key}"} if key else {})
    response = connection.getresponse()
    return response.status, response.read()


def health(image: Image, port: int) -> int:
    """What HEALTHCHECK exits with."""
    words = image.words(image.healthcheck, [])
    env = {**image.environment, "QWEN_PORT": str(port)}
    return subprocess.run(words, env=env, check=False, capture_output=True).returncode


@pytest.mark.container
def test_the_command_serves_as_an_ordinary_user_and_stops_when_asked(image: Image) -> None:
    with running(image, QWEN_MODEL="mini", QWEN_API_KEY=KEY) as (process, port):
        assert get(port, "/health")[0] == 200
        assert health(image, port) == 0
        assert get(port, "/v1/models")[0] == 401
        status, body = get(port, "/v1/models", KEY)
        assert status == 200
        assert json.loads(body)["data"][0]["id"] == "qwen-mini"
        assert get(port, "/")[0] == 200, "the page is installed"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        [server] = map(int, children.read_text(encoding="utf-8").split())
        assert Path(f"/proc/{server}").stat().st_uid == int(image.user) != 0
        os.kill(server, signal.SIGTERM)
        assert process.wait(60) == 0
    assert health(image, port) != 0


@pytest.mark.container
def test_what_is_kept_lies_in_the_volume(image: Image) -> None:
    [volume] = image.volumes
    inside = image.root / volume.lstrip("/")
    assert inside.stat().st_uid == int(image.user)
    with running(image, QWEN_MODEL="mini", QWEN_API_KEY=KEY):
        assert list((inside / "qwen-all-in-one").iterdir())


@pytest.mark.container
def test_the_image_has_torch_for_cpus_and_no_cuda(image: Image) -> None:
    installed = {path.name for path in image.root.glob("usr/local/lib/python3*/site-packages/*")}
    assert "torch" in installed
    assert not {name for name in installed if re.match("nvidia|triton|cuda", name)}


# --- what is written, wherever there is no Debian root to try it in ----------------------


def test_what_the_dockerfile_copies_is_in_the_context() -> None:
    copied = [
        source
        for instruction in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
        if instruction.name == "COPY"
        for source in instruction.rest.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert is_in_context(source, ROOT)


def test_a_continued_line_with_comments_is_one_instruction() -> None:
    text = "RUN --mount=type=cache,target=/c \\\n# why\n    a \\\n    && b\n\nUSER 1000\n"
    run, user = instructions(text)
    assert (run.name, run.flags) == ("RUN", ("mount=type=cache,target=/c",))
    assert run.rest.split() == ["a", "&&", "b"]
    assert (user.name, user.rest) == ("USER", "1000")


def test_compose_opens_ports_on_this_machine_only_and_asks_for_a_key() -> None:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    ports = re.findall(r'^ +- "([\d.]+:\d+:\d+)"$', text, re.M)
    assert ports == ["127.0.0.1:8000:8000", "127.0.0.1:3000:8080"]
    assert "QWEN_API_KEY: ${QWEN_API_KEY:?" in text
