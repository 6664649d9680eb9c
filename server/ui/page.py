"""The page as a whole: its style, its tabs, and the options that turn off parts of Gradio."""

import gradio as gr
from starlette.applications import Starlette

from server.ui.browser import ON_START
from server.ui.chat_tab import ChatTab
from server.ui.classify_tab import ClassifyTab
from server.ui.side_bar import SideBar
from server.ui.texts import I18N, TITLE, local

# Emoji first: many text fonts contain black-and-white emoji.
SYSTEM_FONTS = ("Emoji", "system-ui", "Segoe UI", "PingFang SC", "Noto Sans CJK SC", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
CSS = """
@font-face {
  font-family: Emoji;
  src: local("Apple Color Emoji"), local("Segoe UI Emoji"), local("Noto Color Emoji");
  unicode-range: U+1F300-1FAFF;
}
body:not(.dark) .gradio-container { --checkbox-border-color: var(--neutral-300); }
#chatbot .message-content .md { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 640px) { #chatbot { height: 60vh !important; } }
"""


# How often Gradio polls its event queue and an event's progress. Its defaults of 1 and 10 ms use a
# tenth of a core, even while no page is open.
QUEUE_INTERVAL_S, PROGRESS_INTERVAL_S = 0.02, 0.1


def build_page() -> Starlette:
    """The page as an ASGI application."""
    app, layout = Starlette(), _layout()
    layout._queue.sleep_when_free = QUEUE_INTERVAL_S
    layout._queue.progress_update_sleep_when_free = PROGRESS_INTERVAL_S
    theme = gr.themes.Soft(font=SYSTEM_FONTS, font_mono=MONO_FONTS, primary_hue="indigo")
    gr.mount_gradio_app(
        app,
        layout,
        path="/",
        i18n=I18N,
        theme=theme,
        css=CSS,
        js=ON_START,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        show_error=True,
    )
    return app


def _layout() -> gr.Blocks:
    # Every 10 minutes, uploaded and downloaded files older than an hour are deleted.
    page = gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600))
    with page:
        side = SideBar()
        with gr.Tabs():
            with gr.Tab(local("chat")):
                ChatTab(page, side)
            with gr.Tab(local("classify")) as tab:
                ClassifyTab(tab, side)
        side.connect(page)
    return page
