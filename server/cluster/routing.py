"""Routes requests to replicas: a conversation to the one whose prefix cache has its beginning."""

import hashlib
import json
import random
from collections import Counter
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from server.errors import InvalidRequestError
from server.protocol.json_body import read_json

# The field that holds the turns, for each route with conversations.
TURNS = {"/v1/chat/completions": "messages", "/v1/responses": "input"}
# Fields that precede the turns in a prompt, and OpenAI's hint for routing.
BEFORE_TURNS = ("model", "instructions", "tools", "prompt_cache_key")


class ConversationRouter(ConsistentHashRouter):
    """Consistent hashing for conversations, power of two choices for other requests.

    While its replica has `max_num_seqs` requests, a conversation is routed like other requests.
    """

    def initialize_state(self, *, max_num_seqs: int, max_requests: int) -> None:
        """Limits of a replica. max_num_seqs: requests in a batch. max_requests: admitted."""
        super().initialize_state(num_fallback_replicas=0)
        self._max_num_seqs, self._max_requests = max_num_seqs, max_requests
        # Serve's cached queue lengths lag behind in a burst, and expire after 10 s.
        self._num_sent = Counter[ReplicaID]()

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Called by Serve for every request that it sends to a replica."""
        super().on_send_request(replica_id)
        self._num_sent[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request has ended in any way."""
        super().on_request_completed(replica_id, internal_request_id)
        self._num_sent[replica_id] -= 1

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, the preferred first; Serve takes a group's least busy replica."""
        hashed = await super().choose_replicas(candidate_replicas, pending_request)
        is_conversation = pending_request is not None and pending_request.metadata.session_id
        own = [each for each in hashed if is_conversation and self._below(self._max_num_seqs, each)]
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        # If no replica has room, one of two random ones refuses the request.
        with_room = (
            self._below(self._max_requests, two)
            or self._below(self._max_requests, candidate_replicas)
            or two
        )
        return [*own, with_room]

    def _below(self, limit: int, replicas: list[RunningReplica]) -> list[RunningReplica]:
        """The replicas with fewer requests than `limit`, as far as this router knows."""
        return [each for each in replicas if self._num_requests(each.replica_id) < limit]

    def _num_requests(self, replica_id: ReplicaID) -> int:
        """The queue length that the replica last reported, or this entrance's requests if more."""
        return max(self._num_sent[replica_id], self.replica_queue_len_cache.get(replica_id) or 0)


def conversation_of(path: str, body: bytes) -> str:
    """Identifies a conversation by a hash of its beginning, up to the first user's turn.

    Empty for other requests.
    """
    if path not in TURNS:
        return ""
    try:
        content = read_json(body)
    except InvalidRequestError:
        return ""  # the replica answers with the error
    if not isinstance(content, dict):
        return ""
    beginning = [content.get(name) for name in BEFORE_TURNS]
    beginning.append(_first_turns(content.get(TURNS[path])))
    return hashlib.sha256(json.dumps(beginning).encode()).hexdigest()


def _first_turns(turns: Any) -> Any:
    if isinstance(turns, str):  # in /v1/responses, a string is one turn of the user
        return [{"role": "user", "content": turns}]
    if not isinstance(turns, list):
        return None
    for end, turn in enumerate(turns, 1):
        if isinstance(turn, dict) and turn.get("role") == "user":
            return turns[:end]
    return turns[:1]
