"""The chat page: an OpenAI client with a face, for any base URL. Imports nothing else of ds_serve.

run.py starts it, for `ds-serve chat` and apps/chat.py; page.py puts the tabs together; client.py talks to the
server, and engine.py reads its /metrics.
"""
