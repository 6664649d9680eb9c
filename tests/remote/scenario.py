"""The requests that are recorded with vLLM as the upstream and repeated in the tests."""

from typing import Any

SAD, HAPPY = "我失恋了，很难过", "I got a new job and I love it!"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "is_large": {"type": "boolean"}},
    "required": ["city", "is_large"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"word": {"enum": ["left", "right"]}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}


def chat(text: str, **changes: Any) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": text}]
    return "/v1/chat/completions", {
        "model": "qwen-mini", "messages": messages, "temperature": 0, "max_tokens": 24, **changes,
    }  # fmt: skip


# By name: path and body.
SCENARIO: dict[str, tuple[str, dict[str, Any]]] = {
    "sad": chat(SAD),
    "happy": chat(HAPPY),
    "streamed": chat(SAD, stream=True, stream_options={"include_usage": True}),
    "plain": chat("hello", sentiment=False),
    "logprobs": chat("hello", sentiment=False, logprobs=True, top_logprobs=3, max_tokens=4),
    "biased": chat("hello", sentiment=False, logit_bias={"40": 100}, max_tokens=3),
    "sampled": chat(
        "hello", sentiment=False, temperature=0.8, top_p=0.9, top_k=20, min_p=0.05, seed=7,
        repetition_penalty=1.1, frequency_penalty=0.5, presence_penalty=0.5, max_tokens=8,
    ),
    "choices": chat("hello", sentiment=False, n=2, seed=1, max_tokens=4),
    "json": chat(
        "北京", sentiment=False, max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    ),
    "tool": chat(
        "left?", sentiment=False, tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
        max_tokens=64,
    ),
    "classify": ("/v1/classify", {"input": [SAD, HAPPY, "The shop opens at nine"]}),
    "labels": (
        "/v1/classify",
        {"input": "我的快递丢了", "instructions": "哪个部门？", "labels": ["物流", "售后服务"]},
    ),
    "extract": ("/v1/extract", {"input": "这副耳机的电池很差", "max_items": 2}),
    "completion": (
        "/v1/completions",
        {"model": "qwen-mini", "prompt": "今天天气", "temperature": 0, "max_tokens": 8},
    ),
}  # fmt: skip
