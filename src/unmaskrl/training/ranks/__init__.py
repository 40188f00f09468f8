"""How a model is split over processes, and how they look at signals between its calls."""
