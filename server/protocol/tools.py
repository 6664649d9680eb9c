"""Tools and output formats on the wire."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictStr, Tag

from server.core.grammar import OutputFormat
from server.core.tools import Tool
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


class NamedToolChoice(BaseModel):
    """The one tool that must be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"]


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
    choice: ToolChoice | FunctionName,
    is_parallel: bool,
) -> OutputFormat:
    """What the answer must look like.

    Raises:
        InvalidRequestError: two tools have one name, or the choice is none of them.
    """
    by_name = {tool.name: tool for tool in tools}
    if len(by_name) < len(tools):
        raise InvalidRequestError("'tools' must differ in their names.", param="tools")
    if isinstance(choice, FunctionName):
        if choice.name not in by_name:
            raise InvalidRequestError(
                f"'tool_choice' names {choice.name!r}, which is not among 'tools'.",
                param="tool_choice",
            )
        tools = [by_name[choice.name]]
    elif choice == "none":
        tools = []
    elif choice == "required" and not tools:
        raise InvalidRequestError(
            "'tool_choice' is 'required', but there are no 'tools'.", param="tool_choice"
        )
    return OutputFormat(schema, tools, choice not in ("none", "auto"), is_parallel)
