"""A trained run as one file that other programs run: from uint8 images to probabilities, experts and weights."""
