"""An answer that is an object: the client's `parse` with a pydantic model.

python -m openai_examples.structured_output
"""

from typing import Literal

from pydantic import BaseModel, Field

from openai_examples.connection import clear_errors, connect, served_model


class Feedback(BaseModel):
    """The fields to extract from a text. The answer always has them."""

    topic: str = Field(max_length=20)
    priority: Literal["low", "high"]
    needs_reply: bool


def main() -> None:
    """Requests the object and prints its fields."""
    text = "The app crashes whenever I open my cart. Please help!"
    with clear_errors():
        client = connect()
        completion = client.chat.completions.parse(
            model=served_model(client),
            messages=[{"role": "user", "content": text}],
            response_format=Feedback,
        )
    feedback = completion.choices[0].message.parsed
    assert feedback is not None
    print(f"topic        {feedback.topic}")
    print(f"priority     {feedback.priority}")
    print(f"needs reply  {feedback.needs_reply}")


if __name__ == "__main__":
    main()
