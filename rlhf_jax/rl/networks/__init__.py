"""Networks of reinforcement learning: encoders, heads, distributions."""
