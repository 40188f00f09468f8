"""What a run leaves on the disk: its folder, its settings, its checkpoints."""
