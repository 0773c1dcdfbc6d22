"""Will it fit, and how fast: plans by the compilers of chips that are not there, and by formula."""
