"""Every example runs as its docstring says and prints what it promises.

What the model says, and which mood it sees, is not asserted: only what stands where.
"""

import ast
import contextlib
import gc
import io
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from server.config import Settings
from tests.servers import LiveServer, run_app

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "openai_examples"
TIMEOUT_S = 300  # a model that will not stop fills its context
EMOJIS = "😄😢😐"
LABELS = ("positive", "negative", "neutral")
REFUSED_AT = "No server answers at {}. Start one with: make serve\n"


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"openai_examples.{name}", *arguments]


def environment(base_url: str) -> dict[str, str]:
    env = {**os.environ, "OPENAI_BASE_URL": base_url, "PYTHONIOENCODING": "utf-8"}
    env.pop("OPENAI_API_KEY", None)
    return env


def run(
    base_url: str, name: str, *arguments: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, *arguments),
        cwd=ROOT,
        env=environment(base_url),
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=TIMEOUT_S,
        check=False,
    )


def output_of(base_url: str, name: str, *arguments: str) -> str:
    """The output of an example that runs in this process, where it starts sooner."""
    out, complaints = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(complaints),
    ):
        patch.setenv("OPENAI_BASE_URL", base_url)
        patch.delenv("OPENAI_API_KEY", raising=False)
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_module(f"openai_examples.{name}", run_name="__main__")
        # A program ends with its client still connected.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
    assert complaints.getvalue() == ""
    return out.getvalue()


def typed(base_url: str, stdin: str) -> str:
    """The output of the REPL, as a program, when these lines are typed."""
    done = run(base_url, "repl", stdin=stdin)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refused(monkeypatch: pytest.MonkeyPatch, base_url: str, name: str) -> str:
    """With what an example exits. In this process: to start one takes longer than to be refused."""
    monkeypatch.setenv("OPENAI_BASE_URL", base_url)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module(f"openai_examples.{name}", run_name="__main__")
    # Python writes a text to stderr, and exits with 1.
    assert isinstance(exit_.value.code, str)
    return exit_.value.code


def num_answers(output: str) -> int:
    """How often an emoji follows the REPL's prompt; a piped empty line leaves two prompts."""
    forgotten = r"(?:\(forgetting our oldest turn\)\n)*"
    return len(re.findall(rf"^(?:> )+{forgotten}[{EMOJIS}] ", output, flags=re.M))


def check_chat(base_url: str) -> None:
    you, reply = output_of(base_url, "chat", "今天", "真好").splitlines()[:2]
    assert re.fullmatch(rf"you   今天 真好  [{EMOJIS}] ({'|'.join(LABELS)})", you)
    assert reply.startswith("reply ")
    assert output_of(base_url, "chat", " ").startswith("you   我今天考试通过了")


def check_streaming(base_url: str) -> None:
    output = output_of(base_url, "streaming")
    assert re.fullmatch(rf"[{EMOJIS}] .*\n\(\d+ tokens\)\n", output, flags=re.S)


def check_read_sentiment(base_url: str) -> None:
    lines = [line.split() for line in output_of(base_url, "read_sentiment").splitlines()]
    assert [line[0] for line in lines[:3]] == ["model_extra", "attribute", "x-sentiment"]
    assert lines[0][1] == lines[1][1] == lines[2][1]
    probabilities = {label: float(probability) for label, probability in lines[3:]}
    assert tuple(probabilities) == LABELS
    assert sum(probabilities.values()) == pytest.approx(1, abs=0.002)


def check_without_sentiment(base_url: str) -> None:
    lines = output_of(base_url, "without_sentiment").splitlines()
    for way in ("sentiment=False", ":plain"):
        (line,) = [line for line in lines if line.startswith(way)]
        assert line.removeprefix(way).lstrip().startswith("sentiment None  ")


def check_classify(base_url: str) -> None:
    lines = output_of(base_url, "classify").splitlines()
    row = re.compile(r"(one|batch|own labels) +(\S+) +([01]\.\d\d)  (.+)")
    rows = [match.groups() for line in lines if (match := row.fullmatch(line))]
    assert len(rows) == len(lines) == 5
    assert [title for title, *_ in rows] == ["one", *["batch"] * 3, "own labels"]
    assert all(label in LABELS for _, label, *_ in rows[:4])
    assert rows[4][1] in ("加急", "普通", "可以等")
    assert len({text for *_, text in rows}) == 5


def check_analyses(base_url: str) -> None:
    lines = output_of(base_url, "analyses").splitlines()
    rows = [re.fullmatch(r"(\w+) +\S+ (\w+) +[01]\.\d\d", line) for line in lines[:3]]
    assert [match and match[1] for match in rows] == ["sentiment", "emotion", "intent"]
    assert re.fullmatch(r"keywords +\S.*", lines[3])
    assert len(lines) > 4


def check_extract(base_url: str) -> None:
    rows = [line.split("  <-  ") for line in output_of(base_url, "extract").splitlines()]
    assert len(rows) == 2
    for items, text in rows:
        assert 1 <= len(items.split(", ")) <= 3
        assert all(item in text for item in items.split(", "))


def check_explain(base_url: str) -> None:
    label, *sentences, words = output_of(base_url, "explain").splitlines()
    assert label.removesuffix(", mixed") in LABELS
    assert len(sentences) == 2
    assert re.fullmatch(r"(\S+ [+-][01]\.\d\d(, )?){3}", words)


def check_decisions(base_url: str) -> None:
    refund, team, urgency, usage = output_of(base_url, "decisions").splitlines()
    assert re.fullmatch(r"refund   [01]\.\d\d likely", refund)
    assert re.fullmatch(r"team     (billing|technical) \([01]\.\d\d\)", team)
    assert re.fullmatch(r"urgency  [012]\.\d\d of 2", urgency)
    assert re.fullmatch(r"\d+ tokens, \d+ of them cached", usage)


def check_structured_output(base_url: str) -> None:
    output = output_of(base_url, "structured_output")
    assert re.fullmatch(
        r"topic        .*priority     (low|high)\nneeds reply  (True|False)\n", output, flags=re.S
    )


def check_tool_calls(base_url: str) -> None:
    call, result, answer = output_of(base_url, "tool_calls").split("\n", 2)
    assert re.fullmatch(r'call    CurrentTime \{"with_date": (true|false)\}', call)
    assert re.fullmatch(r"result  .*\d\d:\d\d UTC", result)
    assert answer.startswith("answer  ")


def check_async_many(base_url: str) -> None:
    output = output_of(base_url, "async_many")
    assert output[0] in EMOJIS
    questions = ("我升职了！", "今天好累啊。", "What a lovely morning!", "My phone broke again.")
    places = [
        match.start()
        for question in questions
        if (match := re.search(rf"^[{EMOJIS}] {re.escape(question)} -> ", output, flags=re.M))
    ]
    assert len(places) == 4
    assert places == sorted(places)


def check_adapters(base_url: str) -> None:
    assert output_of(base_url, "adapters").startswith("qwen-mini (base model): ")


def check_repl(base_url: str) -> None:
    for goodbye in ("exit\n", ""):
        output = typed(base_url, f"你好\n\nThank you!\n{goodbye}")
        assert num_answers(output) == 2, output


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def test_every_example_is_checked() -> None:
    files = {path.stem for path in EXAMPLES.glob("*.py")}
    assert files - {"__init__", "connection"} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_the_docstring_of_an_example_says_how_to_run_it(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert f"python -m openai_examples.{name}" in docstring


@pytest.mark.parametrize("name", CHECKS)
def test_an_example_runs(mini: LiveServer, name: str) -> None:
    CHECKS[name](mini.base_url)


@pytest.mark.parametrize("name", CHECKS)
def test_without_a_server_an_example_says_so_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    # Bound, but not listening: connections are refused, and no other process gets the port.
    with socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{refusing.getsockname()[1]}/v1"
        said = refused(monkeypatch, base_url, name)
    assert f"{said}\n" == REFUSED_AT.format(base_url)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", CHECKS)
def test_without_the_key_an_example_says_what_the_server_says(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    guarded: LiveServer,
    name: str,
) -> None:
    said = refused(monkeypatch, guarded.base_url, name)
    assert "Missing or wrong API key" in said and "\n" not in said
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["chat", "async_many"])
def test_an_example_is_a_program_that_exits_with_the_sentence(
    guarded: LiveServer, name: str
) -> None:
    done = run(guarded.base_url, name)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Missing or wrong API key" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_repl_forgets_the_oldest_turn_when_the_conversation_no_longer_fits(
    serve: Callable[[Settings], AbstractContextManager[LiveServer]],
) -> None:
    line = "很好，" * 150  # 150 tokens: one fits, two do not
    with serve(Settings(model="mini", max_context=300)) as server:
        output = typed(server.base_url, f"{line}\n{line}\nexit\n")
        too_long = run(server.base_url, "repl", stdin=line * 2)
    first, second = re.split(r"^> ", output, flags=re.M)[1:3]
    assert first[0] in EMOJIS
    notice, _, answer = second.partition("\n")
    assert notice == "(forgetting our oldest turn)"
    assert answer[0] in EMOJIS
    assert too_long.returncode == 1
    assert "maximum context length is 300" in too_long.stderr
    assert too_long.stderr.count("\n") == 1


def test_a_server_lost_in_the_middle_of_an_answer_is_one_sentence_on_its_own_line() -> None:
    with run_app(Starlette(routes=DYING_ROUTES)) as url:
        done = run(f"{url}/v1", "repl", stdin="你好\n")
    assert done.returncode == 1
    assert done.stdout.endswith("> 😄 Once\n")
    assert done.stderr == REFUSED_AT.format(f"{url}/v1")


@pytest.mark.parametrize("is_answering", [False, True])
def test_ctrl_c_ends_the_repl_quietly(
    mini: LiveServer, ctrl_c_is_heard: None, is_answering: bool
) -> None:
    with subprocess.Popen(
        command("repl"),
        cwd=ROOT,
        env=environment(mini.base_url),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as repl:
        deadline = threading.Timer(TIMEOUT_S, repl.kill)
        deadline.start()
        try:
            assert repl.stdin and repl.stdout
            until(repl.stdout.read, ">")
            if is_answering:
                repl.stdin.write("请给我讲一个很长的故事。\n")
                repl.stdin.flush()
                until(repl.stdout.read, EMOJIS)
            repl.send_signal(signal.SIGINT)
            _, complaint = repl.communicate()
        finally:
            deadline.cancel()
    assert (repl.returncode, complaint) == (0, "")


def until(read: Callable[[int], str], ends: str) -> None:
    """Reads up to a character of `ends`, or up to the end."""
    while (character := read(1)) and character not in ends:
        pass
    assert character, "the program ended"


@pytest.fixture
def ctrl_c_is_heard() -> Iterator[None]:
    """Where pytest itself runs in the background, its children would ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def guarded(
    serve: Callable[[Settings], AbstractContextManager[LiveServer]],
) -> Iterator[LiveServer]:
    """A server that asks for a key."""
    with serve(Settings(model="mini", api_key=(SecretStr("secret"),))) as server:
        yield server


async def list_models(request: Request) -> Response:
    model = {"id": "dying", "object": "model", "created": 0, "owned_by": "test"}
    return JSONResponse({"object": "list", "data": [model]})


async def half_an_answer(request: Request) -> Response:
    """Promises more bytes than it sends, so that the connection is cut."""

    async def body() -> AsyncIterator[str]:
        yield (
            'data: {"id":"x","object":"chat.completion.chunk","created":0,"model":"dying",'
            '"sentiment":{"emoji":"😄"},'
            '"choices":[{"index":0,"delta":{"content":"Once"},"finish_reason":null}]}\n\n'
        )

    headers = {"content-length": "100000"}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)


DYING_ROUTES = [
    Route("/v1/models", list_models),
    Route("/v1/chat/completions", half_an_answer, methods=["POST"]),
]
