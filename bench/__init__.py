"""Benchmarks, the demo and the synthetic inputs that both need."""
