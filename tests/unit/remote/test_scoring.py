"""Scoring continuations with few requests: the requested tokens and the sums."""

import itertools
import random

import pytest

from server.remote.scoring import MAX_PROMPT_TOKENS, MAX_PROMPTS, MAX_TOKEN_IDS, batches, sums


def fake_logprob(beginning: tuple[int, ...], token_id: int) -> float:
    """A fake log-probability that depends on the whole beginning."""
    return -float(hash((beginning, token_id)) % 1000)


def labels(number: int, length: int, vocabulary: int) -> list[list[int]]:
    rng = random.Random(number)
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(1, length))]
            for _ in range(number)]  # fmt: skip


@pytest.mark.parametrize(
    "continuations",
    [
        [[1]],
        [[1], [2], [1, 2]],
        [[1, 2, 3], [1, 2, 4], [1]],
        [[7], [7]],
        labels(255, 4, 1000),
        labels(100, 64, 5),
    ],
)
def test_the_requests_cover_all_scores(continuations: list[list[int]]) -> None:
    logprobs = {}
    for batch in batches(continuations, num_prompt_tokens=100):
        assert batch.beginnings and len(batch.beginnings) <= MAX_PROMPTS
        assert 0 < len(batch.token_ids) <= MAX_TOKEN_IDS
        for beginning, token_id in itertools.product(batch.beginnings, batch.token_ids):
            logprobs[beginning, token_id] = fake_logprob(beginning, token_id)
    expected = [
        sum(fake_logprob(tuple(ids[:i]), ids[i]) for i in range(len(ids))) for ids in continuations
    ]
    assert sums(continuations, logprobs) == expected


def test_the_first_request_scores_only_first_tokens() -> None:
    first, *others = batches([[1, 2], [3, 4], [3, 5]], num_prompt_tokens=100)
    assert (first.beginnings, list(first.token_ids)) == ([()], [1, 3])
    [rest] = others
    assert (rest.beginnings, list(rest.token_ids)) == ([(1,), (3,)], [2, 4, 5])


def test_labels_of_one_token_take_one_request() -> None:
    assert len(list(batches([[i] for i in range(100)], num_prompt_tokens=100))) == 1


def test_a_long_prompt_is_not_sent_many_times_at_once() -> None:
    continuations = [[i, i] for i in range(50)]
    long = MAX_PROMPT_TOKENS // 4
    _, *others = batches(continuations, num_prompt_tokens=long)
    assert max(len(batch.beginnings) for batch in others) == 4
    _, *others = batches(continuations, num_prompt_tokens=MAX_PROMPT_TOKENS * 2)
    assert {len(batch.beginnings) for batch in others} == {1}
