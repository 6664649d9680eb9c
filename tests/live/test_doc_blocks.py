"""Every code block of README and docs that can be run is run, and shows what really comes out."""

import configparser
import contextlib
import csv
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_settings import CliApp

from server.cluster.settings import ClusterSettings
from server.config import Settings
from server.core.roles.task_files import read_task_file
from server.fit.settings import FitSettings
from tests.markdown import PAGES, ROOT, Block, blocks_of, check_json, check_text, load_json
from tests.servers import LiveServer

ADDRESS = "http://127.0.0.1:8000"
SUBCOMMANDS = {"fit": FitSettings, "cluster": ClusterSettings}
# Environment variables that are no settings.
OTHER_VARIABLES = {"QWEN_REAL", "QWEN_VLLM", "QWEN_VLLM_MODEL"}
MAX_NUM_NOT_RUN = 6

Serve = Callable[[Settings], AbstractContextManager[LiveServer]]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs_and_shows_its_output(
    page: Path, mini: LiveServer, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(page)
    nexts = (*blocks[1:], None) if blocks else ()
    outputs = [after if after and after.is_output else None for after in nexts]
    with ExitStack() as stack:
        run = PageRun(mini, serve, stack)
        for block, output in zip(blocks, outputs, strict=True):
            try:
                run.run(block, output)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{block.place}: {error}") from error


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    not_run = [b for page in PAGES for b in blocks_of(page) if b.reason is not None]
    assert all(block.reason for block in not_run)
    assert len(not_run) <= MAX_NUM_NOT_RUN, [block.place for block in not_run]


class PageRun:
    """The blocks of one page, one after the other, in one folder."""

    def __init__(self, mini: LiveServer, serve: Serve, stack: ExitStack) -> None:
        self._mini, self._serve, self._stack = mini, serve, stack
        self._server = mini
        self._names: dict[str, Any] = {"__name__": "docs"}
        self._stack.callback(self._close_clients)

    def run(self, block: Block, output: Block | None) -> None:
        """Raises if the block fails, or prints something else than the output shown behind it."""
        if block.server is not None:
            self._server = self._start(block.server)
        if block.file is not None:
            Path(block.file).write_text(block.code, encoding="utf-8")
        if block.reason is not None:
            return
        if block.language == "python":
            self._python(block, output)
        elif block.language == "bash":
            self._bash(block, output)
        else:
            assert block.language in CHECKS, f"what is a block of {block.language!r}?"
            CHECKS[block.language](block)

    def _start(self, options: str) -> LiveServer:
        if not options:
            return self._mini
        settings = CliApp.run(Settings, cli_args=["--model", "mini", *shlex.split(options)])
        return self._stack.enter_context(self._serve(settings))

    def _close_clients(self) -> None:
        for value in self._names.values():
            if hasattr(value, "close") and not isinstance(value, type):
                value.close()

    def _python(self, block: Block, output: Block | None) -> None:
        code = "\n" * (block.line - 1) + block.code.replace(ADDRESS, self._server.url)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, block.place, "exec"), self._names)
        if output:
            _check_output(output, printed.getvalue())

    def _bash(self, block: Block, output: Block | None) -> None:
        printed = ""
        for command in _commands(block.code):
            words = shlex.split(command, comments=True)
            if words and words[0] == "curl":
                printed += self._curl(command, output)
            else:
                _check_command(words)
        if output and printed:
            _check_output(output, printed)

    def _curl(self, command: str, output: Block | None) -> str:
        options = (
            'curl() { command curl --silent --show-error --fail-with-body --max-time 60 "$@"; }'
        )
        done = subprocess.run(
            ["bash", "-c", f"{options}\n{command.replace(ADDRESS, self._server.url)}"],
            capture_output=True,
            text=True,
            check=False,
        )
        is_error = output is not None and output.code.startswith('{"error"')
        assert (done.returncode != 0) == is_error, f"{done.stderr} {done.stdout}"
        return done.stdout


def _check_output(block: Block, printed: str) -> None:
    try:
        if block.language == "json":
            check_json(load_json(block.code), json.loads(printed))
        else:
            check_text(block.code, printed)
    except AssertionError as error:
        raise AssertionError(f"{block.place}: {error}\nreally printed:\n{printed}") from error


def _commands(code: str) -> Iterator[str]:
    """Each command with all its lines: a quote or a backslash continues one."""
    command = ""
    for line in code.splitlines():
        command += line + "\n"
        if line.endswith("\\"):
            continue
        try:
            shlex.split(command, comments=True)
        except ValueError:  # no closing quotation
            continue
        yield command
        command = ""
    assert not command, f"not closed: {command}"


def _check_command(words: list[str]) -> None:
    while words and re.match(r"[A-Z_]+=", words[0]):
        _check_variable(words[0].partition("=")[0])
        words = words[1:]
    match words:
        case [] | ["cd", *_] | ["source", *_]:
            pass
        case ["export", *pairs]:
            for pair in pairs:
                _check_variable(pair.partition("=")[0])
        case ["make", *arguments]:
            _check_make(arguments)
        case ["python" | "python3", "-m", "server", *arguments] | ["qwen-all-in-one", *arguments]:
            _check_options(arguments)
        case ["python" | "python3", "-m", "pip", *arguments] | ["pip", *arguments]:
            _check_pip(arguments)
        case ["python" | "python3", "-m", module, *arguments]:
            _check_module(module, arguments)
        case _:
            raise AssertionError(f"mark the block as not run, or teach the test {words[0]!r}")


def _check_variable(name: str) -> None:
    if name.startswith("QWEN_") and name not in OTHER_VARIABLES:
        assert name.removeprefix("QWEN_").lower() in Settings.model_fields, name


def _check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [word for word in arguments if "=" not in word]
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"make {target}"
    for word in arguments:
        if word.startswith("ARGS=") and targets == ["serve"]:
            _check_options(shlex.split(word.removeprefix("ARGS=")))


def _check_options(arguments: list[str]) -> None:
    """Of the server's command; nothing is started."""
    kind: Any = SUBCOMMANDS.get(arguments[0] if arguments else "", Settings)
    if "--help" not in arguments:
        CliApp.run(kind, cli_args=arguments[1:] if kind is not Settings else arguments)


def _check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"(?:qwen-all-in-one|^\.)\[([^\]]+)\]", "\n".join(arguments), re.M)
    for extra in ",".join(named).split(",") if named else ():
        assert extra in extras["optional-dependencies"], extra


def _check_module(module: str, arguments: list[str]) -> None:
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin, module
    if module.split(".")[0] not in ("benchmarks", "training", "openai_examples"):
        return
    sources = "".join(p.read_text(encoding="utf-8") for p in Path(spec.origin).parent.glob("*.py"))
    for option in arguments:
        assert not option.startswith("--") or option.partition("=")[0] in sources, option


def _check_toml(block: Block) -> None:
    path = Path(block.file or "block.toml")
    path.write_text(block.code, encoding="utf-8")
    read_task_file(path)


def _check_csv(code: str) -> None:
    rows = list(csv.reader(code.splitlines()))
    assert len({len(row) for row in rows}) == 1, "rows of several lengths"


# Of the languages that are not run.
CHECKS: dict[str, Callable[[Block], object]] = {
    "json": lambda block: load_json(block.code),
    "jsonl": lambda block: [json.loads(line) for line in block.code.splitlines()],
    "csv": lambda block: _check_csv(block.code),
    "toml": _check_toml,
    "yaml": lambda block: yaml.safe_load(block.code),
    "ini": lambda block: configparser.RawConfigParser(strict=False).read_string(block.code),
    "nginx": lambda _: None,  # tests/test_docs.py
    "text": lambda _: None,
}
