"""The rules that check whether answers are to the point."""

from pathlib import Path

import pytest

from benchmarks import points
from benchmarks.points import CELEBRATES, COMFORTS, Opener
from benchmarks.reply_quality import Answer
from training.corpus import read_openers, read_templates
from training.similar import Lines

LOSS = Opener("My cat died", "en", "negative", [CELEBRATES], "cat|loss")
QUESTION = Opener("What is the capital of Peru?", "en", "neutral", [CELEBRATES], "peru|capital",
                  admits=True, truth="Lima")  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "tones"),
    [
        ("恭喜你，努力没有白费！", {CELEBRATES}),
        ("太好了，去哪里庆祝？", {CELEBRATES}),
        ("听到这个消息我很难过，节哀。", {COMFORTS}),
        ("嗯，你平时几点下班？", set()),
        ("Congratulations! What a day.", {CELEBRATES}),
        ("I'm so happy for you.", {CELEBRATES}),
        ("I'm sorry you lost it.", {COMFORTS}),
        ("That must be hard. What happened?", {COMFORTS}),
        ("What did you have for lunch?", set()),
        ("I'm glad you told me.", set()),
        ("Sorry, I can't see the clock.", set()),
    ],
)
def test_the_tone_of_an_answer(answer: str, tones: set[str]) -> None:
    assert points.tones(answer) == tones


def test_a_loss_must_not_be_celebrated_and_may_be_comforted() -> None:
    assert not points.has_right_tone(LOSS, "How wonderful! Enjoy it.")
    assert points.has_right_tone(LOSS, "I'm so sorry about your cat.")
    assert points.has_right_tone(LOSS, "Tell me about it.")


def test_an_answer_with_a_word_of_the_topic_is_to_the_point() -> None:
    assert points.is_to_the_point(LOSS, "Cats leave such a gap.")
    assert not points.is_to_the_point(LOSS, "I see, that is a morning class.")


@pytest.mark.parametrize(
    ("answer", "does"),
    [
        ("I don't know, sorry.", True),
        ("I can't look that up from here.", True),
        ("It is Lima.", True),
        ("It is Bogota.", False),
        ("Absolutely not.", False),
        ("这个我说不准，最好查一下。", True),
    ],
)
def test_an_answer_admits_or_is_correct(answer: str, does: bool) -> None:
    assert points.admits(QUESTION, answer) is does


def test_shares_count_every_answer_and_admissions_only_where_due() -> None:
    to_loss = [Answer("How wonderful!", "negative", 1), Answer("Sorry about it.", "negative", 2)]
    answers = [to_loss, [Answer("The capital? I don't know.", "neutral", 1)]]
    shares = points.shares([LOSS, QUESTION], answers)
    assert shares["answers"] == 3
    assert shares["tone agrees"] == 0.6667
    assert shares["to the point"] == 0.3333
    assert shares["admits"] == 1.0


def test_the_openers_are_120_and_training_has_none_of_them() -> None:
    openers = points.read_openers()
    assert [sum(o.lang == lang for o in openers) for lang in ("zh", "en")] == [60, 60]
    assert len({o.text for o in openers}) == 120
    measured = Lines(o.text for o in openers)
    trained = {row.user for row in [*read_openers(), *read_templates()]}
    assert not [user for user in trained if measured.has_near(user)]


def test_held_out_pairs_are_not_in_the_training_data() -> None:
    held_out = points.read_pairs()
    trained = {row.user for row in read_openers()}
    assert held_out and not [user for g in held_out for user in g["users"] if user in trained]


def test_pairs_are_read_from_the_given_file(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"users": ["a"], "replies": ["b"]}\n')
    assert points.read_pairs(tmp_path / "pairs.jsonl") == [{"users": ["a"], "replies": ["b"]}]
