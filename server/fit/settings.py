"""The options of `fit`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import CliPositionalArg, NoDecode, SettingsConfigDict

from server.config import ModelSettings, PositiveInt, Settings


def _names(value: Any) -> Any:
    """`1=positive,0=negative` as a dictionary."""
    if not isinstance(value, str):
        return value
    pairs = [item.partition("=") for item in value.split(",") if item.strip()]
    if not all(name.strip() and sign for name, sign, _ in pairs):
        raise ValueError("each must be NAME=LABEL, with commas between")
    return {name.strip(): label.strip() for name, _, label in pairs}


def _nonempty(value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise ValueError("it is empty")
    return value


class FitSettings(ModelSettings):
    """Learns a task of the analyst from your own labelled texts, and says how much it helps.

    Some rows are kept aside to test with. Where the test shows no gain, nothing is written. What
    is written is good for the model and the type of its weights alone.
    """

    model_config = SettingsConfigDict(cli_prog_name="qwen-all-in-one fit")

    rows: CliPositionalArg[Path] = Field(
        description="file of labelled texts: CSV with a header, or JSON Lines (.jsonl)"
    )
    task: str = Field("sentiment", min_length=1, description="the task to fit, or a new one's name")
    out: Path = Field(Path("fitted"), description="folder to write; serve it with --tasks")
    instruction: Annotated[str | None, AfterValidator(_nonempty)] = Field(
        None,
        description="what the analyst is asked in a new task; its labels are those of the rows",
    )
    text_column: str = Field("text", description="column, or field, of the texts")
    label_column: str = Field("label", description="column, or field, of the labels")
    labels: Annotated[dict[str, str], NoDecode, BeforeValidator(_names)] = Field(
        {},
        description="what labels of the file mean, as in 1=positive,0=negative; nothing behind "
        "the = leaves such rows out",
    )
    encoding: str = Field("utf-8-sig", description="of the file, such as gb18030 or utf-16")
    method: Literal["head", "prompt"] = Field(
        "head",
        description="'head': a linear head on the model's hidden state; 'prompt': a soft prompt "
        "that starts from the instruction, which takes much longer (needs the extra 'tune')",
    )
    test_share: Annotated[float, Field(ge=0.1, le=0.5)] = Field(
        0.3, description="share of the rows that is kept aside to test with"
    )
    max_rows: PositiveInt = Field(
        5000, description="of more rows, so many are drawn at random; the same each time"
    )
    force: bool = Field(False, description="write what was fitted even if it is no better")

    @property
    def server(self) -> Settings:
        """The settings that a server would load the same model with."""
        return Settings(**{name: getattr(self, name) for name in ModelSettings.model_fields})
