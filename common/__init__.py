"""What every room may use: errors, files, locks, memory, network, signals."""
