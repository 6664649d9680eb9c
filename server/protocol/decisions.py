"""/v1/decisions on the wire."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    StrictStr,
    Tag,
    field_validator,
)

from server.core import questions
from server.core.classifier import Classification
from server.core.questions import Option
from server.core.tasks import Task
from server.protocol.base import Request, branch, of_type

MAX_QUESTIONS = 400
MAX_CHOICES = 255
MAX_LEVELS = 10


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


# --- input ----------------------------------------------------------------------------


class TextPart(_Frozen):
    """Text that a user, the developer or a tool wrote."""

    type: Literal["input_text"]
    text: StrictStr

    def as_text(self) -> str:
        return self.text


class JSONPart(_Frozen):
    """An object, or several, which the model reads as JSON."""

    type: Literal["input_json"]
    data: dict[str, Any] | list[dict[str, Any]]

    def as_text(self) -> str:
        return json.dumps(self.data, ensure_ascii=False)


class OutputTextPart(_Frozen):
    """Text that an assistant wrote."""

    type: Literal["output_text"]
    text: StrictStr

    def as_text(self) -> str:
        return self.text


class RefusalPart(_Frozen):
    """What an assistant said in place of an answer."""

    type: Literal["refusal"]
    refusal: StrictStr

    def as_text(self) -> str:
        return self.refusal


Part = Annotated[
    Annotated[TextPart, Tag(branch("input_text"))]
    | Annotated[JSONPart, Tag(branch("input_json"))]
    | Annotated[OutputTextPart, Tag(branch("output_text"))]
    | Annotated[RefusalPart, Tag(branch("refusal"))],
    of_type(
        "input_text", "input_json", "output_text", "refusal", hint="; this model reads text only"
    ),
]


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "input_text", "text": content}]
    if not isinstance(content, list):
        raise ValueError("must be a string or a list of parts")
    return content


Content = Annotated[list[Part], BeforeValidator(_as_parts)]


def _text_of(content: Sequence[Part]) -> str:
    return "\n".join(part.as_text() for part in content)


class Message(_Frozen):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content

    def for_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _text_of(self.content)}


class FunctionCall(_Frozen):
    """An assistant's call of a function."""

    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    arguments: Json[Any]

    def for_template(self) -> dict[str, Any]:
        return _call(self.name, self.arguments)


class CustomToolCall(_Frozen):
    """An assistant's call of a tool that takes plain text."""

    type: Literal["custom_tool_call"]
    call_id: StrictStr
    name: StrictStr
    input: StrictStr

    def for_template(self) -> dict[str, Any]:
        return _call(self.name, {"input": self.input})


class CallOutput(_Frozen):
    """What a function or tool returned."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: StrictStr
    output: Content

    def for_template(self) -> dict[str, Any]:
        return {"role": "tool", "content": _text_of(self.output)}


def _call(name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    call = {"type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


Item = Annotated[
    Annotated[Message, Tag(branch("message"))]
    | Annotated[FunctionCall, Tag(branch("function_call"))]
    | Annotated[CustomToolCall, Tag(branch("custom_tool_call"))]
    | Annotated[CallOutput, Tag(branch("function_call_output"))]
    | Annotated[CallOutput, Tag(branch("custom_tool_call_output"))],
    of_type(
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        default="message",
    ),
]


def _as_items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of messages")
    return value


# --- questions ------------------------------------------------------------------------


class _Question(_Frozen):
    # A field that belongs to another type of question would change nothing, unnoticed.
    model_config = ConfigDict(extra="forbid")

    name: StrictStr | None = None
    instructions: Content

    @field_validator("instructions")
    @classmethod
    def _check_not_empty(cls, instructions: list[Part]) -> list[Part]:
        if not _text_of(instructions).strip():
            raise ValueError("is empty")
        return instructions


class Predicate(_Question):
    """Is a statement about the input true?"""

    type: Literal["predicate"]

    def task(self) -> Task:
        return questions.predicate(_text_of(self.instructions))

    def answer(self, result: Classification) -> dict[str, Any]:
        (_, yes), _ = result.probabilities
        return {"type": "predicate", "name": self.name, "probability": round(yes, 6)}


class ChoiceOption(_Frozen):
    """One value that may be chosen; a string and a boolean of the same text are two."""

    model_config = ConfigDict(extra="forbid")

    value: str | bool
    description: StrictStr | None = None

    @field_validator("value", mode="before")
    @classmethod
    def _check_type(cls, value: Any) -> Any:
        if not isinstance(value, str | bool) or value == "":
            raise ValueError("must be a boolean or a string that is not empty")
        return value


class Choice(_Question):
    """Which of the values fits the input?"""

    type: Literal["choice"]
    choices: Annotated[list[ChoiceOption], Field(min_length=2, max_length=MAX_CHOICES)]

    @field_validator("choices")
    @classmethod
    def _check_unique(cls, choices: list[ChoiceOption]) -> list[ChoiceOption]:
        # True == 1, but there are no numbers here.
        if len({option.value for option in choices}) < len(choices):
            raise ValueError("the values must differ from each other")
        return choices

    def task(self) -> Task:
        texts = [_plain(option.value) for option in self.choices]
        if len(set(texts)) < len(texts):
            # JSON's quotes tell a string from the boolean of the same text.
            texts = [json.dumps(option.value, ensure_ascii=False) for option in self.choices]
        options = zip(texts, (option.description for option in self.choices), strict=True)
        return questions.choice(_text_of(self.instructions), list(options))

    def answer(self, result: Classification) -> dict[str, Any]:
        labels = [label for label, _ in result.probabilities]
        return {
            "type": "choice",
            "name": self.name,
            "choice": self.choices[labels.index(result.label)].value,
            "confidence": round(result.confidence, 6),
            "probabilities": [
                {"value": option.value, "probability": round(probability, 6)}
                for option, (_, probability) in zip(self.choices, result.probabilities, strict=True)
            ],
        }


class Level(_Frozen):
    """One level of a scale."""

    model_config = ConfigDict(extra="forbid")

    label: Annotated[StrictStr, Field(min_length=1)]
    description: StrictStr | None = None


class Score(_Question):
    """How high is the input on a scale, whose lowest level comes first?"""

    type: Literal["score"]
    levels: Annotated[list[Level], Field(min_length=2, max_length=MAX_LEVELS)]

    @field_validator("levels")
    @classmethod
    def _check_unique(cls, levels: list[Level]) -> list[Level]:
        if len({level.label for level in levels}) < len(levels):
            raise ValueError("the labels must differ from each other")
        return levels

    def task(self) -> Task:
        levels: list[Option] = [(level.label, level.description) for level in self.levels]
        return questions.score(_text_of(self.instructions), levels)

    def answer(self, result: Classification) -> dict[str, Any]:
        return {
            "type": "score",
            "name": self.name,
            "score": round(questions.expected_level(result), 6),
            "confidence": round(result.confidence, 6),
            "probabilities": [
                {"value": value, "label": label.value, "probability": round(probability, 6)}
                for value, (label, probability) in enumerate(result.probabilities)
            ],
        }


Question = Annotated[
    Annotated[Predicate, Tag(branch("predicate"))]
    | Annotated[Choice, Tag(branch("choice"))]
    | Annotated[Score, Tag(branch("score"))],
    of_type("predicate", "choice", "score"),
]


# --- request and response -------------------------------------------------------------


class DecisionsRequest(Request):
    """Body of POST /v1/decisions: questions about one input."""

    model: StrictStr
    input: Annotated[list[Item], Field(min_length=1), BeforeValidator(_as_items)]
    questions: Annotated[list[Question], Field(min_length=1, max_length=MAX_QUESTIONS)]

    @field_validator("input")
    @classmethod
    def _check_not_empty(cls, items: list[Item]) -> list[Item]:
        if all(isinstance(item, Message) and not _text_of(item.content).strip() for item in items):
            raise ValueError("is empty")
        return items

    @field_validator("input")
    @classmethod
    def _check_calls(cls, items: list[Item]) -> list[Item]:
        called = set()
        for item in items:
            if isinstance(item, CallOutput):
                kind = item.type.removesuffix("_output")
                if (kind, item.call_id) not in called:
                    raise ValueError(
                        f"there is no {kind} {item.call_id!r} before the output that names it"
                    )
            elif not isinstance(item, Message):
                called.add((item.type, item.call_id))
        return items

    def conversation(self) -> list[dict[str, Any]]:
        """What the model is shown before a question, as chat templates know it."""
        instructions = {"role": "system", "content": questions.INSTRUCTIONS}
        return [instructions, *(item.for_template() for item in self.input)]


def decision_usage(results: Sequence[Classification]) -> dict[str, Any]:
    """The usage object: every question's whole prompt, and how much of it needed no computing.

    Nothing is generated, for answers are scored.
    """
    num_prompt_tokens = sum(result.num_prompt_tokens for result in results)
    return {
        "input_tokens": num_prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": sum(
                result.num_prompt_tokens if result.is_cached else result.num_cached_tokens
                for result in results
            ),
            "cache_write_tokens": sum(
                result.num_kept_tokens for result in results if not result.is_cached
            ),
        },
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt_tokens,
    }


def _plain(value: str | bool) -> str:
    return value if isinstance(value, str) else json.dumps(value)
