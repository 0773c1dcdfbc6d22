"""Tabular reinforcement learning, where every value can be computed."""
