"""Prompts as data: the built-in ones, a user's own file, and its possible errors."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.core.engine.checkpoint import BUNDLED_FOLDER
from server.core.roles.task_files import (
    BUILTIN_FOLDER,
    TASK_FILE_NAME,
    TaskFile,
    TaskFileError,
    read_task_file,
)
from server.core.roles.tasks import (
    MIN_EXAMPLES,
    Example,
    Label,
    ReplyStyle,
    Task,
    inline_task,
    text_in,
)

PROMPTS = read_task_file()
BUILTIN = PROMPTS.tasks
MINI = read_task_file(BUNDLED_FOLDER / TASK_FILE_NAME)

MOOD = """
[mood]
instructions = "Up or down?"
fallback = "down"
poles = ["up", "down"]
labels = [{ value = "up", text = "happy", cue = "Well." }, { value = "down", text = "sad" }]
"""
REPLY = """
[reply]
persona = "Be kind."
cue_position = "system"
"""
LEARNED = MOOD.replace("poles", 'examples = "moods.jsonl"\npoles')


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


def lines(*rows: Any) -> str:
    """JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def examples(**counts: int) -> list[dict[str, str]]:
    """So many examples of each label."""
    return [
        {"text": f"{label} {i}", "label": label}
        for label, count in counts.items()
        for i in range(count)
    ]


def builtin_rows(name: str) -> list[dict[str, str]]:
    """A file of examples as it is, with the fields that only its readers use."""
    content = (BUILTIN_FOLDER / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()]


def error_of(path: Path) -> str:
    with pytest.raises(TaskFileError) as caught:
        read_task_file(path)
    return str(caught.value)


# --- loading --------------------------------------------------------------------------


def test_sentiment_and_intent_are_built_in() -> None:
    assert set(BUILTIN) == {"sentiment", "emotion", "intent"}
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


def test_the_builtin_sentiment_has_cues_for_clear_moods_in_both_languages() -> None:
    positive, negative, neutral = BUILTIN["sentiment"].labels
    for label in (positive, negative):
        assert label.cue is not None and set(label.cue) == {"zh", "en"}
    assert positive.cue != negative.cue
    assert neutral.cue is None
    assert BUILTIN["sentiment"].poles == ("positive", "negative")


def test_the_builtin_intent_has_no_cues() -> None:
    assert [label.cue for label in BUILTIN["intent"].labels] == [None] * 4
    assert BUILTIN["intent"].poles is None


@pytest.mark.parametrize("name", BUILTIN)
def test_every_builtin_label_has_an_emoji_of_its_own(name: str) -> None:
    emojis = [label.emoji for label in BUILTIN[name].labels]
    assert all(emojis) and len(set(emojis)) == len(emojis)


def test_the_builtin_reply_has_a_persona_in_both_languages_and_the_cue_at_the_users_end() -> None:
    assert PROMPTS.reply is not None
    assert set(PROMPTS.reply.persona) == {"zh", "en"}
    assert PROMPTS.reply.cue_position == "user"


def test_a_task_file_contains_its_own_tasks_only(write: Callable[[str], Path]) -> None:
    prompts = read_task_file(write(MOOD))
    assert set(prompts.tasks) == {"mood"}
    assert prompts.reply == ReplyStyle()


def test_a_task_file_adds_its_tasks(write: Callable[[str], Path]) -> None:
    tasks = (PROMPTS | read_task_file(write(MOOD))).tasks
    assert set(tasks) == {"sentiment", "emotion", "intent", "mood"}
    assert tasks["mood"].name == "mood"
    assert tasks["mood"].instructions == "Up or down?"
    assert tasks["mood"].fallback == "down"
    assert tasks["mood"].poles == ("up", "down")
    assert tasks["mood"].examples == ()
    assert [(x.value, x.text, x.emoji, x.cue) for x in tasks["mood"].labels] == [
        ("up", "happy", "", {"en": "Well."}),
        ("down", "sad", "", None),
    ]
    assert tasks["mood"].values == ["up", "down"]
    assert tasks["sentiment"] == BUILTIN["sentiment"]


def test_a_task_file_replaces_a_builtin_task_of_the_same_name(write: Callable[[str], Path]) -> None:
    tasks = (PROMPTS | read_task_file(write(MOOD.replace("[mood]", "[sentiment]")))).tasks
    assert set(tasks) == {"sentiment", "emotion", "intent"}
    assert [label.text for label in tasks["sentiment"].labels] == ["happy", "sad"]
    assert tasks["sentiment"].version != BUILTIN["sentiment"].version
    # Nothing of the replaced task is left: not even the examples of its other labels.
    assert tasks["sentiment"].examples == ()
    assert tasks["intent"] == BUILTIN["intent"]


def test_an_empty_task_file_changes_nothing(write: Callable[[str], Path]) -> None:
    empty = read_task_file(write(""))
    assert empty == TaskFile()
    assert PROMPTS | empty == PROMPTS
    assert empty | PROMPTS == PROMPTS


def test_a_task_file_may_hold_several_tasks_in_chinese(write: Callable[[str], Path]) -> None:
    other = '["语气"]\ninstructions = "客气吗？"\n[["语气".labels]]\nvalue = "是"\ntext = "客气"\n'
    other += '[["语气".labels]]\nvalue = "否"\ntext = "无礼"\nemoji = "😠"\n'
    tasks = read_task_file(write(MOOD + other)).tasks
    assert set(tasks) == {"mood", "语气"}
    assert tasks["语气"].labels[1] == Label(value="否", text="无礼", emoji="😠")


# --- tasks that extract ---------------------------------------------------------------

TOPICS = """
[topics]
kind = "extract"
instructions = { zh = "找出话题。", en = "Find the topics." }
[[topics.examples]]
text = "The bus was late."
items = ["bus"]
[[topics.examples]]
text = "电池坏了。"
items = ["电池"]
"""


def test_an_extract_task_shows_the_examples_of_the_texts_language(
    write: Callable[[str], Path],
) -> None:
    prompts = read_task_file(write(TOPICS))
    assert prompts.tasks == {}
    assert prompts.extract_tasks["topics"].messages("屏幕很好") == [
        {"role": "system", "content": "找出话题。"},
        {"role": "user", "content": "电池坏了。"},
        {"role": "assistant", "content": "电池\n"},
        {"role": "user", "content": "屏幕很好"},
    ]


def test_a_name_is_that_of_one_task_whatever_its_kind(write: Callable[[str], Path]) -> None:
    labels = read_task_file(write(MOOD.replace("[mood]", "[keywords]")))
    merged = PROMPTS | labels
    assert "keywords" in merged.tasks and "keywords" not in merged.extract_tasks
    assert "keywords" in (merged | PROMPTS).extract_tasks
    assert "keywords" not in (merged | PROMPTS).tasks


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"extract"', '"summary"', "topics.kind: must be 'labels' or 'extract'"),
        ('"extract"', "3", "topics.kind"),
        ('["bus"]', '["train"]', "the item 'train' does not occur in the example's text"),
        ('["bus"]', "[]", "topics.examples.0.items"),
        ("instructions", "labels", "topics.instructions"),
    ],
)
def test_what_is_wrong_with_an_extract_task_is_named(
    write: Callable[[str], Path], old: str, new: str, named: str
) -> None:
    with pytest.raises(TaskFileError, match=re.escape(named)):
        read_task_file(write(TOPICS.replace(old, new)))


# --- the reply's style ----------------------------------------------------------------


def test_the_table_reply_is_no_task_but_the_style_of_the_reply(
    write: Callable[[str], Path],
) -> None:
    prompts = read_task_file(write(MOOD + REPLY))
    assert set(prompts.tasks) == {"mood"}
    assert prompts.reply == ReplyStyle(persona={"en": "Be kind."}, cue_position="system")


def test_a_style_replaces_what_it_gives_and_leaves_the_rest_and_the_tasks(
    write: Callable[[str], Path],
) -> None:
    own = read_task_file(write('[reply]\npersona = { zh = "善良。" }\n'))
    merged = PROMPTS | own
    assert merged.reply == ReplyStyle(
        persona={"zh": "善良。"}, cue_position="user", cue_min_confidence=0.7
    )
    assert merged.tasks == BUILTIN
    # With a model that was trained on cues in another place, they stay there.
    assert (PROMPTS | MINI | own).reply.cue_position == "behind"


def test_the_last_file_that_has_a_style_decides(write: Callable[[str], Path]) -> None:
    own = read_task_file(write(MOOD + REPLY))
    assert (PROMPTS | MINI | own).reply == own.reply
    assert (PROMPTS | own | MINI).reply == MINI.reply
    assert (own | TaskFile()).reply == own.reply


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"Be kind."', '""', "reply.persona.en"),
        ('"Be kind."', '{ cn = "善良。" }', "reply.persona"),
        ('"Be kind."', "3", "reply.persona"),
        ('"Be kind."', "{}", "reply.persona"),
        ('"Be kind."', '{ zh = "" }', "reply.persona.zh"),
        ('"Be kind."', "{ zh = 3 }", "reply.persona.zh"),
        ('"system"', '"above"', "reply.cue_position"),
        ('"system"', "1", "reply.cue_position"),
        ("cue_position", "cue_positon", "reply.cue_positon"),
        (REPLY[REPLY.index("[reply]") :], 'reply = "Be kind."', "reply"),
        ("[reply]", "[[reply]]", "reply"),
    ],
)
def test_a_wrong_style_is_one_sentence_that_names_file_and_field(
    write: Callable[[str], Path], old: str, new: str, named: str
) -> None:
    assert old in REPLY
    path = write(REPLY.replace(old, new))
    message = error_of(path)
    assert str(path) in message
    assert f": {named}: " in message.replace(str(path), "")
    assert "\n" not in message


# --- texts by language ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "language", "text"),
    [
        ({"zh": "你好", "en": "Hi"}, "zh", "你好"),
        ({"zh": "你好", "en": "Hi"}, "en", "Hi"),
        ({"zh": "你好", "en": "Hi"}, "de", "Hi"),
        ({"de": "Hallo", "en": "Hi"}, "zh", "Hi"),
        ({"en": "Hi"}, "zh", "Hi"),
        ({"zh": "你好"}, "en", "你好"),
        ({"de": "Hallo", "zh": "你好"}, "fr", "Hallo"),
    ],
)
def test_a_text_missing_in_a_language_is_taken_in_english_or_in_the_first_there_is(
    texts: dict[str, str], language: str, text: str
) -> None:
    assert text_in(texts, language) == text


@pytest.mark.parametrize("language", ["zh", "en", "ja"])
def test_a_single_string_serves_every_language(language: str) -> None:
    cue = Label.model_validate({"value": "up", "text": "happy", "cue": "Well."}).cue
    assert cue is not None and text_in(cue, language) == "Well."


# --- examples -------------------------------------------------------------------------


def test_examples_are_read_from_the_file_beside_the_task_file(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = examples(up=MIN_EXAMPLES, down=MIN_EXAMPLES + 1)
    first = {"text": "真棒　！", "label": "up", "kind": "review", "lang": "zh"}
    (tmp_path / "moods.jsonl").write_text(lines(first, *rows), encoding="utf-8")
    read = read_task_file(write(LEARNED)).tasks["mood"].examples
    # Unknown fields, such as the language, are for people.
    assert read[0] == Example(text="真棒　！", label="up", kind="review")
    assert [(each.text, each.label, each.kind) for each in read[1:]] == [
        (row["text"], row["label"], "") for row in rows
    ]


def test_empty_lines_between_examples_are_passed_over(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = examples(up=MIN_EXAMPLES, down=MIN_EXAMPLES)
    content = "\n" + lines(*rows).replace("\n", "\r\n \n\n")
    (tmp_path / "moods.jsonl").write_text(content, encoding="utf-8")
    assert len(read_task_file(write(LEARNED)).tasks["mood"].examples) == len(rows)


def test_examples_that_are_not_beside_the_task_file_are_taken_from_the_builtin_ones(
    write: Callable[[str], Path],
) -> None:
    own = read_task_file(
        write(
            '[feeling]\ninstructions = "How?"\nexamples = "sentiment.jsonl"\nlabels = ['
            '{ value = "negative", text = "bad" }, { value = "neutral", text = "so" }, '
            '{ value = "positive", text = "good" }]\n'
        )
    )
    assert own.tasks["feeling"].examples == BUILTIN["sentiment"].examples


def test_examples_beside_the_task_file_come_before_builtin_ones_of_that_name(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = examples(up=MIN_EXAMPLES, down=MIN_EXAMPLES)
    (tmp_path / "sentiment.jsonl").write_text(lines(*rows), encoding="utf-8")
    tasks = read_task_file(write(LEARNED.replace("moods.jsonl", "sentiment.jsonl"))).tasks
    assert len(tasks["mood"].examples) == len(rows)


@pytest.mark.parametrize(
    "name",
    ["sub/moods.jsonl", "./moods.jsonl", "../moods.jsonl", "/etc/passwd", "moods.jsonl/", "."],
)
def test_examples_in_another_folder_are_refused_even_if_they_are_there(
    write: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    content = lines(*examples(up=MIN_EXAMPLES, down=MIN_EXAMPLES))
    (tmp_path / "sub").mkdir()
    for folder in (tmp_path, tmp_path / "sub"):
        (folder / "moods.jsonl").write_text(content, encoding="utf-8")
    path = write(LEARNED.replace("moods.jsonl", name))
    message = error_of(path)
    assert str(path) in message and repr(name) in message and "\n" not in message


@pytest.mark.parametrize("name", ["moods.jsonl", "folder.jsonl", ".."])
def test_examples_that_are_missing_or_no_file_are_named(
    write: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    path = write(LEARNED.replace("moods.jsonl", name))
    message = error_of(path)
    assert str(path) in message and "cannot read the examples" in message and "\n" not in message
    assert str(tmp_path / name) in message


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("good morning", id="no JSON"),
        pytest.param('{"text": "a", "label": "up"', id="cut off"),
        pytest.param('["a", "up"]', id="a list"),
        pytest.param('"a"', id="a string"),
        pytest.param("null", id="null"),
        pytest.param('{"text": "a"}', id="no label"),
        pytest.param('{"label": "up"}', id="no text"),
        pytest.param('{"text": "", "label": "up"}', id="an empty text"),
        pytest.param('{"text": 1, "label": "up"}', id="a number for a text"),
        pytest.param('{"text": "a", "label": true}', id="no string for a label"),
        pytest.param('{"text": "a", "label": "up", "kind": 1}', id="a number for a kind"),
        pytest.param(r'{"text": "\ud800", "label": "up"}', id="half a character"),
        pytest.param("[" * 100_000, id="nested too deep"),
        pytest.param("1" * 10_000, id="a number too long"),
    ],
)
def test_a_bad_line_of_examples_is_named_with_its_number(
    write: Callable[[str], Path], tmp_path: Path, line: str
) -> None:
    rows = examples(up=MIN_EXAMPLES, down=MIN_EXAMPLES)
    file = tmp_path / "moods.jsonl"
    file.write_text(lines(*rows[:3]) + "\n" + line + "\n" + lines(*rows[3:]), encoding="utf-8")
    message = error_of(write(LEARNED))
    assert f"{file}, line 5:" in message and "\n" not in message


def test_examples_that_are_not_utf_8_are_named(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "moods.jsonl"
    file.write_bytes(lines({"text": "你", "label": "up"}).encode("gbk"))
    message = error_of(write(LEARNED))
    assert str(file) in message and "\n" not in message


def test_an_example_of_an_unknown_label_is_refused_with_the_label(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = examples(up=MIN_EXAMPLES, down=MIN_EXAMPLES, sideways=1)
    (tmp_path / "moods.jsonl").write_text(lines(*rows), encoding="utf-8")
    path = write(LEARNED)
    message = error_of(path)
    assert str(path) in message and "mood" in message and "'sideways'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("counts", "label", "count"),
    [
        ({"up": MIN_EXAMPLES, "down": MIN_EXAMPLES - 1}, "down", MIN_EXAMPLES - 1),
        ({"up": MIN_EXAMPLES}, "down", 0),
        ({"up": 1, "down": 100}, "up", 1),
    ],
)
def test_a_label_with_too_few_examples_is_refused_with_both_numbers(
    write: Callable[[str], Path], tmp_path: Path, counts: dict[str, int], label: str, count: int
) -> None:
    (tmp_path / "moods.jsonl").write_text(lines(*examples(**counts)), encoding="utf-8")
    path = write(LEARNED)
    message = error_of(path)
    assert str(path) in message and "mood" in message
    assert f"'{label}' has {count} examples" in message and f"at least {MIN_EXAMPLES}" in message
    assert "\n" not in message


def test_the_least_number_of_examples_is_enough() -> None:
    rows = examples(up=MIN_EXAMPLES, down=MIN_EXAMPLES)
    assert len(task(examples=[Example.model_validate(row) for row in rows]).examples) == 20


def test_examples_are_no_part_of_what_is_printed_or_sent_of_a_task() -> None:
    assert "examples" not in BUILTIN["sentiment"].model_dump()
    assert "examples" not in repr(BUILTIN["sentiment"])


# --- the built-in examples ------------------------------------------------------------


def test_the_builtin_sentiment_examples_are_many_and_balanced() -> None:
    rows = builtin_rows("sentiment.jsonl")
    assert len(rows) == len(BUILTIN["sentiment"].examples) >= 1200
    counts = Counter((row["label"], row["lang"]) for row in rows)
    groups = {(value, lang) for value in BUILTIN["sentiment"].values for lang in ("zh", "en")}
    assert set(counts) == groups
    assert max(counts.values()) <= 1.05 * min(counts.values())


def test_the_builtin_intent_examples_are_at_least_forty_a_label_and_language() -> None:
    rows = builtin_rows("intent.jsonl")
    assert len(rows) == len(BUILTIN["intent"].examples)
    counts = Counter((row["label"], row["lang"]) for row in rows)
    groups = {(value, lang) for value in BUILTIN["intent"].values for lang in ("zh", "en")}
    assert set(counts) == groups
    assert min(counts.values()) >= 40


def test_the_builtin_emotion_examples_are_at_least_sixty_a_label_and_language() -> None:
    rows = builtin_rows("emotion.jsonl")
    assert len(rows) == len(BUILTIN["emotion"].examples)
    counts = Counter((row["label"], row["lang"]) for row in rows)
    groups = {(value, lang) for value in BUILTIN["emotion"].values for lang in ("zh", "en")}
    assert set(counts) == groups
    assert min(counts.values()) >= 60


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_examples_are_unique_and_each_has_a_kind(name: str) -> None:
    read = BUILTIN[name].examples
    texts = Counter(" ".join(each.text.casefold().split()) for each in read)
    assert [text for text, count in texts.items() if count > 1] == []
    assert all(each.kind and each.text == each.text.strip() for each in read)


@pytest.mark.parametrize("name", BUILTIN)
def test_the_language_of_a_builtin_example_is_that_of_its_script(name: str) -> None:
    for row in builtin_rows(f"{name}.jsonl"):
        if any(char.isalpha() for char in row["text"]):  # some are emoji alone
            has_han = any("\u4e00" <= char <= "\u9fff" for char in row["text"])
            assert has_han == (row["lang"] == "zh"), row["text"]


# --- the bundled model's own file -----------------------------------------------------


def test_the_bundled_model_keeps_the_prompts_it_was_trained_with() -> None:
    assert MINI.reply == ReplyStyle(
        persona={"en": "你是一位温暖真诚的对话伙伴，请用用户的语言，简短自然地回应。"},
        cue_position="behind",
    )
    assert set(MINI.tasks) == {"sentiment"}
    sentiment = MINI.tasks["sentiment"]
    assert sentiment.instructions == (
        "你是一个冷酷的情感分析师，只关注情绪极性，不与用户对话。"
        "请判断用户这句话的情感，只能回答一个词：正面、负面或中性。"
    )
    assert (sentiment.fallback, sentiment.min_confidence) == ("neutral", 0.0)
    assert sentiment.min_label_mass == 0.01
    assert [(x.value, x.text, x.emoji, x.cue) for x in sentiment.labels] == [
        ("positive", "正面", "😄", {"en": "用户此刻的情绪：正面😄"}),
        ("negative", "负面", "😢", {"en": "用户此刻的情绪：负面😢"}),
        ("neutral", "中性", "😐", {"en": "用户此刻的情绪：中性😐"}),
    ]
    assert sentiment.poles == ("positive", "negative")
    assert sentiment.examples == BUILTIN["sentiment"].examples


def test_the_bundled_models_file_leaves_the_other_tasks() -> None:
    merged = PROMPTS | MINI
    assert set(merged.tasks) == {"sentiment", "emotion", "intent"}
    assert merged.tasks["intent"] == BUILTIN["intent"]
    assert merged.tasks["sentiment"] == MINI.tasks["sentiment"]
    assert merged.reply == MINI.reply


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
        ('cue = "Well."', 'cue = ""', "mood.labels.0.cue"),
        ('cue = "Well."', "cue = ['a']", "mood.labels.0.cue"),
        ('cue = "Well."', "cue = {}", "mood.labels.0.cue"),
        ('cue = "Well."', 'cue = { zh = "" }', "mood.labels.0.cue.zh"),
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
        # Where it stood once.
        ('fallback = "down"', 'cue = "They are {text}."', "mood.cue"),
        ('["up", "down"]', '["up"]', "mood.poles"),
        ('["up", "down"]', '["up", "down", "up"]', "mood.poles"),
        ('["up", "down"]', '"up"', "mood.poles"),
        ('["up", "down"]', '["up", "sideways"]', "pole 'sideways'"),
        ('["up", "down"]', '["happy", "down"]', "pole 'happy'"),
        ('fallback = "down"', "examples = 3", "mood.examples"),
        ('fallback = "down"', "examples = [1]", "mood.examples.0"),
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


# --- the analyst's prompt --------------------------------------------------------------


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
        {"poles": ("up", "down")},
        {"poles": ("down", "up")},
        {"adapter": "poet"},
    ],
    ids=str,
)
def test_the_version_changes_when_anything_changes(changes: dict[str, Any]) -> None:
    assert task(**changes).version != task().version


def test_equal_tasks_have_the_same_version() -> None:
    assert task().version == task().version
    assert read_task_file().tasks["sentiment"].version == BUILTIN["sentiment"].version


def test_examples_do_not_change_the_version() -> None:
    rows = examples(up=MIN_EXAMPLES, down=MIN_EXAMPLES)
    learned = task(examples=[Example.model_validate(row) for row in rows])
    assert learned != task()
    assert learned.version == task().version


def test_a_cue_does_not_change_the_version_for_it_changes_no_judgement() -> None:
    cued = task(labels=(Label(value="up", text="happy", cue={"en": "Well."}), task().labels[1]))
    assert cued != task()
    assert cued.version == task().version


def test_a_task_cannot_be_changed_behind_its_version() -> None:
    with pytest.raises(ValidationError):
        task().instructions = "other"  # type: ignore[misc] # the rule under test


# --- tasks that a client describes ----------------------------------------------------


def test_an_inline_task_scores_the_labels_themselves_and_has_no_fallback() -> None:
    inline = inline_task("Spam?", ["yes", "no"])
    assert inline.instructions == "Spam?"
    assert [(x.value, x.text) for x in inline.labels] == [("yes", "yes"), ("no", "no")]
    assert inline.fallback is None and inline.poles is None and inline.examples == ()
    assert [label.cue for label in inline.labels] == [None, None]
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
    assert read_task_file(path).tasks["mood"].name == "mood"


def test_toml_nested_too_deep_is_a_task_file_error(tmp_path: Path) -> None:
    path = tmp_path / "tasks.toml"
    path.write_text("x = " + "[" * 100_000)
    with pytest.raises(TaskFileError):
        read_task_file(path)
