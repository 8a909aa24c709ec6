"""What comes in: image sets, augmentation, frozen features."""
