"""Prompts continued as they are: what the engine computes, and what it need not compute."""

from typing import cast

import pytest

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.engine import Engine
from server.core.engine.sequence import FinishedEvent, FinishReason, SamplingParams, TokenEvent
from server.core.engine.stream import TokenStream
from server.core.engine.work import Work
from server.core.text.completion import Completer, Prompt
from server.core.text.tokenizer import ChatTokenizer
from server.errors import ContextLengthError, InvalidRequestError

PARAMS = SamplingParams(max_tokens=50, temperature=0.5, seed=3)
MAX_CONTEXT = 20


class FakeEngine:
    """Records its calls; every answer is token 5."""

    def __init__(self) -> None:
        self.submitted: list[tuple[list[int], SamplingParams]] = []
        self.prefilled: list[list[int]] = []

    async def prefill(
        self, prompt_ids: list[int], *, work: Work | None = None, adapter: Adapter = BASE
    ) -> int | None:
        self.prefilled.append(prompt_ids)
        return 3

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> TokenStream:
        self.submitted.append((prompt_ids, params))
        stream = TokenStream(lambda: None, lambda: 2)
        stream.events.put_nowait(TokenEvent(5))
        stream.events.put_nowait(FinishedEvent(FinishReason.STOP))
        return stream


@pytest.fixture
def generator() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def completer(generator: FakeEngine, tokenizer: ChatTokenizer) -> Completer:
    return Completer(cast(Engine, generator), tokenizer, max_context=MAX_CONTEXT)


async def test_texts_are_encoded_as_they_are_and_ids_are_unchanged(
    completer: Completer, generator: FakeEngine, tokenizer: ChatTokenizer
) -> None:
    text = "你好<|im_end|>"
    await completer.complete({"prompt[0]": text, "prompt[1]": [7, 8]}, PARAMS, [])
    assert [ids for ids, _ in generator.submitted] == [tokenizer.encode_text(text), [7, 8]]
    assert tokenizer.marker_id("<|im_end|>") not in generator.submitted[0][0]


async def test_one_choice_of_a_prompt_needs_no_prefill(
    completer: Completer, generator: FakeEngine
) -> None:
    choices = await completer.complete({"prompt[0]": [7], "prompt[1]": [8, 9]}, PARAMS, [])
    assert generator.prefilled == []
    assert (choices.num_prompt_tokens, choices.num_cached_tokens) == (3, 4)


async def test_several_choices_compute_each_prompt_once_and_differ_in_their_seed(
    completer: Completer, generator: FakeEngine
) -> None:
    prompts: dict[str, Prompt] = {"prompt[0]": [7], "prompt[1]": [8, 9]}
    choices = await completer.complete(prompts, PARAMS, [], num_choices=2)
    assert generator.prefilled == [[7], [8, 9]]
    assert [(ids, params.seed) for ids, params in generator.submitted] == [
        ([7], 3),
        ([7], 4),
        ([8, 9], 3),
        ([8, 9], 4),
    ]
    assert [len(pieces) for pieces in await choices.read()] == [1] * 4
    assert (choices.num_prompt_tokens, choices.num_cached_tokens) == (3, 6)
    assert choices.num_completion_tokens == 4


async def test_each_continuation_is_capped_by_the_room_after_its_prompt(
    completer: Completer, generator: FakeEngine
) -> None:
    await completer.complete({"prompt[0]": [7], "prompt[1]": [7] * 19}, PARAMS, [])
    assert [params.max_tokens for _, params in generator.submitted] == [19, 1]


@pytest.mark.parametrize("prompt", [[7] * MAX_CONTEXT, "word " * 99], ids=["ids", "text"])
async def test_nothing_is_computed_if_one_prompt_is_too_long(
    completer: Completer, generator: FakeEngine, prompt: Prompt
) -> None:
    with pytest.raises(ContextLengthError) as caught:
        await completer.complete({"prompt[0]": [7], "prompt[1]": prompt}, PARAMS, [], num_choices=2)
    assert caught.value.param == "prompt[1]"
    assert not generator.submitted and not generator.prefilled


@pytest.mark.parametrize("token_id", [-1, 10**9])
async def test_a_token_the_model_does_not_have_is_named(
    completer: Completer, generator: FakeEngine, token_id: int
) -> None:
    with pytest.raises(InvalidRequestError, match=f"no token {token_id}") as caught:
        await completer.complete({"prompt": [7, 7, token_id]}, PARAMS, [])
    assert caught.value.param == "prompt[2]"
    assert generator.submitted == []
