"""Scores continuations with few requests, each for the next tokens after several beginnings.

Knows token ids, not requests.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

# The most that vLLM and this server accept in one request.
MAX_TOKEN_IDS = 128
# Keeps a body below this server's default limit.
MAX_PROMPTS, MAX_PROMPT_TOKENS = 64, 200_000

Beginning = tuple[int, ...]
# Log-probability (nats) of a token after the prompt and a beginning.
Logprobs = Mapping[tuple[Beginning, int], float]


@dataclass
class Batch:
    """The content of one request: scores every token after every beginning."""

    beginnings: list[Beginning] = field(default_factory=list)
    token_ids: dict[int, None] = field(default_factory=dict)  # an ordered set

    def has_room(self, token_ids: Sequence[int], num_prompt_tokens: int) -> bool:
        """Whether another beginning with these next tokens fits."""
        num_prompts = len(self.beginnings) + 1
        return (
            num_prompts <= MAX_PROMPTS
            and num_prompts * num_prompt_tokens <= MAX_PROMPT_TOKENS
            and len(self.token_ids | dict.fromkeys(token_ids)) <= MAX_TOKEN_IDS
        )

    def add(self, beginning: Beginning, token_ids: Sequence[int]) -> None:
        """Adds a beginning and its next tokens."""
        self.beginnings.append(beginning)
        self.token_ids |= dict.fromkeys(token_ids)


def batches(continuations: Sequence[Sequence[int]], num_prompt_tokens: int) -> Iterator[Batch]:
    """The requests that score the continuations.

    The first one scores only their first tokens, so that the later ones find the prompt in the
    prefix cache. num_prompt_tokens: the length of the prompt and the longest continuation.
    """
    next_ids = defaultdict[Beginning, dict[int, None]](dict)
    for ids in continuations:
        for i, token_id in enumerate(ids):
            next_ids[tuple(ids[:i])][token_id] = None
    for is_first in (True, False):
        batch = Batch()
        for beginning, token_ids in next_ids.items():
            if bool(beginning) is is_first:
                continue
            for chunk in _chunks(list(token_ids)):
                if batch.beginnings and not batch.has_room(chunk, num_prompt_tokens):
                    yield batch
                    batch = Batch()
                batch.add(beginning, chunk)
        if batch.beginnings:
            yield batch


def sums(continuations: Sequence[Sequence[int]], logprobs: Logprobs) -> list[float]:
    """The log-probability of each continuation."""
    return [
        sum(logprobs[tuple(ids[:i]), token_id] for i, token_id in enumerate(ids))
        for ids in continuations
    ]


def _chunks(token_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for begin in range(0, len(token_ids), MAX_TOKEN_IDS):
        yield token_ids[begin : begin + MAX_TOKEN_IDS]
