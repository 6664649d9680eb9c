"""Who runs in a step, told by token counts alone: nothing here computes anything."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.core.engine.scheduler import ScheduledChunk, Scheduler
from server.core.engine.sequence import SamplingParams, Sequence


def prompt(num_tokens: int) -> Sequence:
    return Sequence([7] * num_tokens, SamplingParams(max_tokens=100), [], lambda event: None)


class FakeMemory:
    """Room for a number of tokens; remembers who holds how many."""

    def __init__(self, num_tokens: int = 10**9) -> None:
        self.num_tokens = num_tokens
        self.held: dict[Sequence, int] = {}

    def admit(self, sequence: Sequence) -> bool:
        assert sequence not in self.held
        return self._take(sequence, len(sequence.token_ids))

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        assert sequence in self.held, "not admitted"
        return self._take(sequence, sequence.num_computed + num_tokens)

    def suspend(self, sequence: Sequence) -> None:
        del self.held[sequence]
        sequence.num_computed = 0

    def _take(self, sequence: Sequence, num_tokens: int) -> bool:
        others = sum(self.held.values()) - self.held.get(sequence, 0)
        if others + num_tokens > self.num_tokens:
            return False
        self.held[sequence] = max(num_tokens, self.held.get(sequence, 0))
        return True


def make(
    *sequences: Sequence, max_num_seqs: int = 8, max_prefill_tokens: int = 100,
    memory: FakeMemory | None = None,
) -> Scheduler:  # fmt: skip
    scheduler = Scheduler(max_num_seqs, max_prefill_tokens, memory or FakeMemory())
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler


def step(scheduler: Scheduler) -> list[ScheduledChunk]:
    """Schedules a step and computes it: every complete prompt gets one more token."""
    chunks = scheduler.schedule()
    is_last = [chunk.is_last for chunk in chunks]
    for chunk, is_complete in zip(chunks, is_last, strict=True):
        chunk.sequence.num_computed += chunk.num_tokens
        if is_complete:
            chunk.sequence.completion_ids.append(7)
    return chunks


def sizes(chunks: list[ScheduledChunk], *sequences: Sequence) -> list[int]:
    """Number of tokens of each of the sequences in the step, 0 if it is not in it."""
    num_tokens = {chunk.sequence: chunk.num_tokens for chunk in chunks}
    assert len(num_tokens) == len(chunks), "a sequence has two chunks in one step"
    assert set(num_tokens) <= set(sequences)
    return [num_tokens.get(sequence, 0) for sequence in sequences]


# --- prefill and decode ---------------------------------------------------------------


def test_a_prompt_within_the_budget_is_computed_in_one_step() -> None:
    a = prompt(10)
    scheduler = make(a, max_prefill_tokens=10)
    (chunk,) = scheduler.schedule()
    assert chunk == ScheduledChunk(a, 10)
    assert chunk.is_last


def test_a_prompt_beyond_the_budget_is_computed_in_chunks_and_only_the_last_one_counts() -> None:
    a = prompt(10)
    scheduler = make(a, max_prefill_tokens=4)
    chunks = []
    while not a.completion_ids:
        (chunk,) = scheduler.schedule()
        chunks.append((chunk.num_tokens, chunk.is_last))
        step(scheduler)
    assert chunks == [(4, False), (4, False), (2, True)]


def test_after_its_prompt_a_sequence_computes_one_token_a_step() -> None:
    a = prompt(5)
    scheduler = make(a)
    assert [sizes(step(scheduler), a) for _ in range(4)] == [[5], [1], [1], [1]]
    assert len(a.completion_ids) == 4
    assert a.num_uncomputed == 1


def test_decode_continues_beside_a_long_prefill() -> None:
    a, b = prompt(3), prompt(10)
    scheduler = make(a, max_prefill_tokens=4)
    step(scheduler)
    scheduler.add(b)
    assert [sizes(step(scheduler), a, b) for _ in range(4)] == [[1, 4], [1, 4], [1, 2], [1, 1]]


def test_decoding_sequences_do_not_use_up_the_budget_of_prompts() -> None:
    decoding, b = [prompt(2) for _ in range(6)], prompt(9)
    scheduler = make(*decoding, max_prefill_tokens=4)
    for _ in range(3):
        step(scheduler)
    assert all(sequence.completion_ids for sequence in decoding)
    scheduler.add(b)
    assert sizes(step(scheduler), *decoding, b) == [1] * 6 + [4]


def test_what_the_first_prompt_leaves_of_the_budget_goes_to_the_next() -> None:
    a, b, c = prompt(3), prompt(8), prompt(5)
    scheduler = make(a, b, c, max_prefill_tokens=5)
    assert sizes(step(scheduler), a, b, c) == [3, 2, 0]
    assert sizes(step(scheduler), a, b, c) == [1, 5, 0]
    assert sizes(step(scheduler), a, b, c) == [1, 1, 4]
    assert sizes(step(scheduler), a, b, c) == [1, 1, 1]


@pytest.mark.parametrize("max_prefill_tokens", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 5])
def test_no_step_exceeds_its_limits_and_every_prompt_gets_done(
    max_num_seqs: int, max_prefill_tokens: int
) -> None:
    sequences = [prompt(num_tokens) for num_tokens in (1, 30, 2, 2, 17, 64, 5, 1, 9)]
    scheduler = make(*sequences, max_num_seqs=max_num_seqs, max_prefill_tokens=max_prefill_tokens)
    # Every step computes something, so there cannot be more steps than tokens.
    for _ in range(sum(len(sequence.prompt_ids) + 2 for sequence in sequences)):
        if scheduler.is_idle:
            break
        is_prefill = {sequence: sequence.num_uncomputed > 1 for sequence in sequences}
        chunks = step(scheduler)
        assert 0 < len(chunks) <= max_num_seqs
        assert all(chunk.num_tokens > 0 for chunk in chunks)
        prefilled = sum(chunk.num_tokens for chunk in chunks if is_prefill[chunk.sequence])
        assert prefilled <= max_prefill_tokens
        for sequence in list(scheduler.running):
            if len(sequence.completion_ids) == 3:
                assert scheduler.remove(sequence)
    assert all(len(sequence.completion_ids) == 3 for sequence in sequences)


def test_the_chunks_of_a_prompt_cover_it_without_gap_or_overlap() -> None:
    a, b = prompt(23), prompt(11)
    scheduler = make(a, b, max_prefill_tokens=4)
    covered: dict[Sequence, list[int]] = {a: [], b: []}
    for _ in range(9):
        for chunk in scheduler.schedule():
            begin = chunk.sequence.num_computed
            covered[chunk.sequence] += range(begin, begin + chunk.num_tokens)
        step(scheduler)
    assert covered[a][:23] == list(range(23))
    assert covered[b] == list(range(11))


def test_scheduling_alone_changes_no_sequence() -> None:
    a = prompt(10)
    scheduler = make(a, max_prefill_tokens=4)
    assert scheduler.schedule() == scheduler.schedule() == [ScheduledChunk(a, 4)]
    assert a.num_computed == 0 and a.completion_ids == []


# --- first come, first served ---------------------------------------------------------


def test_prompts_are_finished_in_the_order_they_came() -> None:
    sequences = [prompt(num_tokens) for num_tokens in (9, 2, 30, 4)]
    scheduler = make(*sequences, max_prefill_tokens=3)
    done: list[Sequence] = []
    for _ in range(sum(len(sequence.prompt_ids) for sequence in sequences)):
        step(scheduler)
        done += [s for s in sequences if s.completion_ids and s not in done]
    assert done == sequences


def test_no_more_than_max_num_seqs_run_together() -> None:
    sequences = [prompt(2) for _ in range(5)]
    scheduler = make(*sequences, max_num_seqs=3)
    for _ in range(4):
        assert [chunk.sequence for chunk in step(scheduler)] == sequences[:3]
    assert scheduler.running == sequences[:3]
    assert list(scheduler.waiting) == sequences[3:]


def test_a_freed_slot_goes_to_who_waits_longest() -> None:
    a, b, c, d = (prompt(2) for _ in range(4))
    scheduler = make(a, b, c, d, max_num_seqs=2)
    step(scheduler)
    scheduler.remove(a)
    assert sizes(step(scheduler), a, b, c, d) == [0, 1, 2, 0]
    scheduler.remove(c)
    assert sizes(step(scheduler), a, b, c, d) == [0, 1, 0, 2]


def test_a_newcomer_joins_at_the_next_step() -> None:
    a, b = prompt(2), prompt(3)
    scheduler = make(a)
    step(scheduler)
    scheduler.add(b)
    assert sizes(step(scheduler), a, b) == [1, 3]


# --- removing -------------------------------------------------------------------------


def test_a_waiting_sequence_can_be_removed_and_never_runs() -> None:
    a, b, c = prompt(2), prompt(2), prompt(2)
    scheduler = make(a, b, c, max_num_seqs=1)
    step(scheduler)
    assert scheduler.remove(b)
    scheduler.remove(a)
    assert sizes(step(scheduler), a, b, c) == [0, 0, 2]


def test_a_sequence_can_be_removed_in_the_middle_of_its_prefill() -> None:
    a, b = prompt(50), prompt(4)
    scheduler = make(a, b, max_prefill_tokens=4)
    assert sizes(step(scheduler), a, b) == [4, 0]
    assert scheduler.remove(a)
    assert sizes(step(scheduler), a, b) == [0, 4]


def test_removing_tells_whether_the_sequence_was_there() -> None:
    a, b = prompt(2), prompt(2)
    scheduler = make(a, max_num_seqs=1)
    assert not scheduler.remove(b)
    assert scheduler.remove(a)
    assert not scheduler.remove(a)


def test_of_two_equal_sequences_only_the_one_meant_is_removed() -> None:
    a, b = prompt(2), prompt(2)
    scheduler = make(a, b)
    step(scheduler)
    assert scheduler.remove(b)
    assert scheduler.running == [a]


def test_the_scheduler_is_idle_when_nobody_waits_or_runs() -> None:
    a, b = prompt(2), prompt(2)
    scheduler = make(max_num_seqs=1)
    assert scheduler.is_idle
    assert scheduler.schedule() == []
    scheduler.add(a)
    assert not scheduler.is_idle
    scheduler.add(b)
    step(scheduler)
    scheduler.remove(a)
    assert not scheduler.is_idle
    scheduler.remove(b)
    assert scheduler.is_idle


@pytest.mark.parametrize(("max_num_seqs", "max_prefill_tokens"), [(0, 1), (1, 0), (-1, 1)])
def test_limits_that_let_nothing_run_are_a_mistake_of_the_caller(
    max_num_seqs: int, max_prefill_tokens: int
) -> None:
    with pytest.raises(AssertionError):
        Scheduler(max_num_seqs, max_prefill_tokens, FakeMemory())


# --- when memory is short -------------------------------------------------------------


def test_a_prompt_that_does_not_fit_waits_and_keeps_its_turn() -> None:
    a, b, c = prompt(6), prompt(6), prompt(1)
    memory = FakeMemory(10)
    scheduler = make(a, b, c, memory=memory)
    assert sizes(step(scheduler), a, b, c) == [6, 0, 0]
    assert list(scheduler.waiting) == [b, c]
    scheduler.remove(a)
    del memory.held[a]
    assert sizes(step(scheduler), a, b, c) == [0, 6, 1]


def test_who_came_last_gives_way_and_computes_all_of_it_again() -> None:
    a, b = prompt(4), prompt(4)
    memory = FakeMemory(9)
    scheduler = make(a, b, memory=memory)
    assert sizes(step(scheduler), a, b) == [4, 4]
    assert sizes(step(scheduler), a, b) == [1, 0]  # the ninth token; b has to go
    assert scheduler.running == [a]
    assert list(scheduler.waiting) == [b]
    scheduler.remove(a)
    del memory.held[a]
    assert sizes(step(scheduler), a, b) == [0, 5]  # its prompt and the token it had sampled
    assert len(b.completion_ids) == 2


def test_who_has_to_give_way_itself_does_not_run() -> None:
    a, b = prompt(4), prompt(4)
    scheduler = make(a, b, memory=FakeMemory(8))
    assert sizes(step(scheduler), a, b) == [4, 4]
    assert sizes(step(scheduler), a, b) == [1, 0]
    assert sizes(step(scheduler), a, b) == [1, 0]


arrivals = st.lists(
    st.tuples(
        st.integers(0, 30),  # the step before which it comes
        st.integers(1, 40),  # tokens of its prompt
        st.integers(1, 20),  # tokens it wants
        st.none() | st.integers(0, 40),  # the step before which it is aborted
    ),
    max_size=12,
)


@given(arrivals, st.integers(1, 5), st.integers(1, 30), st.integers(60, 120))
def test_every_sequence_gets_its_tokens_whatever_comes_and_goes(
    arrivals: list[tuple[int, int, int, int | None]],
    max_num_seqs: int,
    max_prefill_tokens: int,
    room: int,
) -> None:
    memory = FakeMemory(room)
    scheduler = Scheduler(max_num_seqs, max_prefill_tokens, memory)
    sequences = [
        Sequence([7] * size, SamplingParams(max_tokens=wanted), [], lambda event: None)
        for _, size, wanted, _ in arrivals
    ]
    open_ones = set(sequences)

    def end(sequence: Sequence) -> None:
        open_ones.discard(sequence)
        memory.held.pop(sequence, None)
        scheduler.remove(sequence)

    # A sequence that had to give way computes its tokens again; the first one never does.
    bound = 40 + sum((size + wanted) * (wanted + 1) for _, size, wanted, _ in arrivals)
    for number in range(bound):
        for sequence, (arrives, _, _, aborted) in zip(sequences, arrivals, strict=True):
            if arrives == number:
                scheduler.add(sequence)
            if aborted == number and arrives <= number:
                end(sequence)
        chunks = step(scheduler)
        prefilled = [c.num_tokens for c in chunks if c.num_tokens > 1]
        assert sum(prefilled) <= max_prefill_tokens
        assert len(scheduler.running) <= max_num_seqs
        assert sum(memory.held.values()) <= room
        assert set(memory.held) == set(scheduler.running), "memory held by who does not run"
        for sequence in list(scheduler.running):
            assert sequence.params is not None
            if len(sequence.completion_ids) == sequence.params.max_tokens:
                end(sequence)
        if number > 40 and scheduler.is_idle:
            break
    assert scheduler.is_idle
    assert not open_ones
    assert not memory.held
