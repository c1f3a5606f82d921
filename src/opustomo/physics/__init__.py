"""Physics: pure functions on tensors (units, axis order and signs in every docstring); imports nothing of ours."""
