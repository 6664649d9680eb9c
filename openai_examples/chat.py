"""A question, its mood and its answer.

python -m openai_examples.chat "今天终于下班了，好累"
"""

import sys

from openai_examples.connection import clear_errors, connect, served_model


def main() -> None:
    """Sends the words of the command line, or a default message."""
    text = " ".join(sys.argv[1:]).strip() or "我今天考试通过了，好开心！"
    with clear_errors():
        client = connect()
        reply = client.chat.completions.create(
            model=served_model(client), messages=[{"role": "user", "content": text}]
        )
    sentiment = (reply.model_extra or {})["sentiment"]
    print(f"you   {text}  {sentiment['emoji']} {sentiment['label']}")
    print(f"reply {reply.choices[0].message.content}")


if __name__ == "__main__":
    main()
