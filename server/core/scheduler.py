"""Decides which sequences run in the next step. Knows token counts, not tensors or text."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from server.core.sequence import Sequence


@dataclass(frozen=True)
class ScheduledChunk:
    """`num_tokens` of a sequence to be computed in this step."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence has nothing left to compute, so its logits count."""
        return self.num_tokens == self.sequence.num_uncomputed


class Scheduler:
    """First come, first served; sequences join and leave at every step.

    A step holds one token of every decoding sequence and at most `max_prefill_tokens` of
    prompts, so a long prompt delays running streams by one chunk at a time.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_prefill_tokens: int,
        on_admit: Callable[[Sequence], None] = lambda sequence: None,
    ) -> None:
        """on_admit: called with each sequence before its first chunk is scheduled."""
        assert max_num_seqs > 0 and max_prefill_tokens > 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._max_num_seqs = max_num_seqs
        self._max_prefill_tokens = max_prefill_tokens
        self._on_admit = on_admit

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Forgets the sequence. Returns whether it was here."""
        if sequence in self.running:
            self.running.remove(sequence)
            return True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return True
        return False

    def schedule(self) -> list[ScheduledChunk]:
        """The chunks of the next step; admits waiting sequences while there is room."""
        while self.waiting and len(self.running) < self._max_num_seqs:
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            self._on_admit(sequence)
        chunks = []
        prefill_left = self._max_prefill_tokens
        for sequence in self.running:
            num_tokens = sequence.num_uncomputed
            if sequence.num_computed < len(sequence.prompt_ids):
                num_tokens = min(num_tokens, prefill_left)
                prefill_left -= num_tokens
            if num_tokens:
                chunks.append(ScheduledChunk(sequence, num_tokens))
        return chunks
