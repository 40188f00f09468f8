"""Prompts, rewards and parsers as d1 published them."""
