"""From a configuration to its parts: device, features, model, trainer; and back from a run's folder."""
