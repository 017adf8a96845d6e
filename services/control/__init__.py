"""Steering a running job: its desk, a named Ray actor, and the client of command line and dashboard."""
