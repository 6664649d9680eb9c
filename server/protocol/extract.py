"""/v1/extract on the wire."""

from typing import Annotated

from pydantic import Field, StrictInt, StrictStr

from server.core.roles.extractor import DEFAULT_MAX_ITEMS
from server.protocol.texts import TextsRequest

MAX_ITEMS = 20


class ExtractRequest(TextsRequest):
    """Body of POST /v1/extract: the texts, the task, and the maximum number of items."""

    task: Annotated[StrictStr, Field(min_length=1)] = "keywords"
    max_items: Annotated[StrictInt, Field(ge=1, le=MAX_ITEMS)] = DEFAULT_MAX_ITEMS
