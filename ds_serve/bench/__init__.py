"""The load test: `ds-serve bench` against any OpenAI-compatible URL.

Knows HTTP and nothing else of this package. The command line calls run.run.
"""
