"""Simulates how much of a conversation the replicas of a cluster have cached, by routing method.

Each turn's prompt is the history and a new message. A replica caches the most recent histories and
computes the rest. Compares power of two choices, which is Serve's default; a hash of the
conversation; and a hash unless its replica is busy, which is the method of
`server/cluster/routing.py`. Prints a table and, last, one line of JSON.

    python -m benchmarks.conversations --num-replicas 10 100 1000 --utilization 0.6
"""

import argparse
import bisect
import heapq
import itertools
import json
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

# Qwen2.5-0.5B in int8 on two cores; keys and values in bfloat16 take 12 KiB per token.
PREFILL_TOKENS_PER_S = 769
DECODE_TOKENS_PER_S = 327
MAX_KNOWN_TOKENS = 512 * 2**20 // (12 * 2**10)
MAX_NUM_SEQS = 16
# Conversations. Some begin with one of a few common openers, such as "hello".
MEAN_TURNS, MEAN_PAUSE_S = 5, 30
MESSAGE_TOKENS, ANSWER_TOKENS = 40, 60
NUM_COMMON = 20
NUM_POINTS = 100  # of a replica on the hash ring, as in Serve
# The first half is a warm-up and is not counted: the conversations have no history yet.
TURNS_PER_REPLICA = 1200


@dataclass(eq=False)
class Conversation:
    """A conversation. point: its place on the hash ring."""

    point: float
    turns_left: int
    num_history_tokens: int = 0


@dataclass
class Replica:
    """Shares its time among its running turns, and caches the most recent histories."""

    known: OrderedDict[Conversation, int] = field(default_factory=OrderedDict)
    num_known_tokens: int = 0
    num_turns_ever: int = 0
    # (end, start, conversation): a turn ends when `work_done` reaches its end, in replica seconds.
    turns: list[tuple[float, float, Conversation]] = field(default_factory=list)
    work_done: float = 0.0
    last_s: float = 0.0

    def advance(self, now_s: float) -> None:
        if self.turns:
            self.work_done += (now_s - self.last_s) / len(self.turns)
        self.last_s = now_s

    def next_end_s(self) -> float:
        return self.last_s + (self.turns[0][0] - self.work_done) * len(self.turns)

    def begin(self, conversation: Conversation, now_s: float) -> int:
        """Starts a turn; returns how many tokens of the history are cached."""
        known = self.known.get(conversation, 0)
        work = turn_s(conversation.num_history_tokens - known)
        heapq.heappush(self.turns, (self.work_done + work, now_s, conversation))
        self.num_turns_ever += 1
        return known

    def end(self) -> tuple[float, Conversation]:
        """Ends the first turn that is due; returns its start and its conversation."""
        _, start_s, conversation = heapq.heappop(self.turns)
        conversation.num_history_tokens += MESSAGE_TOKENS + ANSWER_TOKENS
        self._keep(conversation)
        return start_s, conversation

    def _keep(self, conversation: Conversation) -> None:
        num_tokens = conversation.num_history_tokens
        self.num_known_tokens += num_tokens - self.known.pop(conversation, 0)
        self.known[conversation] = num_tokens
        while self.num_known_tokens > MAX_KNOWN_TOKENS:
            self.num_known_tokens -= self.known.popitem(last=False)[1]


def turn_s(num_unknown_tokens: int) -> float:
    """Seconds of a turn that runs alone on a replica."""
    num_prefilled = num_unknown_tokens + MESSAGE_TOKENS
    return num_prefilled / PREFILL_TOKENS_PER_S + ANSWER_TOKENS / DECODE_TOKENS_PER_S


Route = Callable[[Conversation], Replica]


def two_choices(replicas: list[Replica], rng: random.Random) -> Route:
    def route(_: Conversation) -> Replica:
        two = rng.sample(replicas, min(2, len(replicas)))
        return min(two, key=lambda replica: len(replica.turns))

    return route


def by_hash(replicas: list[Replica], rng: random.Random) -> Route:
    ring = sorted((rng.random(), i) for i in range(len(replicas)) for _ in range(NUM_POINTS))
    points = [point for point, _ in ring]

    def route(conversation: Conversation) -> Replica:
        return replicas[ring[bisect.bisect(points, conversation.point) % len(ring)][1]]

    return route


def by_hash_unless_busy(replicas: list[Replica], rng: random.Random) -> Route:
    own, other = by_hash(replicas, rng), two_choices(replicas, rng)

    def route(conversation: Conversation) -> Replica:
        replica = own(conversation)
        return replica if len(replica.turns) < MAX_NUM_SEQS else other(conversation)

    return route


ROUTES = {"two choices": two_choices, "hash": by_hash, "hash unless busy": by_hash_unless_busy}


def new_conversations(rng: random.Random, common_share: float) -> Iterator[Conversation]:
    common = [rng.random() for _ in range(NUM_COMMON)]
    while True:
        is_common = rng.random() < common_share
        point = rng.choice(common) if is_common else rng.random()
        # Geometric, so that any turn may be the last.
        turns = 1
        while rng.random() > 1 / MEAN_TURNS:
            turns += 1
        yield Conversation(point, turns)


def simulate(
    num_replicas: int, name: str, utilization: float, common_share: float
) -> dict[str, float]:
    """The figures of one routing method; `work` is relative to a cache of all histories.

    utilization: of the replicas, if all histories were cached. common_share: share of the
    conversations that begin with a common opener.
    """
    rng = random.Random(0)
    replicas = [Replica() for _ in range(num_replicas)]
    route = ROUTES[name](replicas, rng)
    pause_s = turn_s(0) * MEAN_TURNS / (utilization * num_replicas)  # between two new conversations
    order, coming = itertools.count(), new_conversations(rng, common_share)
    # (time, tie-breaker, replica whose turn may have ended, conversation whose turn starts). With
    # neither, a new conversation starts.
    events: list[tuple[float, int, Replica | None, Conversation | None]] = []
    heapq.heappush(events, (0.0, next(order), None, None))
    num_begun = num_history = num_known = 0
    num_turns, latencies_s = TURNS_PER_REPLICA * num_replicas, list[float]()
    while len(latencies_s) < num_turns:
        now_s, _, replica, conversation = heapq.heappop(events)
        if replica is None:
            if conversation is None:
                conversation = next(coming)
                at = now_s + rng.expovariate(1 / pause_s)
                heapq.heappush(events, (at, next(order), None, None))
            replica = route(conversation)
            replica.advance(now_s)
            known = replica.begin(conversation, now_s)
            if len(latencies_s) >= num_turns // 2:
                num_begun += 1
                num_known += known
                num_history += conversation.num_history_tokens
        elif replica.turns and replica.next_end_s() <= now_s + 1e-9:
            replica.advance(now_s)
            start_s, ended = replica.end()
            latencies_s.append(now_s - start_s)
            ended.turns_left -= 1
            if ended.turns_left:
                at = now_s + rng.expovariate(1 / MEAN_PAUSE_S)
                heapq.heappush(events, (at, next(order), None, ended))
        else:
            continue  # outdated: later turns have delayed this end
        if replica.turns:
            heapq.heappush(events, (replica.next_end_s(), next(order), replica, None))
    numbers = [each.num_turns_ever for each in replicas]
    counted = sorted(latencies_s[num_turns // 2 :])
    return {
        "known_share": num_known / num_history,
        "work": turn_s((num_history - num_known) // num_begun) / turn_s(0),
        "median_s": statistics.median(counted),
        "p99_s": counted[int(0.99 * len(counted))],
        "busiest": max(numbers) / statistics.mean(numbers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-replicas", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--utilization", type=float, default=0.6)
    parser.add_argument("--common-share", type=float, default=0.2)
    args = parser.parse_args()
    results = []
    print("replicas  routing            cached   work   median s   99 % s  busiest/mean")
    for number in args.num_replicas:
        for name in ROUTES:
            figures = simulate(number, name, args.utilization, args.common_share)
            results.append({"num_replicas": number, "routing": name, **figures})
            columns = "{known_share:6.3f} {work:6.2f} {median_s:10.2f} {p99_s:8.2f} {busiest:12.2f}"
            print(f"{number:8}  {name:17}", columns.format(**figures), flush=True)
    print(json.dumps({**vars(args), "results": results}))


if __name__ == "__main__":
    main()
