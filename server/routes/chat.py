"""POST /v1/chat/completions, whole and streamed."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.core.choices import Piece
from server.core.generation_config import or_default
from server.core.reply import Reply
from server.core.sequence import SamplingParams
from server.protocol.base import classification, new_id, now, usage
from server.protocol.chat import ChatCompletionRequest, logprobs_content
from server.routes.common import check_model, read_body, services_of, unless_disconnected
from server.routes.sampling import sampling_params
from server.routes.streaming import stream
from server.services import Services


async def chat_completions(request: Request) -> Response:
    """Judges the mood of the last user message, then answers."""
    services = services_of(request)
    body = ChatCompletionRequest.parse(await read_body(request))
    is_plain = check_model(services, body.model)

    async def begin() -> Reply:
        return await services.replier.reply(
            [message.for_template() for message in body.messages],
            _sampling_params(body, services),
            body.stop,
            with_sentiment=body.sentiment and not is_plain,
            num_choices=body.n,
        )

    if body.stream:
        reply = await unless_disconnected(request, begin())
        return stream(_chunks(body, services, reply), reply.abort, _headers(reply))

    async def complete() -> tuple[Reply, list[list[Piece]]]:
        reply = await begin()
        return reply, await reply.read()

    return _whole(body, services, *await unless_disconnected(request, complete()))


def _sampling_params(body: ChatCompletionRequest, services: Services) -> SamplingParams:
    return sampling_params(
        body,
        services,
        max_tokens=or_default(body.max_completion_tokens, body.max_tokens),
        num_logprobs=body.top_logprobs if body.logprobs else None,
    )


def _whole(
    body: ChatCompletionRequest, services: Services, reply: Reply, pieces: list[list[Piece]]
) -> Response:
    content = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": now(),
        "model": body.model,
        "choices": [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": "".join(piece.text for piece in pieces[index]),
                    "refusal": None,
                },
                "logprobs": _logprobs(body, services, pieces[index]),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(reply.choices)
        ],
        "usage": _usage(reply),
        "sentiment": classification(reply.sentiment),
    }
    return JSONResponse(content, headers=_headers(reply))


async def _chunks(
    body: ChatCompletionRequest, services: Services, reply: Reply
) -> AsyncIterator[dict[str, Any]]:
    """Roles and sentiment, text, finish reasons, usage on request."""
    base: dict[str, Any] = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": now(),
        "model": body.model,
    }

    def chunk(index: int, delta: dict[str, str], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        choice |= {key: more.pop(key) for key in choice.keys() & more.keys()}
        usage_key = {"usage": None} if body.includes_usage else {}
        return {**base, "choices": [choice], **usage_key, **more}

    for index in range(len(reply.choices)):
        # Clients keep an unknown field only if the first chunk has it.
        first = {"sentiment": classification(reply.sentiment)} if index == 0 else {}
        yield chunk(index, {"role": "assistant", "content": ""}, **first)
    async for index, piece in reply.pieces():
        if piece is None:
            yield chunk(index, {}, finish_reason=reply.choices[index].finish_reason)
        else:
            logprobs = _logprobs(body, services, [piece])
            yield chunk(index, {"content": piece.text}, logprobs=logprobs)
    if body.includes_usage:
        yield {**base, "choices": [], "usage": _usage(reply)}


def _logprobs(
    body: ChatCompletionRequest, services: Services, pieces: Sequence[Piece]
) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    tokens = [token for piece in pieces for token in piece.tokens]
    return {"content": logprobs_content(tokens, services.tokenizer.token_bytes), "refusal": None}


def _usage(reply: Reply) -> dict[str, Any]:
    return usage(reply.num_prompt_tokens, reply.num_completion_tokens, reply.num_cached_tokens)


def _headers(reply: Reply) -> dict[str, str]:
    return {"x-sentiment": reply.sentiment.label.value} if reply.sentiment else {}
