"""Every example runs as its docstring says and prints what it promises."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LiveServer

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120
EMOJIS = "😄😢😐"
LABELS = ("positive", "negative", "neutral")


def run(base_url: str, name: str, *arguments: str, stdin: str = "") -> str:
    env = {**os.environ, "OPENAI_BASE_URL": base_url, "PYTHONIOENCODING": "utf-8"}
    env.pop("OPENAI_API_KEY", None)
    done = subprocess.run(
        [sys.executable, "-m", f"openai_examples.{name}", *arguments],
        cwd=ROOT,
        env=env,
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def check_chat(base_url: str) -> None:
    you, reply = run(base_url, "chat", "今天", "真好").splitlines()[:2]
    assert you.startswith("you   今天 真好")
    assert you.endswith(LABELS)
    assert reply.startswith("reply ")


def check_streaming(base_url: str) -> None:
    output = run(base_url, "streaming")
    assert output[0] in EMOJIS
    assert output.strip().endswith("tokens)")


def check_read_sentiment(base_url: str) -> None:
    lines = run(base_url, "read_sentiment").splitlines()
    by_extra, by_attribute, by_header = (line.split()[1] for line in lines[:3])
    assert by_extra == by_attribute == by_header
    assert [line.split()[0] for line in lines[3:]] == list(LABELS)


def check_without_sentiment(base_url: str) -> None:
    lines = run(base_url, "without_sentiment").splitlines()
    assert sum("sentiment None" in line for line in lines) == 2


def check_classify(base_url: str) -> None:
    lines = [line.split() for line in run(base_url, "classify").splitlines()]
    assert [line[0] for line in lines] == ["one", "batch", "batch", "batch", "own"]
    assert all(line[2] in LABELS for line in lines[:4])
    assert lines[4][3] in ("加急", "普通", "可以等")


def check_async_many(base_url: str) -> None:
    lines = run(base_url, "async_many").splitlines()
    starts = [line for line in lines if " -> " in line]
    assert len(starts) == 4
    assert all(line[0] in EMOJIS for line in starts)


def check_repl(base_url: str) -> None:
    for goodbye in ("exit\n", ""):
        output = run(base_url, "repl", stdin=f"你好\n\nThank you!\n{goodbye}")
        answers = [line for line in output.split("> ") if line[:1] in EMOJIS and line.strip()]
        assert len(answers) == 2, output


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def test_every_example_is_checked() -> None:
    files = {path.stem for path in (ROOT / "openai_examples").glob("*.py")}
    assert files - {"__init__", "connection"} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_the_example_runs(mini: LiveServer, name: str) -> None:
    CHECKS[name](mini.base_url)


@pytest.mark.parametrize("name", CHECKS)
def test_without_a_server_an_example_says_so_in_one_sentence(name: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1"}
    done = subprocess.run(
        [sys.executable, "-m", f"openai_examples.{name}"],
        cwd=ROOT,
        env=env,
        input="",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "make serve" in done.stderr
