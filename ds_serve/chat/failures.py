"""What went wrong, as a sentence that says what to do.

Knows the exceptions of OpenAI's client and of the server's errors; knows no page.
"""

from __future__ import annotations

import openai

FAILURES = (openai.OpenAIError, ConnectionAbortedError)  # what Server's methods raise


def sentence(error: BaseException, base_url: str) -> str:
    """For the one who chats. The server's own words come last, where it said something."""
    if isinstance(error, ConnectionAbortedError):
        return "The connection broke before the answer was complete. Press retry to ask again."
    if isinstance(error, openai.APITimeoutError):
        return f"{base_url} took too long. Try again later, or ask for less (max_tokens)."
    if isinstance(error, openai.APIConnectionError):
        return f"No server answers at {base_url}. Start it, or wait until it is back, then press retry."
    if isinstance(error, openai.APIStatusError):
        return _of_status(error)
    said = error.message if isinstance(error, openai.APIError) else str(error)
    return f"The server ended the answer. Press retry to ask again. It said: {said}"


def _of_status(error: openai.APIStatusError) -> str:
    said = _said(error)
    wait = error.response.headers.get("retry-after", "")
    when = f"in {wait} s" if wait.isdecimal() else "in a moment"
    match error.status_code:
        case 400 if error.code == "context_length_exceeded":
            advice = (
                "This is too long for the model. Start a new chat, shorten the context or the message, "
                "or lower max_tokens."
            )
        case 401 | 403:
            advice = "The server wants another API key. Set OPENAI_API_KEY and start the chat page again."
        case 404:
            advice = "The server does not have that. Choose another model, or check the base URL."
        case 429:
            advice = f"The server is busy. Press retry {when}."
        case 503:
            advice = f"The server is not ready: it starts, or ends. Press retry {when}."
        case status if status >= 500:
            advice = "The server failed. Press retry; if it fails again, look at its log."
        case _:
            advice = "The server refused this. Change what it names, then press retry."
    return f"{advice} It said: {said}" if said else advice


def _said(error: openai.APIStatusError) -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return message if isinstance(message, str) else error.response.reason_phrase
