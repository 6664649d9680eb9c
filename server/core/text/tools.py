"""Tools a model may call: how they are described to it, and how its calls are read.

The format is the one of Qwen2.5's and Qwen3's chat templates, for every checkpoint alike: a
call is the text `<tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>`. Where a checkpoint's
own template knows no tools, messages are put into that form before they are rendered.

Some models, among them Qwen2.5-Coder, write calls as JSON without the tags, most of them in a
code fence. In an answer that may be any text, JSON that names a tool is a call, too.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from server.core.text.markers import find_marker

CALL_BEGIN = "<tool_call>"
# A line break cannot stand in JSON, so this ends a call wherever it is seen.
CALL_END = "}\n</tool_call>"

# The same of a call without tags. Models write `}}`; the grammar makes it `}\n}`.
UNTAGGED_END = "\n}"
# White space within the head of a call without tags.
BLANKS = r"[ \t\n]{0,20}"

# The line break cannot stand in an answer in JSON, unlike the tag alone.
_TAGGED_HEAD = rf'{CALL_BEGIN}\n\{{"name": "(?P<tagged>[\w-]+)", "arguments": '

_INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class Tool:
    """A function that may be called. parameters: a JSON Schema of an object."""

    name: str
    parameters: Mapping[str, Any]
    description: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates know it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": dict(self.parameters)}}


def call_head(name: str) -> str:
    """A call of the tool of this name, up to its arguments."""
    return f'{CALL_BEGIN}\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def untagged_head(name: str) -> str:
    """A regular expression of a call without tags, up to its arguments. name: one, too."""
    return rf'\{{{BLANKS}"name": ?"{name}",{BLANKS}"arguments":'


def call_opening(untagged: Sequence[Tool]) -> regex.Pattern[str]:
    """What a call begins with, up to its arguments; its one group is the tool's name.

    A code fence or a bracket before a call without tags belongs to it.
    untagged: the tools whose calls may stand without tags.
    """
    if not untagged:
        return regex.compile(_TAGGED_HEAD)
    names = "|".join(regex.escape(tool.name) for tool in untagged)
    head = untagged_head(rf"(?P<untagged>{names})")
    # The blank behind the head is no part of the arguments.
    untagged_call = rf"(?:```(?:json)?{BLANKS})?(?:\[{BLANKS})?{head} ?(?=[^ ])"
    return regex.compile(rf"{_TAGGED_HEAD}|{untagged_call}")


def without_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[Any]:
    """The conversation as a template reads it that knows system, user and assistant only.

    Tools are described at the end of the first system message, calls become text of the
    assistant, and results what the user says.
    """
    plain: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role == "assistant":
            calls = [_call_text(call["function"]) for call in message.get("tool_calls") or ()]
            content = "\n".join(filter(None, [content, *calls]))
        elif role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            if i and messages[i - 1]["role"] == "tool":
                plain[-1]["content"] += f"\n{content}"
                continue
        plain.append({"role": role, "content": content})
    if tools:
        described = _INSTRUCTIONS.format(
            tools="\n".join(json.dumps(t.for_template(), ensure_ascii=False) for t in tools)
        )
        if plain and plain[0]["role"] == "system":
            described = f"{plain.pop(0)['content']}\n\n{described}"
        plain.insert(0, {"role": "system", "content": described})
    return plain


def _call_text(function: Mapping[str, Any]) -> str:
    # Arguments travel as JSON in a string, and stand in the text as JSON.
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call_head(function["name"]) + arguments + CALL_END


@dataclass(frozen=True)
class TextDelta:
    """More text of the answer."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """More of a call's arguments, which are JSON; the first delta of a call has its name."""

    index: int
    name: str | None
    arguments: str


Delta = TextDelta | CallDelta


@dataclass
class ToolCall:
    """A call in an answer; its arguments are JSON once the answer is complete."""

    id: str
    name: str
    arguments: str = ""


class Answer:
    """An answer that comes in pieces: its text, and its calls if it may have some.

    Expects what the grammar for tool calls lets through: where a call has begun, nothing but
    calls follows.
    """

    def __init__(self, opening: regex.Pattern[str] | None) -> None:
        """opening: as `call_opening` gives it; None: the answer is text, whatever it looks like."""
        self.text = ""
        self.calls: list[ToolCall] = []  # that have begun
        self._opening = opening
        self._unread = ""
        self._call_end = ""  # what ends the arguments that are being read; "" outside

    def add(self, text: str) -> list[Delta]:
        """Reads on; returns what became certain."""
        self._unread += text
        deltas: list[Delta] = []
        while True:
            if self._call_end:
                end, marker = find_marker(self._unread, [self._call_end])
                deltas += self._append(self._read(end))
                if not marker:
                    return deltas
                self._read(len(marker))
                self._call_end = ""
            else:
                opening = self._find_opening()
                deltas += self._append(self._read(opening.start() if opening else None))
                if opening is None or opening.partial:
                    return deltas
                self._read(len(opening[0]))
                deltas.append(self._begin_call(opening))

    def end(self) -> list[Delta]:
        """What was still uncertain, when nothing more comes. A call cut before its name is none."""
        rest = self._read()
        # What may be the end of a call is dropped, so that arguments never go beyond their JSON.
        is_part_of_call = self._call_end or rest.startswith(CALL_BEGIN)
        return [] if is_part_of_call else self._append(rest)

    def _find_opening(self) -> regex.Match[str] | None:
        """Where a call begins, or may begin once more has come."""
        return self._opening.search(self._unread, partial=True) if self._opening else None

    def _read(self, length: int | None = None) -> str:
        """The next characters; None: all there are."""
        text = self._unread[:length]
        self._unread = self._unread[len(text) :]
        return text

    def _begin_call(self, opening: regex.Match[str]) -> CallDelta:
        self._call_end = CALL_END if opening.lastgroup == "tagged" else UNTAGGED_END
        call = ToolCall(f"call_{uuid.uuid4().hex}", opening[opening.lastgroup or 0])
        self.calls.append(call)
        return CallDelta(len(self.calls) - 1, call.name, "")

    def _append(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._call_end:
            self.calls[-1].arguments += text
            return [CallDelta(len(self.calls) - 1, None, text)]
        if self.calls:
            return []  # between calls or behind them: line breaks, fences, a comma, a bracket
        self.text += text
        return [TextDelta(text)]
