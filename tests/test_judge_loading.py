"""Judges of all tasks at the start: fitted once, read from their files afterwards."""

import asyncio
import io
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from server.config import Settings
from server.core.engine.adapters import ONLY_BASE, Adapter
from server.core.engine.checkpoint import CheckpointError
from server.core.engine.model import load_runner
from server.core.engine.stream import EngineClosedError
from server.core.roles.judge_cache import JudgeCache
from server.core.roles.judges import HeadJudge, Judge, LabelJudge
from server.core.roles.prompts import REFERENCE_TEXTS
from server.core.roles.tasks import Example, Label, Task
from server.core.text.tokenizer import ChatTokenizer
from server.errors import EngineUnreachableError
from server.judge_loading import JudgeLoader, PriorLoader
from server.loading import load_services
from tests.unit.core.roles.test_judges import (
    NUM_LAYERS,
    VALUES,
    FakeModel,
    FakeTokenizer,
    Row,
    examples,
    hinting,
    silent,
    task,
    telling,
)

PLAIN = Task(
    name="plain",
    instructions="Which?",
    labels=tuple(Label(value=value, text=value) for value in VALUES),
)


def load(
    model: FakeModel,
    folder: Path,
    *tasks: Task,
    digest: str = "digest",
    max_context: int = 1000,
    tokenizer: FakeTokenizer | None = None,
    adapters: Mapping[str, Adapter] = ONLY_BASE,
) -> Mapping[str, Judge]:
    judges = loader(
        model, folder, digest=digest, max_context=max_context, tokenizer=tokenizer,
        adapters=adapters,
    )  # fmt: skip
    judges.load(tasks or (task(), PLAIN))
    return judges.judges


def loader(
    model: FakeModel,
    folder: Path,
    *,
    digest: str = "digest",
    max_context: int = 1000,
    tokenizer: FakeTokenizer | None = None,
    adapters: Mapping[str, Adapter] = ONLY_BASE,
) -> JudgeLoader:
    return JudgeLoader(
        model,
        cast(ChatTokenizer, tokenizer or FakeTokenizer()),
        JudgeCache(folder, digest),
        num_layers=NUM_LAYERS,
        max_context=max_context,
        adapters=adapters,
    )


def answering() -> FakeModel:
    """A model whose hidden states predict the labels."""
    return FakeModel(
        label_scores=lambda text: (
            silent(text)[:3] if text in REFERENCE_TEXTS else hinting(text)[:3]
        ),
        states=telling,
    )


def test_every_task_gets_a_judge_under_its_version(tmp_path: Path) -> None:
    model = answering()
    judges = load(model, tmp_path)
    assert set(judges) == {task().version, PLAIN.version}
    assert isinstance(judges[task().version], HeadJudge)
    plain = judges[PLAIN.version]
    assert isinstance(plain, LabelJudge) and len(plain.prior) == 3 and plain.validation is None
    assert len(model.calls) == len(examples()) + len(REFERENCE_TEXTS)


def test_without_tasks_there_are_no_judges(tmp_path: Path) -> None:
    model = answering()
    judges = loader(model, tmp_path)
    judges.load([])
    assert judges.judges == {} and not model.calls


def test_tasks_loaded_one_by_one_get_their_judges(tmp_path: Path) -> None:
    tasks: Iterable[Task] = (each for each in (task(), PLAIN))
    judges = loader(answering(), tmp_path)
    judges.load(tasks)
    assert len(judges.judges) == 2


# --- saved judges ---------------------------------------------------------------------


def assert_same(ours: Mapping[str, Judge], theirs: Mapping[str, Judge]) -> None:
    assert set(ours) == set(theirs)
    for version, judge in ours.items():
        other = theirs[version]
        assert type(judge) is type(other) and judge.validation == other.validation
        if isinstance(judge, HeadJudge) and isinstance(other, HeadJudge):
            assert judge.layer == other.layer
            assert np.array_equal(judge.head.weights, other.head.weights)
            assert np.array_equal(judge.head.biases, other.head.biases)
        else:
            assert judge == other


def test_a_second_start_reads_and_does_not_score(tmp_path: Path) -> None:
    first, again = load(answering(), tmp_path), answering()
    assert_same(load(again, tmp_path), first)
    assert not again.calls
    assert len(list(tmp_path.iterdir())) == 2


def test_a_judge_is_fitted_with_the_adapter_of_its_task_and_again_with_another_one(
    tmp_path: Path,
) -> None:
    adapted = Task(**PLAIN.model_dump(), adapter="poet")
    poet = Adapter("poet", num_virtual_tokens=5, digest="first")
    for adapter in (poet, replace(poet, digest="second")):
        model = answering()
        load(model, tmp_path, adapted, adapters={**ONLY_BASE, "poet": adapter})
        assert {call["adapter"] for call in model.calls} == {adapter}
    again = answering()
    load(again, tmp_path, adapted, adapters={**ONLY_BASE, "poet": poet})
    assert not again.calls


def test_only_what_is_missing_is_fitted(tmp_path: Path) -> None:
    load(answering(), tmp_path, PLAIN)
    model = answering()
    assert len(load(model, tmp_path)) == 2
    assert not set(model.texts) & set(REFERENCE_TEXTS)
    assert len(model.calls) == len(examples())


def other_example(**changes: str) -> Task:
    """The task with another example in place of one in the middle."""
    of = examples()
    of[40] = of[40].model_copy(update=changes)
    return task(of)


class OtherTokenizer(FakeTokenizer):
    """A template with additional tokens before the instruction."""

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return [3, *super().encode_chat(messages)]


@pytest.mark.parametrize(
    "changed",
    [
        other_example(text="down new"),
        other_example(label="up"),
        other_example(kind="new"),
        task(examples(29)),
        task(examples()[::-1]),
        task([]),
        task().model_copy(update={"instructions": "Which?"}),
        task().model_copy(update={"labels": PLAIN.labels}),
    ],
    ids=["text", "label", "kind", "fewer", "order", "none", "instructions", "label texts"],
)
def test_a_task_that_has_changed_is_fitted_again_and_no_other(
    tmp_path: Path, changed: Task
) -> None:
    load(answering(), tmp_path)
    model = answering()
    load(model, tmp_path, changed, PLAIN)
    assert len(model.calls) == (len(changed.examples) or len(REFERENCE_TEXTS))
    again = answering()
    load(again, tmp_path, task(), PLAIN)
    load(again, tmp_path, changed, PLAIN)
    assert not again.calls


@pytest.mark.parametrize(
    ("digest", "tokenizer"), [("other", FakeTokenizer()), ("digest", OtherTokenizer())]
)
def test_another_model_or_template_has_its_own_judges(
    tmp_path: Path, digest: str, tokenizer: FakeTokenizer
) -> None:
    load(answering(), tmp_path)
    model = answering()
    load(model, tmp_path, digest=digest, tokenizer=tokenizer)
    assert len(model.calls) == len(examples()) + len(REFERENCE_TEXTS)
    assert len(list(tmp_path.iterdir())) == 4
    # The first judges are still saved.
    again = answering()
    load(again, tmp_path)
    assert not again.calls


def test_what_was_fitted_in_a_short_context_is_not_used_in_a_longer_one(tmp_path: Path) -> None:
    # No example fits after the instruction.
    short = load(answering(), tmp_path, task(), max_context=7 + 13 + 4)
    assert isinstance(short[task().version], LabelJudge)
    assert isinstance(load(answering(), tmp_path, task())[task().version], HeadJudge)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_a_damaged_file_is_fitted_again_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    first = load(answering(), tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(content)
    model = answering()
    assert_same(load(model, tmp_path), first)
    assert len(model.calls) == len(examples()) + len(REFERENCE_TEXTS)
    assert len([each for each in caplog.records if each.levelname == "WARNING"]) == 1
    again = answering()
    assert_same(load(again, tmp_path), first)
    assert not again.calls


def test_judges_that_cannot_be_saved_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("here")
    judges = load(answering(), tmp_path / "file")
    assert len(judges) == 2
    [warning] = [each for each in caplog.records if each.levelname == "WARNING"]
    assert f"--cache-dir {tmp_path / 'file'}" in warning.getMessage()


# --- fitting on first use -------------------------------------------------------------


async def test_a_task_is_fitted_when_it_is_used_and_kept_for_later_starts(tmp_path: Path) -> None:
    model = answering()
    judges = loader(model, tmp_path)
    judges.find([task(), PLAIN])
    assert judges.judges == {} and not model.calls
    judge = await judges.fit(task())
    assert isinstance(judge, HeadJudge) and judges.judges == {task().version: judge}
    later = loader(answering(), tmp_path)
    later.find([task(), PLAIN])
    assert_same(later.judges, judges.judges)


def test_a_task_that_is_given_twice_is_fitted_once(tmp_path: Path) -> None:
    model = answering()
    assert len(load(model, tmp_path, task(), task())) == 1
    assert len(model.calls) == len(examples())


# --- event loops, errors and progress -------------------------------------------------


async def test_judges_are_fitted_where_an_event_loop_runs_already(tmp_path: Path) -> None:
    assert asyncio.get_running_loop().is_running()
    assert len(load(answering(), tmp_path)) == 2


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("the model's hidden states\nare not finite"), "the model's hidden states"),
        (RuntimeError("out of memory"), "out of memory"),
        (EngineClosedError(), "shutting down"),
    ],
)
def test_a_task_that_cannot_be_learned_is_one_clear_sentence(
    tmp_path: Path, error: Exception, says: str
) -> None:
    def states(text: str, layer: int) -> Row:
        if text == "flat 7":
            raise error
        return telling(text, layer)

    with pytest.raises(CheckpointError) as raised:
        load(FakeModel(states=states), tmp_path)
    message = str(raised.value)
    assert message.startswith("the task 'mood' cannot be learned: ") and says in message
    assert "\n" not in message
    assert raised.value.__cause__ is error
    assert not list(tmp_path.iterdir())


def test_what_was_learned_before_an_error_is_kept(tmp_path: Path) -> None:
    def label_scores(text: str) -> Row:
        if text in REFERENCE_TEXTS:
            raise ValueError("not finite")
        return silent(text)[:3]

    with pytest.raises(CheckpointError, match="the task 'plain'"):
        load(FakeModel(label_scores, telling), tmp_path)
    model = answering()
    assert len(load(model, tmp_path)) == 2
    assert set(model.texts) == set(REFERENCE_TEXTS)


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_progress_of_fitting_and_a_log_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        load(answering(), tmp_path / str(stderr.isatty()), task())
        shown[stderr.isatty()] = stderr.getvalue()
    assert "0/90" in shown[True]
    # The progress line is cleared at the end.
    assert not shown[True].rpartition("\r")[0].rpartition("\r")[2].strip()
    assert shown[False] == ""


# --- with a model ---------------------------------------------------------------------


def test_a_second_start_of_the_same_model_computes_no_judge(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tmp_path / "tasks.toml"
    tasks.write_text(
        '[sentiment]\ninstructions = "Which?"\nexamples = "few.jsonl"\n'
        'labels = [{value = "a", text = "a"}, {value = "b", text = "b"}]\n'
        '[intent]\ninstructions = "Which?"\n'
        'labels = [{value = "a", text = "a"}, {value = "b", text = "b"}]\n'
    )
    of = [Example(text=f"{value} {i}", label=value) for i in range(12) for value in "ab"]
    (tmp_path / "few.jsonl").write_text("\n".join(each.model_dump_json() for each in of))
    settings = Settings(model=str(tiny_checkpoint), tasks=tasks, cache_dir=tmp_path / "judges")
    num_steps = []

    def load_and_count(*args: object, **kwargs: object) -> object:
        runner = load_runner(*args, **kwargs)  # type: ignore[arg-type]
        plain_step = runner.step
        num_steps.append(0)

        def step(*args: object) -> object:
            num_steps[-1] += 1
            return plain_step(*args)  # type: ignore[arg-type]

        runner.step = step  # type: ignore[method-assign, assignment]
        return runner

    monkeypatch.setattr("server.loading.load_runner", load_and_count)
    judges = []
    for _ in range(2):
        services = load_services(settings)
        services.engine.close()
        judges.append(services.judges)
    assert num_steps[0] > 0 and num_steps[1] == 0
    assert_same(*judges)
    # The judge of the task that every chat needs; the other task is fitted on first use.
    assert len(list((tmp_path / "judges").iterdir())) == 1


def test_without_hidden_states_labels_are_scored_and_the_prior_subtracted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, brought = answering(), task().model_copy(update={"judge": Path("head.safetensors")})
    judges = PriorLoader(model, cast(ChatTokenizer, FakeTokenizer()), max_context=1000)
    judges.load([brought, brought, PLAIN])
    assert all(isinstance(judge, LabelJudge) and judge.prior for judge in judges.judges.values())
    assert len(model.calls) == len(judges.judges) * len(REFERENCE_TEXTS)
    [warning] = caplog.messages
    assert f"the task {brought.name} is judged by the scores of its labels" in warning


def test_a_prior_that_cannot_be_measured_is_one_clear_sentence() -> None:
    def fail(text: str) -> Row:
        raise EngineClosedError

    judges = PriorLoader(
        FakeModel(label_scores=fail), cast(ChatTokenizer, FakeTokenizer()), max_context=1000
    )
    with pytest.raises(CheckpointError, match="the labels of the task 'plain' cannot be scored"):
        judges.load([PLAIN])


@pytest.mark.parametrize("kind", [JudgeLoader, PriorLoader])
def test_an_engine_unreachable_on_a_tasks_first_use_is_reported_as_such(
    tmp_path: Path, kind: type
) -> None:
    def fail(*_: object) -> Row:
        raise EngineUnreachableError

    model = FakeModel(label_scores=fail, states=fail)
    if kind is PriorLoader:
        tokenizer = cast(ChatTokenizer, FakeTokenizer())
        judges: JudgeLoader | PriorLoader = PriorLoader(model, tokenizer, max_context=1000)
    else:
        judges = loader(model, tmp_path)
    with pytest.raises(EngineUnreachableError):
        asyncio.run(judges.fit(task()))
