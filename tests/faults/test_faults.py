"""A fault at every step of an answer: it fails the request it belongs to, and no other."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.local import LocalEngine
from server.core.engine.model.runner import ModelRunner
from server.core.engine.model.sampler import Sampler
from server.core.engine.sequence import SamplingParams, Sequence
from server.core.engine.stream import TokenStream
from server.core.engine.work import Work
from server.core.text import choices, grammar
from server.core.text.detokenizer import Detokenizer
from tests.faults.conftest import BOUND_S, contents_of, endless, events_of, held, text_of
from tests.live.test_clients_at_once import is_idle, until
from tests.live.test_errors import assert_error
from tests.servers import LiveServer

SEED = 666  # of the request that is hit
NUM_OTHERS = 3
MAX_TOKENS = 12


class BrokenOnPurposeError(Exception):
    """The injected fault."""


def is_hit(sequence: Sequence) -> bool:
    return sequence.params is not None and sequence.params.seed == SEED


def raising(*args: Any, **options: Any) -> Any:
    raise BrokenOnPurposeError


# --- where it can break: each puts a fault into a running server -----------------------


def break_memory(method: str) -> Callable[[pytest.MonkeyPatch, ModelRunner], None]:
    def install(patch: pytest.MonkeyPatch, runner: ModelRunner) -> None:
        plain = getattr(runner, method)

        def broken(sequence: Sequence, *args: Any, **options: Any) -> Any:
            if is_hit(sequence):
                raise BrokenOnPurposeError
            return plain(sequence, *args, **options)

        patch.setattr(runner, method, broken)

    return install


def break_forward(num_tokens: int, *, is_done: bool) -> Callable[[Any, ModelRunner], None]:
    """num_tokens: sampled before. is_done: behind the forward, which has written its keys."""

    def install(patch: pytest.MonkeyPatch, runner: ModelRunner) -> None:
        forward = runner._model.forward

        def broken(segments: Any, *args: Any) -> Any:
            hit = [state.cache for sequence, state in runner._states.items()
                   if is_hit(sequence) and len(sequence.completion_ids) == num_tokens]  # fmt: skip
            is_in_step = any(segment.cache in hit for segment in segments)
            if is_in_step and not is_done:
                raise BrokenOnPurposeError
            hidden = forward(segments, *args)
            if is_in_step:
                raise BrokenOnPurposeError
            return hidden

        patch.setattr(runner._model, "forward", broken)

    return install


def break_sampler(patch: pytest.MonkeyPatch, runner: ModelRunner) -> None:
    penalise = Sampler.penalise

    def broken(self: Sampler, logits: Any) -> None:
        if self.params.seed == SEED and self.num_sampled:
            raise BrokenOnPurposeError
        penalise(self, logits)

    patch.setattr(Sampler, "penalise", broken)


def break_detokenizer(patch: pytest.MonkeyPatch, runner: ModelRunner) -> None:
    begin = choices.begin_choices

    def broken(engine: Any, prompt_ids: Any, params: Any, *args: Any, **options: Any) -> Any:
        begun = begin(engine, prompt_ids, params, *args, **options)
        if params.seed == SEED:
            begun[0].detokenizer.push = raising  # type: ignore[method-assign]
        return begun

    patch.setattr("server.core.roles.reply.begin_choices", broken)


def break_grammar(name: str) -> Callable[[pytest.MonkeyPatch, ModelRunner], None]:
    """Only the request that is hit has one."""

    def install(patch: pytest.MonkeyPatch, runner: ModelRunner) -> None:
        owner = grammar.Grammar if name == "begin" else grammar.GrammarState
        patch.setattr(owner, name, raising)

    return install


def break_compiler(patch: pytest.MonkeyPatch, runner: ModelRunner) -> None:
    patch.setattr(grammar.GrammarCompiler, "json_schema", raising)


FAULTS = {
    "admission": break_memory("admit"),
    "room for the next tokens": break_memory("reserve"),
    "prefill": break_forward(0, is_done=False),
    "behind a prefill": break_forward(0, is_done=True),
    "decode": break_forward(3, is_done=False),
    "behind a decode": break_forward(3, is_done=True),
    "sampler": break_sampler,
    "detokenizer": break_detokenizer,
    "grammar's compiler": break_compiler,
    "grammar's beginning": break_grammar("begin"),
    "grammar's choice": break_grammar("allowed"),
    "grammar's next state": break_grammar("accept"),
}


# --- what then happens ----------------------------------------------------------------


async def ask_together(
    client: httpx.AsyncClient, server: LiveServer, *bodies: dict[str, Any]
) -> list[httpx.Response]:
    """The responses to requests that share their steps, all but the first."""
    url, engine = f"{server.base_url}/chat/completions", server.engine
    submitted = []

    def submit(
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> TokenStream:
        submitted.append(params)
        return LocalEngine.submit(engine, prompt_ids, params, work=work, adapter=adapter)

    def have_begun() -> bool:
        # One may fail before it is submitted.
        return len(submitted) + any(request.done() for request in asked) >= len(bodies)

    async with asyncio.timeout(BOUND_S):
        with pytest.MonkeyPatch.context() as patch, held(server.services):
            patch.setattr(engine, "submit", submit)
            asked = [asyncio.create_task(client.post(url, json=body)) for body in bodies]
            await until(have_begun)
        return await asyncio.gather(*asked)


def others(server: LiveServer) -> list[dict[str, Any]]:
    """Requests of different lengths, whose log-probabilities any disturbance would change."""
    return [
        endless(
            server,
            messages=[{"role": "user", "content": f"question {i} " * (10 * i + 1)}],
            seed=i,
            temperature=1.5,
            # Among thousands, whose order rounding changes, another would be drawn.
            top_k=20,
            max_tokens=MAX_TOKENS,
            logprobs=True,
            stream=i == 1,
        )
        for i in range(NUM_OTHERS)
    ]


def assert_same(responses: list[httpx.Response], expected: list[httpx.Response]) -> None:
    """Texts and log-probabilities; the other sequences of a step change their rounding."""
    assert len(responses) == len(expected)
    for one, other in zip(responses, expected, strict=True):
        assert text_of(one) == text_of(other)
        assert logprobs_of(one) == pytest.approx(logprobs_of(other), abs=1e-3)


def logprobs_of(response: httpx.Response) -> list[float]:
    choices = [content["choices"][0] for content in contents_of(response)]
    contents = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
    return [token["logprob"] for tokens in contents for token in tokens]


@pytest.fixture(scope="module")
def undisturbed(mini: LiveServer) -> list[httpx.Response]:
    """What the others are answered where nothing is broken."""

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            return await ask_together(client, mini, *others(mini))

    return asyncio.run(ask())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_fails_the_request_it_belongs_to_and_no_other(
    client: httpx.AsyncClient,
    mini: LiveServer,
    undisturbed: list[httpx.Response],
    fault: str,
    stream: bool,
) -> None:
    hit = endless(mini, seed=SEED, max_tokens=MAX_TOKENS, stream=stream)
    if "grammar" in fault:
        hit["response_format"] = {"type": "json_object"}
    engine: Any = mini.engine
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch, engine._runner)
        *rest, failed = await ask_together(client, mini, *others(mini), hit)
        await until(lambda: is_idle(engine))
    assert_same(rest, undisturbed)
    assert_failed(failed)
    # And what they left behind is sound.
    assert_same(await ask_together(client, mini, *others(mini)), undisturbed)


def assert_failed(response: httpx.Response) -> None:
    assert "BrokenOnPurpose" not in response.text
    if response.status_code != 200:
        assert_error(response, 500, "server_error", None)
        assert response.headers["x-should-retry"] == "false"
        return
    *_, error, end = events_of(response.text)
    assert json.loads(error)["error"]["type"] == "server_error"
    assert end == "[DONE]"


async def test_a_release_that_fails_loses_no_token(
    client: httpx.AsyncClient, mini: LiveServer, undisturbed: list[httpx.Response]
) -> None:
    engine: Any = mini.engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._runner, "_remember", raising)
        disturbed = await ask_together(client, mini, *others(mini))
        await until(lambda: is_idle(engine))
    assert_same(disturbed, undisturbed)


async def test_an_event_loop_that_stalls_loses_no_token(
    client: httpx.AsyncClient, mini: LiveServer, undisturbed: list[httpx.Response]
) -> None:
    push = Detokenizer.push
    stalls = iter([0.3, 0.3])

    def slow(self: Any, token_id: int) -> str:
        time.sleep(next(stalls, 0))
        return push(self, token_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detokenizer, "push", slow)
        stalled = await ask_together(client, mini, *others(mini))
    assert_same(stalled, undisturbed)
    assert next(stalls, None) is None
