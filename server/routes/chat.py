"""POST /v1/chat/completions, whole or streamed."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.core.engine.sequence import TokenEvent
from server.core.roles.reply import Reply
from server.core.text.grammar import OutputFormat
from server.core.text.tools import Answer, CallDelta, Delta, TextDelta
from server.protocol.base import findings, new_id, now, sentiment_headers, usage
from server.protocol.chat import ChatCompletionRequest, message
from server.protocol.sampling import logprobs_content
from server.routes.common import read, unless_disconnected
from server.routes.replying import begin_reply
from server.routes.streaming import stream
from server.services import Services


async def chat_completions(request: Request) -> Response:
    """Judges the mood of the last user message, then answers."""
    services, body = await read(request, ChatCompletionRequest)
    output = body.output()

    async def begin() -> _Chat:
        reply = await begin_reply(
            request,
            services,
            body,
            [each.for_template() for each in body.messages],
            output,
            schema_param="response_format",
            max_tokens=body.max_completion_tokens or body.max_tokens,
            num_logprobs=body.top_logprobs if body.logprobs else None,
            num_choices=body.n,
        )
        return _Chat(body, services, reply, output)

    async def complete() -> Response:
        return await (await begin()).whole()

    if not body.stream:
        return await unless_disconnected(request, complete())
    chat = await unless_disconnected(request, begin())
    return stream(request, chat.chunks(), chat.reply.abort, chat.headers)


class _Chat:
    """Turns a reply into a response or a stream of chunks."""

    def __init__(
        self, body: ChatCompletionRequest, services: Services, reply: Reply, output: OutputFormat
    ) -> None:
        self.reply = reply
        self._body, self._services = body, services
        self._answers = [Answer(output.call_opening) for _ in reply.choices]
        self.headers = sentiment_headers(reply.sentiment)

    async def whole(self) -> Response:
        """The response, when all choices are complete."""
        tokens: list[list[TokenEvent]] = [[] for _ in self._answers]
        async for index, _, new_tokens in self._deltas():
            tokens[index] += new_tokens
        content = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion",
            "created": now(),
            "model": self._body.model,
            "choices": [
                {
                    "index": index,
                    "message": message(answer.text, answer.calls),
                    "logprobs": self._logprobs(tokens[index]),
                    "finish_reason": self._finish_reason(index),
                }
                for index, answer in enumerate(self._answers)
            ],
            "usage": self._usage(),
            **findings(self.reply.sentiment, self.reply.analyses),
        }
        return JSONResponse(content, headers=self.headers)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Chunks of roles and sentiment, text and calls, finish reasons, and usage on request."""
        base: dict[str, Any] = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": now(),
            "model": self._body.model,
        }
        no_usage = {"usage": None} if self._body.includes_usage else {}

        def chunk(
            index: int, delta: dict[str, Any], finish_reason: str | None = None,
            logprobs: dict[str, Any] | None = None,
        ) -> dict[str, Any]:  # fmt: skip
            choice = {"index": index, "delta": delta, "logprobs": logprobs}
            return {**base, "choices": [{**choice, "finish_reason": finish_reason}], **no_usage}

        for index in range(len(self._answers)):
            # Clients keep an unknown field only if the first chunk has it.
            first = {} if index else findings(self.reply.sentiment, self.reply.analyses)
            yield {**chunk(index, {"role": "assistant", "content": ""}), **first}
        async for index, delta, tokens in self._deltas():
            logprobs = self._logprobs(tokens) if tokens else None
            if delta is None:
                yield chunk(index, {}, self._finish_reason(index), logprobs)
            else:
                yield chunk(index, self._delta(index, delta), logprobs=logprobs)
        if self._body.includes_usage:
            yield {**base, "choices": [], "usage": self._usage()}

    async def _deltas(self) -> AsyncIterator[tuple[int, Delta | None, list[TokenEvent]]]:
        """Deltas with the index of their choice and their tokens; None ends a choice."""
        pending_tokens: list[list[TokenEvent]] = [[] for _ in self._answers]
        async for index, piece in self.reply.pieces():
            answer = self._answers[index]
            deltas = answer.end() if piece is None else answer.add(piece.text)
            if piece is not None:
                pending_tokens[index] += piece.tokens
            for delta in deltas:
                yield index, delta, pending_tokens[index]
                pending_tokens[index] = []
            if piece is None:
                yield index, None, pending_tokens[index]

    def _delta(self, index: int, delta: Delta) -> dict[str, Any]:
        match delta:
            case TextDelta(text):
                return {"content": text}
            case CallDelta(number, None, arguments):
                call: dict[str, Any] = {"index": number, "function": {"arguments": arguments}}
            case CallDelta(number, str(name), arguments):
                call = {
                    "index": number,
                    "id": self._answers[index].calls[number].id,
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
        return {"tool_calls": [call]}

    def _finish_reason(self, index: int) -> str | None:
        reason = self.reply.choices[index].finish_reason
        return "tool_calls" if reason == "stop" and self._answers[index].calls else reason

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        token_bytes = self._services.tokenizer.token_bytes
        return {"content": logprobs_content(tokens, token_bytes), "refusal": None}

    def _usage(self) -> dict[str, Any]:
        reply = self.reply
        return usage(reply.num_prompt_tokens, reply.num_completion_tokens, reply.num_cached_tokens)
