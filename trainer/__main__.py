"""`python -m trainer` is the `slipstream` command."""

from trainer.cli import main

main()
