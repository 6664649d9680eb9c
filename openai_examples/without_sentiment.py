"""Two ways to turn the sentiment off: a field of the request, or the model's `:plain` twin.

python -m openai_examples.without_sentiment
"""

from openai.types.chat import ChatCompletionUserMessageParam

from openai_examples.connection import clear_errors, connect, served_model

MESSAGE: ChatCompletionUserMessageParam = {"role": "user", "content": "你好！"}


def main() -> None:
    """Answers in both ways: without a sentiment pass, a cue or a persona."""
    with clear_errors():
        client = connect()
        model = served_model(client)
        by_field = client.chat.completions.create(
            model=model, messages=[MESSAGE], extra_body={"sentiment": False}
        )
        by_model = client.chat.completions.create(model=f"{model}:plain", messages=[MESSAGE])
    for way, reply in (("sentiment=False", by_field), (":plain", by_model)):
        sentiment = (reply.model_extra or {})["sentiment"]
        print(f"{way:16} sentiment {sentiment}  {reply.choices[0].message.content}")


if __name__ == "__main__":
    main()
