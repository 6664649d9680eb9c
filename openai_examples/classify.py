"""The judgement alone: one text, a batch, and labels of one's own.

python -m openai_examples.classify
"""

from typing import Any

from openai import OpenAI

from openai_examples.connection import clear_connection_errors, connect


def classify(client: OpenAI, **body: Any) -> list[dict[str, Any]]:
    """POST /v1/classify; the openai client carries routes it does not know, too."""
    response = client.post("/classify", body=body, cast_to=dict[str, Any])
    data: list[dict[str, Any]] = response["data"]
    return data


def main() -> None:
    """Prints a line for every text."""
    with clear_connection_errors():
        client = connect()
        one = classify(client, input="The food was wonderful.")
        batch = classify(
            client, input=["味道不错，下次还来。", "等了两个小时，气死我了。", "明天下午三点开会。"]
        )
        own = classify(
            client,
            input="电脑打不开了，客户正在等我！",
            instructions="判断这条工单的紧急程度，只回答一个词：加急、普通或可以等。",
            labels=["加急", "普通", "可以等"],
        )
    for title, data in (("one", one), ("batch", batch), ("own labels", own)):
        for item in data:
            print(f"{title:10} {item['index']} {item['label']} {item['confidence']:.2f}")


if __name__ == "__main__":
    main()
