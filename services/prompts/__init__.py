"""Prompts and what becomes of them: sources, chat templates and loss masks, plan, step leases, ledger."""
