"""Typed questions about one input: is it so, which of these, and how much.

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


def shown(answer: Answer) -> str:
    """What the answer says; each type says it in a field of its own."""
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
    """Asks all questions at once; the answers come in their order."""
    with clear_errors():
        client = connect()
        decision = client.decisions.create(
            model=served_model(client), input=TICKET, questions=QUESTIONS
        )
    for answer in decision.answers:
        print(f"{answer.name:8} {shown(answer)}")
    usage = decision.usage
    print(f"{usage.input_tokens} tokens, {usage.input_tokens_details.cached_tokens} of them cached")


if __name__ == "__main__":
    main()
