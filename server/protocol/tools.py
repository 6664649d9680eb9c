"""Tools and output formats on the wire."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, StrictBool, StrictStr, Tag, field_validator

from server.core.text.grammar import OutputFormat
from server.core.text.tools import Tool
from server.errors import InvalidRequestError
from server.protocol.base import branch, of_type

MAX_TOOLS = 128
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

# OpenAI's rule for the names of functions and schemas.
Name = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(BaseModel):
    """A function the model may call. It is always called as its parameters say."""

    name: Name
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None

    @field_validator("parameters")
    @classmethod
    def _check_numbers(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        # Python reads NaN and 1e999, but neither template nor response could write them.
        try:
            json.dumps(parameters, allow_nan=False)
        except ValueError as error:
            raise ValueError("holds a number that is not finite") from error
        return parameters

    def tool(self) -> Tool:
        """What the model is told."""
        return Tool(self.name, {**ANY_OBJECT, **(self.parameters or {})}, self.description)


class ToolDefinition(BaseModel):
    """A tool; functions are the only ones there are."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(BaseModel):
    """A function by name."""

    name: StrictStr


ToolMode = Literal["none", "auto", "required"]
TOOL_MODES: tuple[str, ...] = get_args(ToolMode)


@dataclass(frozen=True)
class ToolSubset:
    """Names of the tools that may be called, and whether one of them must be."""

    names: Sequence[str]
    is_required: bool


class NamedTool(BaseModel):
    """A tool by name; as a choice the one that must be called."""

    type: Literal["function"]
    function: FunctionName

    def subset(self) -> ToolSubset:
        """The choice in the words of all routes."""
        return ToolSubset([self.function.name], is_required=True)


class AllowedTools(BaseModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedToolsChoice(BaseModel):
    """Leaves some of the tools to choose from."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools

    def subset(self) -> ToolSubset:
        """The choice in the words of all routes."""
        allowed = self.allowed_tools
        names = [tool.function.name for tool in allowed.tools]
        return ToolSubset(names, is_required=allowed.mode == "required")


ToolChoice = Annotated[
    Annotated[ToolMode, Tag(branch("word"))]
    | Annotated[NamedTool, Tag(branch("function"))]
    | Annotated[AllowedToolsChoice, Tag(branch("allowed_tools"))],
    of_type("function", "allowed_tools", words=TOOL_MODES),
]


class JsonSchema(BaseModel):
    """The schema an answer must fit. It always does, whether or not `strict` is said."""

    name: Name
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: StrictBool | None = None


class TextFormat(BaseModel):
    """Any text."""

    type: Literal["text"]

    @property
    def output_schema(self) -> Mapping[str, Any] | None:
        """What the answer must fit; None for any text."""
        return None


class JsonObjectFormat(BaseModel):
    """Any JSON object."""

    type: Literal["json_object"]

    @property
    def output_schema(self) -> Mapping[str, Any] | None:
        """What the answer must fit."""
        return ANY_OBJECT


class JsonSchemaFormat(BaseModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    @property
    def output_schema(self) -> Mapping[str, Any] | None:
        """What the answer must fit."""
        return self.json_schema.schema_


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag(branch("text"))]
    | Annotated[JsonObjectFormat, Tag(branch("json_object"))]
    | Annotated[JsonSchemaFormat, Tag(branch("json_schema"))],
    of_type("text", "json_object", "json_schema"),
]


def output_format(
    schema: Mapping[str, Any] | None,
    tools: Sequence[Tool],
    choice: ToolMode | ToolSubset,
    is_parallel: bool,
) -> OutputFormat:
    """What the answer must look like.

    Raises:
        InvalidRequestError: two tools have one name, or the choice names none of them.
    """
    names = {tool.name for tool in tools}
    if len(names) < len(tools):
        raise InvalidRequestError("'tools' must differ in their names.", param="tools")
    if isinstance(choice, ToolSubset):
        if unknown := [name for name in choice.names if name not in names]:
            raise InvalidRequestError(
                f"'tool_choice' names {unknown[0]!r}, which is not among 'tools'.",
                param="tool_choice",
            )
        tools = [tool for tool in tools if tool.name in choice.names]
        return OutputFormat(schema, tools, choice.is_required, is_parallel)
    if choice == "required" and not tools:
        raise InvalidRequestError(
            "'tool_choice' is 'required', but there are no 'tools'.", param="tool_choice"
        )
    return OutputFormat(
        schema, [] if choice == "none" else tools, choice == "required", is_parallel
    )
