"""What the event loop sees of the engine: submit, score, prefill, close.

Knows token ids, not text and not sentiment. All is computed on a thread of its own, so the loop is
never blocked.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.runner import Runner
from server.core.engine.sequence import PrefilledEvent, SamplingParams, ScoredEvent, Sequence
from server.core.engine.stream import TokenStream
from server.core.engine.thread import EngineThread, Observer
from server.core.engine.work import Work


@dataclass(frozen=True)
class Scores:
    """What was asked for about the end of a prompt, and how much of the prompt was known.

    logprobs: (nats) of every continuation.
    hidden_states: (L, C), of the last prompt token after each layer asked for, or None.
    """

    logprobs: list[float]
    num_cached: int
    hidden_states: NDArray[np.float32] | None = None


class Engine:
    """Runs sequences in continuous batches on a thread of its own.

    work: the request that a sequence belongs to; None: the sequence is one of its own.
    adapter: what the sequence is computed with beside the base model.
    Methods that start a sequence raise an EngineClosedError once the engine is closing.
    """

    def __init__(self, runner: Runner, *, max_num_seqs: int, max_rows: int) -> None:
        """max_num_seqs, max_rows: as the scheduler has them."""
        self._runner = runner
        self._thread = EngineThread(runner, max_num_seqs=max_num_seqs, max_rows=max_rows)
        self._scheduler = self._thread.scheduler
        self._thread.start()

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, *, work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> TokenStream:  # fmt: skip
        """Starts to continue the prompt. Call from the event loop."""
        assert prompt_ids and params.max_tokens > 0
        return self._start(Sequence(prompt_ids, params, work=work or Work(), adapter=adapter))

    async def score(
        self,
        prompt_ids: list[int],
        continuations: list[list[int]],
        *,
        layers: tuple[int, ...] = (),
        num_shared: int = 0,
        is_pinned: bool = False,
        work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> Scores:
        """Scores each continuation after the prompt.

        layers: those whose hidden states are wanted, rising from 1. Without continuations the
        forward ends for this prompt after the last of them.
        num_shared: first tokens that later prompts will have too; they are computed once.
        is_pinned: whether these are kept for good.
        A cancelled call frees its slot.
        """
        assert prompt_ids and (continuations or layers) and all(continuations)
        sequence = Sequence(
            prompt_ids,
            continuations=continuations,
            layers=layers,
            num_shared=num_shared,
            is_pinned=is_pinned,
            work=work or Work(),
            adapter=adapter,
        )
        stream = self._start(sequence)
        end = await stream.end(ScoredEvent)
        return Scores(end.logprobs, stream.num_cached, end.hidden_states)

    async def prefill(
        self, prompt_ids: list[int], *, work: Work | None = None, adapter: Adapter = BASE
    ) -> int | None:
        """Computes the prompt, so that a sequence that begins with it starts sooner.

        Returns how many of its tokens were known already; None, and nothing is computed, if it is
        too long to be kept. A cancelled call frees its slot.
        """
        if not self._runner.is_kept(adapter.num_virtual_tokens + len(prompt_ids)):
            return None
        stream = self._start(Sequence(prompt_ids, work=work or Work(), adapter=adapter))
        await stream.end(PrefilledEvent)
        return stream.num_cached

    def observe(self, observer: Observer) -> None:
        """Reports to the observer from now on."""
        self._thread.observer = observer

    @property
    def is_alive(self) -> bool:
        """Whether the engine still works on sequences."""
        return self._thread.is_alive() and not self._thread.is_closed

    @property
    def breakdown(self) -> Exception | None:
        """What ended the engine, if it was not closed."""
        return self._thread.breakdown

    @property
    def num_running(self) -> int:
        """Sequences that hold memory. A step computes some or all of them."""
        return len(self._scheduler.admission.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for memory, or for their request's turn."""
        return len(self._scheduler.admission.waiting)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the memory in use has room for."""
        return self._runner.num_kv_tokens

    def close(self) -> None:
        """Aborts every sequence and ends the thread. May be called twice."""
        self._thread.close()

    def _start(self, sequence: Sequence) -> TokenStream:
        stream = TokenStream(lambda: self._thread.abort(sequence), lambda: sequence.num_cached or 0)
        sequence.deliver = stream.deliver
        self._thread.add(sequence)
        return stream
