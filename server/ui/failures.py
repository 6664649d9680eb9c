"""The messages that the page shows when a call fails."""

import html

import gradio as gr
from openai import (
    APIConnectionError,
    APIError,
    AuthenticationError,
    InternalServerError,
    RateLimitError,
)

from server.ui.texts import Language, say


def warn(message: str, language: Language) -> None:
    """Shows a message for a few seconds. Unlike an error, it lets chained events run."""
    # Gradio reads the message as HTML, and it may quote the user.
    gr.Warning(html.escape(message, quote=False), title=say("notice", language))


def explain(error: APIError, language: Language) -> str:
    """What happened and what to do, in one sentence."""
    if isinstance(error, AuthenticationError):
        return say("key_needed", language)
    if isinstance(error, RateLimitError):
        return say("busy", language).format(seconds=error.response.headers.get("retry-after", "2"))
    if isinstance(error, APIConnectionError):
        return say("restarting", language)
    if isinstance(error, InternalServerError) and error.status_code == 503:
        return say("restarting", language)
    # error.message begins with the status; the body has the server's own message.
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return message or error.message
