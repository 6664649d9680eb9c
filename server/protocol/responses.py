"""/v1/responses on the wire. Nothing is stored, so nothing stored can be referred to."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, Tag, model_validator

from server.core.text.grammar import OutputFormat
from server.core.text.tools import ToolCall
from server.errors import InvalidRequestError
from server.protocol.base import FIRST_ERROR, Options, branch, of_type, refuse_unsupported
from server.protocol.items import Items, conversation
from server.protocol.sampling import MAX_TOP_LOGPROBS, SamplingRequest
from server.protocol.tools import (
    ANY_OBJECT,
    MAX_TOOLS,
    TOOL_MODES,
    FunctionDefinition,
    FunctionName,
    Name,
    ToolMode,
    ToolSubset,
    output_format,
)

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "moderation": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}),
    "truncation": ("disabled",),
}
WITHOUT_EFFECT = (
    "access_programs",
    "max_tool_calls",  # of tools that run at the server, of which there are none
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
)
LOGPROBS = "message.output_text.logprobs"


# --- output ---------------------------------------------------------------------------


class TextFormat(BaseModel):
    """Any text."""

    type: Literal["text"] = "text"

    @property
    def output_schema(self) -> Mapping[str, Any] | None:
        """What the text must fit; None for any."""
        return None


class JsonObjectFormat(BaseModel):
    """Any JSON object."""

    type: Literal["json_object"]

    @property
    def output_schema(self) -> Mapping[str, Any] | None:
        """What the text must fit."""
        return ANY_OBJECT


class JsonSchemaFormat(BaseModel):
    """JSON of a schema. It always fits, whether or not `strict` is said."""

    type: Literal["json_schema"]
    name: Name
    schema_: dict[str, Any] = Field(alias="schema")
    description: StrictStr | None = None
    strict: StrictBool | None = None

    @property
    def output_schema(self) -> Mapping[str, Any] | None:
        """What the text must fit."""
        return self.schema_


class TextOptions(Options):
    """How the text is written."""

    format: Annotated[
        Annotated[TextFormat, Tag(branch("text"))]
        | Annotated[JsonObjectFormat, Tag(branch("json_object"))]
        | Annotated[JsonSchemaFormat, Tag(branch("json_schema"))],
        of_type("text", "json_object", "json_schema"),
    ] = TextFormat()
    verbosity: Literal["medium"] | None = None


class FunctionTool(FunctionDefinition):
    """A function the model may call."""

    type: Literal["function"]


Tool = Annotated[Annotated[FunctionTool, Tag(branch("function"))], of_type("function")]


class NamedFunction(FunctionName):
    """A function by name; as a choice the one that must be called."""

    type: Literal["function"]

    def subset(self) -> ToolSubset:
        """The choice in the words of all routes."""
        return ToolSubset([self.name], is_required=True)


class AllowedToolsChoice(BaseModel):
    """Leaves some of the functions to choose from."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1)]

    def subset(self) -> ToolSubset:
        """The choice in the words of all routes."""
        names = [tool.name for tool in self.tools]
        return ToolSubset(names, is_required=self.mode == "required")


ToolChoice = Annotated[
    Annotated[ToolMode, Tag(branch("word"))]
    | Annotated[NamedFunction, Tag(branch("function"))]
    | Annotated[AllowedToolsChoice, Tag(branch("allowed_tools"))],
    of_type("function", "allowed_tools", words=TOOL_MODES),
]


# --- the request ----------------------------------------------------------------------


class ResponsesRequest(SamplingRequest):
    """Body of POST /v1/responses."""

    known = frozenset({*UNSUPPORTED, *WITHOUT_EFFECT})

    input: Items
    instructions: StrictStr | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    text: TextOptions = TextOptions()
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, default_factory=list)]
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: StrictBool = True
    # Nothing but log-probabilities: there is never more to include.
    include: Annotated[list[StrictStr], FIRST_ERROR, Field(default_factory=list)]
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    metadata: Annotated[dict[str, StrictStr], Field(default_factory=dict)]
    previous_response_id: StrictStr | None = None
    sentiment: StrictBool = True

    @property
    def has_logprobs(self) -> bool:
        """Whether tokens come with their log-probabilities."""
        return LOGPROBS in self.include

    def output(self) -> OutputFormat:
        """What the answer must look like.

        Raises:
            InvalidRequestError: tools and their choice do not go together.
        """
        choice = self.tool_choice
        return output_format(
            self.text.format.output_schema,
            [tool.tool() for tool in self.tools],
            choice if isinstance(choice, str) else choice.subset(),
            self.parallel_tool_calls,
        )

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates know it."""
        said = conversation(self.input)
        if self.instructions is None:
            return said
        return [{"role": "system", "content": self.instructions}, *said]

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.previous_response_id is not None:
            raise InvalidRequestError(
                "'previous_response_id': this server keeps no responses; send the whole "
                "conversation in 'input'.",
                param="previous_response_id",
                code="unsupported_parameter",
            )
        if self.top_logprobs and not self.has_logprobs:
            raise InvalidRequestError(
                f"'top_logprobs' is only allowed when 'include' has {LOGPROBS!r}.",
                param="top_logprobs",
            )
        refuse_unsupported(self.model_extra, UNSUPPORTED)
        return self


# --- the response ---------------------------------------------------------------------


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The text of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def message_item(item_id: str, status: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A message of the answer."""
    return {
        "id": item_id, "type": "message", "role": "assistant", "status": status, "content": parts
    }  # fmt: skip


def call_item(item_id: str, status: str, call: ToolCall, arguments: str) -> dict[str, Any]:
    """A call in the answer."""
    return {
        "id": item_id, "type": "function_call", "status": status, "call_id": call.id,
        "name": call.name, "arguments": arguments,
    }  # fmt: skip


def response_usage(num_input: int, num_cached: int, num_output: int) -> dict[str, Any]:
    """Token counts. What is computed is kept for later prompts, so the rest was written."""
    return {
        "input_tokens": num_input,
        "input_tokens_details": {
            "cached_tokens": num_cached, "cache_write_tokens": num_input - num_cached
        },
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_input + num_output,
    }  # fmt: skip
