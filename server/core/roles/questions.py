"""Questions about a conversation, as tasks whose prompts all begin with the conversation.

Knows neither tokens nor the model.
"""

from collections.abc import Sequence

from server.core.roles.classification import Classification
from server.core.roles.tasks import Label, Task

# The system message before the conversation.
INSTRUCTIONS = (
    "You are an analyst. Do not take part in what you are shown: answer the question that comes "
    "last, with one of the answers it allows and not a word more."
)
YES, NO = "Yes", "No"

# An answer and its description, if it has one.
Option = tuple[str, str | None]


def predicate(statement: str) -> Task:
    """Asks whether the statement is true."""
    question = f"{statement}\n\nAnswer {YES} if this is true of the above, {NO} if it is not."
    return _task(question, (YES, NO))


def choice(instructions: str, options: Sequence[Option]) -> Task:
    """Asks which of the options fits."""
    question = f"{instructions}\n\nAnswer with one of these:\n{_option_list(options)}"
    return _task(question, [text for text, _ in options])


def score(instructions: str, levels: Sequence[Option]) -> Task:
    """Asks which of the levels fits. levels: the lowest comes first."""
    question = f"{instructions}\n\nAnswer with one of these levels, from lowest to highest:\n"
    return _task(question + _option_list(levels), [text for text, _ in levels])


def expected_level(answer: Classification) -> float:
    """The mean of the levels, counted from 0 and weighted by their probabilities."""
    return sum(level * p for level, (_, p) in enumerate(answer.probabilities))


def _task(question: str, answers: Sequence[str]) -> Task:
    labels = tuple(Label(value=text, text=text) for text in answers)
    return Task(name="question", instructions=question, labels=labels)


def _option_list(options: Sequence[Option]) -> str:
    return "\n".join(
        f"- {text}: {description}" if description else f"- {text}" for text, description in options
    )
