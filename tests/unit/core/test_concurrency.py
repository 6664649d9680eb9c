"""Work done once for several callers, and several works done together."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from server.core.concurrency import SingleFlight, all_of

T = TypeVar("T")

BOUND_S = 20


class Work:
    """Computes `result` as often as it is asked, or fails; `gate` holds it back."""

    def __init__(self, result: str = "done") -> None:
        self.result = result
        self.num_begun = 0
        self.num_cancelled = 0
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        # Set by a test in which the work takes its time to stop.
        self.may_stop = asyncio.Event()
        self.may_stop.set()

    async def __call__(self) -> str:
        self.num_begun += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            await self.may_stop.wait()
            if self.error is not None:
                raise self.error from None
            raise
        if self.error is not None:
            raise self.error
        return self.result


async def bounded(awaitable: Awaitable[T]) -> T:
    """The result, or a failed test in place of one that hangs."""
    return await asyncio.wait_for(awaitable, BOUND_S)


async def settle() -> None:
    """Lets every coroutine that can run do so."""
    for _ in range(10):
        turn = asyncio.Event()
        asyncio.get_running_loop().call_soon(turn.set)
        await turn.wait()


def start(
    flights: SingleFlight[str, str], work: Work, key: str = "a"
) -> asyncio.Task[tuple[str, bool]]:
    return asyncio.create_task(flights.get(key, work))


def held() -> Work:
    """Work that waits to be let on."""
    work = Work()
    work.gate.clear()
    return work


@pytest.fixture
async def complaints() -> list[str]:
    """What the event loop has to complain about: errors that reach nobody else."""
    heard: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: heard.append(f"{context['message']}: {context.get('exception')!r}")
    )
    return heard


# --- results that are kept ------------------------------------------------------------


async def test_a_second_call_gets_the_kept_result() -> None:
    flights, work = SingleFlight[str, str](4), Work()
    assert await flights.get("a", work) == ("done", False)
    assert await flights.get("a", work) == ("done", True)
    assert work.num_begun == 1
    assert (flights.num_hits, flights.num_misses) == (1, 1)


async def test_keys_are_computed_apart() -> None:
    flights = SingleFlight[str, str](4)
    assert await flights.get("a", Work("one")) == ("one", False)
    assert await flights.get("b", Work("two")) == ("two", False)
    assert await flights.get("a", Work("three")) == ("one", True)
    assert (flights.num_hits, flights.num_misses) == (1, 2)


async def test_an_empty_result_is_one_too() -> None:
    flights, work = SingleFlight[str, str](4), Work("")
    assert await flights.get("a", work) == ("", False)
    assert await flights.get("a", work) == ("", True)


async def test_the_result_not_used_for_longest_makes_room() -> None:
    flights, work = SingleFlight[str, str](2), Work()
    for key in ("a", "b", "a", "c"):
        await flights.get(key, work)
    assert "a" in flights and "c" in flights and "b" not in flights


async def test_asking_whether_a_result_is_known_is_no_use_of_it() -> None:
    flights, work = SingleFlight[str, str](2), Work()
    await flights.get("a", work)
    await flights.get("b", work)
    assert "a" in flights
    await flights.get("c", work)
    assert "a" not in flights
    assert (flights.num_hits, flights.num_misses) == (0, 3)


async def test_with_no_room_nothing_is_kept_but_what_is_in_flight_is_shared(
    complaints: list[str],
) -> None:
    flights, work = SingleFlight[str, str](0), held()
    waiting = [start(flights, work) for _ in range(3)]
    await settle()
    work.gate.set()
    assert [is_known for _, is_known in await bounded(asyncio.gather(*waiting))] == [
        False,
        True,
        True,
    ]
    assert "a" not in flights
    assert await flights.get("a", work) == ("done", False)
    assert work.num_begun == 2
    assert complaints == []


async def test_a_key_in_flight_is_not_known_yet() -> None:
    flights, work = SingleFlight[str, str](4), held()
    running = start(flights, work)
    await settle()
    assert "a" not in flights
    work.gate.set()
    await bounded(running)
    assert "a" in flights


# --- computations that are shared -----------------------------------------------------


async def test_equal_keys_in_flight_share_a_computation() -> None:
    flights, work = SingleFlight[str, str](4), held()
    waiting = [start(flights, work) for _ in range(3)]
    await settle()
    assert work.num_begun == 1
    work.gate.set()
    results = await bounded(asyncio.gather(*waiting))
    assert results == [("done", False), ("done", True), ("done", True)]
    assert (flights.num_hits, flights.num_misses) == (2, 1)


async def test_different_keys_in_flight_are_computed_side_by_side() -> None:
    flights, one, other = SingleFlight[str, str](4), held(), Work("other")
    waiting = start(flights, one, "a")
    assert await bounded(flights.get("b", other)) == ("other", False)
    one.gate.set()
    assert await bounded(waiting) == ("done", False)


@pytest.mark.parametrize("leaver", [0, 1, 2])
async def test_a_caller_that_leaves_takes_nothing_from_the_others(leaver: int) -> None:
    flights, work = SingleFlight[str, str](4), held()
    waiting = [start(flights, work) for _ in range(3)]
    await settle()
    waiting[leaver].cancel()
    await settle()
    assert waiting[leaver].cancelled() and work.num_cancelled == 0
    work.gate.set()
    stayed = [waiter for i, waiter in enumerate(waiting) if i != leaver]
    assert [result for result, _ in await bounded(asyncio.gather(*stayed))] == ["done"] * 2
    assert work.num_begun == 1
    assert "a" in flights


async def test_the_computation_stops_when_the_last_caller_has_left() -> None:
    flights, work = SingleFlight[str, str](4), held()
    waiting = [start(flights, work) for _ in range(2)]
    await settle()
    waiting[0].cancel()
    await settle()
    assert work.num_cancelled == 0
    waiting[1].cancel()
    await settle()
    assert work.num_cancelled == 1
    assert "a" not in flights
    work.gate.set()
    assert await bounded(flights.get("a", work)) == ("done", False)
    assert work.num_begun == 2


async def test_a_newcomer_does_not_join_a_computation_that_is_being_cancelled() -> None:
    flights, slow = SingleFlight[str, str](4), held()
    slow.may_stop.clear()
    first = start(flights, slow)
    await settle()
    first.cancel()
    await settle()
    assert slow.num_cancelled == 1
    fresh = held()
    newcomer = start(flights, fresh)
    await settle()
    # The old computation ends only now; it must not take the new one's place.
    slow.may_stop.set()
    await settle()
    another = start(flights, fresh)
    await settle()
    fresh.gate.set()
    results = await bounded(asyncio.gather(newcomer, another))
    assert list(results) == [("done", False), ("done", True)]
    assert fresh.num_begun == 1


# --- computations that fail -----------------------------------------------------------


async def test_an_error_reaches_everybody_who_waits_and_is_not_kept() -> None:
    flights, work = SingleFlight[str, str](4), held()
    work.error = ValueError("bad")
    waiting = [start(flights, work) for _ in range(3)]
    await settle()
    work.gate.set()
    results = await bounded(asyncio.gather(*waiting, return_exceptions=True))
    assert results == [work.error] * 3
    assert "a" not in flights
    work.error = None
    assert await bounded(flights.get("a", work)) == ("done", False)
    assert work.num_begun == 2


async def test_an_error_when_nobody_waits_any_more_makes_no_noise(complaints: list[str]) -> None:
    flights, work = SingleFlight[str, str](4), held()
    work.may_stop.clear()
    work.error = ValueError("too late")
    first = start(flights, work)
    await settle()
    first.cancel()
    await settle()
    work.may_stop.set()
    await settle()
    del first
    gc.collect()
    await settle()
    assert work.num_cancelled == 1
    assert complaints == []


# --- works done together --------------------------------------------------------------


async def test_results_come_in_the_order_of_the_works_however_they_end() -> None:
    ended: list[str] = []

    async def compute(name: str, wait_for: Callable[[], bool]) -> str:
        while not wait_for():
            await settle()
        ended.append(name)
        return name

    works = [compute("a", lambda: "b" in ended), compute("b", lambda: True)]
    assert await bounded(all_of(works)) == ["a", "b"]
    assert ended == ["b", "a"]


async def test_no_works_have_no_results() -> None:
    assert await all_of([]) == []


async def test_all_works_begin_before_one_has_ended() -> None:
    works = [held() for _ in range(3)]
    together = asyncio.create_task(all_of(work() for work in works))
    await settle()
    assert [work.num_begun for work in works] == [1, 1, 1]
    for work in works:
        work.gate.set()
    assert await bounded(together) == ["done"] * 3


async def test_the_first_error_ends_the_others_and_is_raised_itself() -> None:
    others, failing = [held(), held()], Work()
    failing.error = ValueError("bad")
    with pytest.raises(ValueError, match="bad") as caught:
        await bounded(all_of([others[0](), failing(), others[1]()]))
    assert caught.value is failing.error
    assert [work.num_cancelled for work in others] == [1, 1]


async def test_an_error_within_works_of_works_is_raised_itself() -> None:
    failing = Work()
    failing.error = ValueError("bad")
    with pytest.raises(ValueError, match="bad") as caught:
        await bounded(all_of([all_of([failing()]), all_of([held()()])]))
    assert caught.value is failing.error


async def test_leaving_ends_all_works() -> None:
    works = [held() for _ in range(3)]
    together = asyncio.create_task(all_of(work() for work in works))
    await settle()
    together.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bounded(together)
    assert [work.num_cancelled for work in works] == [1, 1, 1]
