"""Benchmarks: the server against its peers, and the parts of its hot path."""
