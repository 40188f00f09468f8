"""Settings, their checks, what they cost, and the shipped YAML files."""
