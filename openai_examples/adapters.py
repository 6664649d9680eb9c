"""Sends one message to the model and to each of its adapters (`--adapter NAME=FOLDER`).

python -m openai_examples.adapters
"""

from openai.types.chat import ChatCompletionUserMessageParam

from openai_examples.connection import clear_errors, connect

MESSAGE: ChatCompletionUserMessageParam = {"role": "user", "content": "今天下雨了，写一句话吧。"}


def main() -> None:
    """Prints an answer of each. The list also has each model as `:plain`, without sentiment."""
    with clear_errors():
        client = connect()
        for model in client.models.list():
            if model.id.endswith(":plain"):
                continue
            reply = client.chat.completions.create(
                model=model.id, messages=[MESSAGE], max_tokens=60
            )
            parent = (model.model_extra or {})["parent"]
            kind = f"adapter of {parent}" if parent else "base model"
            print(f"{model.id} ({kind}): {reply.choices[0].message.content}")


if __name__ == "__main__":
    main()
