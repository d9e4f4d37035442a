"""Paged attention that Hugging Face models call, and the backends that compute it."""
