"""A conversation in the terminal; the emoji shows before the answer streams.

python -m openai_examples.repl        # ends with `exit`, Ctrl-D or Ctrl-C
"""

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from openai_examples.connection import clear_connection_errors, connect, served_model


def answer(client: OpenAI, model: str, conversation: list[ChatCompletionMessageParam]) -> str:
    """Streams the answer to the terminal and returns it whole."""
    text = ""
    stream = client.chat.completions.create(model=model, messages=conversation, stream=True)
    for chunk in stream:
        if sentiment := (chunk.model_extra or {}).get("sentiment"):
            print(sentiment["emoji"], end=" ", flush=True)
        piece = chunk.choices[0].delta.content or ""
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def converse() -> None:
    """Reads lines until the user has had enough."""
    client = connect()
    model = served_model(client)
    print(f"{model}: say something, or `exit`.")
    conversation: list[ChatCompletionMessageParam] = []
    while (line := input("> ").strip()) != "exit":
        if line:
            conversation.append({"role": "user", "content": line})
            reply = answer(client, model, conversation)
            conversation.append({"role": "assistant", "content": reply})


def main() -> None:
    """Ends quietly on Ctrl-D and Ctrl-C."""
    try:
        with clear_connection_errors():
            converse()
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main()
