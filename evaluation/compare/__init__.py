"""Drafters of one target head to head: the same prompts, the same seeds, one target in memory."""
