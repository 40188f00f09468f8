"""Algorithms on tensors: torch and jaxtyping only, no file access."""
