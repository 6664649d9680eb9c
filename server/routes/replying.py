"""Begins a reply, for the routes that take a conversation."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request

from server.core.engine.sequence import Grammar
from server.core.roles.reply import Reply
from server.core.text.grammar import GrammarCompiler, GrammarError, OutputFormat
from server.errors import InvalidRequestError
from server.protocol.chat import ChatCompletionRequest
from server.protocol.responses import ResponsesRequest
from server.routes.common import check_tasks, find_model, work_of
from server.routes.sampling import sampling_params
from server.services import Services


async def begin_reply(
    request: Request, services: Services, body: ChatCompletionRequest | ResponsesRequest,
    messages: Sequence[Mapping[str, Any]], output: OutputFormat, *, schema_param: str,
    max_tokens: int | None, num_logprobs: int | None, num_choices: int = 1,
) -> Reply:  # fmt: skip
    """Judges the mood of the last user message, then starts one answer or several.

    messages: in the form that chat templates read. max_tokens: None for as many as fit the context.
    schema_param: the request's field with the schema of the answer, for errors.
    """
    check_tasks(body.tasks, services.replier.task_names, lambda i: f"tasks[{i}]")
    model = find_model(services, body.model)
    grammar = await asyncio.to_thread(
        _compile, services.grammars, output, schema_param=schema_param
    )
    return await services.replier.reply(
        messages,
        sampling_params(
            body, services, max_tokens=max_tokens, num_logprobs=num_logprobs, grammar=grammar
        ),
        # An answer of calls only has no text for stop strings to end.
        () if output.is_call_required else body.stop,
        work=work_of(request),
        with_sentiment=body.sentiment and not model.is_plain,
        tasks=body.tasks,
        tools=output.tools,
        call_opening=output.call_opening,
        num_choices=num_choices,
        adapter=model.adapter,
    )


def _compile(
    grammars: GrammarCompiler, output: OutputFormat, *, schema_param: str
) -> Grammar | None:
    """The grammar of the answer's format. May take a second.

    Raises:
        InvalidRequestError: a schema is invalid, or has a rule that cannot be guaranteed.
    """
    try:
        return grammars.compile(output)
    except GrammarError as error:
        param = schema_param if error.tool is None else "tools"
        raise InvalidRequestError(f"'{param}': {error}.", param=param) from error
