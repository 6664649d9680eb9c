"""Tasks and the reply's style as data: instructions, labels, examples, persona.

Knows neither files nor tokens.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from server.core.roles.language import ENGLISH, LANGUAGES, language_of

# With fewer examples of a label, cross-validation is unreliable.
MIN_EXAMPLES = 10
# Used if a text is missing in the user's language.
DEFAULT_LANGUAGE = ENGLISH

NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


def _by_language(value: Any) -> Any:
    if isinstance(value, dict) and (unknown := sorted(set(value) - set(LANGUAGES))):
        raise ValueError(
            f"the language {unknown[0]!r} is not supported; use {' or '.join(LANGUAGES)}"
        )
    return {DEFAULT_LANGUAGE: value} if isinstance(value, str) else value


# A text by language (server/core/roles/language.py). A single string serves every language.
Texts = Annotated[dict[str, NonEmpty], Field(min_length=1), BeforeValidator(_by_language)]


def text_in(texts: Mapping[str, str], language: str) -> str:
    """The text in the language; else in English; else in its first language."""
    if language in texts:
        return texts[language]
    return texts.get(DEFAULT_LANGUAGE) or next(iter(texts.values()))


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Label(_Frozen):
    """One possible answer: `value` for clients, `text` for the model, `emoji` for people.

    cue: the text added to the conversation when this is the user's mood; None: nothing is added.
    """

    value: NonEmpty
    text: NonEmpty
    emoji: str = ""
    cue: Texts | None = None


class Example(BaseModel):
    """A text and the value of its label. `kind` groups similar texts, such as reviews."""

    model_config = ConfigDict(frozen=True)

    text: NonEmpty
    label: NonEmpty
    kind: str = ""


class Task(_Frozen):
    """An instruction, the labels that may answer it, and when to fall back.

    poles: the values of the labels that count +1 and -1 in a result's `score`.
    examples: labelled texts that the task's judge is fitted to.
    judge: the file of an already fitted judge, used instead of the examples.
    adapter: the name of the adapter that the task is judged with; "" for the base model.
    """

    name: NonEmpty
    instructions: NonEmpty
    labels: Annotated[tuple[Label, ...], Field(min_length=2, max_length=255)]
    fallback: str | None = None
    min_confidence: Probability = 0.0
    min_label_mass: Probability = 0.0
    poles: tuple[str, str] | None = None
    # Left out of the version if empty, so that judges fitted by earlier releases stay valid.
    adapter: str = Field(default="", exclude_if=lambda name: not name)
    examples: tuple[Example, ...] = Field(default=(), exclude=True, repr=False)
    judge: Path | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _labels_are_consistent(self) -> "Task":
        for name in ("value", "text"):
            seen = [getattr(label, name) for label in self.labels]
            if len(set(seen)) != len(seen):
                raise ValueError(f"label {name}s must differ from each other")
        if self.fallback is not None and self.fallback not in self.values:
            raise ValueError(f"fallback {self.fallback!r} is not one of the labels")
        for pole in self.poles or ():
            if pole not in self.values:
                raise ValueError(f"pole {pole!r} is not one of the labels")
        if self.poles is not None and self.poles[0] == self.poles[1]:
            raise ValueError("the poles must be two different labels")
        return self

    @model_validator(mode="after")
    def _examples_are_enough(self) -> "Task":
        counts = Counter(example.label for example in self.examples)
        if unknown := sorted(counts.keys() - set(self.values)):
            raise ValueError(f"the label {unknown[0]!r} of an example is not one of the labels")
        for value in self.values if self.examples else ():
            if counts[value] < MIN_EXAMPLES:
                raise ValueError(
                    f"the label {value!r} has {counts[value]} examples; give at least "
                    f"{MIN_EXAMPLES} for every label, or leave 'examples' out"
                )
        return self

    @property
    def values(self) -> list[str]:
        """The labels' values, in order."""
        return [label.value for label in self.labels]

    @cached_property
    def version(self) -> str:
        """A digest of all that can change a result, except the examples."""
        dumped = self.model_dump_json(exclude={"labels": {"__all__": {"cue"}}})
        return hashlib.sha256(dumped.encode()).hexdigest()[:16]

    def messages(self, text: str) -> list[dict[str, str]]:
        """The analyst's conversation about `text`. The instruction is first, to be cached."""
        return [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": text},
        ]


class ExtractExample(_Frozen):
    """A text and the pieces to find in it, copied exactly."""

    text: NonEmpty
    items: Annotated[tuple[NonEmpty, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _items_are_in_the_text(self) -> "ExtractExample":
        for item in self.items:
            if item not in self.text:
                raise ValueError(f"the item {item!r} does not occur in the example's text")
        return self


class ExtractTask(_Frozen):
    """A task that finds pieces of a text: an instruction, and examples for the prompt.

    The prompt contains only examples in the text's language.
    """

    name: NonEmpty
    instructions: Texts
    examples: tuple[ExtractExample, ...] = ()

    @cached_property
    def version(self) -> str:
        """A digest of all that can change a result."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def messages(self, text: str) -> list[dict[str, str]]:
        """The conversation about `text`; an answer has one item per line."""
        language = language_of(text)
        messages = [{"role": "system", "content": text_in(self.instructions, language)}]
        for example in self.examples:
            if language_of(example.text) == language:
                answer = "".join(f"{item}\n" for item in example.items)
                messages += [
                    {"role": "user", "content": example.text},
                    {"role": "assistant", "content": answer},
                ]
        return [*messages, {"role": "user", "content": text}]


class ReplyStyle(_Frozen):
    """The reply's persona and cue. A task file may set some fields; the others keep their values.

    persona: the system prompt of a chat without one of its own.
    cue_task: the task whose label determines the cue.
    cue_position: where the cue is added: to the first system message, to the last user message,
    or in a system message after the conversation.
    cue_min_confidence: a label less likely than this adds no cue.
    """

    persona: Texts = Field(default_factory=dict)
    cue_task: NonEmpty = "sentiment"
    cue_position: Literal["system", "user", "behind"] = "user"
    cue_min_confidence: Probability = 0.0

    def __or__(self, other: "ReplyStyle") -> "ReplyStyle":
        """This style, updated with the fields that are set in the other one."""
        update = {name: getattr(other, name) for name in other.model_fields_set}
        return self.model_copy(update=update)


def inline_task(instructions: str, labels: Sequence[str]) -> Task:
    """A task from a client's request: each label is its own text, and there is no fallback.

    Raises:
        ValidationError: the labels repeat, or are too few or too many.
    """
    return Task(
        name="inline",
        instructions=instructions,
        labels=tuple(Label(value=label, text=label) for label in labels),
    )
