"""Keywords of texts. Every keyword occurs in its text.

python -m openai_examples.extract
"""

from typing import Any

from openai_examples.connection import clear_errors, connect

REVIEWS = [
    "这款耳机的音质很好，但是电池只能用三个小时。",
    "The noodles at this restaurant are delicious, but the queue is always an hour long.",
]


def main() -> None:
    """Prints a line for each text."""
    with clear_errors():
        client = connect()
        body = {"input": REVIEWS, "task": "keywords", "max_items": 3}
        # The openai client's generic `post` calls any route.
        response = client.post("/extract", body=body, cast_to=dict[str, Any])
        for text, item in zip(REVIEWS, response["data"], strict=True):
            print(f"{', '.join(item['items'])}  <-  {text}")


if __name__ == "__main__":
    main()
