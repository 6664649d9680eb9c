"""The sidebar: conversations, settings of the requests, the API key."""

from typing import Any

import gradio as gr
from openai import APIError

from server.ui.browser import KEEP_KEY, RECALL_KEY
from server.ui.client import connect, own_url, served_model
from server.ui.texts import TITLE, local

# Options of an event that shows no progress and is not part of Gradio's API.
PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


# In pixels. In a narrower window the sidebar would cover the chat.
MIN_WIDTH = 768


class SideBar:
    """Conversations, and the settings of the requests."""

    def __init__(self) -> None:
        # Closed until the width is known: it would cover a phone's whole screen.
        self._width = gr.Number(visible=False)  # of the browser's window, in pixels
        with gr.Sidebar(open=False) as self.panel:
            gr.Markdown(f"## {TITLE}")
            self.api_key = gr.Textbox(
                label=local("api_key"),
                info=local("api_key_info"),
                type="password",
                html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
                elem_id="api-key",
                visible=False,
            )
            self.new = gr.Button(local("new_conversation"), variant="primary", size="sm")
            self.conversations = gr.Radio(
                [], label=local("conversations"), elem_id="conversations", visible=False
            )
            with gr.Accordion(local("settings"), open=True):
                self._system_prompt = gr.Textbox(
                    label=local("system_prompt"), info=local("system_prompt_info"), lines=2
                )
                self._sentiment = gr.Checkbox(True, label=local("sentiment"))
                # Filled with the server's tasks by `_list_tasks`.
                self._tasks = gr.CheckboxGroup(
                    [], label=local("analyses"), elem_id="analyses", visible=False
                )
                self._has_own = gr.Checkbox(
                    False, label=local("own_sampling"), elem_id="own-sampling"
                )
                with gr.Column(visible=False) as self._sampling:
                    self._temperature = gr.Slider(0, 2, 0.7, step=0.1, label=local("temperature"))
                    self._max_tokens = gr.Slider(16, 2048, 512, step=16, label=local("max_tokens"))

    @property
    def options(self) -> list[gr.components.Component]:
        """In the order of chat.Options."""
        return [
            self._system_prompt,
            self._has_own,
            self._temperature,
            self._max_tokens,
            self._sentiment,
            self._tasks,
            self.api_key,
        ]

    @property
    def key_outputs(self) -> list[Any]:
        """The components that `ask_for_key` changes."""
        return [self.panel, self.api_key]

    def ask_for_key(self) -> dict[Any, Any]:
        """Shows the field for the key, which is hidden until the server refuses a request."""
        return {self.panel: gr.Sidebar(open=True), self.api_key: gr.Textbox(visible=True)}

    def connect(self, page: gr.Blocks) -> None:
        """Connects the events that do not concern the tabs."""
        self._has_own.input(_show_if, [self._has_own], [self._sampling], queue=False, **PRIVATE)
        page.load(
            _open_if_wide, [self._width], [self.panel], js="() => innerWidth", queue=False,
            **PRIVATE,
        )  # fmt: skip
        listing = [_list_tasks, [self.api_key], [self._tasks]]
        recalled = page.load(None, None, [self.api_key], js=RECALL_KEY, **PRIVATE)
        # Not queued: Gradio closes the queue's stream when this event ends. A message sent at that
        # moment would wait for ever on the closed stream.
        recalled.then(*listing, queue=False, **PRIVATE)
        gr.on([self.api_key.submit, self.api_key.blur], *listing, queue=False, **PRIVATE)
        self.api_key.input(None, [self.api_key], None, js=KEEP_KEY, **PRIVATE)


async def _list_tasks(api_key: str, request: gr.Request) -> Any:
    """The tasks to choose from: all but sentiment, which has its own box."""
    try:
        async with connect(own_url(request), api_key) as client:
            names = [name for name in (await served_model(client)).tasks if name != "sentiment"]
    except APIError:
        return gr.skip()  # the next message shows the error
    return gr.CheckboxGroup(names, visible=bool(names))


def _open_if_wide(width: float) -> Any:
    return gr.Sidebar(open=width >= MIN_WIDTH)


def _show_if(is_visible: bool) -> Any:
    return gr.Column(visible=is_visible)
