"""The whole `fit` command: its output, serving its result, and its errors."""

import csv
import json
import shlex
import tomllib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors import safe_open

from server.__main__ import main
from server.config import ModelSettings, Settings, read_settings
from server.fit.settings import FitSettings
from tests.servers import LiveServer

Serve = Callable[[Settings], AbstractContextManager[LiveServer]]

INSTRUCTION = "Is this about an animal or about a machine?"
# A random model has no knowledge, but its hidden states differ by word.
WORDS = {
    "animal": ("cat", "dog", "horse", "fox", "bird"),
    "machine": ("printer", "engine", "tractor", "drill", "pump"),
}


def table(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def learnable(num_each: int = 30) -> list[tuple[str, str]]:
    """Rows whose words determine their labels."""
    return [
        (f"the {words[i % 5]} the {words[i % 3]} number {i}", label)
        for i in range(num_each)
        for label, words in WORDS.items()
    ]


def unlearnable(num_each: int = 30) -> list[tuple[str, str]]:
    """Rows whose labels cannot be learned."""
    return [(f"number {7 * i}", ("animal", "machine")[i % 2]) for i in range(2 * num_each)]


def fit(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Runs the command in this process; returns its error message, or an empty string."""
    monkeypatch.setattr("sys.argv", ["qwen-all-in-one", "fit", *map(str, arguments)])
    try:
        main()
    except SystemExit as stopped:
        # Python prints a string code to stderr and exits with 1.
        return one_sentence(stopped)
    return ""


def one_sentence(stopped: SystemExit) -> str:
    assert isinstance(stopped.code, str) and "\n" not in stopped.code
    return stopped.code


@pytest.fixture
def options(tiny_checkpoint: Path, tmp_path: Path) -> list[object]:
    """The options of a new task on the random model."""
    return ["--task", "things", "--instruction", INSTRUCTION, "--model", tiny_checkpoint,
            "--out", tmp_path / "out"]  # fmt: skip


def classify(server: LiveServer, task: str, *texts: str) -> list[str]:
    body = {"input": list(texts), "task": task}
    response = httpx.post(f"{server.base_url}/classify", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return [item["label"] for item in response.json()["data"]]


# --- what is written ------------------------------------------------------------------


def test_a_new_task_is_fitted_written_and_served(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[object],
    tiny_checkpoint: Path,
    tmp_path: Path,
    serve: Serve,
) -> None:
    assert fit(monkeypatch, table(tmp_path / "rows.csv", learnable()), *options) == ""
    printed = capsys.readouterr().out
    assert "42 training rows, 18 test rows, 0 left out" in printed
    assert "The new judge is better" in printed and f"--tasks {tmp_path / 'out'}" in printed
    assert "expected with twice the rows (84): about" in printed

    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "tasks.toml", "things.safetensors", "things-report.html", "things-report.json",
    }  # fmt: skip
    written = tomllib.loads((out / "tasks.toml").read_text())["things"]
    assert written == {
        "instructions": INSTRUCTION,
        "labels": [{"value": "animal", "text": "animal"}, {"value": "machine", "text": "machine"}],
        "judge": "things.safetensors",
    }
    with safe_open(out / "things.safetensors", framework="np") as opened:
        about = json.loads(opened.metadata()["judge"])["about"]
    assert about["instructions"] == INSTRUCTION and about["dtype"] == "float32"
    assert len(about["weights"]) == 64

    with serve(Settings(model=str(tiny_checkpoint), tasks=out)) as server:
        found = classify(server, "things", "the dog the cat number 77", "the pump the drill")
        assert found == ["animal", "machine"]
        models = httpx.get(f"{server.base_url}/models").json()["data"]
        assert "things" in json.dumps(models[0]["tasks"])


def test_the_report_has_all_figures_and_is_self_contained(
    monkeypatch: pytest.MonkeyPatch, options: list[object], tmp_path: Path
) -> None:
    rows = [*learnable(), ("", "animal"), ("the cat the cat number 0", "animal")]
    assert fit(monkeypatch, table(tmp_path / "rows.csv", rows), *options) == ""
    report = json.loads((tmp_path / "out" / "things-report.json").read_text())
    assert report["is_gain"] and report["after"]["accuracy"] > report["before"]["accuracy"]
    assert len(report["curve"]["num_rows"]) == 4
    assert {each["line"] for each in report["rows"]["left_out"]} == {62, 63}
    page = (tmp_path / "out" / "things-report.html").read_text()
    assert page.count("<svg") == 2 and "The new judge is better" in page
    assert f"{report['after']['accuracy']:.3f}" in page
    assert "http" not in page and "<script" not in page
    # Neither contains a text of a row.
    assert "tractor" not in page and "tractor" not in json.dumps(report)


def test_the_printed_command_serves_the_fitted_task(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[object],
    tiny_checkpoint: Path,
    tmp_path: Path,
    serve: Serve,
) -> None:
    out, rows = tmp_path / "my fits", table(tmp_path / "rows.csv", learnable())
    assert fit(monkeypatch, rows, *options, "--dtype", "bfloat16", "--out", out) == ""
    *_, line = capsys.readouterr().out.splitlines()
    python, m, server, *arguments = shlex.split(line)
    assert [python, m, server] == ["python", "-m", "server"]
    settings = read_settings(Settings, arguments)
    assert (settings.model, settings.dtype) == (str(tiny_checkpoint), "bfloat16")
    with serve(settings) as live:
        assert classify(live, "things", "the dog the cat number 77") == ["animal"]


def test_the_model_options_are_those_of_the_server() -> None:
    given: dict[str, Any] = {
        "model": "a/b",
        "revision": "main",
        "adapter": ("x=y",),
        "dtype": "int4",
        "num_threads": 2,
        "max_context": 99,
        "max_kv_mib": 7,
        "tasks": Path("tasks.toml"),
        "cache_dir": Path("cache"),
    }
    assert given.keys() == ModelSettings.model_fields.keys()
    settings = FitSettings(rows=Path("rows.csv"), **given)
    assert settings.server.model_dump(include=set(given)) == given


def test_a_label_cannot_inject_html_into_the_report(
    monkeypatch: pytest.MonkeyPatch, options: list[object], tmp_path: Path
) -> None:
    rows = [(text, f"<b>{label}</b>") for text, label in learnable()]
    assert fit(monkeypatch, table(tmp_path / "rows.csv", rows), *options) == ""
    page = (tmp_path / "out" / "things-report.html").read_text()
    assert "<b>animal" not in page and "&lt;b&gt;animal" in page


def test_a_folder_may_hold_several_tasks(
    monkeypatch: pytest.MonkeyPatch, options: list[object], tmp_path: Path
) -> None:
    rows = table(tmp_path / "rows.csv", learnable())
    assert fit(monkeypatch, rows, *options) == ""
    assert fit(monkeypatch, rows, *options, "--task", "more/things") == ""
    tables = tomllib.loads((tmp_path / "out" / "tasks.toml").read_text())
    assert list(tables) == ["things", "more/things"]
    assert tables["more/things"]["judge"] == "more_things.safetensors"


def test_an_existing_task_keeps_all_but_its_examples(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks.toml"
    tasks.write_text(
        '[things]\ninstructions = "Which?\\nOr \\"what\\"?"\n'
        'fallback = "b"\nexamples = "few.jsonl"\n'
        'labels = [{value = "a", text = "animal"}, '
        '{value = "b", text = "机器", cue = {zh = "！"}}]\n'
    )
    few = [{"text": f"few {i}", "label": value} for i in range(10) for value in "ab"]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, few)))
    rows = table(tmp_path / "rows.csv", learnable())
    options = ["--model", tiny_checkpoint, "--tasks", tasks, "--task", "things"]
    names = ["--labels", "machine=b,animal=a", "--out", tmp_path / "out", "--force"]
    assert fit(monkeypatch, rows, *options, *names) == ""
    before = tomllib.loads(tasks.read_text())["things"]
    after = tomllib.loads((tmp_path / "out" / "tasks.toml").read_text())["things"]
    assert {**before, "judge": "things.safetensors"} == {**after, "examples": "few.jsonl"}


# --- what is not written --------------------------------------------------------------


def test_a_judge_that_is_not_better_is_only_written_with_force(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[object],
    tmp_path: Path,
) -> None:
    rows = table(tmp_path / "rows.csv", unlearnable())
    assert "--force writes it" in fit(monkeypatch, rows, *options)
    assert "The new judge is not better" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert fit(monkeypatch, rows, *options, "--force") == ""
    assert (tmp_path / "out" / "tasks.toml").is_file()


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        (learnable()[::2], (), "the rows have 1 label"),
        (learnable(9), (), "the label 'animal' has 9 rows that can be used; 10 are needed"),
        ([], (), "the rows have 0 labels"),
        (learnable(), ("--task", "sentiment"), "the task 'sentiment' already has an instruction"),
        (learnable(), ("--label-column", "kind"), "has no column 'kind'"),
        (learnable(), ("--encoding", "utf-32"), "is not text in utf-32"),
        (learnable(), ("--labels", "animal"), "--labels 'animal': give NAME=LABEL pairs"),
        (learnable(), ("--test-share", "0.9"), "--test-share '0.9'"),
        (learnable(), ("--tasks", "/no/such.toml"), "cannot read the task file /no/such.toml"),
        (learnable(), ("--model", "/no/such/model"), "neither a folder"),
        (learnable(), ("--revision", "main"), "--revision is for models of the hub"),
        (learnable(), ("--out", __file__), "is a file; name a folder"),
        (learnable(), ("--out", "/proc/new"), "cannot write to --out /proc/new"),
        (learnable(), ("--instruction", "word " * 600), "leaves no room in a context of 512"),
    ],
)
def test_bad_input_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    options: list[object],
    tmp_path: Path,
    rows: list[tuple[str, str]],
    more: tuple[str, ...],
    says: str,
) -> None:
    path = table(tmp_path / "rows.csv", rows)
    assert says in fit(monkeypatch, path, *options, *more)
    assert not (tmp_path / "out").exists()


def test_a_label_that_the_task_lacks_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = table(tmp_path / "rows.csv", learnable())
    says = fit(monkeypatch, path, "--model", "mini", "--out", tmp_path / "out")
    assert "line 2: the task 'sentiment' has no label 'animal'" in says


def test_a_folder_with_a_broken_task_file_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, options: list[object], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tasks.toml").write_text("[")
    path = table(tmp_path / "rows.csv", learnable())
    assert "cannot read its tasks.toml" in fit(monkeypatch, path, *options)


def test_an_unknown_option_exits_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["qwen-all-in-one", "fit", "rows.csv", "--nonsense"])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2


# --- serving it -----------------------------------------------------------------------


def test_a_judge_of_another_model_or_instruction_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, options: list[object], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    assert fit(monkeypatch, table(tmp_path / "rows.csv", learnable()), *options) == ""
    out = tmp_path / "out"
    for serving, says in (
        (("--model", tiny_checkpoint, "--dtype", "bfloat16"), "give --dtype float32"),
        (("--model", "mini"), "was fitted to another model"),
    ):
        assert says in refused(monkeypatch, *serving, "--tasks", out)
    text = (out / "tasks.toml").read_text()
    (out / "tasks.toml").write_text(text.replace(INSTRUCTION, "What?"))
    says = refused(monkeypatch, "--model", tiny_checkpoint, "--tasks", out)
    assert "another instruction than the task 'things' has now" in says


def refused(monkeypatch: pytest.MonkeyPatch, *options: object) -> str:
    """The error message of a server that does not start."""
    monkeypatch.setattr("sys.argv", ["qwen-all-in-one", "--port", "0", *map(str, options)])
    with pytest.raises(SystemExit) as raised:
        main()
    return one_sentence(raised.value)
