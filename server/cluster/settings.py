"""The options of `cluster`: the server's own, and how many replicas there are."""

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import SettingsConfigDict

from server.config import PositiveInt, Settings


class ClusterSettings(Settings):
    """The server as replicas under Ray Serve, on all machines of a Ray cluster.

    Options of threads, memory and queues are those of one replica.
    """

    model_config = SettingsConfigDict(cli_prog_name="qwen-all-in-one cluster")

    num_replicas: PositiveInt = Field(2, description="replicas, or the fewest with --max-replicas")
    max_replicas: PositiveInt | None = Field(
        None,
        description="most replicas: their number follows the load, --max-num-seqs ongoing requests "
        "each; default: it is fixed",
    )
    num_entrances: PositiveInt = Field(
        1, description="processes that check requests and hand them to replicas"
    )
    num_threads: PositiveInt = Field(
        2, description="CPU threads of a replica; Ray keeps as many CPUs for it"
    )
    grace_period: Annotated[float, Field(ge=0)] = Field(
        600.0,
        description="seconds that requests have to finish on a replica that is stopped or replaced",
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="port on every node")
    ui: bool = Field(False, description="a cluster serves no page")

    @field_validator("max_replicas")
    @classmethod
    def _is_no_less(cls, value: int | None, info: ValidationInfo) -> int | None:
        fewest = info.data.get("num_replicas", 0)
        if value is not None and value < fewest:
            raise ValueError(f"there are at least {fewest} (--num-replicas)")
        return value

    @field_validator("ui", "check", "engine")
    @classmethod
    def _is_off(cls, value: object) -> object:
        if value:
            raise ValueError("a cluster does not know it; leave it out")
        return value
