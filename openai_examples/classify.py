"""Classification without a chat: one text, a batch, and your own labels.

python -m openai_examples.classify
"""

from typing import Any

from openai import OpenAI

from openai_examples.connection import clear_errors, connect

REVIEW = "The food was wonderful."
REVIEWS = ["味道不错，下次还来。", "等了两个小时，气死我了。", "明天下午三点开会。"]
TICKET = "电脑打不开了，客户正在等我！"


def classify(client: OpenAI, **body: Any) -> list[dict[str, Any]]:
    """Calls POST /v1/classify with the openai client's generic `post`."""
    response = client.post("/classify", body=body, cast_to=dict[str, Any])
    data: list[dict[str, Any]] = response["data"]
    return data


def show(title: str, texts: list[str], data: list[dict[str, Any]]) -> None:
    """Prints a line for each text. The results have the order of the texts."""
    for text, item in zip(texts, data, strict=True):
        print(f"{title:10} {item['label']:8} {item['confidence']:.2f}  {text}")


def main() -> None:
    """Sends three requests."""
    with clear_errors():
        client = connect()
        show("one", [REVIEW], classify(client, input=REVIEW))
        show("batch", REVIEWS, classify(client, input=REVIEWS, task="sentiment"))
        own = classify(
            client,
            input=TICKET,
            instructions="判断这条工单的紧急程度，只回答一个词：加急、普通或可以等。",
            labels=["加急", "普通", "可以等"],
        )
        show("own labels", [TICKET], own)


if __name__ == "__main__":
    main()
