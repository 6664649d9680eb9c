"""The chat tab: what happens when something is said, stopped, retried, undone or edited."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
from openai import APIError, AuthenticationError

from server.ui.client import connect, own_url, seen_url, served_model, stream_chat
from server.ui.commands import curl_line, python_lines
from server.ui.conversation import Turn, request_messages
from server.ui.failures import explain, warn
from server.ui.texts import language_of, name_of, say, with_names


@dataclass(frozen=True)
class Options:
    """What the side bar says. Without has_own_sampling, the server's applies."""

    system_prompt: str
    has_own_sampling: bool
    temperature: float
    max_tokens: float
    with_sentiment: bool
    tasks: list[str]
    api_key: str


class Meter:
    """How fast an answer comes."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._first = self._last = 0.0
        self._usage: dict[str, Any] = {}

    def text_came(self) -> None:
        self._last = time.perf_counter()
        self._first = self._first or self._last

    def usage_came(self, usage: dict[str, Any]) -> None:
        self._usage = usage

    def figures(self) -> tuple[str, str, str]:
        """Time to first token, tokens per second, cached tokens."""
        ttft = f"{(self._first - self._begin) * 1000:.0f} ms" if self._first else "–"
        intervals, seconds = self._usage.get("completion_tokens", 0) - 1, self._last - self._first
        speed = f"{intervals / seconds:.0f}" if intervals > 0 and seconds > 0 else "–"
        details = self._usage.get("prompt_tokens_details") or {}
        cached, prompt = details.get("cached_tokens"), self._usage.get("prompt_tokens")
        return ttft, speed, f"{cached} / {prompt}" if prompt else "–"


def chat_body(model: str, turns: list[Turn], options: Options) -> dict[str, Any]:
    """The request that answers the last turn."""
    own = {"temperature": options.temperature, "max_tokens": int(options.max_tokens)}
    return {
        "model": model,
        "messages": request_messages(turns, options.system_prompt),
        **(own if options.has_own_sampling else {}),
        "stream": True,
        "stream_options": {"include_usage": True},
        "sentiment": options.with_sentiment,
        **({"tasks": options.tasks} if options.tasks else {}),
    }


@dataclass(frozen=True)
class View:
    """What a step of an answer shows; None leaves a component as it is."""

    turns: list[Turn]
    figures: tuple[str, str, str] | None = None
    lines: tuple[str, str] | None = None
    is_judged: bool = False
    is_key_needed: bool = False


async def answer(
    turns: list[Turn], options: Options, request: gr.Request
) -> AsyncGenerator[View, None]:
    """Answers the last of the turns, which are changed as the answer comes."""
    turn, meter = turns[-1], Meter()
    yield View(turns)
    try:
        async with connect(own_url(request), options.api_key) as client:
            model = await served_model(client)
            body = chat_body(model.id, turns, options)
            lines = _lines(request, body, options)
            meter = Meter()
            async with aclosing(stream_chat(client, body)) as pieces:
                async for piece in pieces:
                    if piece.analyses is not None:
                        turn["analyses"] = piece.analyses
                        yield View(turns)
                    if piece.sentiment is not None:
                        labels = model.tasks.get("sentiment", [])
                        turn["sentiment"] = with_names(piece.sentiment, labels)
                        yield View(turns, lines=lines, is_judged=True)
                    if piece.text:
                        meter.text_came()
                        turn["answer"] += piece.text
                        yield View(turns)
                    if piece.usage is not None:
                        meter.usage_came(piece.usage)
            yield View(turns, figures=meter.figures(), lines=lines)
    except APIError as error:
        language = language_of(request)
        warn(explain(error, language), language)
        yield View(turns, is_key_needed=isinstance(error, AuthenticationError))


def _lines(request: gr.Request, body: dict[str, Any], options: Options) -> tuple[str, str]:
    url, has_key = seen_url(request), bool(options.api_key)
    return curl_line(url, body, has_key=has_key), python_lines(url, body, has_key=has_key)


def mood_label(turns: list[Turn], request: gr.Request) -> Any:
    """The probabilities of the last judgement, marked when they came from the cache."""
    judged = [turn["sentiment"] for turn in turns if turn["sentiment"]]
    if not judged:
        return gr.Label(value=None, visible=False)
    last, language = judged[-1], language_of(request)
    probabilities = {name_of(each, language): each["probability"] for each in last["probabilities"]}
    key = "mood_cached" if last["cached"] else "mood"
    return gr.Label(value=probabilities, label=say(key, language), visible=True)


def mood_plot(turns: list[Turn], request: gr.Request) -> Any:
    """A line for each label over the turns; nothing before the second point."""
    language = language_of(request)
    rows = [
        {
            "turn": f"{number:2d}",
            "probability": each["probability"],
            "label": name_of(each, language),
        }
        for number, turn in enumerate(turns, 1)
        if turn["sentiment"]
        for each in turn["sentiment"]["probabilities"]
    ]
    is_worth_it = len({row["turn"] for row in rows}) > 1
    return gr.LinePlot(
        pd.DataFrame(rows) if is_worth_it else None,
        title=say("mood_turns", language),
        visible=is_worth_it,
    )
