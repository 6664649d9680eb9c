"""A conversation as the page keeps it: turns, and what they look like as messages."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from server.ui.texts import Language, name_of

# The chatbot reads what it shows as HTML, and drops from it what it takes for a tag. Behind an
# invisible character nothing is a tag or an entity. Copied and edited texts are without it.
WORD_JOINER = "\u2060"
# Begins each line of what was found in a text, beneath the text: one bubble, so that one edit is
# one event. What is copied ends before it (browser.py).
SEPARATOR = "\u2063"
_OPENS_HTML = re.compile(r"<(?=[a-zA-Z/!?])|&(?=[a-zA-Z#])")


class Turn(TypedDict):
    """What the user said, how it was judged, what was answered; JSON, for the browser keeps it.

    analyses: by the tasks' names; a conversation kept by an earlier page has none.
    """

    user: str
    sentiment: dict[str, Any] | None
    analyses: NotRequired[dict[str, Any]]
    answer: str


Conversations = list[list[Turn]]


def new_turn(text: str) -> Turn:
    """One that is not judged or answered yet."""
    return Turn(user=text, sentiment=None, answer="")


def request_messages(turns: Sequence[Turn], system_prompt: str) -> list[dict[str, str]]:
    """The conversation as the API reads it; what was never answered leaves no empty message."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
    messages = system
    for turn in turns:
        messages.append({"role": "user", "content": turn["user"]})
        if turn["answer"]:
            messages.append({"role": "assistant", "content": turn["answer"]})
    return messages


def shown_messages(turns: Sequence[Turn], language: Language) -> list[dict[str, Any]]:
    """The conversation as the chatbot shows it; what was found stands beneath what was said."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        lines = [inert(line) for line in findings(turn, language)]
        said = f"\n{SEPARATOR}".join([inert(turn["user"]), *lines])
        messages.append({"role": "user", "content": said})
        if turn["answer"]:
            messages.append({"role": "assistant", "content": inert(turn["answer"])})
    return messages


def inert(text: str) -> str:
    """The text such that nothing in it is HTML."""
    return _OPENS_HTML.sub(rf"\g<0>{WORD_JOINER}", text)


def plain(text: str) -> str:
    """What the user made of a shown message, as text again, without what was found in it."""
    return text.split(SEPARATOR)[0].replace(WORD_JOINER, "").strip()


def keep(
    turns: list[Turn], saved: Conversations, current: int | None, said: str
) -> tuple[list[Turn], Conversations, int | None, str]:
    """Keeps the conversation, if there is one; what got no answer goes back to be sent anew."""
    if turns and not turns[-1]["answer"]:
        *turns, unanswered = turns
        said = said or unanswered["user"]
    saved = list(saved)
    if current is not None and not turns:
        del saved[current]
        current = None
    elif current is not None:
        saved[current] = turns
    elif turns:
        current = len(saved)
        saved.append(turns)
    return turns, saved, current, said


def turn_at(turns: Sequence[Turn], index: int) -> int:
    """Which turn the shown message of that index belongs to."""
    end = 0
    for number, turn in enumerate(turns):
        end += 2 if turn["answer"] else 1
        if index < end:
            return number
    return len(turns) - 1


def findings(turn: Turn, language: Language) -> list[str]:
    """Lines such as `😢 负面 98%` for the mood, and `intent: 💬 闲聊 91%` for each analysis."""
    mood = [_finding(turn["sentiment"], language)] if turn["sentiment"] else []
    analyses = turn.get("analyses", {}).items()
    return [*mood, *(f"{task}: {_finding(result, language)}" for task, result in analyses)]


def _finding(result: Mapping[str, Any] | Sequence[str] | None, language: Language) -> str:
    """A label and how likely it is, or pieces of the text; a dash where there is nothing."""
    if isinstance(result, Mapping):
        return f"{name_of(result, language)} {result['confidence']:.0%}"
    return " · ".join(result or ["–"])


def title(turns: Sequence[Turn], fallback: str) -> str:
    """The beginning of what was said first."""
    text = " ".join(turns[0]["user"].split()) if turns else fallback
    return text if len(text) <= 24 else f"{text[:23]}…"
