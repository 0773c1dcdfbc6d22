"""Feedback from models: judges, pairwise comparisons, critiques and revisions, labels of steps."""
