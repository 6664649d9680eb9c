"""Decides which sequences run in the next step. Knows token counts, not tensors or text."""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from server.core.engine.sequence import Sequence


@dataclass(frozen=True)
class ScheduledChunk:
    """`num_tokens` of a sequence to be computed in this step."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence has nothing left to compute, so its logits count."""
        return self.num_tokens == self.sequence.num_uncomputed


class Memory(Protocol):
    """Where sequences keep what they have computed. The scheduler only asks whether it fits."""

    def admit(self, sequence: Sequence) -> bool:
        """Takes in a sequence with all its tokens; False: not now."""

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes room for more tokens; never False for a sequence that is alone."""

    def suspend(self, sequence: Sequence) -> None:
        """Gives an admitted sequence's room to others; it will be admitted again."""


class Scheduler:
    """First come, first served; sequences join and leave at every step.

    A step holds one token of every decoding sequence and at most `max_prefill_tokens` of
    prompts, so a long prompt delays running streams by one chunk at a time. When memory is
    short, who came last waits, and computes again what it had to give up.
    """

    def __init__(self, max_num_seqs: int, max_prefill_tokens: int, memory: Memory) -> None:
        assert max_num_seqs > 0 and max_prefill_tokens > 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # who came first, first
        self._max_num_seqs = max_num_seqs
        self._max_prefill_tokens = max_prefill_tokens
        self._memory = memory

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
        self._admit_waiting()
        chunks = []
        prefill_left = self._max_prefill_tokens
        for sequence in list(self.running):
            num_tokens = sequence.num_uncomputed
            if not sequence.is_decoding:
                num_tokens = min(num_tokens, prefill_left)
            if not num_tokens or not self._make_room(sequence, num_tokens):
                continue
            if not sequence.is_decoding:
                prefill_left -= num_tokens
            chunks.append(ScheduledChunk(sequence, num_tokens))
        return chunks

    def _admit_waiting(self) -> None:
        while self.waiting and len(self.running) < self._max_num_seqs:
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            # Admission may end the sequence, which is then in neither place.
            if not self._memory.admit(sequence) and sequence in self.running:
                self._put_back(sequence)
                return

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Takes from those who came last what this one needs; False if that is itself."""
        while sequence in self.running:
            if self._memory.reserve(sequence, num_tokens):
                return True
            # Reserving and suspending may also end who breaks them.
            if sequence in self.running:
                last = self.running[-1]
                self._memory.suspend(last)
                if last in self.running:
                    self._put_back(last)
        return False

    def _put_back(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
