"""The front: OpenAI's HTTP routes over one engine process, which it starts and watches.

Knows text and HTTP; reaches the engine by messages only. The command line calls run.serve.
"""
