"""The server through the openai client, as its users see it."""

from typing import Any

import openai
import pytest

from tests.servers import LiveServer

MESSAGES: Any = [{"role": "user", "content": "今天真开心！"}]


@pytest.fixture
def client(live: LiveServer) -> Any:
    with openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=0) as client:
        yield client


def test_a_reply_contains_the_sentiment(client: openai.OpenAI, live: LiveServer) -> None:
    reply: Any = client.chat.completions.create(model=live.model, messages=MESSAGES, max_tokens=8)
    assert reply.sentiment["label"] in ("positive", "negative", "neutral")
    assert reply.model_extra["sentiment"] == reply.sentiment
    assert set(reply.model_extra) == {"sentiment"}
    assert isinstance(reply.choices[0].message.content, str)


def test_a_stream_contains_the_sentiment_before_any_text(
    client: openai.OpenAI, live: LiveServer
) -> None:
    chunks = list(
        client.chat.completions.create(
            model=live.model, messages=MESSAGES, max_tokens=8, stream=True
        )
    )
    first: Any = chunks[0]
    assert first.sentiment["emoji"] in "😄😢😐"
    assert not first.choices[0].delta.content
    assert any(chunk.choices[0].delta.content for chunk in chunks[1:])


def test_the_stream_helper_keeps_the_sentiment(client: openai.OpenAI, live: LiveServer) -> None:
    with client.chat.completions.stream(
        model=live.model, messages=MESSAGES, max_tokens=8, stream_options={"include_usage": True}
    ) as stream:
        try:
            for _ in stream:
                pass
            final: Any = stream.get_final_completion()
        except openai.LengthFinishReasonError as at_the_limit:
            final = at_the_limit.completion
    assert final.sentiment["label"]
    assert final.usage.completion_tokens <= 8


def test_sentiment_is_off_by_extra_body(client: openai.OpenAI, live: LiveServer) -> None:
    reply: Any = client.chat.completions.create(
        model=live.model, messages=MESSAGES, max_tokens=4, extra_body={"sentiment": False}
    )
    assert reply.sentiment is None


def test_the_models_list_has_the_model_and_its_plain_twin(
    client: openai.OpenAI, live: LiveServer
) -> None:
    models: Any = client.models.list().data
    assert [m.id for m in models] == [live.model, f"{live.model}:plain"]
    assert all(m.context_length == live.services.max_context for m in models)
    for model in models:
        assert client.models.retrieve(model.id).id == model.id


KINDS = ("labels", "extract")


def test_a_model_lists_its_tasks_and_their_labels(client: openai.OpenAI, live: LiveServer) -> None:
    model: Any = client.models.retrieve(live.model)
    names = {kind: [t["name"] for t in model.tasks if t["kind"] == kind] for kind in KINDS}
    assert names == {
        "labels": list(live.services.tasks),
        "extract": list(live.services.extract_tasks),
    }
    sentiment = next(task for task in model.tasks if task["name"] == "sentiment")
    assert sentiment["labels"][0] == {"value": "positive", "text": "正面", "emoji": "😄"}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "nobody"}, openai.NotFoundError),
        ({"temperature": 9}, openai.BadRequestError),
        ({"n": 0}, openai.BadRequestError),
    ],
)
def test_errors_become_the_clients_exceptions(
    client: openai.OpenAI,
    live: LiveServer,
    arguments: dict[str, Any],
    error: type[openai.APIStatusError],
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": live.model, "messages": MESSAGES, **arguments})
    assert caught.value.body


async def test_the_async_client_streams(live: LiveServer) -> None:
    async with openai.AsyncOpenAI(base_url=live.base_url, api_key="unused") as client:
        stream = await client.chat.completions.create(
            model=live.model, messages=MESSAGES, max_tokens=8, stream=True
        )
        async with stream:
            chunks: list[Any] = [chunk async for chunk in stream]
    assert chunks[0].sentiment["label"]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
