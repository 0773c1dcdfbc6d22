"""Floor 2: rewards from rules, as plain functions of texts."""
