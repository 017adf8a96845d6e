"""Training jobs: recipes, the driver, the DeepSpeed loop, and the `slipstream` command."""
