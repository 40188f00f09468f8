"""The loops, what a run remembers, how it is split over GPUs."""
