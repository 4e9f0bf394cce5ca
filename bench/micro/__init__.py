"""Micro-benchmarks of the hot path's parts: nanoseconds per operation."""
