"""LangChain's ChatOpenAI against a real server."""

from typing import Any

import pydantic
import pytest

from tests.servers import LiveServer

langchain_openai = pytest.importorskip("langchain_openai")

# Warnings of other projects are not errors here.
pytestmark = pytest.mark.filterwarnings("default")


class Mood(pydantic.BaseModel):
    """How somebody feels."""

    is_glad: bool


@pytest.fixture
def model(tiny: LiveServer) -> Any:
    return langchain_openai.ChatOpenAI(
        base_url=tiny.base_url, api_key="unused", model=tiny.model, max_tokens=60, seed=1
    )


def test_it_is_answered(model: Any) -> None:
    answer = model.invoke("Hello!")
    assert answer.text
    assert answer.usage_metadata["output_tokens"] > 0


def test_it_streams(model: Any) -> None:
    pieces = [piece.text for piece in model.stream("Hello!")]
    assert len(pieces) > 2 and "".join(pieces) == model.invoke("Hello!").text


async def test_it_streams_asynchronously(model: Any) -> None:
    assert "".join([piece.text async for piece in model.astream("Hello!")])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_it_gets_structured_output(model: Any, method: str) -> None:
    answer = model.with_structured_output(Mood, method=method).invoke("I am so happy!")
    assert isinstance(answer, Mood)


def test_it_calls_tools(model: Any) -> None:
    answer = model.bind_tools([Mood], tool_choice="Mood", parallel_tool_calls=False).invoke("Hi!")
    [call] = answer.tool_calls
    assert call["name"] == "Mood" and isinstance(call["args"]["is_glad"], bool)


def test_it_reaches_the_sentiment(model: Any, tiny: LiveServer) -> None:
    model.include_response_headers = True
    headers = model.invoke("I am so happy!").response_metadata["headers"]
    assert headers["x-sentiment"] in ("positive", "negative", "neutral")
