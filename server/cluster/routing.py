"""Which replica a request goes to: a conversation to the one that has its beginning in memory."""

import hashlib
import json
import random
from collections import Counter
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from server.errors import InvalidRequestError
from server.protocol.json_body import read_json

# Where the routes that converse have their turns.
TURNS = {"/v1/chat/completions": "messages", "/v1/responses": "input"}
# What stands before the turns in a prompt, and OpenAI's own hint for routing.
BEFORE_TURNS = ("model", "instructions", "tools", "prompt_cache_key")


class ConversationRouter(ConsistentHashRouter):
    """Serve's consistent hashing for conversations, its power of two choices for all else.

    A conversation leaves its replica while that has as many requests as it computes together.
    """

    def initialize_state(self, *, max_num_seqs: int, max_requests: int) -> None:
        """max_num_seqs: requests a replica computes together. max_requests: that it lets in."""
        super().initialize_state(num_fallback_replicas=0)
        self._max_num_seqs, self._max_requests = max_num_seqs, max_requests
        # What replicas told last is soon too little in a burst, and is forgotten after 10 s.
        self._num_sent = Counter[ReplicaID]()

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Called by Serve for every request that a replica is sent."""
        super().on_send_request(replica_id)
        self._num_sent[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when it has ended, however."""
        super().on_request_completed(replica_id, internal_request_id)
        self._num_sent[replica_id] -= 1

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, the preferred first; the least busy one of a group is taken."""
        hashed = await super().choose_replicas(candidate_replicas, pending_request)
        is_conversation = pending_request is not None and pending_request.metadata.session_id
        own = [each for each in hashed if is_conversation and self._below(self._max_num_seqs, each)]
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        # Where no replica has room, one of them says so.
        with_room = (
            self._below(self._max_requests, two)
            or self._below(self._max_requests, candidate_replicas)
            or two
        )
        return [*own, with_room]

    def _below(self, limit: int, replicas: list[RunningReplica]) -> list[RunningReplica]:
        """Those that have fewer requests, as far as this router knows."""
        return [each for each in replicas if self._num_requests(each.replica_id) < limit]

    def _num_requests(self, replica_id: ReplicaID) -> int:
        """Of all entrances, as the replica told last, but at least those of this one."""
        return max(self._num_sent[replica_id], self.replica_queue_len_cache.get(replica_id) or 0)


def conversation_of(path: str, body: bytes) -> str:
    """What tells a conversation from others: a hash of its beginning, up to the first user's turn.

    Empty for what is no conversation.
    """
    if path not in TURNS:
        return ""
    try:
        content = read_json(body)
    except InvalidRequestError:
        return ""  # the replica says what is wrong with it
    if not isinstance(content, dict):
        return ""
    beginning = [content.get(name) for name in BEFORE_TURNS]
    beginning.append(_first_turns(content.get(TURNS[path])))
    return hashlib.sha256(json.dumps(beginning).encode()).hexdigest()


def _first_turns(turns: Any) -> Any:
    if isinstance(turns, str):  # /v1/responses takes a text for one turn of the user
        return [{"role": "user", "content": turns}]
    if not isinstance(turns, list):
        return None
    for end, turn in enumerate(turns, 1):
        if isinstance(turn, dict) and turn.get("role") == "user":
            return turns[:end]
    return turns[:1]
