"""The options of `cluster`: those of the server, and the number of replicas."""

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import SettingsConfigDict

from server.config import PositiveInt, Settings


class ClusterSettings(Settings):
    """Runs replicas of the server under Ray Serve, on all machines of a Ray cluster.

    Options for threads, memory and queues apply to each replica.
    """

    model_config = SettingsConfigDict(cli_prog_name="qwen-all-in-one cluster")

    num_replicas: PositiveInt = Field(
        2, description="number of replicas; with --max-replicas the smallest number"
    )
    max_replicas: PositiveInt | None = Field(
        None,
        description="largest number of replicas: it follows the load, with --max-num-seqs ongoing "
        "requests each; default: a fixed number",
    )
    num_entrances: PositiveInt = Field(
        1, description="processes that check requests and send them to replicas"
    )
    num_threads: PositiveInt = Field(
        2, description="CPU threads of a replica; Ray reserves as many CPUs"
    )
    grace_period: Annotated[float, Field(ge=0)] = Field(
        600.0,
        description="seconds in which a replica that is stopped or replaced finishes its requests",
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="port on every node")
    ui: bool = Field(False, description="a cluster serves no page")

    @field_validator("max_replicas")
    @classmethod
    def _is_no_less(cls, value: int | None, info: ValidationInfo) -> int | None:
        fewest = info.data.get("num_replicas", 0)
        if value is not None and value < fewest:
            raise ValueError(f"must be at least {fewest} (--num-replicas)")
        return value

    @field_validator("ui", "check", "engine")
    @classmethod
    def _is_off(cls, value: object) -> object:
        if value:
            raise ValueError("a cluster does not support it; leave it out")
        return value
