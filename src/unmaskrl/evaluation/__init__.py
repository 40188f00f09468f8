"""Decode held-out problems and count."""
