"""One rank: a StepPlan in, a StepResult out. Tensors; no HTTP and no text."""
