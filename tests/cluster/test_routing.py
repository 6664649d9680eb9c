"""The routing of requests to replicas."""

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed, which the extra 'cluster' brings")
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest, ReplicaID

from server.cluster.routing import ConversationRouter, conversation_of

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
MAX_NUM_SEQS, MAX_REQUESTS = 2, 3
DEPLOYMENT = DeploymentID("Replica", "qwen")


def hash_of(path: str, **fields: Any) -> str:
    return conversation_of(path, json.dumps(fields).encode())


def turns_of(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]


def test_a_conversation_keeps_its_hash_as_it_grows() -> None:
    system = [{"role": "system", "content": "be kind"}]
    first = hash_of(CHAT, model="m", messages=[*system, *turns_of("hello")])
    assert first == hash_of(CHAT, model="m", messages=[*system, *turns_of("hello", "hi", "why?")])
    assert first == hash_of(CHAT, model="m", messages=[*system, *turns_of("hello")], temperature=0)


def test_a_string_input_is_a_turn_of_the_user() -> None:
    text = hash_of(RESPONSES, model="m", input="hello")
    assert text == hash_of(RESPONSES, model="m", input=turns_of("hello", "hi", "why?"))


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": turns_of("hello!")},
        {"messages": [{"role": "system", "content": "be kind"}, *turns_of("hello")]},
        {"messages": turns_of("hello"), "model": "other"},
        {"messages": turns_of("hello"), "prompt_cache_key": "mine"},
        {"messages": turns_of("hello"), "tools": [{"type": "function"}]},
    ],
)
def test_a_different_beginning_has_another_hash(fields: dict[str, Any]) -> None:
    assert hash_of(CHAT, **fields) != hash_of(CHAT, messages=turns_of("hello"))


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/classify", b'{"input": "hello"}'), (CHAT, b"{"), (CHAT, b"[1]"), ("/v1/models", b"")],
)
def test_other_requests_have_no_conversation(path: str, body: bytes) -> None:
    assert conversation_of(path, body) == ""


@pytest.mark.parametrize("turns", [None, 1, [], ["x"], [{"role": 1}], [None]])
def test_invalid_turns_are_left_to_the_replica_to_refuse(turns: Any) -> None:
    assert hash_of(CHAT, messages=turns)


# --- the router -------------------------------------------------------------------------


@pytest.fixture
def router() -> ConversationRouter:
    """A router with four idle replicas."""
    router = ConversationRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    router.initialize_state(max_num_seqs=MAX_NUM_SEQS, max_requests=MAX_REQUESTS)
    replicas: Any = [
        SimpleNamespace(replica_id=ReplicaID(f"r{i}", DEPLOYMENT), max_ongoing_requests=100)
        for i in range(4)
    ]
    router._replicas = {replica.replica_id: replica for replica in replicas}
    router._rebuild_ring(frozenset(router._replicas))
    set_requests(router, dict.fromkeys(names(replicas), 0))
    return router


def set_requests(router: ConversationRouter, numbers: dict[str, int]) -> None:
    for name, number in numbers.items():
        router.replica_queue_len_cache.update(ReplicaID(name, DEPLOYMENT), number)


def names(replicas: list[Any]) -> list[str]:
    return [replica.replica_id.unique_id for replica in replicas]


async def choose(router: ConversationRouter, conversation: str = "") -> list[list[str]]:
    """Names of the groups, the preferred first."""
    metadata = RequestMetadata("id", "id", session_id=conversation)
    request = PendingRequest([], {}, metadata)
    groups = await router.choose_replicas(list(router._replicas.values()), request)
    return [names(group) for group in groups]


async def test_a_conversation_prefers_its_own_replica_until_that_is_busy(
    router: ConversationRouter,
) -> None:
    [own], _ = await choose(router, "some conversation")
    for _ in range(20):
        assert (await choose(router, "some conversation"))[0] == [own]
    set_requests(router, {own: MAX_NUM_SEQS})
    [others] = await choose(router, "some conversation")
    assert len(others) == 2


async def test_conversations_are_spread_and_other_requests_go_to_one_of_two(
    router: ConversationRouter,
) -> None:
    owners = Counter([(await choose(router, f"conversation {i}"))[0][0] for i in range(400)])
    assert len(owners) == 4 and min(owners.values()) > 40
    pairs = [await choose(router) for _ in range(100)]
    assert all(len(groups) == 1 and len(groups[0]) == 2 for groups in pairs)
    assert {name for [pair] in pairs for name in pair} == set(owners)


async def test_a_sent_request_counts_before_the_replica_reports_it(
    router: ConversationRouter,
) -> None:
    for name in ("r0", "r1", "r2"):
        for _ in range(MAX_REQUESTS):
            router.on_send_request(ReplicaID(name, DEPLOYMENT))
        set_requests(router, {name: 1})  # its last report
    assert await choose(router) == [["r3"]]
    router.on_request_completed(ReplicaID("r1", DEPLOYMENT), "id")
    assert {name for _ in range(50) for [group] in [await choose(router)] for name in group} == {
        "r1",
        "r3",
    }


async def test_the_last_replica_with_room_is_found(router: ConversationRouter) -> None:
    set_requests(router, {"r0": MAX_REQUESTS, "r1": MAX_REQUESTS, "r2": MAX_REQUESTS})
    for _ in range(20):
        assert await choose(router) == [["r3"]]
    set_requests(router, {"r3": MAX_REQUESTS})
    [two] = await choose(router)
    assert len(two) == 2  # one of them refuses the request
