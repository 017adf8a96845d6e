"""The live dashboard of one output directory: history and state as JSON, server-sent events, a static page.

It reads nothing but the run's `telemetry.jsonl` and its lock file, so it opens running, finished and dead runs alike,
and can be ended and started at any time. It imports no torch.
"""
