"""The commands of `slipstream`, one module a group; `trainer.cli` puts them together."""
