"""The simulation of conversations over replicas."""

import pytest

from benchmarks import conversations
from benchmarks.conversations import simulate


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "TURNS_PER_REPLICA", 200)


def test_a_conversation_is_cached_by_hash_and_seldom_by_two_choices() -> None:
    hashed = simulate(8, "hash", 0.3, common_share=0)
    assert hashed["known_share"] > 0.99 and hashed["work"] < 1.01
    spread = simulate(8, "two choices", 0.3, common_share=0)
    assert spread["known_share"] < 0.4 and spread["work"] > 1.5


def test_a_single_replica_has_every_history_cached() -> None:
    for name in conversations.ROUTES:
        assert simulate(1, name, 0.3, common_share=0)["known_share"] == 1


def test_a_conversation_leaves_a_busy_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "MAX_NUM_SEQS", 4)
    kept = simulate(8, "hash", 0.5, common_share=1)
    left = simulate(8, "hash unless busy", 0.5, common_share=1)
    assert left["busiest"] < kept["busiest"]


def test_histories_that_do_not_fit_are_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "MAX_KNOWN_TOKENS", 0)
    assert simulate(2, "hash", 0.3, common_share=0)["known_share"] == 0
