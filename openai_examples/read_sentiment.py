"""Three ways to read the sentiment of a reply: model_extra, an attribute, a response header.

python -m openai_examples.read_sentiment
"""

from openai_examples.connection import clear_errors, connect, served_model


def main() -> None:
    """Reads the sentiment of one reply in three ways."""
    with clear_errors():
        client = connect()
        response = client.chat.completions.with_raw_response.create(
            model=served_model(client),
            messages=[{"role": "user", "content": "外卖又送错了，真烦。"}],
        )
    reply = response.parse()
    # The attribute works, too, but type checkers only know model_extra.
    sentiment = (reply.model_extra or {})["sentiment"]
    print("model_extra ", sentiment["label"], sentiment["confidence"])
    print("attribute   ", reply.sentiment["label"])  # type: ignore[attr-defined]
    print("x-sentiment ", response.headers["x-sentiment"])
    for item in sentiment["probabilities"]:
        print(f"  {item['value']:9} {item['probability']:.3f}")


if __name__ == "__main__":
    main()
