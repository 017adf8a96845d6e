"""The running parts, target, replay and prompts, and what they share."""
