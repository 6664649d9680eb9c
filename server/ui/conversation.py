"""A conversation as the page keeps it: turns, and what they look like as messages."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from server.ui.texts import Language, name_of

# The chatbot reads what it shows as HTML, and drops from it what it takes for a tag. Behind an
# invisible character nothing is a tag or an entity. Copied and edited texts are without it.
WORD_JOINER = "\u2060"
# Stands between what was said and its mood: one bubble, so that one edit is one event. What is
# copied ends before it (browser.py).
SEPARATOR = "\u2063"
_OPENS_HTML = re.compile(r"<(?=[a-zA-Z/!?])|&(?=[a-zA-Z#])")


class Turn(TypedDict):
    """What the user said, how it was judged, what was answered; JSON, for the browser keeps it."""

    user: str
    sentiment: dict[str, Any] | None
    answer: str


Conversations = list[list[Turn]]


def with_names(sentiment: dict[str, Any], labels: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The judgement, each of its probabilities with the text and emoji of its label."""
    known = {label["value"]: label for label in labels}
    named = [{**known.get(each["value"], {}), **each} for each in sentiment["probabilities"]]
    return {**sentiment, "probabilities": named}


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
    """The conversation as the chatbot shows it; the mood stands beneath what the user said."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        said = inert(turn["user"])
        if turn["sentiment"]:
            said += f"\n{SEPARATOR}{inert(mood(turn['sentiment'], language))}"
        messages.append({"role": "user", "content": said})
        if turn["answer"]:
            messages.append({"role": "assistant", "content": inert(turn["answer"])})
    return messages


def inert(text: str) -> str:
    """The text such that nothing in it is HTML."""
    return _OPENS_HTML.sub(rf"\g<0>{WORD_JOINER}", text)


def plain(text: str) -> str:
    """What the user made of a shown message, as text again, without the mood."""
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


def mood(sentiment: dict[str, Any], language: Language) -> str:
    """Such as `😢 负面 98%`."""
    return f"{name_of(sentiment, language)} {sentiment['confidence']:.0%}"


def title(turns: Sequence[Turn], fallback: str) -> str:
    """The beginning of what was said first."""
    text = " ".join(turns[0]["user"].split()) if turns else fallback
    return text if len(text) <= 24 else f"{text[:23]}…"
