"""The chat tab: where its components stand, and which event leads to which function."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

from server.ui import chat
from server.ui.conversation import (
    Conversations,
    Turn,
    keep,
    new_turn,
    plain,
    shown_messages,
    title,
    turn_at,
)
from server.ui.side_bar import QUIETLY, SideBar
from server.ui.texts import language_of, local, say

OPENERS = (
    "今天的实验终于成功了，太棒了！",
    "我失恋了，很难过。",
    "I finally got the job!",
    "My flight was cancelled and nobody helped.",
)
AT_ONCE = {**QUIETLY, "queue": False}


class ChatTab:
    """The conversation, its mood, and what lies beneath."""

    def __init__(self, page: gr.Blocks, side: SideBar) -> None:
        self._side = side
        # All conversations stay in the browser; the one that is open is here while it is.
        self._saved = gr.BrowserState([], storage_key="qwen-all-in-one", secret="no secret")
        self._current = gr.State()  # its number among the saved; None while it is new
        self._turns = gr.State([])
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self._lay_out_conversation()
            with gr.Column(scale=2, min_width=300):
                self._lay_out_mood()
        with gr.Accordion(local("under_the_hood"), open=False, elem_id="hood"):
            self._lay_out_hood()
        # What is kept of the open conversation, and where it is shown.
        self._kept = [self._turns, self._saved, self._current, self._said]
        shown = [self._chatbot, self._label, self._plot, side.conversations]
        self._shown = [*self._kept, *shown]
        self._connect(page)

    def _lay_out_conversation(self) -> None:
        self._chatbot = gr.Chatbot(
            elem_id="chatbot",
            show_label=False,
            height="68vh",
            render_markdown=False,
            sanitize_html=True,
            allow_tags=False,
            latex_delimiters=[],
            editable="user",
            buttons=["copy"],
            feedback_options=None,
            placeholder=local("greeting"),
            examples=[{"text": text} for text in OPENERS],
        )
        self._said = gr.Textbox(
            elem_id="message",
            placeholder=local("message"),
            show_label=False,
            submit_btn=True,
            max_lines=6,
            autofocus=True,
        )

    def _lay_out_mood(self) -> None:
        self._label = gr.Label(label=local("mood"), elem_id="mood", visible=False)
        self._plot = gr.LinePlot(
            x="turn",
            y="probability",
            color="label",
            y_lim=[0, 1],
            x_title=" ",
            y_title=" ",
            color_title=" ",
            height=280,
            # A title instead: below a label, what it takes of the height is cut off.
            show_label=False,
            elem_id="mood-plot",
            visible=False,
            buttons=[],
        )

    def _lay_out_hood(self) -> None:
        with gr.Row():
            self._figures = [
                gr.Textbox("–", label=local(key), interactive=False, max_lines=1)
                for key in ("ttft", "speed", "cached_tokens")
            ]
        with gr.Tabs():
            with gr.Tab("curl"):
                self._curl = gr.Code(language="shell", show_label=False, wrap_lines=True)
            with gr.Tab("Python"):
                self._python = gr.Code(language="python", show_label=False, wrap_lines=True)

    def _connect(self, page: gr.Blocks) -> None:
        said, turns = self._said, self._turns
        chatbot, side = self._chatbot, self._side
        # Nothing else on load: whoever is quick has already said something.
        page.load(_list_saved, [self._saved], [side.conversations], **AT_ONCE)
        begun = [turns, said]
        answers = [
            self._answer_after(said.submit(_say, [said, turns], begun, **AT_ONCE)),
            self._answer_after(chatbot.example_select(_say_opener, [turns], begun, **AT_ONCE)),
            self._answer_after(chatbot.retry(_retry, [turns], begun, **AT_ONCE)),
            self._answer_after(chatbot.edit(_edit, [turns], begun, **AT_ONCE)),
        ]
        stopped = said.stop(None, cancels=answers, **AT_ONCE)
        self._finish_after(stopped)
        # What still comes belongs to the conversation that is left, which ends as if stopped.
        left = side.new.click(None, cancels=answers, **AT_ONCE)
        left.then(_open_new, self._kept, self._shown, **AT_ONCE)
        left = side.conversations.input(None, cancels=answers, **AT_ONCE)
        left.then(_open, [side.conversations, *self._kept], self._shown, **AT_ONCE)
        undone = chatbot.undo(_undo, [turns], begun, **AT_ONCE)
        self._finish_after(undone)
        cleared = chatbot.clear(_clear, None, begun, **AT_ONCE)
        self._finish_after(cleared)

    def _answer_after(self, begun: Any) -> Any:
        hood = [*self._figures, self._curl, self._python]
        answering = begun.success(
            self._answer,
            [self._turns, *self._side.options],
            [self._turns, self._chatbot, self._label, self._plot, *hood, *self._side.asking],
            concurrency_limit=None,
            **QUIETLY,
        )
        # Not `then`, which a cancelled answer would start, too: what cancels one finishes it, and
        # of two at once the second would undo what the first did.
        answering.success(_finish, self._kept, self._shown, **AT_ONCE)
        return answering

    async def _answer(
        self,
        turns: list[Turn],
        system_prompt: str,
        has_own_sampling: bool,
        temperature: float,
        max_tokens: float,
        with_sentiment: bool,
        tasks: list[str],
        api_key: str,
        request: gr.Request,
    ) -> AsyncIterator[dict[Any, Any]]:
        if not turns or turns[-1]["answer"]:
            return
        options = chat.Options(
            system_prompt, has_own_sampling, temperature, max_tokens, with_sentiment, tasks, api_key
        )
        async with aclosing(chat.answer(turns, options, request)) as views:
            async for view in views:
                changes = {
                    self._turns: view.turns,
                    self._chatbot: shown_messages(view.turns, language_of(request)),
                }
                if view.is_judged:
                    changes[self._label] = chat.mood_label(turns, request)
                    changes[self._plot] = chat.mood_plot(turns, request)
                if view.figures is not None:
                    changes |= dict(zip(self._figures, view.figures, strict=True))
                if view.lines is not None:
                    changes |= dict(zip((self._curl, self._python), view.lines, strict=True))
                yield changes | (self._side.ask_for_key() if view.is_key_needed else {})

    def _finish_after(self, event: Any) -> Any:
        return event.then(_finish, self._kept, self._shown, **AT_ONCE)


def _open_new(
    turns: list[Turn], saved: Conversations, current: int | None, said: str, request: gr.Request
) -> tuple[Any, ...]:
    _, saved, _, said = keep(turns, saved, current, said)
    return _show([], saved, None, said, request)


def _open(
    number: int,
    turns: list[Turn],
    saved: Conversations,
    current: int | None,
    said: str,
    request: gr.Request,
) -> tuple[Any, ...]:
    _, kept, _, said = keep(turns, saved, current, said)
    if current is not None and current < number:
        number -= len(saved) - len(kept)  # nothing was left of the one before it
    return _show(kept[number], kept, number, said, request)


def _list_saved(saved: Conversations, request: gr.Request) -> Any:
    return _list_of(saved, None, request)


def _list_of(saved: Conversations, current: int | None, request: gr.Request) -> Any:
    """The newest first."""
    fallback = say("new_conversation", language_of(request))
    choices = [(title(turns, fallback), number) for number, turns in enumerate(saved)]
    return gr.Radio(choices[::-1], value=current, visible=bool(choices))


def _say(text: str, turns: list[Turn]) -> tuple[list[Turn], Any]:
    return _begun([*turns, new_turn(text.strip())] if text.strip() else turns)


def _say_opener(opener: gr.SelectData, turns: list[Turn]) -> tuple[list[Turn], Any]:
    return _begun([*turns, new_turn(opener.value["text"])])


def _retry(turns: list[Turn]) -> tuple[list[Turn], Any]:
    return _begun([*turns[:-1], new_turn(turns[-1]["user"])])


def _edit(edit: gr.EditData, turns: list[Turn]) -> tuple[list[Turn], Any]:
    index = edit.index if isinstance(edit.index, int) else edit.index[0]
    return _begun([*turns[: turn_at(turns, index)], new_turn(plain(edit.value))])


def _begun(turns: list[Turn]) -> tuple[list[Turn], Any]:
    return turns, gr.Textbox("", submit_btn=False, stop_btn=True)


def _undo(turns: list[Turn]) -> tuple[list[Turn], Any]:
    return turns[:-1], turns[-1]["user"]


def _clear() -> tuple[list[Turn], Any]:
    return [], gr.skip()


def _finish(
    turns: list[Turn], saved: Conversations, current: int | None, said: str, request: gr.Request
) -> tuple[Any, ...]:
    return _show(*keep(turns, saved, current, said), request)


def _show(
    turns: list[Turn], saved: Conversations, current: int | None, said: str, request: gr.Request
) -> tuple[Any, ...]:
    return (
        turns,
        saved,
        current,
        gr.Textbox(said, submit_btn=True, stop_btn=False),
        shown_messages(turns, language_of(request)),
        chat.mood_label(turns, request),
        chat.mood_plot(turns, request),
        _list_of(saved, current, request),
    )
