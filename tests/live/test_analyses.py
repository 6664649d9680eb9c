"""Further tasks on a chat's last message: `tasks` and their `analyses`."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import Settings
from server.core.engine.scheduler import ScheduledChunk
from server.core.engine.sequence import SamplingParams, Sequence
from server.loading import load_services
from tests.live.test_chat import chunks_of, post
from tests.servers import LiveServer, local_engine

TASKS = ["emotion", "intent", "sentiment"]
BOUND_S = 60


def classified(live: LiveServer, text: str, task: str) -> dict[str, Any]:
    response = httpx.post(
        f"{live.base_url}/classify", json={"input": text, "task": task}, timeout=BOUND_S
    )
    assert response.status_code == 200, response.text
    [item] = response.json()["data"]
    return {**item, "cached": False}


def without_cached(analyses: dict[str, Any]) -> dict[str, Any]:
    return {name: {**result, "cached": False} for name, result in analyses.items()}


def test_analyses_equal_those_of_classify_and_come_with_the_sentiment(live: LiveServer) -> None:
    text = "快递又丢了，我真的很生气！"
    reply = post(live, messages=[{"role": "user", "content": text}], tasks=TASKS).json()
    analyses = without_cached(reply["analyses"])
    assert list(analyses) == TASKS
    for task, result in analyses.items():
        assert {"index": 0, **result} == classified(live, text, task)
    assert analyses["sentiment"] == {**reply["sentiment"], "cached": False}


def test_a_stream_sends_the_analyses_in_its_first_chunk(live: LiveServer) -> None:
    whole = post(live, tasks=TASKS).json()
    first, *others = chunks_of(post(live, tasks=TASKS, stream=True))
    assert without_cached(first["analyses"]) == without_cached(whole["analyses"])
    assert all("analyses" not in chunk for chunk in others)


def test_without_tasks_nothing_changes(live: LiveServer) -> None:
    with_tasks, plain = post(live, tasks=TASKS).json(), post(live).json()
    assert "analyses" not in plain
    assert plain["choices"] == with_tasks["choices"]
    assert "analyses" not in post(live, tasks=[]).json()


def test_the_plain_model_has_analyses_but_no_cue(live: LiveServer) -> None:
    plain = post(live, model=f"{live.model}:plain").json()
    asked = post(live, model=f"{live.model}:plain", tasks=["emotion"]).json()
    assert asked["sentiment"] is None and asked["analyses"]["emotion"]["label"]
    assert asked["choices"] == plain["choices"]


def test_the_responses_route_sends_analyses_too(live: LiveServer) -> None:
    body = {"model": live.model, "input": "我好开心！", "tasks": ["intent"], "max_output_tokens": 4}
    response = httpx.post(f"{live.base_url}/responses", json=body, timeout=BOUND_S).json()
    assert response["analyses"]["intent"]["label"] in {"question", "request", "complaint", "chat"}


@pytest.mark.parametrize(
    ("tasks", "param", "word"),
    [
        (["intent", "moood"], "tasks[1]", "emotion, intent, keywords, sentiment"),
        ("intent", "tasks", ""),
        ([1], "tasks[0]", ""),
        (["intent"] * 17, "tasks", "16"),
    ],
)
def test_wrong_tasks_are_refused(live: LiveServer, tasks: Any, param: str, word: str) -> None:
    for route, said in (("chat/completions", "messages"), ("responses", "input")):
        message = [{"role": "user", "content": "hi"}]
        body = {"model": live.model, said: message, "tasks": tasks}
        response = httpx.post(f"{live.base_url}/{route}", json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == param and word in error["message"]


async def test_all_labels_of_a_chat_are_computed_in_one_step(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = load_services(Settings(model=str(tiny_checkpoint)))
    engine = local_engine(services)
    runner = engine._runner
    try:
        for task in services.tasks.values():
            await services.classifier.judge_of(task)
        await services.classifier.warm_up(services.tasks.values())
        steps: list[list[ScheduledChunk]] = []
        is_busy, go_on = threading.Event(), threading.Event()
        plain_step = runner.step

        def step(chunks: list[ScheduledChunk], *args: Any) -> Any:
            steps.append(chunks)
            is_busy.set()
            go_on.wait(BOUND_S)
            return plain_step(chunks, *args)

        num_added, all_added = 0, asyncio.Event()
        plain_add = engine._thread.add

        def add(sequence: Sequence) -> None:
            nonlocal num_added
            plain_add(sequence)
            num_added += 1
            if num_added == 1 + len(TASKS) + 1:
                all_added.set()

        monkeypatch.setattr(runner, "step", step)
        monkeypatch.setattr(engine._thread, "add", add)
        # The engine is busy until all that the chat needs is queued.
        other = asyncio.create_task(engine.prefill(services.tokenizer.encode_text("other")))
        assert await asyncio.to_thread(is_busy.wait, BOUND_S)
        messages = [{"role": "user", "content": "今天真开心"}]
        replying = asyncio.create_task(
            services.replier.reply(
                messages, SamplingParams(max_tokens=1), (), with_sentiment=True, tasks=TASKS
            )
        )
        await asyncio.wait_for(all_added.wait(), BOUND_S)
        go_on.set()
        reply = await asyncio.wait_for(replying, BOUND_S)
        reply.abort()
        await other
        judged = [
            sum(bool(chunk.sequence.layers or chunk.sequence.continuations) for chunk in chunks)
            for chunks in steps
        ]
        assert [number for number in judged if number] == [len(TASKS)]
        assert len(steps[1]) == len(TASKS) + 1  # and the conversation with them
    finally:
        go_on.set()
        engine.close()


def test_a_task_is_fitted_when_it_is_first_used(
    tiny_checkpoint: Path,
    tmp_path: Path,
    serve: Callable[[Settings], AbstractContextManager[LiveServer]],
) -> None:
    settings = Settings(model=str(tiny_checkpoint), cache_dir=tmp_path)
    with serve(settings) as server:
        tasks = httpx.get(f"{server.base_url}/models/{server.model}").json()["tasks"]
        judged_by = {task["name"]: task["judged_by"] for task in tasks if task["kind"] == "labels"}
        assert judged_by["sentiment"] and judged_by["intent"] is None
        assert post(server, tasks=["intent"]).json()["analyses"]["intent"]["label"]
        tasks = httpx.get(f"{server.base_url}/models/{server.model}").json()["tasks"]
        [intent] = [task for task in tasks if task["name"] == "intent"]
        assert intent["judged_by"] and intent["num_examples"] > 0
    assert len(list(tmp_path.iterdir())) == 2


def test_keywords_are_a_list_of_pieces_of_the_text(live: LiveServer) -> None:
    text = "Our flight to Lisbon was late again."
    messages = [{"role": "user", "content": text}]
    reply = post(live, messages=messages, tasks=["keywords", "emotion"]).json()
    keywords = reply["analyses"]["keywords"]
    assert list(reply["analyses"]) == ["keywords", "emotion"]
    assert 1 <= len(keywords) <= 5
    assert all(keyword in text for keyword in keywords)
