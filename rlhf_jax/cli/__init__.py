"""The command line, `rlhf`: commands, options, mistakes in one sentence."""
