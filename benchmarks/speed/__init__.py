"""Speed of rollout, scoring and a whole step against a naive loop."""
