"""The target service: a frozen model behind gRPC, its client, and the pool that keeps N of them alive."""
