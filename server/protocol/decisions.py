"""/v1/decisions on the wire."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, Tag, field_validator

from server.core.roles import questions
from server.core.roles.classification import Classification
from server.core.roles.questions import Option
from server.core.roles.tasks import Task
from server.protocol.base import FIRST_ERROR, RequestBody, branch, input_usage, of_type
from server.protocol.items import Content, Items, Part, conversation, text_of

MAX_QUESTIONS = 400
MAX_CANDIDATES = 255
MAX_LEVELS = 10


# --- questions ------------------------------------------------------------------------


class _Strict(BaseModel):
    # A field of another type of question would silently have no effect.
    model_config = ConfigDict(extra="forbid")


class _Question(_Strict):
    name: StrictStr | None = None
    instructions: Content

    @field_validator("instructions")
    @classmethod
    def _check_not_empty(cls, instructions: list[Part]) -> list[Part]:
        if not text_of(instructions).strip():
            raise ValueError("is empty")
        return instructions


class PredicateQuestion(_Question):
    """Is a statement about the input true?"""

    type: Literal["predicate"]

    def task(self) -> Task:
        return questions.predicate(text_of(self.instructions))

    def answer(self, result: Classification) -> dict[str, Any]:
        (_, yes), _ = result.probabilities
        return {"type": "predicate", "name": self.name, "probability": round(yes, 6)}


class Candidate(_Strict):
    """A value that may be chosen. A string and a boolean with the same text are different."""

    value: str | bool
    description: StrictStr | None = None

    @field_validator("value", mode="before")
    @classmethod
    def _check_type(cls, value: Any) -> Any:
        if not isinstance(value, str | bool) or value == "":
            raise ValueError("must be a boolean or a string that is not empty")
        return value


class ChoiceQuestion(_Question):
    """Which of the values fits the input?"""

    type: Literal["choice"]
    choices: Annotated[list[Candidate], FIRST_ERROR, Field(min_length=2, max_length=MAX_CANDIDATES)]

    @field_validator("choices")
    @classmethod
    def _check_unique(cls, choices: list[Candidate]) -> list[Candidate]:
        # True == 1, but no value is a number.
        if len({option.value for option in choices}) < len(choices):
            raise ValueError("the values must differ from each other")
        return choices

    def task(self) -> Task:
        texts = [_plain(option.value) for option in self.choices]
        if len(set(texts)) < len(texts):
            # JSON's quotes distinguish a string from the boolean with the same text.
            texts = [json.dumps(option.value, ensure_ascii=False) for option in self.choices]
        options = zip(texts, (option.description for option in self.choices), strict=True)
        return questions.choice(text_of(self.instructions), list(options))

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


class Level(_Strict):
    """One level of a scale."""

    label: Annotated[StrictStr, Field(min_length=1)]
    description: StrictStr | None = None


class ScoreQuestion(_Question):
    """How high is the input on a scale, whose lowest level comes first?"""

    type: Literal["score"]
    levels: Annotated[list[Level], FIRST_ERROR, Field(min_length=2, max_length=MAX_LEVELS)]

    @field_validator("levels")
    @classmethod
    def _check_unique(cls, levels: list[Level]) -> list[Level]:
        if len({level.label for level in levels}) < len(levels):
            raise ValueError("the labels must differ from each other")
        return levels

    def task(self) -> Task:
        levels: list[Option] = [(level.label, level.description) for level in self.levels]
        return questions.score(text_of(self.instructions), levels)

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
    Annotated[PredicateQuestion, Tag(branch("predicate"))]
    | Annotated[ChoiceQuestion, Tag(branch("choice"))]
    | Annotated[ScoreQuestion, Tag(branch("score"))],
    of_type("predicate", "choice", "score"),
]


# --- request and response -------------------------------------------------------------


class DecisionsRequest(RequestBody):
    """Body of POST /v1/decisions: questions about one input."""

    model: StrictStr
    input: Items
    questions: Annotated[list[Question], FIRST_ERROR, Field(min_length=1, max_length=MAX_QUESTIONS)]

    def conversation(self) -> list[dict[str, Any]]:
        """The messages before a question, in the form that chat templates read."""
        instructions = {"role": "system", "content": questions.INSTRUCTIONS}
        return [instructions, *conversation(self.input)]


def decision_usage(results: Sequence[Classification]) -> dict[str, Any]:
    """The usage object: the tokens of all questions' prompts, and those that needed no computing.

    There are no output tokens: answers are scored.
    """
    return input_usage(
        sum(result.num_prompt_tokens for result in results),
        num_cached=sum(
            result.num_prompt_tokens if result.is_cached else result.num_cached_tokens
            for result in results
        ),
        num_kept=sum(result.num_kept_tokens for result in results if not result.is_cached),
        num_output=0,
    )


def _plain(value: str | bool) -> str:
    return value if isinstance(value, str) else json.dumps(value)
