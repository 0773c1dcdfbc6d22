"""What a user runs: one file a stage, its options and `run`."""
