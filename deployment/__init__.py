"""Export of a trained run to one file for other programs: from uint8 images to probabilities, experts and weights."""
