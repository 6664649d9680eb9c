"""The analyst's prompts and labels as token ids."""

import contextlib
import unicodedata
from collections import Counter
from functools import cached_property

from server.core.engine.adapters import BASE, Adapter
from server.core.roles.tasks import MIN_EXAMPLES, Example, Task
from server.core.text.tokenizer import ChatTokenizer
from server.errors import ContextLengthError, InvalidRequestError

# Limits on the tokens of all labels together, and of one label, which is scored in one step.
MAX_LABEL_TOKENS, MAX_TOKENS_PER_LABEL = 1024, 64
# Everyday sentences in both languages and every mood, to measure the labels' prior: how likely the
# model finds each label regardless of the text. An empty text would not do: it really is neutral,
# so its prior would penalise a neutral label (arXiv 2102.09690 and 2309.17249).
REFERENCE_TEXTS = (
    "今天玩得真开心", "这家店的服务太差了", "会议改到周三下午三点", "帮我写一封请假的邮件",
    "谢谢你，帮了我大忙", "快递怎么还没到", "北京到上海坐高铁要多久", "我有点担心明天的考试",
    "I love this song", "The screen broke after two days", "The shop opens at nine",
    "Please translate this sentence", "What a wonderful surprise", "Nobody answered my call",
    "How many people live in Canada?", "I miss my old friends",
)  # fmt: skip


class TaskPrompts:
    """The analyst's prompts of one task, and its labels, as token ids."""

    def __init__(
        self, task: Task, tokenizer: ChatTokenizer, max_context: int, adapter: Adapter = BASE
    ) -> None:
        """max_context: the model's. adapter: the one that the task names."""
        self.task, self._tokenizer, self.adapter = task, tokenizer, adapter
        self.max_context = max_context - adapter.num_virtual_tokens

    @cached_property
    def num_shared(self) -> int:
        """The number of first tokens that all prompts of the task share: its instruction."""
        one, other = self.encode("a"), self.encode("我")
        return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)

    def encode(self, text: str) -> list[int]:
        """Ids of the prompt about the text.

        Raises:
            ChatTemplateError: the template refuses the task's prompt.
        """
        return self._tokenizer.encode_chat(self.task.messages(text))

    @cached_property
    def examples(self) -> tuple[list[Example], list[list[int]]]:
        """The task's examples that fit the context with the labels, and their prompts' ids.

        Both lists are empty if fewer than MIN_EXAMPLES of a label fit.
        """
        encoded = [(each, self.encode(normalise(each.text))) for each in self.task.examples]
        short_enough = [(each, ids) for each, ids in encoded if self.has_room_for(ids)]
        counts = Counter(each.label for each, _ in short_enough)
        if any(counts[value] < MIN_EXAMPLES for value in self.task.values):
            return [], []
        return [each for each, _ in short_enough], [ids for _, ids in short_enough]

    def has_room_for(self, prompt_ids: list[int]) -> bool:
        """Whether the prompt and the labels' texts fit the context together."""
        return len(prompt_ids) + self._num_forward_label_tokens < self.max_context

    @cached_property
    def references(self) -> list[tuple[list[int], list[list[int]]]]:
        """The reference texts' prompts as ids, each with the ids of the labels' texts.

        Prompts that do not fit the context are left out.
        """
        references = []
        for text in REFERENCE_TEXTS:
            ids = self.encode(text)
            with contextlib.suppress(ContextLengthError):
                references.append((ids, self.labels(len(ids))))
        return references

    def labels(
        self, num_prompt_tokens: int, *, input_param: str = "input", labels_param: str = "labels"
    ) -> list[list[int]]:
        """Ids of the labels' texts, which are scored after a prompt.

        input_param, labels_param: the request's fields with the text and the labels, for errors.

        Raises:
            InvalidRequestError: a label is too long, or all together are.
            ContextLengthError: prompt and labels are too long for the model.
        """
        num_label_tokens = sum(map(len, self._label_ids))
        if num_label_tokens > MAX_LABEL_TOKENS:
            raise InvalidRequestError(
                f"'{labels_param}': the labels to choose from have {num_label_tokens} tokens "
                f"together; at most {MAX_LABEL_TOKENS} are allowed. Use fewer or shorter labels.",
                param=labels_param,
            )
        longest = max(map(len, self._label_ids))
        if longest > MAX_TOKENS_PER_LABEL:
            raise InvalidRequestError(
                f"'{labels_param}': a label to choose from has {longest} tokens; at most "
                f"{MAX_TOKENS_PER_LABEL} are allowed. Use a shorter label.",
                param=labels_param,
            )
        num_tokens = num_prompt_tokens + self._num_forward_label_tokens
        if num_tokens >= self.max_context:
            raise ContextLengthError(num_tokens, self.max_context, input_param)
        return self._label_ids

    @cached_property
    def _label_ids(self) -> list[list[int]]:
        return [self._tokenizer.encode_text(label.text) for label in self.task.labels]

    @cached_property
    def _num_forward_label_tokens(self) -> int:
        """The label tokens that one forward may have after a prompt: all but each label's last."""
        return sum(len(ids) - 1 for ids in self._label_ids)


def normalise(text: str) -> str:
    """The text as it is judged and cached: in NFC, each run of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())
