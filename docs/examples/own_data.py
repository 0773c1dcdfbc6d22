"""Data objects as they are: python own_data.py MODEL OUT."""

import sys

import pandas

import rlhf_jax as rj

rows = pandas.DataFrame({"prompt": ["1 + 1 = ?", "2 + 2 = ?"] * 4, "completion": ["2", "4"] * 4})
run = rj.sft(rj.load(sys.argv[1]), rows, steps=2, batch_size=4, out=sys.argv[2])
print(run.metrics[-1]["loss"])
