"""Supervised training: its data and its loop."""
