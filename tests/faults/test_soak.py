"""Minutes of everything at once: no reply is lost or mixed up, and nothing stays behind.

`make soak` takes SOAK_MINUTES (10) for it, a fifth of which warms the server up.
"""

import asyncio
import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.core.engine.thread import REST_AFTER_S
from server.core.text.tokenizer import ChatTokenizer
from tests.faults.conftest import BOUND_S, contents_of, text_of
from tests.processes import Footprint, Running, environment, started

MODEL = "qwen-mini"
NUM_CLIENTS = 24
SHARE_LEAVING = 0.3
MAX_GROWTH = 1.05
WARM_UP_SHARE = 0.2
MOODS = [f"{mood}, day {i}" for i in range(20) for mood in ("很开心", "I am so sad", "出发了")]
# So small that both are full, and entries leave them, before anything is measured.
SMALL_CACHES = ("--sentiment-cache-size", "40", "--max-prefix-mib", "16")

Check = Callable[[httpx.Response], None]


@dataclass(frozen=True)
class Question:
    """A request, and what proves that a response is the one to it."""

    kind: str
    path: str
    body: dict[str, Any]
    check: Check


@dataclass
class Asker:
    """Thinks of questions, no two of which have the same answer."""

    tokenizer: ChatTokenizer
    moods: dict[str, float] = field(default_factory=dict)  # what a text is, judged alone
    _chance: random.Random = field(default_factory=lambda: random.Random(5))
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        words = (
            (i, text.decode())
            for i, text in enumerate(self.tokenizer.token_bytes)
            if text.isalpha() and len(text) > 1
        )
        self._words = list(words)

    def next(self) -> Question:
        make = self._chance.choice([self._owned, self._owned, self._repeated, self._classified])
        return make(f"owner-{next(self._numbers)}-{self._chance.randbytes(4).hex()}")

    def _owned(self, owner: str) -> Question:
        """Only one answer fits, and no one else's."""
        mood, stream = self._chance.choice(MOODS), self._chance.random() < 0.5
        schema = {
            "type": "object",
            "properties": {"owner": {"const": owner}},
            "required": ["owner"],
            "additionalProperties": False,
        }
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": mood}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "own", "schema": schema},
            },
            "stream": stream,
        }

        def check(response: httpx.Response) -> None:
            assert json.loads(text_of(response)) == {"owner": owner}
            assert self._confidence(contents_of(response)[0]["sentiment"]) == self._mood(mood)

        return Question("stream" if stream else "chat", "chat/completions", body, check)

    def _repeated(self, owner: str) -> Question:
        """One word, as often as asked; without a grammar, so that any word could come."""
        (word, text), times = self._chance.choice(self._words), self._chance.randrange(5, 60)
        stream = self._chance.random() < 0.5
        body = {
            "model": f"{MODEL}:plain",
            "messages": [{"role": "user", "content": owner}],
            "logit_bias": {str(word): 100},
            "max_tokens": times,
            "stream": stream,
        }

        def check(response: httpx.Response) -> None:
            assert text_of(response) == text * times

        return Question("stream" if stream else "chat", "chat/completions", body, check)

    def _classified(self, owner: str) -> Question:
        """Labels of one's own, or texts whose mood is known."""
        if self._chance.random() < 0.5:
            moods = self._chance.sample(MOODS, 4)

            def check_moods(response: httpx.Response) -> None:
                results = response.json()["data"]
                assert [self._confidence(each) for each in results] == list(map(self._mood, moods))

            return Question("classify", "classify", {"input": moods}, check_moods)
        labels = [f"{owner}-{i}" for i in range(3)]
        body = {"input": [owner, "another"], "instructions": "Whose is it?", "labels": labels}

        def check(response: httpx.Response) -> None:
            for result in response.json()["data"]:
                assert [each["value"] for each in result["probabilities"]] == labels
                assert result["label"] in labels

        return Question("classify", "classify", body, check)

    def _mood(self, text: str) -> Any:
        # The other sequences of the same step change the rounding.
        return pytest.approx(self.moods[text], abs=1e-3)

    @staticmethod
    def _confidence(result: dict[str, Any]) -> float:
        confidence: float = result["confidence"]
        return confidence

    async def learn(self, client: httpx.AsyncClient, url: str) -> None:
        """What every text is when nothing else runs."""
        for text in MOODS:
            response = await client.post(f"{url}/classify", json={"input": text})
            self.moods[text] = self._confidence(response.json()["data"][0])


@dataclass
class Crowd:
    """Clients that ask without a pause, some of which hang up."""

    asker: Asker
    url: str
    answered: Counter[str] = field(default_factory=Counter)
    num_left: int = 0
    _chance: random.Random = field(default_factory=lambda: random.Random(6))
    _usual_s: dict[str, float] = field(default_factory=dict)

    async def ask(self, seconds: float) -> None:
        """Until that time is over and the last reply is here; hangs up all connections."""
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            httpx.AsyncClient(base_url=self.url, timeout=BOUND_S, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(NUM_CLIENTS):
                group.create_task(self._ask_on(client, end))

    async def _ask_on(self, client: httpx.AsyncClient, end: float) -> None:
        while time.monotonic() < end:
            question = self.asker.next()
            begin, patience_s = time.monotonic(), 2.0 * BOUND_S
            if is_leaving := self._chance.random() < SHARE_LEAVING:
                patience_s = self._chance.random() * self._usual_s.get(question.kind, 0.1)
            try:
                async with asyncio.timeout(patience_s):
                    response = await client.post(question.path, json=question.body)
            except TimeoutError:
                assert is_leaving, f"no reply to {question}"
                self.num_left += 1
                continue
            assert response.status_code == 200, (question, response.text)
            question.check(response)
            self.answered[question.kind] += 1
            usual_s = self._usual_s.setdefault(question.kind, time.monotonic() - begin)
            self._usual_s[question.kind] = 0.9 * usual_s + 0.1 * (time.monotonic() - begin)


def metrics(server: Running) -> dict[tuple[str, ...], float]:
    """Every number, by its name and the values of its labels."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


async def at_rest(server: Running, num_descriptors: int | None = None) -> Footprint:
    """What the server holds when no request is left and the engine is idle."""
    gone = {
        ("qwen_requests_inside",): 0.0,
        ("qwen_sequences", "running"): 0.0,
        ("qwen_sequences", "waiting"): 0.0,
        ("qwen_kv_tokens",): 0.0,
    }
    async with asyncio.timeout(BOUND_S):
        while True:
            now = await asyncio.to_thread(metrics, server)
            footprint = Footprint.of(server.process.pid)
            is_free = all(now[name] == value for name, value in gone.items())
            if is_free and num_descriptors in (None, footprint.num_descriptors):
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(REST_AFTER_S + 2)
    return Footprint.of(server.process.pid)


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
async def test_nothing_is_lost_mixed_up_or_left_behind(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    seconds = float(os.environ.get("SOAK_MINUTES", "10")) * 60
    with started(environment(tmp_path), "--model", "mini", *SMALL_CACHES) as server:
        idle = await at_rest(server)
        crowd = Crowd(Asker(tokenizer), f"{server.url}/v1")
        async with httpx.AsyncClient() as client:
            await crowd.asker.learn(client, crowd.url)
        await crowd.ask(seconds * WARM_UP_SHARE)
        before = await at_rest(server, idle.num_descriptors)
        await crowd.ask(seconds * (1 - WARM_UP_SHARE))
        after = await at_rest(server, idle.num_descriptors)
        failed = [
            name for name in metrics(server) if name[0] == "qwen_requests_total" and name[2] >= "5"
        ]
    print(f"\n{dict(crowd.answered)} answered, {crowd.num_left} left; {before} -> {after}")
    num_asked = crowd.num_left + crowd.answered.total()
    assert set(crowd.answered) == {"chat", "stream", "classify"}
    assert crowd.num_left > 0.5 * SHARE_LEAVING * num_asked
    assert after.resident_kib < MAX_GROWTH * before.resident_kib
    assert after.num_threads <= before.num_threads
    assert not failed
    output = "".join(server.output)
    assert "Traceback" not in output and "ERROR" not in output
