"""The command `unmaskrl`: one file per command."""
