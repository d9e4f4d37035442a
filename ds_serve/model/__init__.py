"""From a model directory to a module that a worker can run: load, shard, attach attention, inject, verify."""
