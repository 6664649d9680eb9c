"""Every sampling parameter against its definition."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from server.core.model.sampler import Sampler
from server.core.sequence import SamplingParams

PROBS = [0.5, 0.25, 0.15, 0.06, 0.04]
LOGITS = torch.tensor([math.log(p) for p in PROBS])
DRAWS = 3000


def sampler(prompt: list[int] | None = None, **params: Any) -> Sampler:
    return Sampler(SamplingParams(max_tokens=1, **params), prompt or [], len(PROBS))


def frequencies(chooser: Sampler, logits: torch.Tensor = LOGITS) -> list[float]:
    counts = Counter(chooser.sample(logits).token_id for _ in range(DRAWS))
    return [counts[i] / DRAWS for i in range(len(logits))]


def test_temperature_zero_takes_the_likeliest_token_whatever_the_seed() -> None:
    assert {sampler(temperature=0.0, seed=s).sample(LOGITS).token_id for s in range(20)} == {0}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0).tolist()
    assert frequencies(sampler(temperature=temperature, seed=1)) == pytest.approx(
        expected, abs=0.03
    )


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (2, 2), (4, 4), (99, 5)])
def test_top_k_keeps_the_k_likeliest(top_k: int, kept: int) -> None:
    expected = [p / sum(PROBS[:kept]) for p in PROBS[:kept]] + [0.0] * (len(PROBS) - kept)
    assert frequencies(sampler(top_k=top_k, seed=2)) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.49, 1), (0.51, 2), (0.76, 3), (0.97, 5)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    expected = [p / sum(PROBS[:kept]) for p in PROBS[:kept]] + [0.0] * (len(PROBS) - kept)
    assert frequencies(sampler(top_p=top_p, seed=3)) == pytest.approx(expected, abs=0.03)


def test_top_p_counts_only_what_top_k_left() -> None:
    # Of 0.5 and 0.25 the first alone holds two thirds.
    assert frequencies(sampler(top_k=2, top_p=0.6, seed=4))[0] == 1.0


def test_a_nucleus_larger_than_the_first_guess_is_found_exactly() -> None:
    size = 1000
    chooser = Sampler(SamplingParams(max_tokens=1, top_p=0.9, seed=5), [], size)
    kept, ids = chooser._candidates(torch.zeros(size))
    assert len(kept) == len(set(ids.tolist())) == pytest.approx(900, abs=1)


def test_repetition_penalty_lowers_tokens_of_prompt_and_answer() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0, -1.1, -9.0])
    chooser = sampler([0], temperature=0.0, repetition_penalty=1.5)
    # 0 was in the prompt: 2 / 1.5 < 1.9; then 1 was answered: 1.9 / 1.5 < 2 / 1.5.
    assert [chooser.sample(logits).token_id for _ in range(2)] == [1, 0]
    negative = torch.tensor([-1.0, -1.2, -9.0, -9.0, -9.0])
    assert sampler([0], temperature=0.0, repetition_penalty=1.5).sample(negative).token_id == 1


def test_frequency_penalty_counts_every_sampled_token_and_none_of_the_prompt() -> None:
    logits = torch.tensor([2.0, 1.5, 0.8, -9.0, -9.0])
    chooser = sampler([0, 0, 0, 0], temperature=0.0, frequency_penalty=0.55)
    # 0 goes 2, 1.45, 0.9, 0.35; 1 goes 1.5, 0.95, 0.4; 2 stays at 0.8.
    assert [chooser.sample(logits).token_id for _ in range(6)] == [0, 1, 0, 1, 0, 2]


def test_presence_penalty_counts_once_however_often_a_token_came() -> None:
    logits = torch.tensor([2.0, 1.5, -9.0, -9.0, -9.0])
    chooser = sampler([0], temperature=0.0, presence_penalty=1.0)
    # Once both have been there, both are lowered by one for good.
    assert [chooser.sample(logits).token_id for _ in range(5)] == [0, 1, 0, 0, 0]


def test_negative_penalties_favour_what_was_said() -> None:
    logits = torch.tensor([1.0, 0.9, -9.0, -9.0, -9.0])
    chooser = sampler(temperature=0.0, frequency_penalty=-2.0)
    assert [chooser.sample(logits).token_id for _ in range(3)] == [0, 0, 0]


def test_logit_bias_is_added_after_the_penalties() -> None:
    bias = ((4, 100.0), (0, -100.0))
    assert sampler(temperature=0.0, logit_bias=bias).sample(LOGITS).token_id == 4
    expected = (LOGITS + torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0])).softmax(0).tolist()
    assert frequencies(sampler(logit_bias=((2, 2.0),), seed=4)) == pytest.approx(expected, abs=0.03)
    # The repetition penalty would have divided the bias, too.
    chooser = sampler([1], temperature=0.0, repetition_penalty=2.0, logit_bias=((1, 3.0),))
    assert chooser.sample(torch.tensor([2.4, 0.1, 0.0, 0.0, 0.0])).token_id == 1


@pytest.mark.parametrize(("min_p", "kept"), [(1.0, 1), (0.4, 2), (0.2, 3), (0.1, 4), (0.01, 5)])
def test_min_p_keeps_tokens_of_that_share_of_the_likeliest(min_p: float, kept: int) -> None:
    expected = [p / sum(PROBS[:kept]) for p in PROBS[:kept]] + [0.0] * (len(PROBS) - kept)
    assert frequencies(sampler(min_p=min_p, seed=5)) == pytest.approx(expected, abs=0.03)


def test_min_p_counts_after_temperature() -> None:
    # At temperature 2 the ratios are square roots: 0.25 / 0.5 becomes 0.71.
    assert frequencies(sampler(min_p=0.6, temperature=2.0, seed=5))[1] > 0
    assert frequencies(sampler(min_p=0.6, temperature=1.0, seed=5))[1] == 0


def test_the_same_seed_draws_the_same_tokens() -> None:
    first, second, other = (sampler(seed=s, temperature=1.5) for s in (7, 7, 8))
    draws = [
        [chooser.sample(LOGITS).token_id for _ in range(50)] for chooser in (first, second, other)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(temperature: float, bad: float) -> None:
    logits = LOGITS.clone()
    logits[3] = bad
    with pytest.raises(ValueError, match="not finite"):
        sampler(temperature=temperature).sample(logits)


def test_logits_are_not_modified() -> None:
    logits = LOGITS.clone()
    sampler([1], temperature=0.7, top_k=3, top_p=0.9, repetition_penalty=1.3).sample(logits)
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    chooser = sampler(temperature=temperature, seed=6)
    assert {chooser.sample(LOGITS).token_id for _ in range(50)} == {0}


@pytest.mark.parametrize("vocab_size", [1, 5, 63, 64, 65, 300, 1000])
def test_greedy_takes_the_first_of_the_largest_wherever_it_is(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    greedy = Sampler(SamplingParams(max_tokens=1, temperature=0.0), [], vocab_size)
    for _ in range(50):
        # Few different values, so that there are ties.
        logits = torch.randint(0, 8, (vocab_size,), generator=generator).float()
        expected = logits.tolist().index(max(logits.tolist()))
        assert greedy.sample(logits).token_id == expected


# --- log-probabilities ----------------------------------------------------------------


def test_logprobs_are_of_the_distribution_before_temperature_and_cuts() -> None:
    chooser = sampler(temperature=0.5, top_k=2, top_p=0.5, min_p=0.3, num_logprobs=3, seed=1)
    token = chooser.sample(LOGITS)
    expected = LOGITS.log_softmax(0)
    assert token.logprob == pytest.approx(float(expected[token.token_id]))
    values, ids = expected.topk(3)
    assert [i for i, _ in token.top_logprobs] == ids.tolist()
    assert [p for _, p in token.top_logprobs] == pytest.approx(values.tolist())


def test_logprobs_are_of_the_distribution_after_penalties_and_bias() -> None:
    chooser = sampler([0], temperature=0.0, logit_bias=((4, 2.5),), presence_penalty=1.0,
                      num_logprobs=5)  # fmt: skip
    chooser.sample(LOGITS)
    token = chooser.sample(LOGITS)
    logits = LOGITS.clone()
    logits[4] += 2.5
    first = int(logits.argmax())
    logits[first] -= 1.0
    assert token.logprob == pytest.approx(float(logits.log_softmax(0)[token.token_id]))


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    token = sampler(num_logprobs=20).sample(LOGITS)
    assert sorted(i for i, _ in token.top_logprobs) == list(range(len(LOGITS)))


def test_without_num_logprobs_nothing_is_told() -> None:
    token = sampler(seed=1).sample(LOGITS)
    assert (token.logprob, token.top_logprobs) == (None, ())
