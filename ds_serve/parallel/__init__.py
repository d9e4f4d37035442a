"""Several ranks: their grid, the plans that go out to them, and what they send one another."""
