"""Heavy requests for `benchmarks.fairness` and `tests/faults`. No text repeats.

Knows the bodies of requests, not how they are sent.
"""

import itertools
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

NUM_TEXTS = 256
NUM_LABELLED_TEXTS = 64
NUM_CHOICES = 16
NUM_QUESTIONS = 400

WHEN = {
    "zh": ["今天早上", "昨天晚上", "周末", "午饭以后", "上个月", "下班路上", "刚才", "放假第一天"],
    "en": ["This morning", "Last night", "On Sunday", "After lunch", "Last month", "Just now"],
}
WHO = {
    "zh": ["我和同事", "妈妈", "我的室友", "楼下的邻居", "弟弟", "隔壁班的老师", "我最好的朋友"],
    "en": ["my sister", "our neighbour", "the whole team", "my old teacher", "a friend of mine"],
}
WHAT = {
    "zh": ["又做了一桌菜", "把钥匙弄丢了", "去医院排了队", "收到了快递", "改了一遍报告",
           "赢了比赛"],
    "en": ["cooked for everyone", "lost the keys", "waited at the bank", "won the game",
           "wrote the report", "missed the last train"],
}  # fmt: skip
FEELING = {
    "zh": ["心里有点难过", "大家都很高兴", "说不上好坏", "真是气人", "总算松了一口气"],
    "en": ["and it made us sad", "and everybody was happy", "as on any other day",
           "and nobody was pleased", "which was a relief"],
}  # fmt: skip
KINDS = ("slow", "missing", "wrong", "broken", "unexpected")
THINGS = ("parcel delivery", "phone support", "monthly invoice", "login page", "refund form",
          "gift card", "garden chair", "opening hours", "spare part", "电池")  # fmt: skip
LABELS = [f"{kind} {thing}" for kind in KINDS for thing in THINGS]


class Request(NamedTuple):
    """A POST request. path: below /v1/."""

    path: str
    body: dict[str, Any]


class Writer:
    """Writes requests for a model, in the same order every time."""

    def __init__(self, model: str, endless: Mapping[str, float]) -> None:
        """endless: a `logit_bias` with which no reply ends by itself."""
        self._model, self._endless = model, endless
        self._random, self._numbers = random.Random(15), itertools.count(100)

    def sentence(self, language: str = "zh") -> str:
        """An everyday sentence of about twenty tokens."""
        lists = (each[language] for each in (WHEN, WHO, WHAT, FEELING))
        when, who, what, feeling = map(self._random.choice, lists)
        number = next(self._numbers)
        if language == "zh":
            return f"{when}{who}{what}，算起来是第{number}次了，{feeling}。"
        return f"{when} {who} {what}, for time number {number}, {feeling}."

    def sentences(self, number: int) -> list[str]:
        """Alternately Chinese and English."""
        return [self.sentence("en" if i % 2 else "zh") for i in range(number)]

    def text(self, num_sentences: int) -> str:
        """Several sentences as one text."""
        return " ".join(self.sentences(num_sentences))

    def chat(self, content: str, **changes: Any) -> Request:
        """A chat with one message."""
        messages = [{"role": "user", "content": content}]
        return Request("chat/completions", {"model": self._model, "messages": messages, **changes})

    def endless(self, content: str, **changes: Any) -> Request:
        """A chat without sentiment that ends at `max_tokens` or when the context is full."""
        return self.chat(content, sentiment=False, logit_bias=dict(self._endless), **changes)

    def short_chat(self) -> Request:
        """A chat that should be answered quickly."""
        return self.chat(self.sentence(), stream=True, max_tokens=8)

    def stream(self) -> Request:
        """A stream of one token per chunk that runs until the client disconnects."""
        return self.endless(self.sentence(), stream=True)

    def classify(self, num_texts: int = NUM_TEXTS) -> Request:
        """The sentiment of many texts."""
        return Request("classify", {"input": self.sentences(num_texts)})

    def own_labels(self, num_texts: int = NUM_LABELLED_TEXTS) -> Request:
        """Fifty labels of several tokens each, in a new task."""
        body = {
            "instructions": f"Customer {next(self._numbers)} writes to the shop. What about?",
            "labels": LABELS,
            "input": self.sentences(num_texts),
        }
        return Request("classify", body)

    def choices(self, **changes: Any) -> Request:
        """Sixteen answers to one message."""
        return self.endless(self.sentence(), n=NUM_CHOICES, **changes)

    def long_prompt(self, num_sentences: int) -> Request:
        """A long prompt with an answer of one token."""
        return self.endless(self.text(num_sentences), max_tokens=1)

    def decisions(self, num_questions: int = NUM_QUESTIONS) -> Request:
        """Questions of all three types about a new input."""
        questions = [self._question(number) for number in range(num_questions)]
        body = {"model": self._model, "input": self.text(4), "questions": questions}
        return Request("decisions", body)

    def _question(self, number: int) -> dict[str, Any]:
        match number % 4:
            case 0:
                options = [{"value": value} for value in ("family", "work", f"day {number}")]
                question = f"Where does number {number} belong?"
                return {"type": "choice", "instructions": question, "choices": options}
            case 1:
                levels = [{"label": label} for label in ("not at all", "a little", "very")]
                question = f"How much does person {number} mind?"
                return {"type": "score", "instructions": question, "levels": levels}
            case _:
                return {"type": "predicate", "instructions": f"Person {number} is mentioned."}
