"""The replay buffer: a table in Redis, the shard that fills it, the reader that trainers use."""
