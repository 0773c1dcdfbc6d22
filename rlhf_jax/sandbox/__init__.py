"""Processes with limits, in which text of others is parsed, rendered and computed."""
