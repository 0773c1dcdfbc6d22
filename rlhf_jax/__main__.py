"""`python -m rlhf_jax`, which is `rlhf`."""

from rlhf_jax.cli.commands import main

main()
