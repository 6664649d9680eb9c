"""Measures during training how many answers to the test openers are to the point.

Needs only torch, numpy and tokenizers. The share is that of `benchmarks.points` at temperature 0
with the true mood as the cue; in the server it also depends on its labels and its sampling.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from training.batches import PADDING, Pack
from training.model import Qwen2
from training.similar import MEASURES

TOKENIZER = Path(__file__).parent.parent / "server" / "models" / "qwen-mini" / "tokenizer.json"
MAX_TOKENS = 32
MOODS = ("positive", "negative", "neutral")


class Points:
    """The openers as prompts."""

    def __init__(self, pack: Pack, device: str) -> None:
        self._tokenizer = Tokenizer.from_file(str(TOKENIZER))
        lines = (MEASURES / "points.jsonl").read_text(encoding="utf-8").splitlines()
        self._openers = [json.loads(line) for line in lines]
        self._end = int(pack.tokens[pack.starts[pack.piece("end")]])
        self._head = pack.arrays["prefix_persona"].tolist()
        self._device = device
        user, cues = _segment(pack, pack.piece("user")), pack.arrays["piece_cue"]
        self._prompts = [
            [*user, *self._tokenizer.encode(opener["text"], add_special_tokens=False).ids,
             *_segment(pack, int(cues[MOODS.index(opener["mood"])]))]
            for opener in self._openers
        ]  # fmt: skip

    @torch.no_grad()
    def answers(self, model: Qwen2) -> list[str]:
        """The greedy answers."""
        rows = [[*self._head, *prompt] for prompt in self._prompts]
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        width = max(map(len, rows)) + MAX_TOKENS
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=self._device)
        for row, prompt in zip(ids, rows, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        at = torch.arange(len(rows), device=self._device)
        positions = torch.arange(width, device=self._device).expand_as(ids)
        for i in range(MAX_TOKENS):
            documents = torch.where(positions < len(self._head), 0, 1)
            documents = documents.masked_fill(positions >= lengths[:, None] + i, PADDING)
            hidden = model(ids, positions, documents)[at, lengths + i - 1]
            ids[at, lengths + i] = model.lm_head(hidden).argmax(-1)
        texts = []
        for row, prompt in zip(ids.tolist(), rows, strict=True):
            answer = row[len(prompt) : len(prompt) + MAX_TOKENS]
            end = answer.index(self._end) if self._end in answer else None
            texts.append(self._tokenizer.decode(answer[:end]))
        return texts

    def shares(self, model: Qwen2) -> dict[str, float]:
        """Share of answers that contain a word of the topic, by language."""
        hits = [
            (opener["lang"], re.search(opener["topic"], answer, re.IGNORECASE) is not None)
            for opener, answer in zip(self._openers, self.answers(model), strict=True)
        ]
        return {
            f"{lang}_to_the_point": round(
                float(np.mean([hit for each, hit in hits if each == lang])), 4
            )
            for lang in ("zh", "en")
        }


def _segment(pack: Pack, index: int) -> list[int]:
    begin = pack.starts[index]
    ids: list[int] = pack.tokens[begin : begin + pack.lengths[index]].tolist()
    return ids
