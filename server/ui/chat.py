"""Streams the answer to the last turn of a conversation, and prepares what the chat tab shows."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
from openai import APIError, AuthenticationError

from server.ui.client import browser_url, connect, own_url, served_model, stream_chat
from server.ui.commands import curl_line, python_lines
from server.ui.conversation import Turn, request_messages
from server.ui.failures import explain, warn
from server.ui.texts import language_of, name_of, say, with_names


@dataclass(frozen=True)
class Options:
    """The settings of the sidebar. has_own_sampling: whether to send temperature and max_tokens."""

    system_prompt: str
    has_own_sampling: bool
    temperature: float
    max_tokens: float
    with_sentiment: bool
    tasks: list[str]
    api_key: str


class Meter:
    """Measures how fast an answer arrives."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._first = self._last = 0.0
        self._usage: dict[str, Any] = {}

    def record_text(self) -> None:
        self._last = time.perf_counter()
        self._first = self._first or self._last

    def record_usage(self, usage: dict[str, Any]) -> None:
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
    """The request for an answer to the last turn."""
    sampling = {"temperature": options.temperature, "max_tokens": int(options.max_tokens)}
    return {
        "model": model,
        "messages": request_messages(turns, options.system_prompt),
        **(sampling if options.has_own_sampling else {}),
        "stream": True,
        "stream_options": {"include_usage": True},
        "sentiment": options.with_sentiment,
        **({"tasks": options.tasks} if options.tasks else {}),
    }


@dataclass(frozen=True)
class View:
    """An update of the chat tab; None leaves a component unchanged.

    has_sentiment: whether the last turn has just got its sentiment.
    """

    turns: list[Turn]
    figures: tuple[str, str, str] | None = None
    lines: tuple[str, str] | None = None
    has_sentiment: bool = False
    is_key_needed: bool = False


async def answer(
    turns: list[Turn], options: Options, request: gr.Request
) -> AsyncGenerator[View, None]:
    """Streams the answer to the last turn; modifies that turn."""
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
                        yield View(turns, lines=lines, has_sentiment=True)
                    if piece.text:
                        meter.record_text()
                        turn["answer"] += piece.text
                        yield View(turns)
                    if piece.usage is not None:
                        meter.record_usage(piece.usage)
            yield View(turns, figures=meter.figures(), lines=lines)
    except APIError as error:
        language = language_of(request)
        warn(explain(error, language), language)
        yield View(turns, is_key_needed=isinstance(error, AuthenticationError))


def _lines(request: gr.Request, body: dict[str, Any], options: Options) -> tuple[str, str]:
    url, has_key = browser_url(request), bool(options.api_key)
    return curl_line(url, body, has_key=has_key), python_lines(url, body, has_key=has_key)


def mood_label(turns: list[Turn], request: gr.Request) -> Any:
    """The probabilities of the last sentiment; the title says if they come from the cache."""
    sentiments = [turn["sentiment"] for turn in turns if turn["sentiment"]]
    if not sentiments:
        return gr.Label(value=None, visible=False)
    last, language = sentiments[-1], language_of(request)
    probabilities = {name_of(each, language): each["probability"] for each in last["probabilities"]}
    key = "mood_cached" if last["cached"] else "mood"
    return gr.Label(value=probabilities, label=say(key, language), visible=True)


def mood_plot(turns: list[Turn], request: gr.Request) -> Any:
    """A line for each label over the turns; hidden until two turns have a sentiment."""
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
    is_visible = len({row["turn"] for row in rows}) > 1
    return gr.LinePlot(
        pd.DataFrame(rows) if is_visible else None,
        title=say("mood_turns", language),
        visible=is_visible,
    )
