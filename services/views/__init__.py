"""Other views of a run's records: sinks for what people have beside the dashboard."""
