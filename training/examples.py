"""Turns corpus rows into token ids exactly as the server renders them.

Encoding half a million conversations with the chat template would take longer than training on
them. So turns are assembled here from encoded texts, and `check_rendering` checks on a sample of
rows that the server would send the same ids.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.core.engine.checkpoint import BUNDLED_FOLDER
from server.core.roles.task_files import TASK_FILE_NAME, TaskFile, read_task_file
from server.core.text.tokenizer import ChatTokenizer
from training.corpus import ReplyRow, SentimentRow

PLAIN_SYSTEM = "You are a helpful assistant"
IGNORED = -100
# In `targets`: the label, whose distribution is learned.
LABEL = -1


@dataclass(frozen=True)
class Example:
    """Token ids after a shared prefix. targets: IGNORED where nothing is learned.

    probabilities: of the labels, for the target LABEL.
    """

    ids: list[int]
    targets: list[int]
    probabilities: Sequence[float] = ()


class Renderer:
    """Builds examples of both roles."""

    def __init__(self, tokenizer: ChatTokenizer, prompts: TaskFile) -> None:
        task, self._style = prompts.tasks["sentiment"], prompts.reply
        encode = tokenizer.encode_text
        self.end = tokenizer.marker_id("<|im_end|>")
        self.start = tokenizer.marker_id("<|im_start|>")
        self._encode, self._task = encode, task
        self.newline = encode("\n")
        self.header = {role: [self.start, *encode(f"{role}\n")] for role in ROLES}
        self.values = [label.value for label in task.labels]
        # Each label is one token of this tokenizer.
        self.label_ids = [single(encode(label.text)) for label in task.labels]
        self.cues = {x.value: encode(_only(x.cue)) for x in task.labels}
        self.instructions = self.turn("system", encode(task.instructions))
        self.persona = self.turn("system", encode(_only(self._style.persona)))
        self.plain = self.turn("system", encode(PLAIN_SYSTEM))

    def sentiment(
        self, text: Sequence[int], probabilities: Sequence[float], learn_text: bool
    ) -> Example:
        """The analyst's answer about `text`, after the prefix `instructions`."""
        prompt = self.turn("user", text) + self.header["assistant"]
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        ids = [*prompt, self.label_ids[best], self.end]
        targets = [IGNORED] * len(prompt) + [LABEL, self.end]
        if learn_text:
            begin = len(self.header["user"])
            targets[begin : begin + len(text)] = text
        return Example(ids, targets, probabilities)

    def reply(
        self,
        history: Sequence[tuple[Sequence[int], Sequence[int]]],
        user: Sequence[int],
        label: str | None,
        reply: Sequence[int],
    ) -> Example:
        """The reply, after the prefix `persona` (with a label) or `plain` (without)."""
        prompt: list[int] = []
        for past_user, past_reply in history:
            prompt += self.turn("user", past_user) + self.turn("assistant", past_reply)
        prompt += self.turn("user", user)
        if label is not None:
            prompt += self.turn("system", self.cues[label])
        prompt += self.header["assistant"]
        answer = [*reply, self.end]
        return Example(prompt + answer, [IGNORED] * len(prompt) + answer)

    def turn(self, role: str, ids: Sequence[int]) -> list[int]:
        return [*self.header[role], *ids, self.end, *self.newline]


ROLES = ("system", "user", "assistant")


def check_rendering(
    renderer: Renderer,
    tokenizer: ChatTokenizer,
    prompts: TaskFile,
    texts: Sequence[SentimentRow],
    replies: Sequence[ReplyRow],
) -> None:
    """Checks the examples of random rows.

    Raises:
        AssertionError: an example differs from what the server would send.
    """
    encode = tokenizer.encode_text
    task = prompts.tasks["sentiment"]
    for row in random.Random(0).sample(list(texts), 100):
        served = tokenizer.encode_chat(task.messages(row.text))
        example = renderer.sentiment(encode(row.text), [1.0], False)
        assert served == renderer.instructions + example.ids[:-2], row.text
    label = task.labels[0]
    for pair in random.Random(0).sample(list(replies), 100):
        served = tokenizer.encode_chat(
            [
                {"role": "system", "content": _only(prompts.reply.persona)},
                {"role": "user", "content": pair.user},
                {"role": "system", "content": _only(label.cue)},
            ]
        )
        reply = encode(pair.reply)
        example = renderer.reply([], encode(pair.user), label.value, reply)
        assert served == renderer.persona + example.ids[: -len(reply) - 1], pair.user


def trained_prompts() -> TaskFile:
    """The bundled model's prompts, which are stored beside its weights."""
    return read_task_file() | read_task_file(BUNDLED_FOLDER / TASK_FILE_NAME)


def _only(texts: Mapping[str, str] | None) -> str:
    """The text of a prompt that has the same text for all languages."""
    assert texts is not None
    [text] = texts.values()
    return text


def single(ids: Sequence[int]) -> int:
    [token_id] = ids
    return token_id
