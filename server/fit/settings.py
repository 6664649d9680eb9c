"""The options of `fit`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import CliPositionalArg, NoDecode, SettingsConfigDict

from server.config import ModelSettings, PositiveInt, Settings


def _names(value: Any) -> Any:
    """Parses `1=positive,0=negative`."""
    if not isinstance(value, str):
        return value
    pairs = [item.partition("=") for item in value.split(",") if item.strip()]
    if not all(name.strip() and sign for name, sign, _ in pairs):
        raise ValueError("give NAME=LABEL pairs, separated by commas")
    return {name.strip(): label.strip() for name, _, label in pairs}


def _nonempty(value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise ValueError("must not be empty")
    return value


class FitSettings(ModelSettings):
    """Learns a task of the analyst from your own labelled texts, and reports the gain.

    Some rows are held out for a test. If it shows no gain, nothing is written. The result works
    with the same model and --dtype only.
    """

    model_config = SettingsConfigDict(cli_prog_name="qwen-all-in-one fit")

    rows: CliPositionalArg[Path] = Field(
        description="file of labelled texts: CSV with a header, or JSON Lines (.jsonl)"
    )
    task: str = Field(
        "sentiment", min_length=1, description="the task to fit, or a new task's name"
    )
    out: Path = Field(Path("fitted"), description="folder to write; serve it with --tasks")
    instruction: Annotated[str | None, AfterValidator(_nonempty)] = Field(
        None,
        description="the analyst's instruction in a new task; its labels are those of the rows",
    )
    text_column: str = Field("text", description="column, or field, of the texts")
    label_column: str = Field("label", description="column, or field, of the labels")
    labels: Annotated[dict[str, str], NoDecode, BeforeValidator(_names)] = Field(
        {},
        description="renames labels of the file, as in 1=positive,0=negative; rows whose label "
        "becomes empty are left out",
    )
    encoding: str = Field(
        "utf-8-sig", description="encoding of the file, such as gb18030 or utf-16"
    )
    method: Literal["head", "prompt"] = Field(
        "head",
        description="'head': a linear head on the model's hidden state; 'prompt': a soft prompt "
        "that starts from the instruction, which takes much longer (needs the extra 'tune')",
    )
    test_share: Annotated[float, Field(ge=0.1, le=0.5)] = Field(
        0.3, description="share of the rows that is held out for the test"
    )
    max_rows: PositiveInt = Field(
        5000, description="most rows to use; of more, a random sample, the same each time"
    )
    force: bool = Field(False, description="write the result even if it is not better")

    @property
    def server(self) -> Settings:
        """The settings of a server with the same model."""
        return Settings(**{name: getattr(self, name) for name in ModelSettings.model_fields})
