"""A conversation in the terminal. The emoji is shown before the answer streams.

python -m openai_examples.repl        # ends with `exit`, Ctrl-D or Ctrl-C
"""

from openai import BadRequestError, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from openai_examples.connection import clear_errors, connect, served_model


def answer(client: OpenAI, model: str, conversation: list[ChatCompletionMessageParam]) -> str:
    """Streams the answer to the terminal and returns it."""
    text = ""
    stream = client.chat.completions.create(model=model, messages=conversation, stream=True)
    try:
        for chunk in stream:
            if sentiment := (chunk.model_extra or {}).get("sentiment"):
                print(sentiment["emoji"], end=" ", flush=True)
            piece = chunk.choices[0].delta.content or ""
            print(piece, end="", flush=True)
            text += piece
    finally:
        print()  # ends the line of an interrupted answer, too
    return text


def answer_what_fits(
    client: OpenAI, model: str, conversation: list[ChatCompletionMessageParam]
) -> str:
    """Deletes the oldest turns until the conversation fits into the model's context."""
    while True:
        try:
            return answer(client, model, conversation)
        except BadRequestError as error:
            if error.code != "context_length_exceeded" or len(conversation) == 1:
                raise
            print("(forgetting our oldest turn)")
            del conversation[:2]


def converse() -> None:
    """Reads and answers lines until the user types `exit`."""
    client = connect()
    model = served_model(client)
    print(f"{model}: say something, or `exit`.")
    conversation: list[ChatCompletionMessageParam] = []
    while (line := input("> ").strip()) != "exit":
        if line:
            conversation.append({"role": "user", "content": line})
            reply = answer_what_fits(client, model, conversation)
            conversation.append({"role": "assistant", "content": reply})


def main() -> None:
    """Exits quietly on Ctrl-D and Ctrl-C."""
    try:
        with clear_errors():
            converse()
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main()
