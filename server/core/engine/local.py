"""The engine in this process, which runs the model on a thread."""

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.engine import Observer, Scores
from server.core.engine.runner import Runner
from server.core.engine.sequence import PrefilledEvent, SamplingParams, ScoredEvent, Sequence
from server.core.engine.stream import TokenStream
from server.core.engine.thread import EngineThread
from server.core.engine.work import Work


class LocalEngine:
    """An `Engine` that computes sequences in continuous batches on its own thread."""

    has_hidden_states = True

    def __init__(self, runner: Runner, *, max_num_seqs: int, max_rows: int) -> None:
        """max_num_seqs, max_rows: see `Scheduler`."""
        self._runner = runner
        self._thread = EngineThread(runner, max_num_seqs=max_num_seqs, max_rows=max_rows)
        self._scheduler = self._thread.scheduler
        self._thread.start()

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, *, work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> TokenStream:  # fmt: skip
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
        if not self._runner.is_kept(adapter.num_virtual_tokens + len(prompt_ids)):
            return None
        stream = self._start(Sequence(prompt_ids, work=work or Work(), adapter=adapter))
        await stream.end(PrefilledEvent)
        return stream.num_cached

    def observe(self, observer: Observer) -> None:
        self._thread.observer = observer

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._thread.is_closed

    @property
    def breakdown(self) -> Exception | None:
        return self._thread.breakdown

    @property
    def trouble(self) -> str | None:
        return f"the engine broke down: {self.breakdown!r}" if self.breakdown else None

    @property
    def num_running(self) -> int:
        """Sequences that hold memory. A step computes some or all of them."""
        return len(self._scheduler.admission.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.admission.waiting)

    @property
    def num_kv_tokens(self) -> int:
        return self._runner.num_kv_tokens

    def close(self) -> None:
        self._thread.close()

    def _start(self, sequence: Sequence) -> TokenStream:
        stream = TokenStream(lambda: self._thread.abort(sequence), lambda: sequence.num_cached)
        sequence.deliver = stream.deliver
        self._thread.add(sequence)
        return stream
