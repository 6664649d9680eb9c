"""POST /tokenize and /detokenize: text to token ids and back."""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.core.text.tokenizer import ChatTemplateError, ChatTokenizer
from server.errors import InvalidRequestError
from server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from server.routes.common import read
from server.services import Services


async def tokenize(request: Request) -> Response:
    """The token ids of a text or conversation of any length."""
    services, body = await read(request, TokenizeRequest)
    # Off the event loop: megabytes take a second.
    return await asyncio.to_thread(_tokenize, body, services)


async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    services, body = await read(request, DetokenizeRequest)
    return await asyncio.to_thread(_detokenize, body, services.tokenizer)


def _tokenize(body: TokenizeRequest, services: Services) -> Response:
    token_ids = _token_ids(body, services.tokenizer)
    token_strs = services.tokenizer.token_strs(token_ids) if body.return_token_strs else None
    return JSONResponse(
        {
            "count": len(token_ids),
            "max_model_len": services.max_context,
            "tokens": token_ids,
            "token_strs": token_strs,
        }
    )


def _detokenize(body: DetokenizeRequest, tokenizer: ChatTokenizer) -> Response:
    tokenizer.check_ids(body.tokens, lambda i: f"tokens[{i}]")
    return JSONResponse({"prompt": tokenizer.decode(body.tokens)})


def _token_ids(body: TokenizeRequest, tokenizer: ChatTokenizer) -> list[int]:
    if body.messages is None:
        assert body.prompt is not None
        return tokenizer.encode_text(body.prompt)
    try:
        return tokenizer.encode_chat(
            [message.for_template() for message in body.messages],
            [tool.function.tool() for tool in body.tools or ()],
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
    except ChatTemplateError as error:
        raise InvalidRequestError(
            f"The model's chat template refuses these messages: {error}.", param="messages"
        ) from error
