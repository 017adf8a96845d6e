"""Drafters in the formats that servers load, and back (specs: checkpoints).

    formats.py      what a written drafter consists of, and what all writers and readers share
    sglang.py       SGLang, as its training companion writes drafters
    speculators.py  vLLM's speculators format

A writer refuses what its server cannot express; a reader makes the drafter again from nothing but the files and the
target's two tables, which is how an export is checked.
"""
