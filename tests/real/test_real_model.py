"""Both roles on a real Qwen that was not trained for them. Run with QWEN_REAL=FOLDER."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from benchmarks.reply_quality import Opener, is_in_wrong_language, leaks, read_openers, repeats
from tests.servers import LiveServer

pytestmark = pytest.mark.real

EVERYDAY = {
    "我今天考试通过了！": "positive",
    "谢谢你一直陪着我": "positive",
    "这家店的面太好吃了": "positive",
    "外卖又送错了，真烦": "negative",
    "今天好累啊，什么都不想做": "negative",
    "我失恋了，很难过": "negative",
    "明天下午三点开会": "neutral",
    "水在一百度时沸腾": "neutral",
    "I got a new job and I love it!": "positive",
    "Thank you, that helped me a lot": "positive",
    "This is the best pizza I have ever had": "positive",
    "I feel so lonely tonight": "negative",
    "My flight was cancelled and nobody helped": "negative",
    "The screen broke after two days": "negative",
    "The train leaves at nine": "neutral",
    "Paris is the capital of France": "neutral",
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "celsius": {"type": "boolean"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ASKING = ["What's the weather in Paris?", "北京今天天气怎么样？"]
# Cross-validated accuracy; the tasks have 3, 7 and 4 labels.
LEAST_ACCURACY = {"sentiment": 0.7, "emotion": 0.6, "intent": 0.7}
NUM_OPENERS = 16
NUM_SEEDED = 6


def post(server: LiveServer, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.base_url}/{path}", json=body, timeout=300)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def chat(server: LiveServer, text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return post(server, "chat/completions", messages=messages, max_tokens=60,
                **{"model": server.model, **fields})  # fmt: skip


def openers() -> list[Opener]:
    """Some openers of each mood and language."""
    return read_openers()[:: len(read_openers()) // NUM_OPENERS]


def test_everyday_sentences_get_a_sensible_label(real: LiveServer) -> None:
    data = post(real, "classify", input=list(EVERYDAY))["data"]
    wrong = [
        (text, item["label"])
        for (text, label), item in zip(EVERYDAY.items(), data, strict=True)
        if item["label"] != label
    ]
    assert len(wrong) <= 2, wrong


def test_no_label_is_given_for_every_text(real: LiveServer) -> None:
    data = post(real, "classify", input=list(EVERYDAY))["data"]
    assert {item["label"] for item in data} == {"positive", "negative", "neutral"}
    for item, label in zip(data, EVERYDAY.values(), strict=True):
        if label != "neutral":
            assert (item["score"] > 0) == (label == "positive"), item


def test_a_clients_own_labels_lose_their_prior(real: LiveServer) -> None:
    task = real.services.tasks["sentiment"]
    values = {label.text: label.value for label in task.labels}
    data = post(real, "classify", input=list(EVERYDAY), instructions=task.instructions,
                labels=list(values))["data"]  # fmt: skip
    is_right = [values[x["label"]] == y for x, y in zip(data, EVERYDAY.values(), strict=True)]
    # Without subtracting its prior, the neutral label would win nearly always.
    assert sum(is_right) >= 10


def test_a_stream_sends_the_analyses_first(real: LiveServer) -> None:
    client = openai.OpenAI(base_url=real.base_url, api_key="unused")
    text = "这款耳机的电池只用了两天就坏了，气死我了！"
    first, *others = client.chat.completions.create(
        model=real.model, messages=[{"role": "user", "content": text}], max_tokens=20, stream=True,
        extra_body={"tasks": ["emotion", "intent", "keywords"]},
    )  # fmt: skip
    extra = first.model_extra or {}
    analyses = extra["analyses"]
    assert extra["sentiment"]["label"] == "negative"
    assert analyses["emotion"]["label"] not in ("joy", "neutral"), analyses
    assert analyses["intent"]["label"] == "complaint", analyses
    assert {"耳机", "电池"} & {*analyses["keywords"]}, analyses
    assert others and not any("analyses" in (chunk.model_extra or {}) for chunk in others)


@pytest.mark.parametrize(
    ("text", "label", "word"),
    [
        ("The waiter was slow, but the food was delicious.", "positive", "delicious"),
        ("这家店的服务太差了", "negative", "差"),
    ],
)
def test_the_word_that_expresses_the_mood_has_the_largest_weight(
    real: LiveServer, text: str, label: str, word: str
) -> None:
    [item] = post(real, "classify", input=text, explain=True)["data"]
    heaviest = max(item["words"], key=lambda each: each["weight"])
    assert item["label"] == label
    assert word in heaviest["text"] and heaviest["weight"] > 0.1, item["words"]


def test_the_model_list_says_how_tasks_are_judged(real: LiveServer) -> None:
    for name in real.services.tasks:
        post(real, "classify", input="今天真开心", task=name)
    tasks = httpx.get(f"{real.base_url}/models/{real.model}").json()["tasks"]
    for task in (each for each in tasks if each["kind"] == "labels"):
        assert task["judged_by"] == "head"
        assert task["accuracy"] > LEAST_ACCURACY[task["name"]]
        assert 0 < task["num_layers"] < 24


def test_answers_are_in_the_users_language_and_name_no_mood(real: LiveServer) -> None:
    sentences = openers()
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda opener: chat(real, opener.text, seed=1), sentences))
    texts = [reply["choices"][0]["message"]["content"] for reply in replies]
    pairs = list(zip(sentences, texts, strict=True))
    assert sum(is_in_wrong_language(*each) for each in pairs) <= 1, pairs
    assert sum(repeats(*each) for each in pairs) <= 2, pairs
    assert sum(leaks(real.services.tasks["sentiment"], text) for text in texts) <= 1, pairs


def test_a_seed_gives_the_same_text_streamed_whole_alone_and_among_others(
    real: LiveServer,
) -> None:
    client = openai.OpenAI(base_url=real.base_url, api_key="unused")

    def streamed(text: str) -> str:
        chunks = client.chat.completions.create(
            model=real.model, messages=[{"role": "user", "content": text}], max_tokens=60, seed=3,
            stream=True,
        )  # fmt: skip
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def whole(text: str) -> str:
        content: str = chat(real, text, seed=3)["choices"][0]["message"]["content"]
        return content

    texts = [opener.text for opener in openers()[:NUM_SEEDED]]
    alone = [whole(text) for text in texts]
    again = [streamed(text) for text in texts]
    with ThreadPoolExecutor(len(texts)) as pool:
        together = list(pool.map(whole, texts))
    same = [len({*each}) == 1 for each in zip(alone, again, together, strict=True)]
    # In int8, rounding may rarely change the order of two close logits.
    assert sum(same) >= len(texts) - 1, list(zip(alone, again, together, strict=True))


def called(choice: dict[str, Any]) -> list[dict[str, Any]]:
    calls = choice["message"].get("tool_calls") or []
    return [{**call["function"], "arguments": json.loads(call["function"]["arguments"])}
            for call in calls]  # fmt: skip


@pytest.mark.parametrize("text", ASKING)
def test_a_model_that_writes_calls_as_json_in_a_fence_calls_tools(
    real: LiveServer, text: str
) -> None:
    [choice] = chat(real, text, tools=[WEATHER], temperature=0)["choices"]
    [call] = called(choice)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert call["name"] == "get_weather" and set(call["arguments"]) <= {"city", "celsius"}
    assert call["arguments"]["city"] in text or call["arguments"]["city"] in ("Paris", "Beijing")
    # Streamed, and with /v1/responses.
    client = openai.OpenAI(base_url=real.base_url, api_key="unused")
    with client.chat.completions.stream(
        model=real.model, messages=[{"role": "user", "content": text}],
        tools=[WEATHER], max_tokens=60, temperature=0,  # type: ignore[list-item]
    ) as stream:  # fmt: skip
        final = stream.get_final_completion().choices[0]
    assert not final.message.content and final.finish_reason == "tool_calls"
    [streamed] = final.message.tool_calls or []
    assert json.loads(streamed.function.arguments) == call["arguments"]
    tool = {"type": "function", **WEATHER["function"]}
    output = post(real, "responses", model=real.model, input=text, tools=[tool], temperature=0,
                  max_output_tokens=60)["output"]  # fmt: skip
    assert [item["type"] for item in output] == ["function_call"]
    assert json.loads(output[0]["arguments"]) == call["arguments"]


def test_a_model_with_tools_still_talks_and_writes_other_json(real: LiveServer) -> None:
    for text in ("你好，你是谁？", "Write a JSON object with the fields name and age."):
        [choice] = chat(real, text, tools=[WEATHER], temperature=0)["choices"]
        assert choice["message"]["content"] and not called(choice)


async def test_the_analyst_does_not_disturb_a_conversation_in_its_step(real: LiveServer) -> None:
    engine, tokenizer = real.services.engine, real.services.tokenizer
    task = real.services.tasks["sentiment"]
    ids = tokenizer.encode_chat(task.messages("今天真开心"))
    [layer] = real.services.judges[task.version].layers
    alone = await engine.score(ids, [], layers=(layer,))
    together, *_ = await asyncio.gather(
        engine.score(ids, [], layers=(layer,)),
        engine.score(ids, [[1], [2]]),
        engine.score(tokenizer.encode_text("something else entirely"), [[3]]),
    )
    assert alone.hidden_states is not None and together.hidden_states is not None
    error = abs(alone.hidden_states - together.hidden_states).max()
    assert error < 0.05 * abs(alone.hidden_states).max()
