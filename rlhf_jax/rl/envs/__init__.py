"""Environments behind one interface, evaluation in them, and logs of transitions."""
