"""Several chats at once. The server batches them; none waits for another to end.

python -m openai_examples.async_many
"""

import asyncio

from openai import AsyncOpenAI

from openai_examples.connection import clear_errors, connect_async

QUESTIONS = [
    "我升职了！",
    "今天好累啊。",
    "What a lovely morning!",
    "My phone broke again.",
]


async def ask(client: AsyncOpenAI, model: str, question: str) -> str:
    """A line with the mood, the question and its answer."""
    reply = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}]
    )
    sentiment = (reply.model_extra or {})["sentiment"]
    return f"{sentiment['emoji']} {question} -> {reply.choices[0].message.content}"


async def ask_all() -> list[str]:
    """Sends all questions at once; returns the answers in the same order."""
    async with connect_async() as client:
        model = (await client.models.list()).data[0].id
        return await asyncio.gather(*(ask(client, model, question) for question in QUESTIONS))


def main() -> None:
    """Prints the answers."""
    with clear_errors():
        for line in asyncio.run(ask_all()):
            print(line)


if __name__ == "__main__":
    main()
