"""Text to token ids and back: chat templates, encoding, incremental decoding with stop strings.

Knows no HTTP, no tensors and no engine. The server and the pipeline call it.
"""
