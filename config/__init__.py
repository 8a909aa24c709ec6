"""Config: the options of every part; YAML and command line."""
