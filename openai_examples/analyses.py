"""Several analyses of a message with one chat request: sentiment, emotion, intent, keywords.

python -m openai_examples.analyses
"""

from typing import Any

from openai_examples.connection import clear_errors, connect, served_model

MESSAGE = "快递三天没动静，客服也不回，你们到底管不管？"
TASKS = ["sentiment", "emotion", "intent", "keywords"]


def describe(result: Any) -> str:
    """A label with its confidence, or keywords."""
    if isinstance(result, list):
        return ", ".join(result)
    return f"{result['emoji']} {result['label']:10} {result['confidence']:.2f}"


def main() -> None:
    """Requests several tasks. Their results are in the first chunk, before the answer."""
    with clear_errors():
        client = connect()
        stream = client.chat.completions.create(
            model=served_model(client),
            messages=[{"role": "user", "content": MESSAGE}],
            max_tokens=100,
            stream=True,
            extra_body={"tasks": TASKS},
        )
        for chunk in stream:
            for name, result in (chunk.model_extra or {}).get("analyses", {}).items():
                print(f"{name:10} {describe(result)}")
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
