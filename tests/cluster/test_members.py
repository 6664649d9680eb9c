"""Results of all processes of a cluster, some of which fail."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed, which the extra 'cluster' brings")
from ray.exceptions import ActorDiedError

from server.cluster import members
from server.cluster.members import Members


class FakeHandle:
    """A deployment whose processes give fixed answers."""

    def __init__(self, *answers: Callable[[], Awaitable[Any]]) -> None:
        self._answers = answers

    def broadcast(self, method: str, *args: Any) -> "FakeHandle":
        return self

    async def _fetch_replica_results_async(self) -> list[Any]:
        return [type("Result", (), {"get_async": staticmethod(each)}) for each in self._answers]


async def sound() -> dict[str, str]:
    return {"status": "ok"}


async def silent() -> str:
    await asyncio.Event().wait()
    return "too late"


async def dead() -> str:
    raise ActorDiedError


async def broken() -> str:
    raise ValueError("not me")


async def test_lost_broken_or_silent_processes_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(members, "STATUS_TIMEOUT_S", 0.2)
    handle: Any = FakeHandle(sound, silent, dead, broken, sound)
    assert await Members(handle, handle).get_json("/health") == [{"status": "ok"}] * 2
    [warning] = caplog.messages
    assert warning == "get_json() failed in a process of the cluster"


async def test_a_cluster_without_processes_has_no_results() -> None:
    handle: Any = FakeHandle()
    assert await Members(handle, handle).get_json("/health") == []
