"""POST /v1/chat/completions, whole and streamed."""

import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message as ASGIMessage

from server.core.generation_config import or_default
from server.core.reply import Piece, Reply
from server.core.sequence import SamplingParams
from server.errors import APIError, InternalError, InvalidRequestError
from server.protocol.base import classification, new_id, now, usage
from server.protocol.chat import ChatCompletionRequest, logprobs_content
from server.routes.common import check_model, read_body, services_of, unless_disconnected
from server.services import Services

logger = logging.getLogger(__name__)

PING_INTERVAL_S = 15

# A ServerSentEvent would bring a line separator of its own, CRLF.
Event = dict[str, str]


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
        return _stream(body, services, await unless_disconnected(request, begin()))

    async def complete() -> tuple[Reply, list[list[Piece]]]:
        reply = await begin()
        pieces: list[list[Piece]] = [[] for _ in reply.choices]
        async for index, piece in reply.pieces():
            if piece is not None:
                pieces[index].append(piece)
        return reply, pieces

    return _whole(body, services, *await unless_disconnected(request, complete()))


def _sampling_params(body: ChatCompletionRequest, services: Services) -> SamplingParams:
    """The request's parameters over the checkpoint's own.

    Raises:
        InvalidRequestError: a token id is beyond the model's vocabulary.
    """
    defaults = services.defaults
    max_tokens = or_default(body.max_completion_tokens, body.max_tokens)
    logit_bias = tuple((int(token_id), bias) for token_id, bias in body.logit_bias.items())
    for token_id, _ in logit_bias:
        if token_id >= services.tokenizer.vocab_size:
            raise InvalidRequestError(
                f"'logit_bias': the model has no token {token_id}, only 0 to "
                f"{services.tokenizer.vocab_size - 1}.",
                param="logit_bias",
            )
    return SamplingParams(
        max_tokens=or_default(max_tokens, services.max_context),
        temperature=float(or_default(body.temperature, defaults.temperature)),
        top_p=float(or_default(body.top_p, defaults.top_p)),
        top_k=max(0, or_default(body.top_k, defaults.top_k)),
        min_p=float(or_default(body.min_p, 0.0)),
        repetition_penalty=float(or_default(body.repetition_penalty, defaults.repetition_penalty)),
        frequency_penalty=float(or_default(body.frequency_penalty, 0.0)),
        presence_penalty=float(or_default(body.presence_penalty, 0.0)),
        logit_bias=logit_bias,
        seed=body.seed,
        num_logprobs=body.top_logprobs if body.logprobs else None,
        stop_token_ids=defaults.eos_token_ids,
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


def _stream(body: ChatCompletionRequest, services: Services, reply: Reply) -> Response:
    async def on_close(_: ASGIMessage) -> None:
        # A generator suspended at `yield` may never run its `finally`.
        reply.abort()

    return EventSourceResponse(
        _events(body, services, reply),
        headers=_headers(reply),
        sep="\n",
        ping=PING_INTERVAL_S,
        client_close_handler_callable=on_close,
    )


async def _events(
    body: ChatCompletionRequest, services: Services, reply: Reply
) -> AsyncIterator[Event]:
    """The chunks: roles and sentiment, text, finish reasons, usage on request, [DONE]."""
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    base: dict[str, Any] = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": now(),
        "model": body.model,
    }

    def chunk(index: int, delta: dict[str, str], **more: Any) -> Event:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        choice |= {key: more.pop(key) for key in choice.keys() & more.keys()}
        usage_key = {"usage": None} if include_usage else {}
        return _event({**base, "choices": [choice], **usage_key, **more})

    try:
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
        if include_usage:
            yield _event({**base, "choices": [], "usage": _usage(reply)})
    except APIError as error:
        yield _event(error.body())
    except Exception:
        logger.exception("a stream failed")
        yield _event(InternalError("The server failed on this request; see its log.").body())
    finally:
        reply.abort()
    yield {"data": "[DONE]"}


def _event(content: dict[str, Any]) -> Event:
    return {"data": json.dumps(content, ensure_ascii=False, separators=(",", ":"))}


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
