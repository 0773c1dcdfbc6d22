"""Training scripts that `rlhf eject` copies: each is whole, and imports nothing of this folder."""
