"""Tools a model may call: how it is told of them, and how its calls are read.

The format is the one of Qwen2.5's and Qwen3's chat templates, for every checkpoint alike: a
call is the text `<tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>`. Where a checkpoint's
own template knows no tools, messages are put into that form before they are rendered.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.core.text.detokenizer import num_held_back

CALL_BEGIN = "<tool_call>"
# A line break cannot stand in JSON, so this ends a call wherever it is seen.
CALL_END = "}\n</tool_call>"

# Unlike the tag alone, this cannot stand in an answer in JSON, which has no line breaks.
CALL_OPENING = f"{CALL_BEGIN}\n"
_HEAD = re.compile(re.escape(CALL_BEGIN) + r'\n\{"name": "(?P<name>[\w-]+)", "arguments": ')

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


class CallParser:
    """Tells calls from text in an answer that comes in pieces.

    Expects what the grammar for tool calls lets through: where a call has begun, nothing but
    calls follows.
    """

    def __init__(self) -> None:
        self.num_calls = 0  # that have begun
        self._held = ""
        self._is_in_arguments = False

    def push(self, text: str) -> list[Delta]:
        """What became certain."""
        self._held += text
        deltas: list[Delta] = []
        while True:
            marker = CALL_END if self._is_in_arguments else CALL_OPENING
            at = self._held.find(marker)
            end = at if at >= 0 else len(self._held) - num_held_back(self._held, [marker])
            if end:
                deltas += self._more(self._held[:end])
                self._held = self._held[end:]
            if at < 0:
                return deltas
            if self._is_in_arguments:
                self._held = self._held[len(CALL_END) :]
                self._is_in_arguments = False
            elif (head := _HEAD.match(self._held)) is not None:
                self._held = self._held[head.end() :]
                self._is_in_arguments = True
                deltas.append(CallDelta(self.num_calls, head["name"], ""))
                self.num_calls += 1
            else:
                return deltas

    def flush(self) -> list[Delta]:
        """What was held back, when the answer is over. A call cut before its name is none."""
        held, self._held = self._held, ""
        # What might be the end of a call is untold, so that arguments never go beyond their JSON.
        if not held or self._is_in_arguments or held.startswith(CALL_BEGIN):
            return []
        return self._more(held)

    def _more(self, text: str) -> list[Delta]:
        if self._is_in_arguments:
            return [CallDelta(self.num_calls - 1, None, text)]
        # Between calls stands a line break.
        return [] if self.num_calls else [TextDelta(text)]


@dataclass
class ToolCall:
    """A call in an answer; its arguments are JSON once the answer is complete."""

    id: str
    name: str
    arguments: str = ""


class Answer:
    """An answer that comes in pieces: its text, and its calls if it may have some."""

    def __init__(self, *, has_tools: bool) -> None:
        self.text = ""
        self.calls: list[ToolCall] = []
        self._parser = CallParser() if has_tools else None

    def add(self, text: str) -> list[Delta]:
        """Reads on; returns what became certain."""
        if self._parser is not None:
            return self._keep(self._parser.push(text))
        return self._keep([TextDelta(text)] if text else [])

    def end(self) -> list[Delta]:
        """What was still uncertain, when nothing more comes."""
        return self._keep(self._parser.flush()) if self._parser is not None else []

    def _keep(self, deltas: list[Delta]) -> list[Delta]:
        for delta in deltas:
            match delta:
                case TextDelta(text):
                    self.text += text
                case CallDelta(_, str(name), _):
                    self.calls.append(ToolCall(f"call_{uuid.uuid4().hex}", name))
                case CallDelta(index, None, arguments):
                    self.calls[index].arguments += arguments
        return deltas
