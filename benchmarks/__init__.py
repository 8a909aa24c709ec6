"""Benchmarks: each file is one command that prints one table and writes it as JSON."""
