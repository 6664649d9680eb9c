"""The page's layout: where each component stands, and which event leads to which function."""

import copy
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
from openai import APIError
from starlette.applications import Starlette

from server.ui import chat
from server.ui.classify import MAX_ROWS, gather_texts, judge, save, task_of
from server.ui.client import connect, own_url
from server.ui.conversation import Turn, new_turn, plain, shown_messages, title, turn_at
from server.ui.failures import explain, warn
from server.ui.texts import I18N, language_of, local, say

TITLE = "Qwen All-in-One"
OPENERS = (
    "今天的实验终于成功了，太棒了！",
    "我失恋了，很难过。",
    "I finally got the job!",
    "My flight was cancelled and nobody helped.",
)
SYSTEM_FONTS = ("system-ui", "Segoe UI", "PingFang SC", "Noto Sans CJK SC", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
CSS = """
#chatbot .message-content .md { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 640px) { #chatbot { height: 60vh !important; } }
"""


def build_page() -> Starlette:
    """The page as an application of its own."""
    app = Starlette()
    theme = gr.themes.Soft(font=SYSTEM_FONTS, font_mono=MONO_FONTS, primary_hue="indigo")
    gr.mount_gradio_app(
        app,
        _layout(),
        path="/",
        i18n=I18N,
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        show_error=True,
    )
    return app


def _layout() -> gr.Blocks:
    # Files of uploads and downloads are deleted after an hour.
    page = gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600))
    with page:
        side = _SideBar()
        with gr.Tabs():
            with gr.Tab(local("chat")):
                _ChatTab(page, side)
            with gr.Tab(local("classify")):
                _ClassifyTab(side)
    return page


class _SideBar:
    """Conversations, and what every request is sent with."""

    def __init__(self) -> None:
        # Closed until it is known that it does not cover a phone's whole screen.
        with gr.Sidebar(open=False) as self.itself:
            gr.Markdown(f"## {TITLE}")
            self.new = gr.Button(local("new_conversation"), variant="primary", size="sm")
            self.conversations = gr.Radio(
                [], label=local("conversations"), elem_id="conversations", visible=False
            )
            with gr.Accordion(local("settings"), open=True):
                self.system_prompt = gr.Textbox(
                    label=local("system_prompt"), info=local("system_prompt_info"), lines=2
                )
                self.temperature = gr.Slider(0, 2, 0.7, step=0.1, label=local("temperature"))
                self.max_tokens = gr.Slider(16, 2048, 512, step=16, label=local("max_tokens"))
                self.sentiment = gr.Checkbox(True, label=local("sentiment"))
            self.api_key = gr.Textbox(
                label=local("api_key"),
                info=local("api_key_info"),
                type="password",
                elem_id="api-key",
            )

    @property
    def options(self) -> list[gr.components.Component]:
        """In the order of chat.Options."""
        return [
            self.system_prompt,
            self.temperature,
            self.max_tokens,
            self.sentiment,
            self.api_key,
        ]


class _ChatTab:
    """The conversation, its mood, and what lies beneath."""

    def __init__(self, page: gr.Blocks, side: _SideBar) -> None:
        self._side = side
        # All conversations stay in the browser; the one that is open is here while it is.
        self._saved = gr.BrowserState([], storage_key="qwen-all-in-one", secret="no secret")
        self._current = gr.State(0)
        self._turns = gr.State([])
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
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
            with gr.Column(scale=1, min_width=240):
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
                    label=local("mood_turns"),
                    show_label=True,
                    visible=False,
                    buttons=[],
                )
                with gr.Accordion(local("under_the_hood"), open=False, elem_id="hood"):
                    self._figures = [
                        gr.Textbox("–", label=local(key), interactive=False, max_lines=1)
                        for key in ("ttft", "speed", "cached_tokens")
                    ]
                    self._curl = gr.Code(language="shell", label="curl", wrap_lines=True)
                    self._python = gr.Code(language="python", label="Python", wrap_lines=True)
        self._connect(page)

    def _connect(self, page: gr.Blocks) -> None:
        said, turns = self._said, self._turns
        chatbot, side = self._chatbot, self._side
        opened = [self._current, turns, chatbot, self._label, self._plot, side.conversations]
        page.load(_open_side_bar, None, [side.itself], **_QUIETLY)
        page.load(_open_new, [self._saved], opened, **_QUIETLY)
        side.new.click(_open_new, [self._saved], opened, **_QUIETLY)
        side.conversations.input(_open, [side.conversations, self._saved], opened, **_QUIETLY)
        begun = [turns, said]
        answers = [
            self._answer_after(said.submit(_say, [said, turns], begun, **_QUIETLY)),
            self._answer_after(chatbot.example_select(_say_opener, [turns], begun, **_QUIETLY)),
            self._answer_after(chatbot.retry(_retry, [turns], begun, **_QUIETLY)),
            self._answer_after(chatbot.edit(_edit, [turns], begun, **_QUIETLY)),
        ]
        stopped = said.stop(None, cancels=answers, **_QUIETLY)
        self._finish_after(stopped)
        undone = chatbot.undo(_undo, [turns], begun, **_QUIETLY)
        self._finish_after(undone)
        cleared = chatbot.clear(_clear, None, begun, **_QUIETLY)
        self._finish_after(cleared)

    def _answer_after(self, begun: Any) -> Any:
        shown = [self._chatbot, self._label, self._plot, *self._figures, self._curl, self._python]
        answering = begun.success(
            _answer,
            [self._turns, *self._side.options],
            [self._turns, *shown],
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        self._finish_after(answering)
        return answering

    def _finish_after(self, event: Any) -> None:
        event.then(
            _finish,
            [self._turns, self._saved, self._current, self._said],
            [
                self._turns,
                self._saved,
                self._said,
                self._chatbot,
                self._label,
                self._plot,
                self._side.conversations,
            ],
            **_QUIETLY,
        )


_QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}

Conversations = list[list[Turn]]


def _open_side_bar(request: gr.Request) -> Any:
    return gr.Sidebar(open="Mobi" not in request.headers.get("user-agent", ""))


def _open_new(saved: Conversations, request: gr.Request) -> tuple[Any, ...]:
    return _opened(len(saved), [], saved, request)


def _open(number: int, saved: Conversations, request: gr.Request) -> tuple[Any, ...]:
    return _opened(number, saved[number], saved, request)


def _opened(
    number: int, turns: list[Turn], saved: Conversations, request: gr.Request
) -> tuple[Any, ...]:
    return (
        number,
        turns,
        shown_messages(turns),
        chat.mood_label(turns, request),
        chat.mood_plot(turns),
        _list_of(saved, number, request),
    )


def _list_of(saved: Conversations, current: int, request: gr.Request) -> Any:
    """The newest first."""
    fallback = say("new_conversation", language_of(request))
    choices = [(title(turns, fallback), number) for number, turns in enumerate(saved)]
    value = current if current < len(saved) else None
    return gr.Radio(choices[::-1], value=value, visible=bool(choices))


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


async def _answer(
    turns: list[Turn],
    system_prompt: str,
    temperature: float,
    max_tokens: float,
    with_sentiment: bool,
    api_key: str,
    request: gr.Request,
) -> AsyncIterator[tuple[Any, ...]]:
    if not turns or turns[-1]["answer"]:
        return
    options = chat.Options(system_prompt, temperature, max_tokens, with_sentiment, api_key)
    async for view in chat.answer(turns, options, request):
        judged = (chat.mood_label(turns, request), chat.mood_plot(turns))
        yield (
            view.turns,
            shown_messages(view.turns),
            *(judged if view.is_judged else (gr.skip(), gr.skip())),
            *(view.figures or (gr.skip(),) * 3),
            *(view.lines or (gr.skip(),) * 2),
        )


def _finish(
    turns: list[Turn], saved: Conversations, current: int, said: str, request: gr.Request
) -> tuple[Any, ...]:
    """Keeps the conversation; what got no answer goes back to where it was written."""
    if turns and not turns[-1]["answer"]:
        *turns, unanswered = turns
        said = said or unanswered["user"]
    saved = copy.copy(saved)
    if current < len(saved):
        saved[current] = turns
    elif turns:
        saved.append(turns)
    return (
        turns,
        saved,
        gr.Textbox(said, submit_btn=True, stop_btn=False),
        shown_messages(turns),
        chat.mood_label(turns, request),
        chat.mood_plot(turns),
        _list_of(saved, current, request),
    )


class _ClassifyTab:
    """Texts in, labels out."""

    def __init__(self, side: _SideBar) -> None:
        with gr.Row():
            with gr.Column():
                pasted = gr.Textbox(label=local("lines"), lines=6, max_lines=6, elem_id="lines")
                file = gr.File(
                    label=local("file"), file_types=[".csv", ".txt"], height=120, elem_id="file"
                )
                task = gr.Dropdown(
                    ["sentiment", "intent"], label=local("task"), allow_custom_value=True
                )
                labels = gr.Textbox(label=local("own_labels"), elem_id="own-labels")
                instructions = gr.Textbox(label=local("own_instructions"), max_lines=3)
                with gr.Row():
                    run = gr.Button(local("run"), variant="primary", elem_id="run")
                    stop = gr.Button(local("stop"))
            with gr.Column():
                plot = gr.BarPlot(
                    x="label",
                    y="count",
                    height=280,
                    y_lim=[0, None],
                    y_axis_format="d",
                    label=local("distribution"),
                    elem_id="distribution",
                    buttons=[],
                )
                note = gr.Markdown(elem_id="note")
                table = gr.Dataframe(
                    headers=["text", "label", "confidence"],
                    datatype="str",
                    label=local("results"),
                    interactive=False,
                    wrap=True,
                    max_height=420,
                    elem_id="results",
                )
                download = gr.DownloadButton(local("download"), visible=False, elem_id="download")
        running = run.click(
            _classify,
            [pasted, file, task, labels, instructions, side.api_key],
            [table, plot, note, download],
            show_progress_on=[plot],
            # One run at a time: ten thousand lines of one browser are work enough.
            concurrency_limit=1,
            api_visibility="private",
        )
        stop.click(None, cancels=[running], api_visibility="private")


async def _classify(
    pasted: str,
    file: str | None,
    task: str,
    labels: str,
    instructions: str,
    api_key: str,
    request: gr.Request,
    progress: Callable[..., Any] = gr.Progress(),  # noqa: B008  # Gradio finds it there
) -> AsyncIterator[tuple[Any, ...]]:
    language = language_of(request)
    texts, body = gather_texts(pasted, file), task_of(task, labels, instructions)
    if not texts or body is None:
        reason = "two_labels" if texts else "no_lines"
        warn(say(reason, language))
        return
    progress(0)
    try:
        async with connect(own_url(request), api_key) as client:
            async for judged in judge(client, texts, body):
                progress((len(judged.results), len(texts)))
                if not judged.is_due:
                    continue
                is_done = len(judged.results) == len(texts)
                note = say("shown_first", language) if len(texts) > MAX_ROWS else ""
                path = save(judged) if is_done else None
                yield (
                    judged.rows,
                    judged.distribution,
                    note.format(shown=min(MAX_ROWS, len(judged.results)), total=len(texts)),
                    gr.DownloadButton(value=path, visible=is_done),
                )
    except APIError as error:
        warn(explain(error, language))
