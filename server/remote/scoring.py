"""Label scores by few requests: the log-probability of each next token behind each beginning.

Knows token ids, nothing of how a request is sent.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

# What vLLM and this server take in one request.
MAX_TOKEN_IDS = 128
# A body of the size that this server reads by default.
MAX_PROMPTS, MAX_PROMPT_TOKENS = 64, 200_000

Beginning = tuple[int, ...]
# (nats), by what stands behind the prompt and the token that comes next.
Logprobs = Mapping[tuple[Beginning, int], float]


@dataclass
class Batch:
    """What one request asks for: the log-probability of every token behind every beginning."""

    beginnings: list[Beginning] = field(default_factory=list)
    token_ids: dict[int, None] = field(default_factory=dict)  # in order, each once

    def has_room(self, token_ids: Sequence[int], num_prompt_tokens: int) -> bool:
        """Whether a beginning with these tokens next fits, too."""
        num_prompts = len(self.beginnings) + 1
        return (
            num_prompts <= MAX_PROMPTS
            and num_prompts * num_prompt_tokens <= MAX_PROMPT_TOKENS
            and len(self.token_ids | dict.fromkeys(token_ids)) <= MAX_TOKEN_IDS
        )

    def add(self, beginning: Beginning, token_ids: Sequence[int]) -> None:
        """Asks for these tokens behind the beginning, too."""
        self.beginnings.append(beginning)
        self.token_ids |= dict.fromkeys(token_ids)


def batches(continuations: Sequence[Sequence[int]], num_prompt_tokens: int) -> Iterator[Batch]:
    """All that has to be known to score the continuations, in few requests.

    The first asks for their first tokens alone: it computes the prompt for the others.
    num_prompt_tokens: of the prompt and the longest continuation.
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
