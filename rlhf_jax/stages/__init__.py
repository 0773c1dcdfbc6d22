"""Stages that users run: one file a stage, its options and `run`."""
