"""A function that the model calls, and the answer with the function's result.

python -m openai_examples.tool_calls
"""

from datetime import UTC, datetime

import openai
from openai.types.chat import ChatCompletionMessageParam
from openai.types.chat.chat_completion_message_function_tool_call_param import Function
from pydantic import BaseModel, Field

from openai_examples.connection import clear_errors, connect, served_model


class CurrentTime(BaseModel):
    """The date and time it is now."""

    with_date: bool = Field(description="whether the date is wanted, too")

    def run(self) -> str:
        """The result for the model."""
        return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC" if self.with_date else "%H:%M UTC")


def main() -> None:
    """Lets the model call the function, then answer with the result."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What time is it?"}]
    with clear_errors():
        client = connect()
        model = served_model(client)
        completion = client.chat.completions.parse(
            model=model,
            messages=messages,
            tools=[openai.pydantic_function_tool(CurrentTime)],
            tool_choice="required",
            parallel_tool_calls=False,
        )
        [call] = completion.choices[0].message.tool_calls or []
        function_call = call.function.parsed_arguments
        assert isinstance(function_call, CurrentTime)
        result = function_call.run()
        print(f"call    {call.function.name} {call.function.arguments}")
        print(f"result  {result}")
        function: Function = {"name": call.function.name, "arguments": call.function.arguments}
        messages += [
            {
                "role": "assistant",
                "tool_calls": [{"id": call.id, "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": call.id, "content": result},
        ]
        reply = client.chat.completions.create(model=model, messages=messages)
    print(f"answer  {reply.choices[0].message.content}")


if __name__ == "__main__":
    main()
