"""A bag-of-tokens classifier: a baseline, and the initial embeddings of the model."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.core.text.tokenizer import ChatTokenizer
from training.corpus import SentimentRow

HIDDEN_SIZE = 256
EPOCHS = 3


class BagOfTokens(nn.Module):
    """The mean of the token embeddings and one linear layer."""

    def __init__(self, vocab_size: int, values: Sequence[str]) -> None:
        super().__init__()
        self.values = list(values)
        self.embeddings = nn.EmbeddingBag(vocab_size, HIDDEN_SIZE, mode="mean")
        self.linear = nn.Linear(HIDDEN_SIZE, len(values))
        nn.init.normal_(self.embeddings.weight, std=0.1)

    def forward(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Label logits: (B, labels)."""
        lengths = torch.tensor([0] + [len(ids) for ids in texts[:-1]])
        flat = torch.tensor([i for ids in texts for i in ids], dtype=torch.long)
        logits: Tensor = self.linear(self.embeddings(flat, lengths.cumsum(0)))
        return logits


def train_bag(
    texts: Sequence[SentimentRow], tokenizer: ChatTokenizer, values: Sequence[str], path: Path
) -> BagOfTokens:
    """Trains the classifier, or reads it from `path` if that exists."""
    bag = BagOfTokens(tokenizer.vocab_size, values)
    if path.exists():
        bag.load_state_dict(torch.load(path))
        return bag
    rows = [(tokenizer.encode_text(r.text.strip()) or [0], values.index(r.label)) for r in texts]
    optimizer = torch.optim.Adam(bag.parameters(), lr=3e-3)
    rng = random.Random(0)
    for _ in range(EPOCHS):
        rng.shuffle(rows)
        for begin in range(0, len(rows), 512):
            batch = rows[begin : begin + 512]
            loss = F.cross_entropy(
                bag([ids for ids, _ in batch]), torch.tensor([label for _, label in batch])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.save(bag.state_dict(), path)
    return bag
