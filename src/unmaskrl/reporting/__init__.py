"""Numbers and rollouts as text, HTML and pictures."""
