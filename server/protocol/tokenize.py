"""/tokenize and /detokenize on the wire, as in vLLM's API."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator

from server.errors import InvalidRequestError
from server.protocol.base import FIRST_ERROR, RequestBody, refuse_unsupported
from server.protocol.messages import MAX_MESSAGES, ChatMessage
from server.protocol.tools import MAX_TOOLS, ToolDefinition

# vLLM's parameters that would change the tokens, with the values that do not.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "chat_template": (),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
FOR_MESSAGES = ("tools", "add_generation_prompt", "continue_final_message")


class TokenizeRequest(RequestBody):
    """Body of POST /tokenize: a text, or a conversation in the model's chat template.

    With neither `add_generation_prompt` nor `continue_final_message`, the conversation is encoded
    as for /v1/chat/completions.
    """

    known = frozenset(UNSUPPORTED)

    prompt: StrictStr | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = (
        None
    )
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: StrictBool = True  # Qwen's tokenizers have none to add
    return_token_strs: StrictBool = False
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("Give either 'prompt' or 'messages'.", param="prompt")
        for name in FOR_MESSAGES:
            if self.messages is None and getattr(self, name) is not None:
                raise InvalidRequestError(f"'{name}' is only allowed with 'messages'.", param=name)
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequestError(
                "'continue_final_message' and 'add_generation_prompt' exclude each other.",
                param="continue_final_message",
            )
        refuse_unsupported(self.model_extra, UNSUPPORTED)
        return self


class DetokenizeRequest(RequestBody):
    """Body of POST /detokenize."""

    tokens: Annotated[list[Annotated[StrictInt, Field(ge=0)]], FIRST_ERROR]
