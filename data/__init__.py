"""Image sets, datasets, splits and augmentation."""
