"""Continues raw text: no chat template, no persona, no sentiment."""

import asyncio
from collections.abc import Mapping, Sequence

from server.core.concurrency import all_of
from server.core.engine.adapters import BASE, Adapter
from server.core.engine.engine import Engine
from server.core.engine.sequence import SamplingParams
from server.core.engine.work import Work
from server.core.text.choices import Choices, begin_choices
from server.core.text.tokenizer import ChatTokenizer
from server.errors import ContextLengthError

# Text, or token ids.
Prompt = str | Sequence[int]


class Completer:
    """Continues prompts as they are."""

    def __init__(
        self, engine: Engine, tokenizer: ChatTokenizer, *, max_context: int
    ) -> None:  # fmt: skip
        self._engine, self._tokenizer, self._max_context = engine, tokenizer, max_context

    async def complete(
        self, prompts: Mapping[str, Prompt], params: SamplingParams, stop: Sequence[str], *,
        num_choices: int = 1, work: Work | None = None, adapter: Adapter = BASE,
    ) -> Choices:  # fmt: skip
        """Starts to continue every prompt. The choices of a prompt are adjacent.

        prompts: by their field in the request, for errors.
        work: the request's; None: a new one for each choice.
        adapter: that the prompts are continued with.
        num_choices: of each prompt. The seed of each further one is one higher.

        Raises:
            ContextLengthError: a prompt leaves no room for a continuation.
            InvalidRequestError: a token id is not in the vocabulary.
        """
        # Off the event loop: megabytes take a second.
        all_ids = await asyncio.to_thread(
            lambda: [self._encode(param, prompt, adapter) for param, prompt in prompts.items()]
        )
        num_cached = None
        if num_choices > 1:
            # Computes each prompt once for all its choices, if the engine has room to keep it.
            known = await all_of(
                self._engine.prefill(ids, work=work, adapter=adapter) for ids in all_ids
            )
            num_cached = sum(num_known or 0 for num_known in known)
        return Choices(
            num_prompt_tokens=sum(len(ids) for ids in all_ids),
            choices=tuple(
                choice
                for ids in all_ids
                for choice in begin_choices(
                    self._engine, ids, params, num_choices, self._tokenizer.token_bytes, stop,
                    max_context=self._max_context, work=work, adapter=adapter,
                )
            ),
            num_prefilled_cached=num_cached,
        )  # fmt: skip

    def _encode(self, param: str, prompt: Prompt, adapter: Adapter) -> list[int]:
        if isinstance(prompt, str):
            ids = self._tokenizer.encode_text(prompt)
        else:
            ids = list(prompt)
            self._tokenizer.check_ids(ids, lambda i: f"{param}[{i}]")
        max_context = self._max_context - adapter.num_virtual_tokens
        if len(ids) >= max_context:
            raise ContextLengthError(len(ids), max_context, param)
        return ids
