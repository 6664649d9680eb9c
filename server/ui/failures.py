"""What a person reads when a call fails."""

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
    """Shows the sentence for a while. What follows the event still runs, as it would not on errors.

    The page takes it for HTML, and it may repeat what a user wrote.
    """
    gr.Warning(html.escape(message, quote=False), title=say("notice", language))


def explain(error: APIError, language: Language) -> str:
    """One sentence, and what to do."""
    if isinstance(error, AuthenticationError):
        return say("key_needed", language)
    if isinstance(error, RateLimitError):
        return say("busy", language).format(seconds=error.response.headers.get("retry-after", "2"))
    if isinstance(error, APIConnectionError):
        return say("restarting", language)
    if isinstance(error, InternalServerError) and error.status_code == 503:
        return say("restarting", language)
    # The client puts the status in front of what the server says.
    said = error.body.get("message") if isinstance(error.body, dict) else None
    return said or error.message
