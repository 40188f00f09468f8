"""Word problems and mathematics: answers, and when two are the same."""
