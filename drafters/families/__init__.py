"""What differs between families of targets: their decoder layers, norms and rotary embeddings."""
