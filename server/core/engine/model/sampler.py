"""Chooses the next tokens of a step's sequences from their logits, all in one pass."""

import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from server.core.engine.sequence import SamplingParams, TokenEvent

# Nuclei are nearly always smaller than this; sorting the whole vocabulary costs 50 times more.
_SMALL_NUCLEUS = 256
# Below this the likeliest token has all the probability, and the division may overflow.
_MIN_TEMPERATURE = 1e-5
# Logits in a block. The largest logits are found by the blocks' maxima.
_BLOCK = 64
# 2^64 over the golden ratio: the step from one counter of SplitMix64 to the next.
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class _Cut(NamedTuple):
    """How many of the largest logits to sample from.

    num: None means all of them, unsorted.
    is_guess: whether to try again with more if these do not reach top_p.
    """

    num: int | None
    is_guess: bool = False


class Sampler:
    """The seed and the penalised tokens of one sequence.

    Logits are processed in this order: repetition penalty, frequency and presence penalty, logit
    bias, grammar, temperature, top_k, top_p, min_p. One of the remaining tokens is sampled.

    A token's noise depends only on the seed, the position in the completion and the token id.
    Logits that differ by rounding, because a step held other sequences or a prompt was cached,
    then nearly always sample the same token.
    """

    def __init__(self, params: SamplingParams, prompt_ids: list[int], vocab_size: int) -> None:
        """vocab_size: ids from it on are padding and never sampled."""
        self.params = params
        self.seed = secrets.randbits(64) if params.seed is None else params.seed & _MASK
        self.num_sampled = 0
        self._vocab_size = vocab_size
        # Of the prompt and the completion. An id that occurs twice is penalised once.
        self._seen_ids = torch.tensor(sorted(set(prompt_ids)), dtype=torch.long)
        self._counts: Counter[int] = Counter()  # of sampled tokens
        self._grammar = params.grammar.begin() if params.grammar else None
        self._biased = torch.tensor([token_id for token_id, _ in params.logit_bias])
        self._biases = torch.tensor([bias for _, bias in params.logit_bias])

    @property
    def cut(self) -> _Cut:
        """How many of this sequence's logits to sample from."""
        if 0 < self.params.top_k < self._vocab_size:
            return _Cut(self.params.top_k)
        return _Cut(_SMALL_NUCLEUS, is_guess=True) if self.params.top_p < 1.0 else _Cut(None)

    def penalise(self, logits: Tensor) -> None:
        """Applies penalties, bias and grammar to the logits (V,), in place.

        The repetition penalty divides positive and multiplies negative logits of all tokens
        seen, prompt included (arXiv 1909.05858). The other two count sampled tokens only, as
        OpenAI's reference defines them: minus count * frequency, minus presence once.
        """
        params = self.params
        logits[self._vocab_size :] = -torch.inf
        if params.repetition_penalty != 1.0:
            penalty, seen = params.repetition_penalty, logits[self._seen_ids]
            logits[self._seen_ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts and (params.frequency_penalty or params.presence_penalty):
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            amounts = counts * params.frequency_penalty + params.presence_penalty
            logits.index_add_(0, torch.tensor(list(self._counts)), -amounts)
        if len(self._biased):
            logits.index_add_(0, self._biased, self._biases)
        if self._grammar is not None:
            allowed = _bits(self._grammar.allowed(), self._vocab_size)
            logits[: self._vocab_size].masked_fill_(~allowed, -torch.inf)

    def accept(self, token_id: int, logits: Tensor) -> TokenEvent:
        """Records the sampled token. logits: (V,), penalised, from which it was sampled."""
        if self._grammar is not None:
            self._grammar.accept(token_id)
        self.num_sampled += 1
        self._counts[token_id] += 1
        if self._counts[token_id] == 1:
            self._seen_ids = torch.cat((self._seen_ids, torch.tensor([token_id])))
        if self.params.num_logprobs is None:
            return TokenEvent(token_id)
        logprobs = logits[: self._vocab_size].log_softmax(0)
        top_ids = list(self.params.logprob_token_ids)
        if not top_ids:
            top = logprobs.topk(min(self.params.num_logprobs, len(logprobs)))
            top_ids = top.indices.tolist()
        top_logprobs = zip(top_ids, logprobs[top_ids].tolist(), strict=True)
        return TokenEvent(token_id, float(logprobs[token_id]), tuple(top_logprobs))


def sample(samplers: Sequence[Sampler], logits: Tensor) -> list[TokenEvent | Exception]:
    """Samples the next token of each sequence, or returns the error that fails it.

    logits: (B, V) in float32, one row for each sampler; they are penalised in place.
    """
    failed: dict[int, Exception] = {}
    for i, sampler in enumerate(samplers):
        try:
            sampler.penalise(logits[i])
        except Exception as error:
            failed[i] = error
    padded = logits
    if num_missing := -logits.shape[1] % _BLOCK:
        padded = F.pad(logits, (0, num_missing), value=-torch.inf)
    maxima = padded.view(len(logits), -1, _BLOCK).amax(-1)
    # The maximum of a block with a NaN is NaN.
    for i, is_finite in enumerate(maxima.amax(1).isfinite().tolist()):
        if not is_finite:
            failed.setdefault(i, ValueError("the model's logits are not finite"))
    token_ids = _choose({i: s for i, s in enumerate(samplers) if i not in failed}, padded, maxima)
    results: list[TokenEvent | Exception] = []
    for i, sampler in enumerate(samplers):
        try:
            results.append(failed.get(i) or sampler.accept(token_ids[i], logits[i]))
        except Exception as error:
            results.append(error)
    return results


def _choose(samplers: Mapping[int, Sampler], logits: Tensor, maxima: Tensor) -> dict[int, int]:
    """Chooses a token id for each row that has a sampler.

    logits: (B, V). maxima: (B, V / _BLOCK), of their blocks.
    """
    rows_by_cut = defaultdict[_Cut | None, list[int]](list)  # None: greedy
    for i, sampler in samplers.items():
        is_greedy = sampler.params.temperature < _MIN_TEMPERATURE
        rows_by_cut[None if is_greedy else sampler.cut].append(i)
    token_ids: dict[int, int] = {}
    for cut, rows in rows_by_cut.items():
        selected = (logits, maxima) if len(rows) == len(logits) else (logits[rows], maxima[rows])
        if cut is None:
            chosen = _argmax(*selected)
        else:
            chosen = _draw([samplers[i] for i in rows], *selected, cut)
        token_ids |= zip(rows, chosen, strict=True)
    return token_ids


def _draw(samplers: Sequence[Sampler], logits: Tensor, maxima: Tensor, cut: _Cut) -> list[int]:
    """Samples by the Gumbel-max trick: a token has the largest sum of logit and noise with its
    softmax probability (arXiv 1411.0030).

    logits, maxima: see `_choose`. cut: of each sampler.
    """
    temperatures = _column(sampler.params.temperature for sampler in samplers)
    reaches_top_p = [True] * len(samplers)
    if cut.num is None:
        kept, ids = logits / temperatures, torch.arange(logits.shape[1])[None]
    else:
        top, ids = _top(logits, maxima, cut.num)
        kept = top / temperatures
        if cut.is_guess:
            # In blocks: the sum over a long row depends on how many rows there are.
            blocks = (logits / temperatures).view(*maxima.shape, _BLOCK)
            total = blocks.logsumexp(2).logsumexp(1, keepdim=True)
        else:
            total = kept.logsumexp(1, keepdim=True)
        top_p = _column(sampler.params.top_p for sampler in samplers)
        # top_p keeps the fewest of the largest probabilities that reach it together, among those
        # that top_k keeps (arXiv 1904.09751).
        is_reached = ((kept - total).exp().cumsum(1) >= top_p).logical_and_(top_p < 1.0)
        kept[:, 1:].masked_fill_(is_reached[:, :-1], -torch.inf)
        if cut.is_guess:
            reaches_top_p = is_reached[:, -1].tolist()
    # min_p keeps tokens of at least that share of the likeliest one's probability
    # (arXiv 2407.01082).
    min_p = _column(sampler.params.min_p for sampler in samplers)
    kept.masked_fill_(kept < kept.amax(1, keepdim=True) + min_p.log(), -torch.inf)
    seeds = np.array([[sampler.seed] for sampler in samplers], dtype=np.uint64)
    positions = np.array([[sampler.num_sampled] for sampler in samplers], dtype=np.uint64)
    noise = torch.from_numpy(_uniform(seeds, positions, ids.numpy()))
    chosen = noise.log_().neg_().log_().neg_().add_(kept).argmax(1, keepdim=True)
    token_ids: list[int] = ids.expand(kept.shape).gather(1, chosen)[:, 0].tolist()
    for i, sampler in enumerate(samplers):
        if cut.num is not None and not reaches_top_p[i]:
            row = slice(i, i + 1)
            larger = _Cut(cut.num * 32, is_guess=cut.num * 32 < logits.shape[1])
            [token_ids[i]] = _draw([sampler], logits[row], maxima[row], larger)
    return token_ids


def _top(logits: Tensor, maxima: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, descending, and their token ids, each (B, num).

    They are searched only in the blocks with the largest maxima, in a tenth of the time of
    `logits.topk`.
    """
    num = min(num, logits.shape[1])
    blocks = maxima.topk(min(num, maxima.shape[1])).indices
    ids = (blocks[..., None] * _BLOCK + torch.arange(_BLOCK)).flatten(1)
    top = logits.gather(1, ids).topk(num)
    return top.values, ids.gather(1, top.indices)


def _argmax(logits: Tensor, maxima: Tensor) -> list[int]:
    """The token id of the first of the largest logits of each row."""
    blocks = maxima.argmax(1, keepdim=True)
    ids = blocks * _BLOCK + torch.arange(_BLOCK)
    chosen: list[int] = ids.gather(1, logits.gather(1, ids).argmax(1, keepdim=True))[:, 0].tolist()
    return chosen


def _column(numbers: Iterable[float]) -> Tensor:
    return torch.tensor(list(numbers))[:, None]


def _uniform(
    seeds: NDArray[np.uint64], positions: NDArray[np.uint64], ids: NDArray[np.int64]
) -> NDArray[np.float64]:
    """A number between 0 and 1, both excluded, for each token id: (B, N).

    SplitMix64 as a generator with a counter (Steele, Lea, Flood: Fast Splittable Pseudorandom
    Number Generators, OOPSLA 2014), keyed by the seed, then by the position. Both are (B, 1).
    """
    key = seeds
    for counter in (positions, ids):
        key = _mixed(key + (counter.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    return ((key >> np.uint64(12)) + 0.5).astype(np.float64) * 2.0**-52


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _bits(mask: bytes, length: int) -> Tensor:
    """(length,), True where the bit is set; the lowest bit of the first byte comes first."""
    octets = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
    return (octets[:, None] >> torch.arange(8)).bitwise_and_(1).bool().flatten()[:length]
