"""Describes tools to the model, and parses its calls of them.

The format is that of Qwen2.5's and Qwen3's chat templates, for every checkpoint: a call is the
text `<tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>`. If a checkpoint's own template
does not render tools, messages are converted to this format before they are rendered.

Some models, such as Qwen2.5-Coder, write calls as JSON without the tags, usually in a code fence.
In an answer that may be any text, JSON that names a tool is a call, too.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from server.core.text.markers import find_marker

CALL_BEGIN = "<tool_call>"
# JSON as it is generated has no line break, so this text always ends a call.
CALL_END = "}\n</tool_call>"

# The end of a call without tags. Models write `}}`; the grammar makes it `}\n}`.
UNTAGGED_END = "\n}"
# White space within the head of a call without tags.
BLANKS = r"[ \t\n]{0,20}"

# With a line break: unlike the tag alone, it cannot occur in an answer in JSON.
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
        """The tool in the form that chat templates read."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": dict(self.parameters)}}


def call_head(name: str) -> str:
    """The text of a call up to its arguments. name: the tool's."""
    return f'{CALL_BEGIN}\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def untagged_head(name: str) -> str:
    """A regular expression of a call without tags, up to its arguments. name: also one."""
    return rf'\{{{BLANKS}"name": ?"{name}",{BLANKS}"arguments":'


def call_opening(untagged: Sequence[Tool]) -> regex.Pattern[str]:
    """The pattern of a call up to its arguments; the matching group is the tool's name.

    A code fence or bracket before a call without tags belongs to the match.
    untagged: the tools that may be called without tags.
    """
    if not untagged:
        return regex.compile(_TAGGED_HEAD)
    names = "|".join(regex.escape(tool.name) for tool in untagged)
    head = untagged_head(rf"(?P<untagged>{names})")
    # The blank after the head is not part of the arguments.
    untagged_call = rf"(?:```(?:json)?{BLANKS})?(?:\[{BLANKS})?{head} ?(?=[^ ])"
    return regex.compile(rf"{_TAGGED_HEAD}|{untagged_call}")


def without_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[Any]:
    """The conversation for a template that knows only system, user and assistant.

    Tools are described at the end of the first system message, calls become text of the
    assistant, and results become messages of the user.
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
    # In messages, arguments are JSON in a string; in the text, they are JSON.
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
    """More of a call's arguments, which are JSON. The first delta of a call has its name."""

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
    """Splits an answer that comes in pieces into its text and its calls.

    Expects what the grammar of tool calls allows: after a call, nothing but calls.
    """

    def __init__(self, opening: regex.Pattern[str] | None) -> None:
        """opening: as `call_opening` returns it; None: the whole answer is text."""
        self.text = ""
        self.calls: list[ToolCall] = []  # the last one may be incomplete
        self._opening = opening
        self._unread = ""
        self._call_end = ""  # the end of the call that is being read; "" outside a call

    def add(self, text: str) -> list[Delta]:
        """Reads more of the answer; returns what is final."""
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
        """Ends the answer; returns what was held back. A call cut off in its head is dropped."""
        rest = self._read()
        # A partial end of a call is dropped, so that arguments never extend beyond their JSON.
        is_part_of_call = self._call_end or rest.startswith(CALL_BEGIN)
        return [] if is_part_of_call else self._append(rest)

    def _find_opening(self) -> regex.Match[str] | None:
        """The start of a call; a partial match if more text may complete it."""
        return self._opening.search(self._unread, partial=True) if self._opening else None

    def _read(self, length: int | None = None) -> str:
        """Removes and returns the next characters; None: all."""
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
            return []  # between or after calls: line breaks, fences, a comma, a bracket
        self.text += text
        return [TextDelta(text)]
