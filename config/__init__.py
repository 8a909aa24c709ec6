"""Config: the options of every part, put together; YAML and command line."""
