"""More than the mood: what else the server can tell of a message, while it answers.

python -m openai_examples.analyses
"""

from typing import Any

from openai_examples.connection import clear_errors, connect, served_model

MESSAGE = "快递三天没动静，客服也不回，你们到底管不管？"
TASKS = ["sentiment", "emotion", "intent", "keywords"]


def told(result: Any) -> str:
    """A label with its probability, or pieces of the text."""
    if isinstance(result, list):
        return ", ".join(result)
    return f"{result['emoji']} {result['label']:10} {result['confidence']:.2f}"


def main() -> None:
    """Asks for several tasks; their results stand in the first chunk, before the answer."""
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
                print(f"{name:10} {told(result)}")
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
