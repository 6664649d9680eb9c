"""A streamed answer: the sentiment is in the first chunk, before any text.

python -m openai_examples.streaming
"""

from openai_examples.connection import clear_errors, connect, served_model


def main() -> None:
    """Prints the emoji at once and the text as it arrives."""
    with clear_errors():
        client = connect()
        stream = client.chat.completions.create(
            model=served_model(client),
            messages=[{"role": "user", "content": "I finally finished my project!"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        sentiment = (next(stream).model_extra or {})["sentiment"]
        print(sentiment["emoji"], end=" ", flush=True)
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            if chunk.usage:  # the last chunk, which has no choices
                print(f"\n({chunk.usage.completion_tokens} tokens)")


if __name__ == "__main__":
    main()
