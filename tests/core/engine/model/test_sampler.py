"""Every sampling parameter against its definition."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from server.core.engine.model.sampler import _GOLDEN, Sampler, _mixed, _uniform, sample
from server.core.engine.sequence import SamplingParams, TokenEvent

PROBS = [0.5, 0.25, 0.15, 0.06, 0.04]
LOGITS = torch.tensor([math.log(p) for p in PROBS])
DRAWS = 3000


class LoneSampler(Sampler):
    """A sampler that is alone in its step."""

    def sample(self, logits: torch.Tensor) -> TokenEvent:
        [token] = sample([self], logits[None].clone())
        if isinstance(token, Exception):
            raise token
        return token


def sampler(prompt: list[int] | None = None, **params: Any) -> LoneSampler:
    return LoneSampler(SamplingParams(max_tokens=1, **params), prompt or [], len(PROBS))


def frequencies(chooser: LoneSampler, logits: torch.Tensor = LOGITS) -> list[float]:
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


def test_top_p_counts_only_tokens_that_top_k_keeps() -> None:
    # Of 0.5 and 0.25 the first alone holds two thirds.
    assert frequencies(sampler(top_k=2, top_p=0.6, seed=4))[0] == 1.0


def test_a_nucleus_larger_than_the_first_guess_is_found_exactly() -> None:
    logits = torch.linspace(0, -0.1, 1000)
    num_kept = int((logits.softmax(0).cumsum(0) < 0.9).sum()) + 1
    chooser = LoneSampler(SamplingParams(max_tokens=1, top_p=0.9, seed=5), [], 1000)
    drawn = {chooser.sample(logits).token_id for _ in range(3000)}
    assert num_kept - 20 < max(drawn) < num_kept


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


def test_presence_penalty_counts_once_however_often_a_token_was_sampled() -> None:
    logits = torch.tensor([2.0, 1.5, -9.0, -9.0, -9.0])
    chooser = sampler([0], temperature=0.0, presence_penalty=1.0)
    # Once both were sampled, both stay lowered by one.
    assert [chooser.sample(logits).token_id for _ in range(5)] == [0, 1, 0, 0, 0]


def test_negative_penalties_favour_sampled_tokens() -> None:
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


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logit_bias": ((3, 1.0),)},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
    {"temperature": 0.9, "top_k": 256, "frequency_penalty": 0.5},
    {"top_p": 0.3},
    {"temperature": 1e6, "top_p": 0.999},  # more than the first guess
    {"temperature": 1.2, "min_p": 0.05, "num_logprobs": 2},
    {"presence_penalty": 1.0},
]


@pytest.mark.parametrize("vocab_size", [700, 704])
def test_a_sequence_draws_the_same_tokens_alone_and_beside_any_others(vocab_size: int) -> None:
    def samplers() -> list[LoneSampler]:
        return [
            LoneSampler(SamplingParams(max_tokens=1, seed=i % 3, **kind), [i, 5], vocab_size)
            for i, kind in enumerate(KINDS * 2)
        ]

    generator = torch.Generator().manual_seed(0)
    alone, together = samplers(), samplers()
    for step in range(20):
        logits = torch.randn(len(alone), vocab_size + 20, generator=generator) * 3
        if step == 10:
            logits[4] = torch.nan  # only this sequence fails
        tokens = sample(together, logits.clone())
        for i, (chooser, token) in enumerate(zip(alone, tokens, strict=True)):
            if step == 10 and i == 4:
                assert isinstance(token, ValueError)
                continue
            assert token == chooser.sample(logits[i])
            assert token.token_id < vocab_size


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    chooser = sampler(temperature=temperature, seed=6)
    assert {chooser.sample(LOGITS).token_id for _ in range(50)} == {0}


@pytest.mark.parametrize("vocab_size", [1, 5, 63, 64, 65, 300, 1000])
def test_greedy_takes_the_first_of_the_largest_wherever_it_is(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    greedy = LoneSampler(SamplingParams(max_tokens=1, temperature=0.0), [], vocab_size)
    for _ in range(50):
        # Few different values, so that there are ties.
        logits = torch.randint(0, 8, (vocab_size,), generator=generator).float()
        expected = logits.tolist().index(max(logits.tolist()))
        assert greedy.sample(logits).token_id == expected


# --- noise ----------------------------------------------------------------------------

# Of five tokens' chi-square, 4 degrees of freedom: exceeded once in 100,000 times.
MAX_CHI_SQUARE = 28.5


def chi_square(counts: Counter[int], probs: list[float]) -> float:
    total = counts.total()
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(probs))


def noise_of(seed: int, position: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    row: NDArray[np.float64]
    [row] = _uniform(
        np.array([[seed]], dtype=np.uint64), np.array([[position]], dtype=np.uint64), ids[None]
    )
    return row


def test_first_tokens_of_many_seeds_have_the_frequencies_of_the_softmax() -> None:
    counts = Counter(sampler(seed=seed).sample(LOGITS).token_id for seed in range(10_000))
    assert chi_square(counts, PROBS) < MAX_CHI_SQUARE


@pytest.mark.parametrize("seed", [0, 1, 2**63, -5])
def test_tokens_at_many_positions_of_a_seed_have_the_frequencies_of_the_softmax(seed: int) -> None:
    chooser = sampler(seed=seed)
    counts = Counter(chooser.sample(LOGITS).token_id for _ in range(10_000))
    assert chi_square(counts, PROBS) < MAX_CHI_SQUARE


def test_tokens_that_follow_each_other_are_independent() -> None:
    chooser = sampler(seed=3, temperature=1e9)  # all five are equally likely
    drawn = [chooser.sample(LOGITS).token_id for _ in range(10_001)]
    pairs = Counter(a * len(PROBS) + b for a, b in itertools.pairwise(drawn))
    # 24 degrees of freedom: exceeded once in 100,000 times.
    assert chi_square(pairs, [1 / 25] * 25) < 67


def test_a_token_has_the_same_noise_beside_any_others_in_any_order() -> None:
    rng = np.random.default_rng(0)
    ids = rng.permutation(5000)
    noise = dict(zip(ids.tolist(), noise_of(9, 4, ids).tolist(), strict=True))
    for size in (1, 2, 100, 4999):
        some = rng.choice(ids, size, replace=False)
        assert noise_of(9, 4, some).tolist() == [noise[i] for i in some.tolist()]


@pytest.mark.parametrize("cut", [{"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}])
def test_a_cut_that_keeps_the_token_drawn_without_it_draws_it_too(cut: dict[str, Any]) -> None:
    size = 200
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 2
    descending, order = logits.sort(descending=True)
    probs = descending.softmax(0)
    is_kept = {
        "top_k": torch.arange(size) < cut.get("top_k", 0),
        "top_p": probs.cumsum(0) - probs < cut.get("top_p", 0),
        "min_p": probs >= probs[0] * cut.get("min_p", 0),
    }
    [name] = cut
    kept = set(order[is_kept[name]].tolist())
    num_kept = 0
    for seed in range(200):
        whole, part = (
            LoneSampler(SamplingParams(max_tokens=1, seed=seed, **each), [], size)
            for each in ({}, cut)
        )
        drawn = whole.sample(logits).token_id
        if drawn in kept:
            num_kept += 1
            assert part.sample(logits).token_id == drawn
    assert 100 < num_kept < 200


def test_every_seed_position_and_token_has_noise_of_its_own() -> None:
    seeds = [*range(20), -1, 2**32, 2**63 - 1, 2**64 - 2]
    ids = np.arange(200)
    noise = np.stack(
        [[noise_of(seed % 2**64, position, ids) for position in range(20)] for seed in seeds]
    )
    assert len(np.unique(noise)) == noise.size
    # Neighbours are not correlated, in 96,000 pairs.
    for axis in range(3):
        size = noise.shape[axis]
        first, second = noise.take(range(size - 1), axis), noise.take(range(1, size), axis)
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / math.sqrt(first.size)


def test_noise_is_uniform() -> None:
    noise = np.sort(noise_of(1, 2, np.arange(100_000)))
    expected = (np.arange(100_000) + 0.5) / 100_000
    # Kolmogorov and Smirnov's bound: exceeded once in 100,000 times.
    assert abs(noise - expected).max() < 2.47 / math.sqrt(100_000)


def test_the_numbers_are_those_of_splitmix64() -> None:
    # The first two of its reference implementation from the seed 1234567.
    steps = np.array([1234567], dtype=np.uint64) + np.array([1, 2], np.uint64) * np.uint64(_GOLDEN)
    assert _mixed(steps).tolist() == [6457827717110365317, 3203168211198807973]


def _unmixed(value: int) -> int:
    """The inverse of `_mixed`."""

    def unshifted(shifted: int, num_bits: int) -> int:
        original = shifted
        for _ in range(64 // num_bits + 1):
            original = shifted ^ (original >> num_bits)
        return original

    value = unshifted(value, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    value = unshifted(value, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return unshifted(value, 30)


@pytest.mark.parametrize("bits", [0, 1, 2**63, 2**64 - 2**11 - 1, 2**64 - 1])
def test_noise_is_strictly_between_0_and_1(bits: int) -> None:
    """bits: of the last 64-bit number."""
    position, token_id = 3, 7
    key = (_unmixed(bits) - (token_id + 1) * _GOLDEN) % 2**64
    seed = (_unmixed(key) - (position + 1) * _GOLDEN) % 2**64
    [noise] = noise_of(seed, position, np.array([token_id]))
    assert noise == pytest.approx(bits / 2**64, abs=1e-15)
    assert 0 < noise < 1


@pytest.mark.parametrize("size", [2, 2000])
def test_logits_that_differ_by_rounding_draw_the_same_tokens(size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (LoneSampler(SamplingParams(max_tokens=1, seed=11), [], size) for _ in range(2))
    num_changed = 0
    for _ in range(2000):
        logits = torch.randn(size, generator=generator)
        rounded = logits + 1e-4 * (2 * torch.rand(size, generator=generator) - 1)
        num_changed += first.sample(logits).token_id != second.sample(rounded).token_id
    # At most one in 5,000 draws is expected to change.
    assert num_changed <= 5


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1, 10**40, -(10**40)])
def test_a_seed_may_be_any_integer(seed: int) -> None:
    def draw(seed: int) -> list[int]:
        chooser = sampler(seed=seed, temperature=1.5)
        return [chooser.sample(LOGITS).token_id for _ in range(50)]

    assert draw(seed) == draw(seed) != draw(seed + 1)


def test_without_a_seed_every_sequence_draws_its_own_tokens() -> None:
    draws = set()
    for _ in range(10):
        chooser = sampler(temperature=2.0)
        draws.add(tuple(chooser.sample(LOGITS).token_id for _ in range(50)))
    assert len(draws) == 10


def test_tokens_without_probability_are_never_sampled() -> None:
    chooser = sampler(seed=2, temperature=2.0, logit_bias=((0, -torch.inf), (2, -torch.inf)))
    assert {chooser.sample(LOGITS).token_id for _ in range(500)} == {1, 3, 4}


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


def test_more_top_logprobs_than_tokens_are_those_of_all_tokens() -> None:
    token = sampler(num_logprobs=20).sample(LOGITS)
    assert sorted(i for i, _ in token.top_logprobs) == list(range(len(LOGITS)))


def test_without_num_logprobs_no_logprobs_are_reported() -> None:
    token = sampler(seed=1).sample(LOGITS)
    assert (token.logprob, token.top_logprobs) == (None, ())
