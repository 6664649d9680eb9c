"""POST /v1/responses, whole or streamed; stateless."""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.core.engine.sequence import TokenEvent
from server.core.roles.reply import Reply
from server.core.text.grammar import OutputFormat
from server.core.text.tools import Answer, CallDelta, Delta, TextDelta, ToolCall
from server.protocol.base import findings, input_usage, new_id, now, sentiment_headers
from server.protocol.responses import ResponsesRequest, call_item, message_item, text_part
from server.protocol.sampling import logprobs_content
from server.routes.common import read, unless_disconnected
from server.routes.replying import begin_reply
from server.routes.streaming import stream
from server.services import Services

ResponseEvent = dict[str, Any]


async def responses(request: Request) -> Response:
    """Judges the mood of the last user message, then answers with items."""
    services, body = await read(request, ResponsesRequest)
    output = body.output()

    async def begin() -> _Response:
        reply = await begin_reply(
            request,
            services,
            body,
            body.messages(),
            output,
            schema_param="text.format",
            max_tokens=body.max_output_tokens,
            num_logprobs=body.top_logprobs if body.has_logprobs else None,
        )
        return _Response(body, services, reply, output)

    async def complete() -> Response:
        response = await begin()
        async for event in response.events():
            last = event
        return JSONResponse(last["response"], headers=response.headers)

    if not body.stream:
        return await unless_disconnected(request, complete())
    response = await unless_disconnected(request, begin())
    # The type of the last event shows that it is the last; there is no [DONE].
    return stream(request, response.events(), response.reply.abort, response.headers, end=None)


class _Response:
    """Turns a reply into events about items: a message, calls."""

    def __init__(
        self, body: ResponsesRequest, services: Services, reply: Reply, output: OutputFormat
    ) -> None:
        self.reply = reply
        self._body, self._services = body, services
        self._answer = Answer(output.call_opening)
        self._id, self._created_at = new_id("resp"), now()
        self._items: list[dict[str, Any]] = []
        self._num_events = 0
        # The item in progress.
        self._item_id: str | None = None
        self._text, self._logprobs = "", list[dict[str, Any]]()
        self._pending_tokens: list[TokenEvent] = []
        self._call: ToolCall | None = None
        self.headers = sentiment_headers(reply.sentiment)

    async def events(self) -> AsyncIterator[ResponseEvent]:
        """The events in order; the last one contains the whole response."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        [choice] = self.reply.choices
        async for piece in choice.pieces():
            self._pending_tokens += piece.tokens
            for delta in self._answer.add(piece.text):
                for event in self._delta_events(delta):
                    yield event
        for delta in self._answer.end():
            for event in self._delta_events(delta):
                yield event
        status = "completed" if choice.finish_reason == "stop" else "incomplete"
        if not self._items and self._item_id is None:
            for event in self._begin_message():
                yield event
        for event in self._end_item(status):
            yield event
        yield self._event(f"response.{status}", response=self._response(status))

    def _delta_events(self, delta: Delta) -> Iterator[ResponseEvent]:
        logprobs = self._take_logprobs()
        match delta:
            case TextDelta(text):
                if self._item_id is None:
                    yield from self._begin_message()
                self._text += text
                self._logprobs += logprobs
                yield self._item_event(
                    "response.output_text.delta",
                    content_index=0,
                    delta=text,
                    logprobs=_without_bytes(logprobs),
                )
            case CallDelta(index, str(), _):
                yield from self._end_item("completed")
                yield from self._begin_call(self._answer.calls[index])
            case CallDelta(_, None, arguments):
                yield self._item_event("response.function_call_arguments.delta", delta=arguments)

    def _begin_message(self) -> Iterator[ResponseEvent]:
        self._item_id, self._text, self._logprobs = new_id("msg"), "", []
        item = message_item(self._item_id, "in_progress", [])
        yield self._event("response.output_item.added", output_index=len(self._items), item=item)
        yield self._item_event(
            "response.content_part.added", content_index=0, part=text_part("", [])
        )

    def _begin_call(self, call: ToolCall) -> Iterator[ResponseEvent]:
        self._item_id, self._call = new_id("fc"), call
        item = call_item(self._item_id, "in_progress", call, "")
        yield self._event("response.output_item.added", output_index=len(self._items), item=item)

    def _end_item(self, status: str) -> Iterator[ResponseEvent]:
        if self._item_id is None:
            return
        if self._call is not None:
            arguments = self._call.arguments
            item = call_item(self._item_id, status, self._call, arguments)
            yield self._item_event("response.function_call_arguments.done", arguments=arguments)
        else:
            # The last tokens may have no text.
            self._logprobs += self._take_logprobs()
            part = text_part(self._text, self._logprobs)
            item = message_item(self._item_id, status, [part])
            yield self._item_event(
                "response.output_text.done",
                content_index=0,
                text=self._text,
                logprobs=_without_bytes(self._logprobs),
            )
            yield self._item_event("response.content_part.done", content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._item_id = self._call = None

    def _take_logprobs(self) -> list[dict[str, Any]]:
        """The log-probabilities of the tokens since the last call."""
        logprobs = logprobs_content(self._pending_tokens, self._services.tokenizer.token_bytes)
        self._pending_tokens = []
        return logprobs

    def _item_event(self, kind: str, **fields: Any) -> ResponseEvent:
        return self._event(kind, item_id=self._item_id, output_index=len(self._items), **fields)

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event

    def _response(self, status: str) -> dict[str, Any]:
        body, reply, defaults = self._body, self.reply, self._services.defaults
        is_done = status != "in_progress"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": body.model,
            "output": list(self._items),
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "temperature": (defaults.temperature if body.temperature is None else body.temperature),
            **body.formats(),
            "top_p": defaults.top_p if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": (
                input_usage(
                    reply.num_prompt_tokens,
                    num_cached=reply.num_cached_tokens,
                    num_kept=reply.num_kept_tokens,
                    num_output=reply.num_completion_tokens,
                )
                if is_done
                else None
            ),
            **findings(reply.sentiment, reply.analyses),
        }


def _without_bytes(logprobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The form of events, which have no bytes."""

    def bare(entry: dict[str, Any]) -> dict[str, Any]:
        return {"token": entry["token"], "logprob": entry["logprob"]}

    return [
        {**bare(entry), "top_logprobs": list(map(bare, entry["top_logprobs"]))}
        for entry in logprobs
    ]
