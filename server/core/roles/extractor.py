"""Extracts pieces of a text, such as keywords, by generation under a grammar of its pieces."""

import asyncio
from dataclasses import dataclass, replace

from server.core.concurrency import SingleFlight
from server.core.engine.engine import Engine
from server.core.engine.sequence import SamplingParams
from server.core.engine.work import Work
from server.core.roles.tasks import ExtractTask
from server.core.text.grammar import Grammar, GrammarCompiler
from server.core.text.tokenizer import ChatTemplateError, ChatTokenizer
from server.errors import ContextLengthError, InvalidRequestError

DEFAULT_MAX_ITEMS = 5


@dataclass(frozen=True)
class Extraction:
    """Pieces of a text in the model's order, without duplicates; case is ignored.

    num_cached_tokens: prompt tokens that needed no computing.
    """

    items: tuple[str, ...]
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    is_cached: bool = False


class Extractor:
    """Extracts pieces of texts. Belongs to one event loop.

    Concurrent calls with the same text share one computation, which is cancelled when no caller
    waits for it any more.
    """

    def __init__(
        self, engine: Engine, tokenizer: ChatTokenizer, grammars: GrammarCompiler, *,
        eos_token_ids: frozenset[int], max_context: int, cache_size: int,
    ) -> None:  # fmt: skip
        """cache_size: number of results kept, 0 for none."""
        self._engine, self._tokenizer, self._grammars = engine, tokenizer, grammars
        self._eos_token_ids, self._max_context = eos_token_ids, max_context
        self._results: SingleFlight[tuple[str, str, int], Extraction] = SingleFlight(cache_size)

    async def extract(
        self, task: ExtractTask, text: str, max_items: int = DEFAULT_MAX_ITEMS,
        work: Work | None = None, *, param: str = "input",
    ) -> Extraction:  # fmt: skip
        """The pieces that the task finds; none if the text has no letter and no digit.

        param: the request's field with the text, for errors.

        Raises:
            ContextLengthError: the text is too long for the model.
            InvalidRequestError: the chat template refuses the task.
        """
        result, is_known = await self._results.get(
            (task.version, text, max_items),
            lambda: self._compute(task, text, max_items, work or Work(), param),
        )
        return replace(result, is_cached=is_known)

    async def _compute(
        self, task: ExtractTask, text: str, max_items: int, work: Work, param: str
    ) -> Extraction:
        prompt_ids, grammar = await asyncio.to_thread(self._prepare, task, text, max_items, param)
        if grammar is None:
            return Extraction(())
        params = SamplingParams(
            max_tokens=self._max_context - len(prompt_ids),
            temperature=0,
            grammar=grammar,
            stop_token_ids=self._eos_token_ids,
        )
        tokens = self._engine.submit(prompt_ids, params, work=work)
        try:
            ids = [token.token_id async for token in tokens]
        finally:
            tokens.abort()
        return Extraction(
            self._items(ids), len(prompt_ids), len(ids), num_cached_tokens=tokens.num_cached or 0
        )

    def _prepare(
        self, task: ExtractTask, text: str, max_items: int, param: str
    ) -> tuple[list[int], Grammar | None]:
        """Ids of the prompt, and the grammar of the answer; None: there is nothing to find."""
        try:
            prompt_ids = self._tokenizer.encode_chat(task.messages(text))
        except ChatTemplateError as error:
            raise InvalidRequestError(
                f"The model's chat template refuses the task {task.name!r}: {error}.", param="task"
            ) from error
        if len(prompt_ids) >= self._max_context:
            raise ContextLengthError(len(prompt_ids), self._max_context, param)
        return prompt_ids, self._grammars.pieces(text, max_items)

    def _items(self, ids: list[int]) -> tuple[str, ...]:
        """The complete lines; a line cut off by the end of the context is dropped."""
        data = b"".join(self._tokenizer.token_bytes[token_id] for token_id in ids)
        lines = data[: data.rfind(b"\n") + 1].decode().split("\n")[:-1]
        # The grammar allows duplicates: to forbid them, it would be compiled after every line.
        items: dict[str, str] = {}
        for line in lines:
            items.setdefault(line.casefold(), line)
        return tuple(items.values())
