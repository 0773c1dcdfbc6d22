"""`python -m rlhf_jax`, which is `rlhf`."""

from rlhf_jax.cli.commands import main

if __name__ == "__main__":
    main()
