"""Rollouts on a serving engine: what is asked over HTTP, what is answered, and the weights that the
server gets.
"""
