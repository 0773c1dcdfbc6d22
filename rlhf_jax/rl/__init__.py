"""Floor 4: the classic algorithms on gymnax environments; whole runs as `train(key, hyper)`."""
