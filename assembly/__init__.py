"""Builds the parts of a run from its configuration (device, features, model, trainer), and loads trained runs."""
