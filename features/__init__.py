"""The frozen part, run once: extraction, placement and cache of features."""
