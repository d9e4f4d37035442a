"""The books of KV blocks: hashes, the device pool, and the manager the scheduler talks to. No tensors."""
