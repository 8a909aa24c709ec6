"""Code that every part of the project may use: errors, files, locks, memory, network, signals."""
