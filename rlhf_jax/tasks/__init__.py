"""Tasks with known truth, on which algorithms are compared; pipelines, studies and tests use them."""
