"""Datasets, splits and augmentation."""
