"""Typed questions about one input: a predicate, a choice and a score.

python -m openai_examples.decisions
"""

from openai.types.decision import Answer
from openai.types.decision_create_params import Question

from openai_examples.connection import clear_errors, connect, served_model

TICKET = "I was charged twice for my order. Please refund me today!"
QUESTIONS: list[Question] = [
    {"type": "predicate", "name": "refund", "instructions": "The customer wants a refund."},
    {
        "type": "choice",
        "name": "team",
        "instructions": "Which team should answer?",
        "choices": [
            {"value": "billing", "description": "payments and invoices"},
            {"value": "technical", "description": "crashes and outages"},
        ],
    },
    {
        "type": "score",
        "name": "urgency",
        "instructions": "How urgent is it?",
        "levels": [{"label": "can wait"}, {"label": "this week"}, {"label": "today"}],
    },
]


def describe(answer: Answer) -> str:
    """The content of the answer; each type has its own field."""
    match answer.type:
        case "predicate":
            return f"{answer.probability:.2f} likely"
        case "choice":
            return f"{answer.choice} ({answer.confidence:.2f})"
        case "score":
            return f"{answer.score:.2f} of {len(answer.probabilities) - 1}"
        case "refusal":
            return "refused"


def main() -> None:
    """Sends all questions at once. The answers have the order of the questions."""
    with clear_errors():
        client = connect()
        decision = client.decisions.create(
            model=served_model(client), input=TICKET, questions=QUESTIONS
        )
    for answer in decision.answers:
        print(f"{answer.name:8} {describe(answer)}")
    usage = decision.usage
    print(f"{usage.input_tokens} tokens, {usage.input_tokens_details.cached_tokens} of them cached")


if __name__ == "__main__":
    main()
