"""A process of its own for verifiers that hostile text could hang."""
