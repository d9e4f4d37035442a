"""The Hugging Face-like pipeline: a front in the caller's own process."""
