"""Benchmarks of the path from target to trainer, with the parts of a run in processes of their own."""
