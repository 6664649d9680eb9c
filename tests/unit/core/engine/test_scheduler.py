"""Which sequences run in a step, by token counts alone: nothing is computed."""

from collections import Counter
from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.core.engine.scheduler import POSITIONS_PER_ROW, ScheduledChunk, Scheduler
from server.core.engine.sequence import SamplingParams, Sequence
from server.core.engine.work import Work

# The request of a sequence, unless a test gives another.
ONE = Work()


def prompt(num_tokens: int, work: Work = ONE) -> Sequence:
    params = SamplingParams(max_tokens=100)
    return Sequence([7] * num_tokens, params, [], lambda event: None, work=work)


def scored(num_tokens: int, *label_lengths: int, work: Work = ONE) -> Sequence:
    labels = [[7] * length for length in label_lengths]
    return Sequence([7] * num_tokens, None, labels, lambda event: None, work=work)


class FakeMemory:
    """Memory for a number of tokens; records how many each sequence holds."""

    def __init__(self, num_tokens: int = 10**9) -> None:
        self.num_tokens = num_tokens
        self.held: dict[Sequence, int] = {}

    def admit(self, sequence: Sequence) -> bool:
        assert sequence not in self.held
        is_admitted = self._take(sequence, len(sequence.token_ids))
        if is_admitted and sequence.work.queue_s is None:
            sequence.work.queue_s = 0.0
        return is_admitted

    def reserve(self, sequence: Sequence) -> bool:
        assert sequence in self.held, "not admitted"
        return self._take(sequence, sequence.num_computed + 1)

    def fits(self, sequence: Sequence, without: Collection[Sequence]) -> bool:
        held = sum(size for other, size in self.held.items() if other not in without)
        return held + sequence.num_tokens <= self.num_tokens

    def suspend(self, sequence: Sequence) -> None:
        del self.held[sequence]
        sequence.num_computed = sequence.num_scored = 0

    def _take(self, sequence: Sequence, num_tokens: int) -> bool:
        others = sum(self.held.values()) - self.held.get(sequence, 0)
        if others + num_tokens > self.num_tokens:
            return False
        self.held[sequence] = max(num_tokens, self.held.get(sequence, 0))
        return True


def make(
    *sequences: Sequence, max_num_seqs: int = 8, max_rows: int = 100,
    memory: FakeMemory | None = None,
) -> Scheduler:  # fmt: skip
    scheduler = Scheduler(max_num_seqs, max_rows, memory or FakeMemory())
    for sequence in sequences:
        scheduler.admission.add(sequence)
    return scheduler


def step(scheduler: Scheduler) -> list[ScheduledChunk]:
    """Schedules a step and computes it: every complete prompt gets one more token.

    A scored sequence that is complete leaves.
    """
    chunks = scheduler.schedule()
    is_last = [chunk.is_last for chunk in chunks]
    for chunk, is_complete in zip(chunks, is_last, strict=True):
        chunk.advance()
        if is_complete and chunk.sequence.params is not None:
            chunk.sequence.completion_ids.append(7)
        elif is_complete:
            assert scheduler.admission.remove(chunk.sequence)
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
    scheduler = make(a, max_rows=10)
    (chunk,) = scheduler.schedule()
    assert chunk == ScheduledChunk(a, 10)
    assert chunk.is_last


def test_a_prompt_beyond_the_budget_is_computed_in_chunks_and_the_final_one_is_last() -> None:
    a = prompt(10)
    scheduler = make(a, max_rows=4)
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
    scheduler = make(a, max_rows=4)
    step(scheduler)
    scheduler.admission.add(b)
    assert [sizes(step(scheduler), a, b) for _ in range(5)] == [
        [1, 3], [1, 3], [1, 3], [1, 1], [1, 1],
    ]  # fmt: skip


def test_decoding_sequences_never_use_up_all_rows_of_a_step() -> None:
    decoding, b = [prompt(2) for _ in range(6)], prompt(9)
    scheduler = make(*decoding, max_rows=4)
    while not all(sequence.completion_ids for sequence in decoding):
        step(scheduler)
    scheduler.admission.add(b)
    assert sizes(step(scheduler), *decoding, b)[-1] == 1


def test_rows_that_the_first_prompt_leaves_go_to_the_next() -> None:
    a, b, c = prompt(3), prompt(8), prompt(5)
    scheduler = make(a, b, c, max_rows=5)
    assert sizes(step(scheduler), a, b, c) == [3, 2, 0]
    assert sizes(step(scheduler), a, b, c) == [1, 4, 0]
    assert sizes(step(scheduler), a, b, c) == [1, 2, 2]
    assert sizes(step(scheduler), a, b, c) == [1, 1, 3]


@pytest.mark.parametrize("max_rows", [2, 3, 7, 64])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 5])
def test_no_step_exceeds_its_limits_and_every_prompt_is_completed(
    max_num_seqs: int, max_rows: int
) -> None:
    sequences = [prompt(num_tokens) for num_tokens in (1, 30, 2, 2, 17, 64, 5, 1, 9)]
    scheduler = make(*sequences, max_num_seqs=max_num_seqs, max_rows=max_rows)
    # Every step computes something, so there cannot be more steps than tokens.
    for _ in range(sum(len(sequence.prompt_ids) + 2 for sequence in sequences)):
        if scheduler.admission.is_idle:
            break
        chunks = step(scheduler)
        assert 0 < len(chunks) <= max_num_seqs
        assert all(chunk.num_tokens > 0 for chunk in chunks)
        assert sum(chunk.num_tokens for chunk in chunks) <= max_rows
        for sequence in list(scheduler.admission.running):
            if len(sequence.completion_ids) == 3:
                assert scheduler.admission.remove(sequence)
    assert all(len(sequence.completion_ids) == 3 for sequence in sequences)


def test_the_chunks_of_a_prompt_cover_it_without_gap_or_overlap() -> None:
    a, b = prompt(23), prompt(11)
    scheduler = make(a, b, max_rows=4)
    covered: dict[Sequence, list[int]] = {a: [], b: []}
    for _ in range(12):
        for chunk in scheduler.schedule():
            begin = chunk.sequence.num_computed
            covered[chunk.sequence] += range(begin, begin + chunk.num_tokens)
        step(scheduler)
    assert covered[a][:23] == list(range(23))
    assert covered[b][:11] == list(range(11))


def test_scheduling_alone_changes_no_sequence() -> None:
    a = prompt(10)
    scheduler = make(a, max_rows=4)
    assert scheduler.schedule() == scheduler.schedule() == [ScheduledChunk(a, 4)]
    assert a.num_computed == 0 and a.completion_ids == []


# --- first come, first served ---------------------------------------------------------


def test_prompts_are_finished_in_order_of_arrival() -> None:
    sequences = [prompt(num_tokens) for num_tokens in (9, 2, 30, 4)]
    scheduler = make(*sequences, max_rows=3)
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
    assert scheduler.admission.running == sequences[:3]
    assert list(scheduler.admission.waiting) == sequences[3:]


def test_a_freed_slot_goes_to_the_sequence_that_waits_longest() -> None:
    a, b, c, d = (prompt(2) for _ in range(4))
    scheduler = make(a, b, c, d, max_num_seqs=2)
    step(scheduler)
    scheduler.admission.remove(a)
    assert sizes(step(scheduler), a, b, c, d) == [0, 1, 2, 0]
    scheduler.admission.remove(c)
    assert sizes(step(scheduler), a, b, c, d) == [0, 1, 0, 2]


def test_a_new_sequence_joins_at_the_next_step() -> None:
    a, b = prompt(2), prompt(3)
    scheduler = make(a)
    step(scheduler)
    scheduler.admission.add(b)
    assert sizes(step(scheduler), a, b) == [1, 3]


# --- removing -------------------------------------------------------------------------


def test_a_waiting_sequence_can_be_removed_and_never_runs() -> None:
    a, b, c = prompt(2), prompt(2), prompt(2)
    scheduler = make(a, b, c, max_num_seqs=1)
    step(scheduler)
    assert scheduler.admission.remove(b)
    scheduler.admission.remove(a)
    assert sizes(step(scheduler), a, b, c) == [0, 0, 2]


def test_a_sequence_can_be_removed_in_the_middle_of_its_prefill() -> None:
    a, b = prompt(50), prompt(4)
    scheduler = make(a, b, max_rows=4)
    assert sizes(step(scheduler), a, b) == [4, 0]
    assert scheduler.admission.remove(a)
    assert sizes(step(scheduler), a, b) == [0, 4]


def test_remove_returns_whether_the_sequence_was_there() -> None:
    a, b = prompt(2), prompt(2)
    scheduler = make(a, max_num_seqs=1)
    assert not scheduler.admission.remove(b)
    assert scheduler.admission.remove(a)
    assert not scheduler.admission.remove(a)


def test_of_two_equal_sequences_only_the_given_one_is_removed() -> None:
    a, b = prompt(2), prompt(2)
    scheduler = make(a, b)
    step(scheduler)
    assert scheduler.admission.remove(b)
    assert scheduler.admission.running == [a]


def test_the_scheduler_is_idle_when_no_sequence_waits_or_runs() -> None:
    a, b = prompt(2), prompt(2)
    scheduler = make(max_num_seqs=1)
    assert scheduler.admission.is_idle
    assert scheduler.schedule() == []
    scheduler.admission.add(a)
    assert not scheduler.admission.is_idle
    scheduler.admission.add(b)
    step(scheduler)
    scheduler.admission.remove(a)
    assert not scheduler.admission.is_idle
    scheduler.admission.remove(b)
    assert scheduler.admission.is_idle


@pytest.mark.parametrize(("max_num_seqs", "max_rows"), [(0, 2), (1, 1), (-1, 2)])
def test_limits_that_let_nothing_run_fail_an_assertion(max_num_seqs: int, max_rows: int) -> None:
    with pytest.raises(AssertionError):
        Scheduler(max_num_seqs, max_rows, FakeMemory())


# --- shared among requests ------------------------------------------------------------


def steps_to_first_token(scheduler: Scheduler, sequence: Sequence) -> int:
    """Adds the sequence; returns the number of steps until it has a token."""
    scheduler.admission.add(sequence)
    for number in range(1, 1000):
        step(scheduler)
        if sequence.completion_ids:
            return number
    raise AssertionError("it never gets a token")


def test_a_request_alone_has_all_rows_of_a_step_and_several_an_eighth() -> None:
    heavy, chat = prompt(1000, Work()), prompt(20, Work())
    scheduler = make(heavy, max_rows=80)
    assert sizes(step(scheduler), heavy) == [80]
    scheduler.admission.add(chat)
    assert sum(sizes(step(scheduler), heavy, chat)) <= 10


def test_a_short_prompt_goes_before_one_that_has_had_many_rows() -> None:
    heavy, chat = prompt(10_000, Work()), prompt(64, Work())
    scheduler = make(heavy, max_rows=256)
    step(scheduler)
    # Two steps of 32 rows; one in four goes to the request that waits longest.
    assert steps_to_first_token(scheduler, chat) <= 3


def test_of_two_long_prompts_neither_waits_for_the_other_to_end() -> None:
    a, b = prompt(3000, Work()), prompt(3000, Work())
    scheduler = make(a, b, max_rows=256)
    for _ in range(60):
        step(scheduler)
    assert min(a.num_computed, b.num_computed) > 0.4 * max(a.num_computed, b.num_computed) > 0


def test_a_long_prompt_gets_rows_however_many_short_ones_come() -> None:
    heavy = prompt(10_000, Work())
    scheduler = make(heavy, max_rows=256)
    step(scheduler)
    computed = heavy.num_computed
    for _ in range(40):
        chat = prompt(200, Work())
        scheduler.admission.add(chat)
        step(scheduler)
        scheduler.admission.remove(chat)
    # One in four of forty steps of 32 rows, less what the answers decode.
    assert heavy.num_computed - computed >= 9 * 28


def test_a_request_with_many_sequences_leaves_slots_to_others() -> None:
    many, works = Work(), [Work() for _ in range(3)]
    scheduler = make(*(prompt(2, many) for _ in range(30)), max_num_seqs=8)
    step(scheduler)
    assert len(scheduler.admission.running) == 8
    chats = [prompt(2, work) for work in works]
    for chat in chats:
        scheduler.admission.add(chat)
    for _ in range(4):
        step(scheduler)
    assert all(chat.completion_ids for chat in chats)


def test_if_not_all_can_decode_each_request_has_a_sequence_in_every_step() -> None:
    many, chat = [prompt(1, ONE) for _ in range(4)], prompt(1, Work())
    scheduler = make(*many, max_num_seqs=4)
    step(scheduler)
    scheduler.admission.add(chat)
    while not chat.completion_ids:
        step(scheduler)
    before = [len(sequence.completion_ids) for sequence in [*many, chat]]
    for _ in range(12):
        assert len(step(scheduler)) == 4
    after = [len(sequence.completion_ids) for sequence in [*many, chat]]
    assert [b - a for a, b in zip(before, after, strict=True)] == [9, 9, 9, 9, 12]


def test_no_more_than_max_num_seqs_requests_run_together() -> None:
    sequences = [prompt(2, Work()) for _ in range(5)]
    scheduler = make(*sequences, max_num_seqs=3)
    for _ in range(9):
        step(scheduler)
    assert scheduler.admission.running == sequences[:3]


def test_an_admitted_request_does_not_queue_again() -> None:
    work = Work()
    first, *others = prompt(2, work), *(prompt(2, Work()) for _ in range(4))
    scheduler = make(first, *others, max_num_seqs=2)
    step(scheduler)
    scheduler.admission.remove(first)
    step(scheduler)  # another request takes the place of the first
    assert steps_to_first_token(scheduler, prompt(2, work)) <= 2


def test_a_row_costs_more_the_more_positions_it_attends_to() -> None:
    far, other = prompt(10_000, Work()), prompt(2, Work())
    scheduler = make(far, other, max_rows=256)
    step(scheduler)
    far.num_computed = POSITIONS_PER_ROW
    assert sizes(step(scheduler), far, other)[0] == 16


# --- continuations --------------------------------------------------------------------


def test_continuations_are_computed_after_the_prompt_as_far_as_the_rows_suffice() -> None:
    a = scored(6, 3, 1, 4, 2, 5)  # 2, 0, 3, 1 and 4 rows
    scheduler = make(a, max_rows=10)
    rows = []
    while not scheduler.admission.is_idle:
        [chunk] = step(scheduler)
        rows.append((chunk.num_tokens, chunk.num_continuations))
    assert rows == [(6, 2), (0, 3)]


def test_a_continuation_longer_than_a_step_is_computed_alone() -> None:
    a = scored(6, 30, 2)
    scheduler = make(a, max_rows=8)
    chunks = []
    while not scheduler.admission.is_idle:
        chunks += [(c.num_tokens, c.num_continuations, c.num_rows) for c in scheduler.schedule()]
        step(scheduler)
    assert chunks == [(6, 0, 6), (0, 1, 29), (0, 1, 1)]


# --- when memory is short -------------------------------------------------------------


def test_a_prompt_that_does_not_fit_waits_and_keeps_its_turn() -> None:
    a, b, c = prompt(6), prompt(6), prompt(1)
    memory = FakeMemory(10)
    scheduler = make(a, b, c, memory=memory)
    assert sizes(step(scheduler), a, b, c) == [6, 0, 0]
    assert list(scheduler.admission.waiting) == [b, c]
    scheduler.admission.remove(a)
    del memory.held[a]
    assert sizes(step(scheduler), a, b, c) == [0, 6, 1]


def test_the_newest_sequence_is_suspended_and_computed_again() -> None:
    a, b = prompt(4), prompt(4)
    memory = FakeMemory(9)
    scheduler = make(a, b, memory=memory)
    assert sizes(step(scheduler), a, b) == [4, 4]
    assert sizes(step(scheduler), a, b) == [1, 0]  # the ninth token; b has to go
    assert scheduler.admission.running == [a]
    assert list(scheduler.admission.waiting) == [b]
    scheduler.admission.remove(a)
    del memory.held[a]
    assert sizes(step(scheduler), a, b) == [0, 5]  # its prompt and the token it had sampled
    assert len(b.completion_ids) == 2


def test_a_sequence_that_is_suspended_for_itself_does_not_run() -> None:
    a, b = prompt(4), prompt(4)
    scheduler = make(a, b, memory=FakeMemory(8))
    assert sizes(step(scheduler), a, b) == [4, 4]
    assert sizes(step(scheduler), a, b) == [1, 0]
    assert sizes(step(scheduler), a, b) == [1, 0]


arrivals = st.lists(
    st.tuples(
        st.integers(0, 30),  # the step before which it arrives
        st.integers(1, 40),  # tokens of its prompt
        st.integers(1, 20),  # its max_tokens
        st.none() | st.integers(0, 40),  # the step before which it is aborted
        st.integers(0, 3),  # its request
    ),
    max_size=12,
)


@given(arrivals, st.integers(1, 5), st.integers(2, 30), st.integers(60, 120))
def test_every_sequence_gets_its_tokens_under_any_arrivals_and_aborts(
    arrivals: list[tuple[int, int, int, int | None, int]],
    max_num_seqs: int,
    max_rows: int,
    room: int,
) -> None:
    memory = FakeMemory(room)
    scheduler = Scheduler(max_num_seqs, max_rows, memory)
    works = [Work() for _ in range(4)]
    sequences = [
        Sequence(
            [7] * size, SamplingParams(max_tokens=wanted), [], lambda event: None, work=works[i]
        )
        for _, size, wanted, _, i in arrivals
    ]
    unfinished = set(sequences)

    def end(sequence: Sequence) -> None:
        unfinished.discard(sequence)
        memory.held.pop(sequence, None)
        scheduler.admission.remove(sequence)

    # A suspended sequence computes its tokens again; the oldest one is never suspended.
    bound = 40 + sum((size + wanted) * (wanted + 1) for _, size, wanted, _, _ in arrivals)
    for number in range(bound):
        for sequence, (arrives, _, _, aborted, _) in zip(sequences, arrivals, strict=True):
            if arrives == number:
                scheduler.admission.add(sequence)
            if aborted == number and arrives <= number:
                end(sequence)
        chunks = step(scheduler)
        assert sum(chunk.num_rows for chunk in chunks) <= max_rows
        per_work = Counter(sequence.work for sequence in scheduler.admission.running)
        assert max(per_work.values(), default=0) <= max_num_seqs
        is_prefill = [chunk for chunk in chunks if chunk.num_tokens > 1]
        if len(per_work) > 1 and is_prefill:
            assert sum(c.num_rows for c in is_prefill) <= scheduler.max_shared_rows
        assert sum(memory.held.values()) <= room
        assert set(memory.held) == set(scheduler.admission.running), (
            "a sequence that does not run holds memory"
        )
        for sequence in list(scheduler.admission.running):
            assert sequence.params is not None
            if len(sequence.completion_ids) == sequence.params.max_tokens:
                end(sequence)
        if number > 40 and scheduler.admission.is_idle:
            break
    assert scheduler.admission.is_idle
    assert not unfinished
    assert not memory.held


def test_a_request_with_many_sequences_frees_memory_for_one_with_none() -> None:
    many, chat = [prompt(4, ONE) for _ in range(4)], prompt(4, Work())
    scheduler = make(*many, memory=FakeMemory(16))
    step(scheduler)
    scheduler.admission.add(chat)
    for _ in range(3):
        step(scheduler)
    assert chat.completion_ids
    assert len(scheduler.admission.running) < 5


def test_a_smaller_sequence_passes_one_that_does_not_fit_but_not_forever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.core.engine.admission.MAX_STEPS_PASSED_BY", 5)
    runs, large = prompt(20, Work()), prompt(30, Work())
    memory = FakeMemory(40)
    scheduler = make(runs, large, memory=memory)
    step(scheduler)
    assert scheduler.admission.waiting == [large]
    small = prompt(2, Work())
    assert steps_to_first_token(scheduler, small) == 1
    scheduler.admission.remove(small)
    del memory.held[small]
    for _ in range(6):
        step(scheduler)
    late = prompt(2, Work())
    scheduler.admission.add(late)
    step(scheduler)
    assert {*scheduler.admission.waiting} == {large, late}
    scheduler.admission.remove(runs)
    del memory.held[runs]
    step(scheduler)
    assert scheduler.admission.running == [large, late]


def test_no_sequence_is_suspended_for_one_that_still_would_not_fit() -> None:
    many, large = [prompt(4, ONE) for _ in range(4)], prompt(20, Work())
    scheduler = make(*many, memory=FakeMemory(18))
    step(scheduler)
    scheduler.admission.add(large)
    scheduler.schedule()
    assert len(scheduler.admission.running) >= 3
