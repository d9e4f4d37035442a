"""The engine: decides which tokens are computed when. Integers only; no text, no tensors."""
