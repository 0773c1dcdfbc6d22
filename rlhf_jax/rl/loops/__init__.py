"""Training loops: on-policy, off-policy, episodic, offline; replay, rollouts and exploration."""
