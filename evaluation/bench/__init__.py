"""What `slipstream bench` runs: each prints a ratio measured in one run, and names the hardware."""
