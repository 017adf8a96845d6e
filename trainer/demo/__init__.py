"""Data of `slipstream demo`: its recipe and its tiny target."""
