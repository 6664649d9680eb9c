"""docs/operations.md shows the errors that the server gives, and has every metric."""

import json
import re
import shutil
import socket
import sys
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants
from prometheus_client.parser import text_string_to_metric_families

from server.__main__ import main
from server.core.engine.checkpoint import BUNDLED_FOLDER, DEFAULT_MODEL, find_checkpoint
from server.errors import OverloadedError
from server.gate import Gate
from tests.processes import closed_port
from tests.servers import LiveServer

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
# Each is caused by a test below.
SHOWN = set(re.findall(r"^(?:qwen-all-in-one: )?(?:error|WARNING): .*$", PAGE, re.M))
OF_THE_COMMAND = {
    "--port abc",
    "--model ./no-such-folder",
    "--model empty",
    "--model noweights",
    "--model llama",
    "--model mini --max-context 2048 --max-kv-mib 1",
    "--model mini --max-context 64",
}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def error_of(monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """The sentence with which the command exits."""
    monkeypatch.setattr(sys, "argv", ["qwen-all-in-one", *options])
    with pytest.raises(SystemExit) as exit_:
        main()
    return str(exit_.value.code)


@pytest.mark.parametrize("options", sorted(OF_THE_COMMAND))
def test_the_page_shows_the_error_of_a_wrong_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    shutil.copytree(BUNDLED_FOLDER, "noweights", ignore=shutil.ignore_patterns("*.safetensors"))
    Path("llama").mkdir()
    Path("llama/config.json").write_text(json.dumps({"model_type": "llama"}))
    port = () if "--port" in options else ("--port", "0")
    assert error_of(monkeypatch, *options.split(), *port) in SHOWN


def test_the_page_shows_the_error_of_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        error = error_of(monkeypatch, "--model", "mini", "--port", port)
    assert error.replace(port, "8000") in SHOWN


def test_the_page_shows_the_error_of_an_unknown_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(monkeypatch, "--modell", "mini") == "2"
    assert capsys.readouterr().err.splitlines()[-1] in SHOWN


@pytest.mark.usefixtures("no_hub")
def test_the_page_shows_what_is_said_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    model = "Qwen/Qwen2.5-0.5B-Instruct"
    assert error_of(monkeypatch, "--model", model, "--port", "0") in SHOWN
    assert f"WARNING: {find_checkpoint('auto').warning}" in SHOWN
    assert DEFAULT_MODEL in PAGE


def test_no_other_error_of_the_command_is_shown() -> None:
    # A port, an unknown option, and two of the hub.
    assert len(SHOWN) == len(OF_THE_COMMAND) + 4


def test_the_page_shows_the_error_of_a_full_queue() -> None:
    gate = Gate(80)
    for _ in range(80):
        gate.enter()
    with pytest.raises(OverloadedError) as error:
        gate.enter()
    assert f'"message": "{error.value.message}"' in PAGE


def test_every_metric_is_in_the_table(tiny: LiveServer) -> None:
    families = list(text_string_to_metric_families(httpx.get(f"{tiny.url}/metrics").text))
    own = {
        (f"{family.name}_total" if family.type == "counter" else family.name, family.type)
        for family in families
        if not family.name.endswith("_created")
    }
    assert set(re.findall(r"^\| `(qwen_\w+)` \| (\w+) \|", PAGE, re.M)) == own
