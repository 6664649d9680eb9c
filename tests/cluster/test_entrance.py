"""The entrance alone: requests that it refuses or relays, and failures of replicas."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.types import Message, Scope

pytest.importorskip("ray", reason="Ray is not installed, which the extra 'cluster' brings")
from server.cluster.entrance import create_entrance
from server.cluster.settings import ClusterSettings
from server.errors import OverloadedError, ReplicaLostError
from server.metrics import Metrics
from tests.servers import run_app

CHAT = "/v1/chat/completions"
Answer = Callable[[], AsyncIterator[Message]]


class FakeMembers:
    """Gives a fixed answer and records the calls."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.scopes: list[Scope] = []
        self.conversations: list[str] = []

    def answer(self, scope: Scope, body: bytes, conversation: str) -> AsyncIterator[Message]:
        self.scopes.append(scope)
        self.conversations.append(conversation)
        return self._answer()

    async def get_json(self, path: str) -> list[dict[str, Any]]:
        return []


def begin(kind: str) -> Message:
    headers = [(b"content-type", kind.encode())]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def body(text: str, *, is_last: bool) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": not is_last}


async def whole() -> AsyncIterator[Message]:
    yield begin("application/json")
    yield body("{}", is_last=True)


async def full() -> AsyncIterator[Message]:
    raise OverloadedError("full")
    yield


async def lost_in_a_stream() -> AsyncIterator[Message]:
    yield begin("text/event-stream; charset=utf-8")
    yield body("data: 1\n\n", is_last=False)
    raise ReplicaLostError


async def endless_stream() -> AsyncIterator[Message]:
    yield begin("text/event-stream; charset=utf-8")
    yield body("data: 1\n\n", is_last=False)
    await asyncio.Event().wait()


async def silent() -> AsyncIterator[Message]:
    await asyncio.Event().wait()
    yield {}


def ask(
    answer: Answer, path: str = CHAT, headers: dict[str, str] | None = None, **settings: Any
) -> tuple[httpx.Response, FakeMembers]:
    members: Any = FakeMembers(answer)
    app = create_entrance(ClusterSettings(**settings), Metrics(), members)
    with run_app(app) as url:
        messages = [{"role": "user", "content": "hello"}]
        return httpx.post(f"{url}{path}", json={"messages": messages}, headers=headers), members


def test_a_request_is_relayed_with_its_id_and_its_conversation() -> None:
    response, members = ask(whole, headers={"x-request-id": "mine"})
    assert response.json() == {}
    [scope], [conversation] = members.scopes, members.conversations
    assert (scope["method"], scope["path"]) == ("POST", CHAT)
    assert dict(scope["headers"])[b"x-request-id"] == b"mine"
    assert conversation


@pytest.mark.parametrize(
    ("settings", "headers", "status"),
    [
        ({"api_key": "one"}, {}, 401),
        ({"api_key": "one"}, {"authorization": "Bearer one"}, 200),
        ({}, {"host": "evil.example"}, 403),
        ({"max_body_bytes": 10}, {}, 413),
    ],
)
def test_a_refused_request_reaches_no_replica(
    settings: dict[str, Any], headers: dict[str, str], status: int
) -> None:
    response, members = ask(whole, headers=headers, **settings)
    assert response.status_code == status
    assert len(members.scopes) == (status == 200)


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [(full, 429, "queue_full"), (silent, 504, "request_timeout")],
)
def test_a_failure_before_the_response_is_a_status(answer: Answer, status: int, code: str) -> None:
    response, _ = ask(answer, request_timeout=0.2)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


@pytest.mark.parametrize(
    ("answer", "code"), [(lost_in_a_stream, "replica_lost"), (endless_stream, "request_timeout")]
)
@pytest.mark.parametrize(("path", "ends"), [(CHAT, ["[DONE]"]), ("/v1/responses", [])])
def test_a_failure_in_a_stream_is_its_last_event(
    answer: Answer, code: str, path: str, ends: list[str]
) -> None:
    response, _ = ask(answer, path, request_timeout=0.5)
    first, error, *rest = [block.removeprefix("data: ") for block in response.text.split("\n\n")]
    assert first == "1" and json.loads(error)["error"]["code"] == code
    assert rest == [*ends, ""]


def test_without_replicas_health_and_ready_are_503() -> None:
    members: Any = FakeMembers(whole)
    with run_app(create_entrance(ClusterSettings(), Metrics(), members)) as url:
        health, ready = httpx.get(f"{url}/health"), httpx.get(f"{url}/ready")
    assert (health.status_code, ready.status_code) == (503, 503)
    assert health.json()["reason"] == "no replica is running"
