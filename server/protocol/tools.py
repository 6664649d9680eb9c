"""Tools and output formats on the wire, in the form of /v1/chat/completions."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AliasChoices, BaseModel, Field, StrictBool, StrictStr, Tag

from server.core.text.grammar import OutputFormat
from server.core.text.tools import Tool
from server.errors import InvalidRequestError
from server.protocol.base import FIRST_ERROR, branch, of_type

MAX_TOOLS = 128
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

# OpenAI's rule for the names of functions and schemas.
Name = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def _nested(kind: str) -> Any:
    """The field `kind`, with an alias for `nested` that errors do not show."""
    return Field(validation_alias=AliasChoices(kind, branch(kind)))


def nested(value: Any) -> Any:
    """Converts a tool, choice or format of /v1/responses to the form of chats.

    That is from `{"type": T, **fields}` to `{"type": T, T: fields}`. Other values are unchanged.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("function", "allowed_tools", "json_schema"):
        return value
    fields = {name: field for name, field in value.items() if name != "type"}
    if kind == "allowed_tools" and isinstance(fields.get("tools"), list):
        fields["tools"] = [nested(tool) for tool in fields["tools"]]
    return {"type": kind, branch(kind): fields}


def flat(value: Any) -> Any:
    """The inverse of `nested`, for a dumped model."""
    if not isinstance(value, dict):
        return value
    fields = value.get(value["type"], {})
    if value["type"] == "allowed_tools":
        fields["tools"] = [flat(tool) for tool in fields["tools"]]
    return {"type": value["type"], **fields}


class FunctionDefinition(BaseModel):
    """A function the model may call. Its arguments fit `parameters`, even if not `strict`."""

    name: Name
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None

    def tool(self) -> Tool:
        """The function as the model reads it."""
        return Tool(self.name, {**ANY_OBJECT, **(self.parameters or {})}, self.description)


class FunctionTool(BaseModel):
    """A function as a tool."""

    type: Literal["function"]
    function: FunctionDefinition = _nested("function")


# Functions are the only supported tools.
ToolDefinition = Annotated[Annotated[FunctionTool, Tag(branch("function"))], of_type("function")]


class FunctionName(BaseModel):
    """A function by name."""

    name: StrictStr


ToolMode = Literal["none", "auto", "required"]
TOOL_MODES: tuple[str, ...] = get_args(ToolMode)


class NamedTool(BaseModel):
    """A tool by name; as a choice, the tool that must be called."""

    type: Literal["function"]
    function: FunctionName = _nested("function")


class AllowedTools(BaseModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], FIRST_ERROR, Field(min_length=1)]


class AllowedToolsChoice(BaseModel):
    """Restricts the model to some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools = _nested("allowed_tools")


ToolChoice = Annotated[
    Annotated[ToolMode, Tag(branch("word"))]
    | Annotated[NamedTool, Tag(branch("function"))]
    | Annotated[AllowedToolsChoice, Tag(branch("allowed_tools"))],
    of_type("function", "allowed_tools", words=TOOL_MODES),
]


class JsonSchema(BaseModel):
    """The schema of the answer, which fits it even if not `strict`."""

    name: Name
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: StrictBool | None = None


class TextFormat(BaseModel):
    """Any text."""

    type: Literal["text"] = "text"


class JsonObjectFormat(BaseModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(BaseModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema = _nested("json_schema")


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag(branch("text"))]
    | Annotated[JsonObjectFormat, Tag(branch("json_object"))]
    | Annotated[JsonSchemaFormat, Tag(branch("json_schema"))],
    of_type("text", "json_object", "json_schema"),
]


def output_format(
    form: TextFormat | JsonObjectFormat | JsonSchemaFormat | None,
    definitions: Sequence[FunctionTool],
    choice: ToolMode | NamedTool | AllowedToolsChoice,
    is_parallel: bool,
) -> OutputFormat:
    """The format of the answer.

    Raises:
        InvalidRequestError: two tools have the same name, or the choice names a missing tool.
    """
    tools = {one.function.name: one.function.tool() for one in definitions}
    if len(tools) < len(definitions):
        raise InvalidRequestError("'tools' must have different names.", param="tools")
    match choice:
        case NamedTool():
            names, is_required = [choice.function.name], True
        case AllowedToolsChoice():
            names = [tool.function.name for tool in choice.allowed_tools.tools]
            is_required = choice.allowed_tools.mode == "required"
        case _:
            names, is_required = [] if choice == "none" else list(tools), choice == "required"
    if unknown := [name for name in names if name not in tools]:
        raise InvalidRequestError(
            f"'tool_choice' names {unknown[0]!r}, which is not among 'tools'.", param="tool_choice"
        )
    if is_required and not names:
        raise InvalidRequestError(
            "'tool_choice' is 'required', but there are no 'tools'.", param="tool_choice"
        )
    schema: Mapping[str, Any] | None = None
    if isinstance(form, JsonSchemaFormat):
        schema = form.json_schema.schema_
    elif isinstance(form, JsonObjectFormat):
        schema = ANY_OBJECT
    allowed = [tool for name, tool in tools.items() if name in names]
    return OutputFormat(schema, allowed, is_required, is_parallel)
