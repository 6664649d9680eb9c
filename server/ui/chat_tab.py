"""The components of the chat tab and their event handlers."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

from server.ui import chat
from server.ui.conversation import (
    Conversations,
    Turn,
    new_turn,
    plain,
    save_conversation,
    shown_messages,
    title,
    turn_at,
)
from server.ui.side_bar import PRIVATE, SideBar
from server.ui.texts import language_of, local, say

OPENERS = (
    "今天的实验终于成功了，太棒了！",
    "我失恋了，很难过。",
    "I finally got the job!",
    "My flight was cancelled and nobody helped.",
)
UNQUEUED = {**PRIVATE, "queue": False}


class ChatTab:
    """The conversation, its mood, and the details under the hood."""

    def __init__(self, page: gr.Blocks, side: SideBar) -> None:
        self._side = side
        # The browser stores all conversations; the server holds the open one only.
        self._saved = gr.BrowserState([], storage_key="qwen-all-in-one", secret="no secret")
        self._current = gr.State()  # index of the open one in `_saved`; None if it is not saved
        self._turns = gr.State([])
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self._lay_out_conversation()
            with gr.Column(scale=2, min_width=300):
                self._lay_out_mood()
        with gr.Accordion(local("under_the_hood"), open=False, elem_id="hood"):
            self._lay_out_hood()
        # The state of the open conversation, and the components that show it.
        self._state = [self._turns, self._saved, self._current, self._message]
        shown = [self._chatbot, self._label, self._plot, side.conversations]
        self._shown = [*self._state, *shown]
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
        self._message = gr.Textbox(
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
            # The plot has a title instead: below a label Gradio cuts off the plot's last pixels.
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
        message, turns = self._message, self._turns
        chatbot, side = self._chatbot, self._side
        # Load nothing else: the user may have sent a message by then.
        page.load(_list_saved, [self._saved], [side.conversations], **UNQUEUED)
        changed = [turns, message]
        answers = [
            self._answer_after(message.submit(_send, [message, turns], changed, **UNQUEUED)),
            self._answer_after(chatbot.example_select(_send_opener, [turns], changed, **UNQUEUED)),
            self._answer_after(chatbot.retry(_retry, [turns], changed, **UNQUEUED)),
            self._answer_after(chatbot.edit(_edit, [turns], changed, **UNQUEUED)),
        ]
        stopped = message.stop(None, cancels=answers, **UNQUEUED)
        self._finish_after(stopped)
        # Opening another conversation first stops the answer of the open one.
        stopped = side.new.click(None, cancels=answers, **UNQUEUED)
        stopped.then(_open_new, self._state, self._shown, **UNQUEUED)
        stopped = side.conversations.input(None, cancels=answers, **UNQUEUED)
        stopped.then(_open, [side.conversations, *self._state], self._shown, **UNQUEUED)
        undone = chatbot.undo(_undo, [turns], changed, **UNQUEUED)
        self._finish_after(undone)
        cleared = chatbot.clear(_clear, None, changed, **UNQUEUED)
        self._finish_after(cleared)

    def _answer_after(self, event: Any) -> Any:
        hood = [*self._figures, self._curl, self._python]
        answering = event.success(
            self._answer,
            [self._turns, *self._side.options],
            [self._turns, self._chatbot, self._label, self._plot, *hood, *self._side.key_outputs],
            concurrency_limit=None,
            **PRIVATE,
        )
        # Not `then`: it would also finish a cancelled answer, which the cancelling event finishes.
        # Of two at once, the second would undo the first.
        answering.success(_finish, self._state, self._shown, **UNQUEUED)
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
                if view.has_sentiment:
                    changes[self._label] = chat.mood_label(turns, request)
                    changes[self._plot] = chat.mood_plot(turns, request)
                if view.figures is not None:
                    changes |= dict(zip(self._figures, view.figures, strict=True))
                if view.lines is not None:
                    changes |= dict(zip((self._curl, self._python), view.lines, strict=True))
                yield changes | (self._side.ask_for_key() if view.is_key_needed else {})

    def _finish_after(self, event: Any) -> Any:
        return event.then(_finish, self._state, self._shown, **UNQUEUED)


def _open_new(
    turns: list[Turn], saved: Conversations, current: int | None, message: str, request: gr.Request
) -> tuple[Any, ...]:
    _, saved, _, message = save_conversation(turns, saved, current, message)
    return _show([], saved, None, message, request)


def _open(
    number: int,
    turns: list[Turn],
    saved: Conversations,
    current: int | None,
    message: str,
    request: gr.Request,
) -> tuple[Any, ...]:
    num_before = len(saved)
    _, saved, _, message = save_conversation(turns, saved, current, message)
    if current is not None and current < number:
        number -= num_before - len(saved)  # the open one had no answer and was deleted
    return _show(saved[number], saved, number, message, request)


def _list_saved(saved: Conversations, request: gr.Request) -> Any:
    return _list_of(saved, None, request)


def _list_of(saved: Conversations, current: int | None, request: gr.Request) -> Any:
    """The list of conversations, the newest first."""
    fallback = say("new_conversation", language_of(request))
    choices = [(title(turns, fallback), number) for number, turns in enumerate(saved)]
    return gr.Radio(choices[::-1], value=current, visible=bool(choices))


def _send(text: str, turns: list[Turn]) -> tuple[list[Turn], Any]:
    return _started([*turns, new_turn(text.strip())] if text.strip() else turns)


def _send_opener(opener: gr.SelectData, turns: list[Turn]) -> tuple[list[Turn], Any]:
    return _started([*turns, new_turn(opener.value["text"])])


def _retry(turns: list[Turn]) -> tuple[list[Turn], Any]:
    return _started([*turns[:-1], new_turn(turns[-1]["user"])])


def _edit(edit: gr.EditData, turns: list[Turn]) -> tuple[list[Turn], Any]:
    index = edit.index if isinstance(edit.index, int) else edit.index[0]
    return _started([*turns[: turn_at(turns, index)], new_turn(plain(edit.value))])


def _started(turns: list[Turn]) -> tuple[list[Turn], Any]:
    """The turns, and the empty message box with a stop button."""
    return turns, gr.Textbox("", submit_btn=False, stop_btn=True)


def _undo(turns: list[Turn]) -> tuple[list[Turn], Any]:
    return turns[:-1], turns[-1]["user"]


def _clear() -> tuple[list[Turn], Any]:
    return [], gr.skip()


def _finish(
    turns: list[Turn], saved: Conversations, current: int | None, message: str, request: gr.Request
) -> tuple[Any, ...]:
    return _show(*save_conversation(turns, saved, current, message), request)


def _show(
    turns: list[Turn], saved: Conversations, current: int | None, message: str, request: gr.Request
) -> tuple[Any, ...]:
    return (
        turns,
        saved,
        current,
        gr.Textbox(message, submit_btn=True, stop_btn=False),
        shown_messages(turns, language_of(request)),
        chat.mood_label(turns, request),
        chat.mood_plot(turns, request),
        _list_of(saved, current, request),
    )
