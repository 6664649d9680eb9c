"""A conversation as a list of turns, and its form as messages."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from server.ui.texts import Language, name_of

# The chatbot reads messages as HTML and removes what looks like a tag. This invisible character
# behind `<` or `&` prevents that. It is removed again from copied and edited texts.
WORD_JOINER = "\u2060"
# Begins each line of results below a user's text. Text and results are one message, so that an
# edit is one event. A copied text ends before the separator (browser.py).
SEPARATOR = "\u2063"
_OPENS_HTML = re.compile(r"<(?=[a-zA-Z/!?])|&(?=[a-zA-Z#])")


class Turn(TypedDict):
    """A user message, its results and the answer. The browser stores it as JSON.

    analyses: by task name; missing in conversations that an older version stored.
    """

    user: str
    sentiment: dict[str, Any] | None
    analyses: NotRequired[dict[str, Any]]
    answer: str


Conversations = list[list[Turn]]


def new_turn(text: str) -> Turn:
    """A turn without results or an answer."""
    return Turn(user=text, sentiment=None, answer="")


def request_messages(turns: Sequence[Turn], system_prompt: str) -> list[dict[str, str]]:
    """The conversation as messages of the API. An empty answer gives no message."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
    messages = system
    for turn in turns:
        messages.append({"role": "user", "content": turn["user"]})
        if turn["answer"]:
            messages.append({"role": "assistant", "content": turn["answer"]})
    return messages


def shown_messages(turns: Sequence[Turn], language: Language) -> list[dict[str, Any]]:
    """The conversation as messages of the chatbot, with the results below the user's texts."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        lines = [inert(line) for line in result_lines(turn, language)]
        content = f"\n{SEPARATOR}".join([inert(turn["user"]), *lines])
        messages.append({"role": "user", "content": content})
        if turn["answer"]:
            messages.append({"role": "assistant", "content": inert(turn["answer"])})
    return messages


def inert(text: str) -> str:
    """The text with a word joiner wherever a tag or an entity of HTML could begin."""
    return _OPENS_HTML.sub(rf"\g<0>{WORD_JOINER}", text)


def plain(text: str) -> str:
    """The user's text of a shown message, without word joiners and results."""
    return text.split(SEPARATOR)[0].replace(WORD_JOINER, "").strip()


def save_conversation(
    turns: list[Turn], saved: Conversations, current: int | None, message: str
) -> tuple[list[Turn], Conversations, int | None, str]:
    """Saves the turns as the conversation `current`; without any turn deletes it.

    Moves the text of an unanswered last turn into an empty message box. message: the box's text.
    Does not modify the arguments.
    """
    if turns and not turns[-1]["answer"]:
        *turns, unanswered = turns
        message = message or unanswered["user"]
    saved = list(saved)
    if current is not None and not turns:
        del saved[current]
        current = None
    elif current is not None:
        saved[current] = turns
    elif turns:
        current = len(saved)
        saved.append(turns)
    return turns, saved, current, message


def turn_at(turns: Sequence[Turn], index: int) -> int:
    """The number of the turn that the shown message of that index belongs to."""
    end = 0
    for number, turn in enumerate(turns):
        end += 2 if turn["answer"] else 1
        if index < end:
            return number
    return len(turns) - 1


def result_lines(turn: Turn, language: Language) -> list[str]:
    """Lines such as `😢 负面 98%` for the mood, and `intent: 💬 闲聊 91%` for each analysis."""
    mood = [_described(turn["sentiment"], language)] if turn["sentiment"] else []
    analyses = turn.get("analyses", {}).items()
    return [*mood, *(f"{task}: {_described(result, language)}" for task, result in analyses)]


def _described(result: Mapping[str, Any] | Sequence[str] | None, language: Language) -> str:
    """A label with its confidence, or keywords; a dash if there is no result."""
    if isinstance(result, Mapping):
        return f"{name_of(result, language)} {result['confidence']:.0%}"
    return " · ".join(result or ["–"])


def title(turns: Sequence[Turn], fallback: str) -> str:
    """The beginning of the first user message."""
    text = " ".join(turns[0]["user"].split()) if turns else fallback
    return text if len(text) <= 24 else f"{text[:23]}…"
