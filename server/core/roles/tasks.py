"""Prompts as data: what the analyst is asked, which labels it may answer, how the reply speaks.

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

# With fewer examples of a label cross-validation says little.
MIN_EXAMPLES = 10
# Where a text is missing in the user's language.
DEFAULT_LANGUAGE = ENGLISH

NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


def _by_language(value: Any) -> Any:
    if isinstance(value, dict) and (unknown := sorted(set(value) - set(LANGUAGES))):
        raise ValueError(
            f"the language {unknown[0]!r} is never chosen; the languages are {', '.join(LANGUAGES)}"
        )
    return {DEFAULT_LANGUAGE: value} if isinstance(value, str) else value


# A text by language (server/core/roles/language.py). A single string serves every language.
Texts = Annotated[dict[str, NonEmpty], Field(min_length=1), BeforeValidator(_by_language)]


def text_in(texts: Mapping[str, str], language: str) -> str:
    """The text in the language, or in English, or in the first language there is."""
    if language in texts:
        return texts[language]
    return texts.get(DEFAULT_LANGUAGE) or next(iter(texts.values()))


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Label(_Frozen):
    """One possible answer: `value` for clients, `text` for the model, `emoji` for people.

    cue: what the reply role is told when this is the user's mood; None: nothing.
    """

    value: NonEmpty
    text: NonEmpty
    emoji: str = ""
    cue: Texts | None = None


class Example(BaseModel):
    """A text and the value of its label. `kind` groups texts of one sort, such as reviews."""

    model_config = ConfigDict(frozen=True)

    text: NonEmpty
    label: NonEmpty
    kind: str = ""


class Task(_Frozen):
    """An instruction, the labels that may answer it, and when to fall back.

    poles: the values of the labels that count +1 and -1 in a result's `score`.
    examples: what the judgement is fitted to when a model is loaded.
    judge: the file of a judge that was fitted before, which is used instead.
    adapter: the name of one that the task is judged with; "" is the base model alone.
    """

    name: NonEmpty
    instructions: NonEmpty
    labels: Annotated[tuple[Label, ...], Field(min_length=2, max_length=255)]
    fallback: str | None = None
    min_confidence: Probability = 0.0
    min_label_mass: Probability = 0.0
    poles: tuple[str, str] | None = None
    # Part of the version only where there is one, so that judges fitted earlier still hold.
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
            raise ValueError(f"fallback {self.fallback!r} is none of the labels")
        for pole in self.poles or ():
            if pole not in self.values:
                raise ValueError(f"pole {pole!r} is none of the labels")
        if self.poles is not None and self.poles[0] == self.poles[1]:
            raise ValueError("the poles must be two labels")
        return self

    @model_validator(mode="after")
    def _examples_are_enough(self) -> "Task":
        counts = Counter(example.label for example in self.examples)
        if unknown := sorted(counts.keys() - set(self.values)):
            raise ValueError(f"the label {unknown[0]!r} of an example is none of the labels")
        for value in self.values if self.examples else ():
            if counts[value] < MIN_EXAMPLES:
                raise ValueError(
                    f"the label {value!r} has {counts[value]} examples; every label needs "
                    f"{MIN_EXAMPLES}, or leave examples out"
                )
        return self

    @property
    def values(self) -> list[str]:
        """The labels as clients read them."""
        return [label.value for label in self.labels]

    @cached_property
    def version(self) -> str:
        """Changes whenever anything that can change a result changes, except the examples."""
        dumped = self.model_dump_json(exclude={"labels": {"__all__": {"cue"}}})
        return hashlib.sha256(dumped.encode()).hexdigest()[:16]

    def messages(self, text: str) -> list[dict[str, str]]:
        """The analyst's conversation about `text`: fixed instruction first, so it can be cached."""
        return [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": text},
        ]


class ExtractExample(_Frozen):
    """A text and what is to be found in it, as it stands there."""

    text: NonEmpty
    items: Annotated[tuple[NonEmpty, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _items_are_in_the_text(self) -> "ExtractExample":
        for item in self.items:
            if item not in self.text:
                raise ValueError(f"the item {item!r} does not stand in the example's text")
        return self


class ExtractTask(_Frozen):
    """A task that finds pieces of a text: an instruction, and examples that are part of the prompt.

    An example is shown with texts of its own language.
    """

    name: NonEmpty
    instructions: Texts
    examples: tuple[ExtractExample, ...] = ()

    @cached_property
    def version(self) -> str:
        """Changes whenever anything that can change a result changes."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def messages(self, text: str) -> list[dict[str, str]]:
        """The conversation about `text`; an answer holds an item a line."""
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
    """How the second role speaks. A file may give some of this; the rest stays as it was.

    persona: the system prompt of a chat that brings none of its own.
    cue_task: the task whose label gives the cue.
    cue_position: where a label's cue stands: in the first system message, at the end of the last
    user message, or in a system message behind the conversation.
    cue_min_confidence: a label less likely than this has no cue.
    """

    persona: Texts = Field(default_factory=dict)
    cue_task: NonEmpty = "sentiment"
    cue_position: Literal["system", "user", "behind"] = "user"
    cue_min_confidence: Probability = 0.0

    def __or__(self, other: "ReplyStyle") -> "ReplyStyle":
        """This style with what the other one was given."""
        given = {name: getattr(other, name) for name in other.model_fields_set}
        return self.model_copy(update=given)


def inline_task(instructions: str, labels: Sequence[str]) -> Task:
    """A task a client describes in its request: each label is its own text, no fallback.

    Raises:
        ValidationError: the labels repeat, or are too few or too many.
    """
    return Task(
        name="inline",
        instructions=instructions,
        labels=tuple(Label(value=label, text=label) for label in labels),
    )
