"""Tasks as data: the built-in ones, a file of one's own, and all that can be wrong with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.core.tasks import Label, Task, TaskFileError, inline_task, load_tasks

BUILTIN = load_tasks()

MOOD = """
[mood]
instructions = "Up or down?"
fallback = "down"
cue = "They are {text}."
labels = [{ value = "up", text = "happy" }, { value = "down", text = "sad" }]
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a task file."""

    def write_file(content: str) -> Path:
        path = tmp_path / "my_tasks.toml"
        path.write_text(content, encoding="utf-8")
        return path

    return write_file


def task(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "name": "mood",
        "instructions": "Up or down?",
        "labels": (Label(value="up", text="happy"), Label(value="down", text="sad")),
    }
    return Task(**fields | changes)


def error_of(path: Path) -> str:
    with pytest.raises(TaskFileError) as caught:
        load_tasks(path)
    return str(caught.value)


# --- loading --------------------------------------------------------------------------


def test_sentiment_and_intent_are_built_in() -> None:
    assert set(BUILTIN) == {"sentiment", "intent"}
    labels = [(label.value, label.text) for label in BUILTIN["sentiment"].labels]
    assert labels == [("positive", "正面"), ("negative", "负面"), ("neutral", "中性")]
    assert BUILTIN["sentiment"].fallback == "neutral"


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_instruction_names_every_label_it_may_answer(name: str) -> None:
    assert BUILTIN[name].name == name
    for label in BUILTIN[name].labels:
        assert label.text in BUILTIN[name].instructions


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_instruction_is_one_line_without_space_around_it(name: str) -> None:
    instructions = BUILTIN[name].instructions
    assert instructions == instructions.strip()
    assert "\n" not in instructions


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_cue_tells_the_label_in_text_and_emoji(name: str) -> None:
    for label in BUILTIN[name].labels:
        cue = BUILTIN[name].render_cue(label)
        assert cue is not None and cue.endswith(label.text + label.emoji)
        assert label.emoji and "{" not in cue


def test_a_task_file_adds_its_tasks(write: Callable[[str], Path]) -> None:
    tasks = load_tasks(write(MOOD))
    assert set(tasks) == {"sentiment", "intent", "mood"}
    assert tasks["mood"].name == "mood"
    assert tasks["mood"].instructions == "Up or down?"
    assert [(x.value, x.text, x.emoji) for x in tasks["mood"].labels] == [
        ("up", "happy", ""),
        ("down", "sad", ""),
    ]
    assert tasks["sentiment"] == BUILTIN["sentiment"]


def test_a_task_file_replaces_a_builtin_task_of_the_same_name(write: Callable[[str], Path]) -> None:
    tasks = load_tasks(write(MOOD.replace("[mood]", "[sentiment]")))
    assert set(tasks) == {"sentiment", "intent"}
    assert [label.text for label in tasks["sentiment"].labels] == ["happy", "sad"]
    assert tasks["sentiment"].version != BUILTIN["sentiment"].version
    assert tasks["intent"] == BUILTIN["intent"]


def test_an_empty_task_file_changes_nothing(write: Callable[[str], Path]) -> None:
    assert load_tasks(write("")) == BUILTIN


def test_a_task_file_may_hold_several_tasks_in_chinese(write: Callable[[str], Path]) -> None:
    other = '["语气"]\ninstructions = "客气吗？"\n[["语气".labels]]\nvalue = "是"\ntext = "客气"\n'
    other += '[["语气".labels]]\nvalue = "否"\ntext = "无礼"\nemoji = "😠"\n'
    tasks = load_tasks(write(MOOD + other))
    assert set(tasks) == {"sentiment", "intent", "mood", "语气"}
    assert tasks["语气"].labels[1] == Label(value="否", text="无礼", emoji="😠")


# --- files that cannot be used --------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('instructions = "Up or down?"', "", "mood.instructions"),
        ('"Up or down?"', '""', "mood.instructions"),
        ('"Up or down?"', "3", "mood.instructions"),
        (MOOD[MOOD.index("labels") :], "", "mood.labels"),
        (', { value = "down", text = "sad" }', "", "mood.labels"),
        (MOOD[MOOD.index("labels") :], 'labels = "up"', "mood.labels"),
        (MOOD[MOOD.index("labels") :], "labels = [1, 2]", "mood.labels.0"),
        ('value = "up"', 'value = ""', "mood.labels.0.value"),
        ('value = "down", ', "", "mood.labels.1.value"),
        ('text = "sad"', 'text = ""', "mood.labels.1.text"),
        (', text = "happy"', "", "mood.labels.0.text"),
        (', text = "sad"', ', text = "sad", emoji = 1', "mood.labels.1.emoji"),
        (', text = "sad"', ', text = "sad", color = "blue"', "mood.labels.1.color"),
        ('value = "down"', 'value = "up"', "label values"),
        ('text = "sad"', 'text = "happy"', "label texts"),
        ('fallback = "down"', 'fallback = "sideways"', "fallback 'sideways'"),
        ('fallback = "down"', "fallback = 2", "mood.fallback"),
        ('fallback = "down"', "min_confidence = 1.1", "mood.min_confidence"),
        ('fallback = "down"', "min_confidence = -0.1", "mood.min_confidence"),
        ('fallback = "down"', "min_confidence = nan", "mood.min_confidence"),
        ('fallback = "down"', "min_label_mass = 2", "mood.min_label_mass"),
        ('fallback = "down"', 'min_label_mass = "much"', "mood.min_label_mass"),
        ('cue = "They are {text}."', "cue = ['a']", "mood.cue"),
        ('fallback = "down"', 'fallbak = "down"', "mood.fallbak"),
        ("[mood]", 'version = "2"\n[mood]', "version"),
        ("[mood]", "[[mood]]", "mood"),
    ],
)
def test_a_wrong_field_is_one_sentence_that_names_file_task_and_field(
    write: Callable[[str], Path], old: str, new: str, named: str
) -> None:
    assert old in MOOD
    path = write(MOOD.replace(old, new))
    message = error_of(path)
    assert str(path) in message
    assert named in message.replace(str(path), "")
    assert "mood" in message or named == "version"
    assert "\n" not in message


def test_more_labels_than_can_be_scored_are_refused(write: Callable[[str], Path]) -> None:
    labels = ", ".join(f'{{ value = "v{i}", text = "t{i}" }}' for i in range(256))
    path = write(f'[many]\ninstructions = "Which?"\nlabels = [{labels}]\n')
    message = error_of(path)
    assert "many.labels" in message and str(path) in message and "\n" not in message


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[mood\n", id="broken TOML"),
        pytest.param(b"[mood]\n[mood]\n", id="a task twice"),
        pytest.param(b"[mood]\ncue = 'a'\ncue = 'b'\n", id="a field twice"),
        pytest.param("[mood]\ncue = '你'".encode("gbk"), id="not UTF-8"),
    ],
)
def test_a_file_that_is_no_toml_is_one_sentence_with_its_name(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    message = error_of(path)
    assert str(path) in message and "\n" not in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = error_of(tmp_path / "nowhere.toml")
    assert str(tmp_path / "nowhere.toml") in message and "\n" not in message


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    message = error_of(tmp_path)
    assert str(tmp_path) in message and "\n" not in message


# --- the cue --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cue", "rendered"),
    [
        ("now {text}{emoji}", "now 正面😄"),
        ("{value}", "positive"),
        ("{value} {text} {emoji} {value}", "positive 正面 😄 positive"),
        ("no placeholder", "no placeholder"),
        ("", ""),
        # Braces that are no placeholder are text, not a format to fail on.
        ("{", "{"),
        ("{}", "{}"),
        ("{0} {name} {text!r}", "{0} {name} {text!r}"),
        ("{{text}}", "{正面}"),
        ("%s %(text)s $text", "%s %(text)s $text"),
    ],
)
def test_a_cue_fills_in_the_label(cue: str, rendered: str) -> None:
    label = Label(value="positive", text="正面", emoji="😄")
    assert task(cue=cue).render_cue(label) == rendered


def test_a_label_without_emoji_leaves_its_place_empty() -> None:
    assert task(cue="<{emoji}>").render_cue(Label(value="up", text="happy")) == "<>"


def test_a_task_without_cue_renders_none() -> None:
    assert task(cue=None).render_cue(Label(value="up", text="happy")) is None


def test_the_analyst_reads_the_instruction_first_and_then_the_text_as_it_is() -> None:
    assert task().messages(" {text}\n") == [
        {"role": "system", "content": "Up or down?"},
        {"role": "user", "content": " {text}\n"},
    ]


# --- versions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"instructions": "Up or down? "},
        {"labels": (Label(value="UP", text="happy"), Label(value="down", text="sad"))},
        {"labels": (Label(value="up", text="glad"), Label(value="down", text="sad"))},
        {"labels": (Label(value="up", text="happy", emoji="😄"), Label(value="down", text="sad"))},
        {"labels": (Label(value="down", text="sad"), Label(value="up", text="happy"))},
        {"labels": (*task().labels, Label(value="flat", text="calm"))},
        {"fallback": "up"},
        {"min_confidence": 0.5},
        {"min_label_mass": 0.5},
        {"cue": "{text}"},
        {"cue": ""},
    ],
    ids=str,
)
def test_the_version_changes_when_anything_changes(changes: dict[str, Any]) -> None:
    assert task(**changes).version != task().version


def test_equal_tasks_have_the_same_version() -> None:
    assert task().version == task().version
    assert load_tasks()["sentiment"].version == BUILTIN["sentiment"].version


def test_a_task_cannot_be_changed_behind_its_version() -> None:
    with pytest.raises(ValidationError):
        task().instructions = "other"


# --- tasks that a client describes ----------------------------------------------------


def test_an_inline_task_scores_the_labels_themselves_and_has_no_fallback() -> None:
    inline = inline_task("Spam?", ["yes", "no"])
    assert inline.instructions == "Spam?"
    assert [(x.value, x.text) for x in inline.labels] == [("yes", "yes"), ("no", "no")]
    assert inline.fallback is None and inline.cue is None
    assert inline.min_confidence == inline.min_label_mass == 0.0


@pytest.mark.parametrize(
    ("instructions", "labels"),
    [("Spam!", ["yes", "no"]), ("Spam?", ["no", "yes"]), ("Spam?", ["yes", "no", "maybe"])],
)
def test_inline_tasks_differ_in_version_as_soon_as_they_differ(
    instructions: str, labels: list[str]
) -> None:
    assert inline_task(instructions, labels).version != inline_task("Spam?", ["yes", "no"]).version


def test_255_inline_labels_are_still_fine() -> None:
    assert len(inline_task("Which?", [str(i) for i in range(255)]).labels) == 255


@pytest.mark.parametrize(
    ("instructions", "labels"),
    [
        pytest.param("Spam?", [], id="no label"),
        pytest.param("Spam?", ["yes"], id="one label"),
        pytest.param("Spam?", ["yes", "yes"], id="a label twice"),
        pytest.param("Spam?", ["yes", ""], id="an empty label"),
        pytest.param("Spam?", [str(i) for i in range(256)], id="256 labels"),
        pytest.param("", ["yes", "no"], id="no instructions"),
    ],
)
def test_an_inline_task_that_cannot_work_is_refused(instructions: str, labels: list[str]) -> None:
    with pytest.raises(ValidationError):
        inline_task(instructions, labels)


def test_a_table_is_known_by_its_own_name_only(tmp_path: Path) -> None:
    path = tmp_path / "tasks.toml"
    path.write_text(
        """
        [mood]
        name = "sentiment"
        instructions = "How?"
        labels = [{value = "a", text = "a"}, {value = "b", text = "b"}]
        """
    )
    assert load_tasks(path)["mood"].name == "mood"


def test_toml_nested_too_deep_is_a_task_file_error(tmp_path: Path) -> None:
    path = tmp_path / "tasks.toml"
    path.write_text("x = " + "[" * 100_000)
    with pytest.raises(TaskFileError):
        load_tasks(path)


def test_a_placeholder_in_a_label_is_not_filled_in_again() -> None:
    task = Task(
        name="t",
        instructions="i",
        labels=(Label(value="{text}", text="{emoji}", emoji="x"), Label(value="b", text="b")),
        cue="{value} {text}",
    )
    assert task.render_cue(task.labels[0]) == "{text} {emoji}"
