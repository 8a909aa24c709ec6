"""Features of the frozen backbone: extraction, placement and cache."""
