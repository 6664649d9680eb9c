"""Chooses the next token of one sequence from its logits."""

import math
import secrets
from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.core.engine.sequence import SamplingParams, TokenEvent

# Nuclei are nearly always smaller than this; sorting the whole vocabulary costs 50 times more.
_SMALL_NUCLEUS = 256
# Below this the likeliest token has all the probability, and the division may overflow.
_MIN_TEMPERATURE = 1e-5
_BLOCK = 64
# 2^64 over the golden ratio: the step from one counter of SplitMix64 to the next.
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class Sampler:
    """The seed and the penalised tokens of one sequence.

    Logits pass, in this order: repetition penalty, frequency and presence penalty, logit
    bias, temperature, top_k, top_p, min_p. What is left is drawn from.

    A token's chance belongs to the token: its noise depends on the seed, the position in the
    completion and the token id alone. Logits that differ by rounding, because a step held other
    sequences or a prompt came from the cache, then nearly always draw the same token.
    """

    def __init__(self, params: SamplingParams, prompt_ids: list[int], vocab_size: int) -> None:
        self._params = params
        self._seed = secrets.randbits(64) if params.seed is None else params.seed & _MASK
        self._num_sampled = 0
        self._is_seen = torch.zeros(vocab_size, dtype=torch.bool)
        self._is_seen[prompt_ids] = True
        self._counts: Counter[int] = Counter()  # of the tokens sampled
        self._grammar = params.grammar.begin() if params.grammar else None
        self._biased = torch.tensor([token_id for token_id, _ in params.logit_bias])
        self._biases = torch.tensor([bias for _, bias in params.logit_bias])

    def sample(self, logits: Tensor) -> TokenEvent:
        """logits: (V,) in float32, not modified.

        Raises:
            ValueError: the logits are not numbers.
        """
        # A NaN is its own maximum; looking at every logit takes ten times longer.
        if not logits.max().isfinite():
            raise ValueError("the model's logits are not finite")
        logits = self._penalised(logits)
        if self._grammar is not None:
            logits = logits.masked_fill(~_bits(self._grammar.allowed(), len(logits)), -torch.inf)
        temperature = self._params.temperature
        if temperature < _MIN_TEMPERATURE:
            token_id = _argmax(logits)
        else:
            token_id = self._draw(logits / temperature)
        if self._grammar is not None:
            self._grammar.accept(token_id)
        self._num_sampled += 1
        self._is_seen[token_id] = True
        self._counts[token_id] += 1
        if self._params.num_logprobs is None:
            return TokenEvent(token_id)
        logprobs = logits.log_softmax(0)
        top = logprobs.topk(min(self._params.num_logprobs, len(logprobs)))
        return TokenEvent(
            token_id,
            float(logprobs[token_id]),
            tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
        )

    def _penalised(self, logits: Tensor) -> Tensor:
        """The logits after penalties and bias; the same tensor if there are none.

        The repetition penalty divides positive and multiplies negative logits of all tokens
        seen, prompt included (arXiv 1909.05858). The other two count sampled tokens only, as
        OpenAI's reference defines them: minus count * frequency, minus presence once.
        """
        params = self._params
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._is_seen, penalised, logits)
        if self._counts and (params.frequency_penalty or params.presence_penalty):
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            amounts = counts * params.frequency_penalty + params.presence_penalty
            logits = logits.index_add(0, torch.tensor(list(self._counts)), -amounts)
        if len(self._biased):
            logits = logits.index_add(0, self._biased, self._biases)
        return logits

    def _draw(self, logits: Tensor) -> int:
        """Draws by the Gumbel-max trick: the largest sum of logit and noise has the probability
        that softmax gives it (arXiv 1411.0030).
        """
        kept, ids = self._candidates(logits)
        noise = torch.from_numpy(_uniform(self._seed, self._num_sampled, ids.numpy()))
        noise = noise.log_().neg_().log_().neg_()
        return int(ids[noise.add_(kept).argmax()])

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The logits left by top_k, top_p and min_p, and their token ids.

        min_p keeps tokens of at least that share of the likeliest one's probability
        (arXiv 2407.01082).
        """
        logits, ids = self._nucleus(logits)
        if self._params.min_p > 0:
            is_kept = logits >= logits.max() + math.log(self._params.min_p)
            logits, ids = logits[is_kept], ids[is_kept]
        return logits, ids

    def _nucleus(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The logits left by top_k, then top_p, and their token ids.

        top_p keeps the smallest set of likeliest tokens that reaches that probability
        (arXiv 1904.09751), counted among those top_k has left.
        """
        vocab_size = len(logits)
        ids = torch.arange(vocab_size)
        if 0 < self._params.top_k < vocab_size:
            logits, ids = logits.topk(self._params.top_k)
        if self._params.top_p >= 1.0:
            return logits, ids
        total = logits.logsumexp(0)
        for count in (_SMALL_NUCLEUS, vocab_size):
            top, order = logits.topk(min(count, len(logits)))
            cumulative = (top - total).exp().cumsum(0)
            if cumulative[-1] >= self._params.top_p:
                break
        num_kept = int((cumulative < self._params.top_p).sum()) + 1
        return top[:num_kept], ids[order[:num_kept]]


def _uniform(seed: int, position: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number between 0 and 1, both excluded, for each token id: (N,).

    SplitMix64 as a generator with a counter (Steele, Lea, Flood: Fast Splittable Pseudorandom
    Number Generators, OOPSLA 2014), keyed by the seed, then by the position.
    """
    key = np.array([seed], dtype=np.uint64)
    for counter in (np.array([position]), ids):
        key = _mixed(key + (counter.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    return ((key >> np.uint64(12)) + 0.5).astype(np.float64) * 2.0**-52


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _argmax(logits: Tensor) -> int:
    """The first of the largest: by blocks, six times faster than torch.argmax over (V,)."""
    num_whole = len(logits) // _BLOCK * _BLOCK
    blocks, rest = logits[:num_whole].view(-1, _BLOCK), logits[num_whole:]
    if num_whole == 0 or (len(rest) and rest.max() > blocks.max()):
        return num_whole + int(rest.argmax())
    block = int(blocks.amax(1).argmax())
    return block * _BLOCK + int(blocks[block].argmax())


def _bits(mask: bytes, length: int) -> Tensor:
    """(length,), True where the bit is set; the lowest bit of the first byte comes first."""
    octets = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
    return (octets[:, None] >> torch.arange(8)).bitwise_and_(1).bool().flatten()[:length]
