"""Options by the names they have elsewhere: TRL, verl, Hugging Face's Trainer and PEFT, and here in the past.

Each name has one or more of ours; the first that a command has is the one it is told. Values may follow:
`--bf16` is `--arch.compute-dtype bfloat16`.
"""

from collections.abc import Collection

_COMPUTE = "--dtype {0}", "--compute-dtype {0}", "--arch.compute-dtype {0}"
_REMAT = "--remat {0}", "--arch.remat {0}"
_PROMPT_LENGTH = "--max-prompt-length", "--max-length", "--max-seq-length", "--length"
_LENGTH = "--max-length", "--max-seq-length", "--length"
_EPSILON = "--epsilon-low", "--epsilon"
_PASSES = "--num-iterations", "--num-ppo-epochs"
_MODEL = ("--model",)
_PER_PROMPT = "--group-size", "--samples-per-prompt", "--n"


def _filled(names: tuple[str, ...], value: str) -> tuple[str, ...]:
    return tuple(name.format(value) for name in names)


TRL = {
    "--num-generations": _PER_PROMPT,
    "--num-sample-generations": ("--samples",),
    "--max-completion-length": ("--max-new-tokens",),
    "--max-tokens": ("--max-new-tokens",),
    "--response-length": ("--max-new-tokens",),
    "--beta": ("--kl-coef",),
    "--init-kl-coef": ("--kl-coef",),
    "--kl-coeff": ("--kl-coef",),
    "--epsilon": ("--epsilon-low",),
    "--epsilon-low": ("--epsilon",),
    "--epsilon-high": ("--epsilon",),
    "--cliprange": ("--epsilon", "--epsilon-low"),
    "--clip-range": ("--epsilon", "--epsilon-low"),
    "--vf-coef": ("--value-coef",),
    "--vf-coeff": ("--value-coef",),
    "--lam": ("--gae-lambda",),
    "--lam-critic": ("--critic-gae-lambda",),
    "--sync-ref-model": ("--ref-model-sync-steps",),
    "--pretrain-data": ("--ptx-data",),
    "--num-ppo-epochs": ("--num-iterations",),
    "--num-iterations": ("--num-ppo-epochs",),
    "--num-mini-batches": ("--num-minibatches",),
    "--steps-per-generation": ("--num-minibatches",),
    "--reward-funcs": ("--rewards",),
    "--reward-weights": ("--rewards",),
    "--reward-model-path": ("--reward-model", "--rewards"),
    "--reward-model-name-or-path": ("--reward-model", "--rewards"),
    "--sft-model-path": _MODEL,
    "--teacher-model-name-or-path": ("--teacher",),
    "--simpo-gamma": ("--gamma",),
    "--discopop-tau": ("--tau",),
    "--cpo-alpha": ("--nll-weight",),
    "--loss-type": ("--loss", "--algorithm"),
    "--advantage-estimator": ("--algorithm",),
    "--vllm-importance-sampling-correction": ("--importance-sampling-correction",),
    "--use-vllm": ("--engine vllm:URL",),
    "--vllm-mode": ("--engine vllm:URL",),
    "--vllm-server-host": ("--engine vllm:URL",),
    "--vllm-server-base-url": ("--engine vllm:URL",),
    "--precompute-ref-log-probs": ("--reference stored",),
    "--dataset-name": ("--data",),
    "--dataset": ("--data",),
    "--dataset-path": ("--data",),
    "--train-file": ("--data",),
    "--validation-file": ("--eval-data",),
    "--eval-dataset": ("--eval-data",),
    "--max-seq-len": _LENGTH,
    "--max-seq-length": ("--max-length", "--length"),
    "--block-size": _LENGTH,
    "--log-completions": ("--samples",),
    "--num-completions-to-print": ("--samples",),
    "--judge-model-path": ("--judge-model", "--judge"),
}

TRAINER = {
    "--model-name-or-path": _MODEL,
    "--model-name": _MODEL,
    "--model-path": _MODEL,
    "--pretrained": _MODEL,
    "--checkpoint": _MODEL,
    "--output-dir": ("--out",),
    "--output": ("--out",),
    "--save-dir": ("--out",),
    "--logging-dir": ("--out",),
    "--run-name": ("--out",),
    "--overwrite-output-dir": ("--out",),
    "--resume-from-checkpoint": ("--resume",),
    "--per-device-train-batch-size": ("--batch-size",),
    "--train-batch-size": ("--batch-size",),
    "--gradient-accumulation-steps": ("--micro-batches",),
    "--grad-accum": ("--micro-batches",),
    "--max-steps": ("--steps",),
    "--num-epochs": ("--num-train-epochs",),
    "--total-episodes": ("--steps",),
    "--total-timesteps": ("--steps",),
    "--report-to": ("--log",),
    "--wandb": ("--log wandb",),
    "--use-wandb": ("--log wandb",),
    "--tensorboard": ("--log tensorboard",),
    "--trackio": ("--log trackio",),
    "--mlflow": ("--log mlflow",),
    "--save-steps": ("--save-every",),
    "--save-freq": ("--save-every",),
    "--eval-steps": ("--eval-every",),
    "--test-freq": ("--eval-every",),
    "--save-total-limit": ("--max-to-keep",),
    "--lr": ("--learning-rate",),
    "--lr-scheduler-type": ("--optimizer.schedule",),
    "--lr-scheduler": ("--optimizer.schedule",),
    "--warmup-steps": ("--optimizer.warmup-steps",),
    "--warmup-ratio": ("--optimizer.warmup-ratio",),
    "--max-grad-norm": ("--optimizer.clip-norm",),
    "--grad-clip": ("--optimizer.clip-norm",),
    "--weight-decay": ("--optimizer.weight-decay",),
    "--optim": ("--optimizer.optimizer",),
    "--optimizer": ("--optimizer.optimizer",),
    "--adam-beta1": ("--optimizer.b1",),
    "--adam-beta2": ("--optimizer.b2",),
    "--adam-epsilon": ("--optimizer.epsilon",),
    "--bf16": _filled(_COMPUTE, "bfloat16"),
    "--fp16": _filled(_COMPUTE, "bfloat16"),
    "--torch-dtype": tuple(name.split()[0] for name in _COMPUTE),
    "--gradient-checkpointing": _filled(_REMAT, "full"),
    "--data-seed": ("--seed",),
    "--disable-tqdm": ("--quiet",),
    "--fsdp": ("--mesh fsdp=N",),
    "--deepspeed": ("--mesh fsdp=N",),
    "--tensor-parallel-size": ("--mesh tensor=N",),
    "--tp-size": ("--mesh tensor=N",),
    "--ds3-gather-for-generation": ("--all-gather-params",),
}

PEFT = {
    "--use-peft": ("--adapter.kind lora",),
    "--lora": ("--adapter.kind lora",),
    "--lora-r": ("--adapter.rank",),
    "--lora-rank": ("--adapter.rank",),
    "--lora-alpha": ("--adapter.alpha",),
    "--lora-target-modules": ("--adapter.targets",),
    "--use-rslora": ("--adapter.kind rslora",),
    "--use-dora": ("--adapter.kind dora",),
    "--load-in-4bit": ("--adapter.quantize nf4",),
    "--load-in-8bit": ("--adapter.quantize int8",),
}

VERL = {
    "--adv-estimator": ("--algorithm",),
    "--algorithm.adv-estimator": ("--algorithm",),
    "--rollout-n": _PER_PROMPT,
    "--rollout.n": _PER_PROMPT,
    "--data.train-files": ("--data",),
    "--data.val-files": ("--eval-data",),
    "--data.train-batch-size": ("--batch-size",),
    "--data.max-prompt-length": _PROMPT_LENGTH,
    "--data.max-response-length": ("--max-new-tokens",),
    "--clip-ratio": ("--epsilon", "--epsilon-low"),
    "--clip-ratio-low": _EPSILON,
    "--clip-ratio-high": ("--epsilon-high", "--epsilon"),
    "--kl-loss-coef": ("--kl-coef",),
    "--use-kl-loss": ("--kl-coef",),
    "--entropy-coeff": ("--entropy-coef",),
    "--ent-coef": ("--entropy-coef",),
    "--ppo-epochs": _PASSES,
    "--ppo-mini-batch-size": ("--num-minibatches",),
    "--ppo-micro-batch-size": ("--micro-batches",),
    "--ppo-micro-batch-size-per-gpu": ("--micro-batches",),
    "--filter-groups": ("--dynamic-sampling-max-rounds",),
    "--overlong-buffer": ("--overlong-penalty-coef",),
    "--total-epochs": ("--num-train-epochs",),
    "--total-training-steps": ("--steps",),
    "--logger": ("--log",),
    "--default-local-dir": ("--out",),
    "--num-nodes": ("--coordinator",),
    "--nnodes": ("--coordinator",),
}

OLD = {
    "--init": _MODEL,
    "--behind": ("--one-step-off-policy",),
    "--correction": ("--importance-sampling-correction",),
    "--clip": ("--epsilon", "--epsilon-low"),
    "--clip-low": _EPSILON,
    "--clip-high": ("--epsilon-high", "--epsilon"),
    "--value-clip": ("--cliprange-value",),
    "--max-kl": ("--target-kl",),
    "--max-draws": ("--dynamic-sampling-max-rounds",),
    "--overlong": ("--overlong-penalty-coef",),
    "--epochs": (*_PASSES, "--num-epochs", "--num-train-epochs"),
    "--simulations": ("--num-simulations",),
    "--search.simulations": ("--search.num-simulations",),
    "--search.ways": ("--search.branching-factor",),
    "--search.votes": ("--search.num-votes",),
    "--search.width": ("--search.beam-width",),
    "--search.thoughts": ("--search.num-thoughts",),
    "--count": ("--num-speculative-tokens",),
    "--considered": ("--max-num-considered-actions",),
    "--minibatches": ("--num-minibatches",),
    "--slots": ("--max-num-seqs",),
    "--keep": ("--max-to-keep",),
    "--gather-params": ("--all-gather-params",),
    "--start-timeout": ("--init-timeout",),
    "--lost-timeout": ("--heartbeat-timeout",),
    "--centring": ("--center-rewards-coefficient",),
    "--student-share": ("--lmbda",),
    "--mixing": ("--mixture-coef",),
    "--beside": ("--extra-data",),
    "--at-least": ("--reward-threshold",),
    "--restart": ("--reinit-each-round",),
    "--apart": ("--intra-document-masking",),
    "--length": ("--max-seq-length",),
    "--fill.share": ("--fim-rate",),
    "--fill.spm-share": ("--fim-spm-rate",),
    "--adapter.quantise": ("--adapter.quantize",),
    "--auxiliary.further-coef": ("--aux.mtp-loss-coef",),
    "--auxiliary.balance-coef": ("--aux.router-aux-loss-coef",),
    "--auxiliary.z-coef": ("--aux.router-z-loss-coef",),
    "--auxiliary.bias-rate": ("--aux.router-bias-update-rate",),
    "--model.further": ("--arch.mtp-depth",),
    "--model.tied": ("--arch.tie-word-embeddings",),
    "--model.hidden": ("--arch.intermediate-size",),
    "--hosts": ("--coordinator",),
    "--too-long": ("--overlength",),
    "--writer": ("--generator",),
    "--passages": ("--top-k",),
    "--passage-words": ("--chunk-size",),
    "--overlap": ("--chunk-overlap",),
    "--near": ("--jaccard-threshold",),
    "--shingle": ("--ngram-size",),
    "--overlap-words": ("--decontamination-ngram",),
    "--arch.tied": ("--arch.tie-word-embeddings",),
    "--arch.hidden": ("--arch.intermediate-size",),
    "--adapter.keep-zeros": ("--adapter.preserve-sparsity",),
    "--scope": ("--granularity",),
    "--model.kind": ("--arch.kind",),
    "--model.width": ("--arch.width",),
    "--model.layers": ("--arch.layers",),
    "--model.heads": ("--arch.heads",),
    "--model.kv-heads": ("--arch.kv-heads",),
    "--model.experts": ("--arch.experts",),
    "--model.experts-per-token": ("--arch.experts-per-token",),
    "--model.router": ("--arch.router",),
    "--model.remat": ("--remat", "--arch.remat"),
    "--model.scan-layers": ("--scan-layers", "--arch.scan-layers"),
    "--model.param-dtype": ("--param-dtype", "--arch.param-dtype"),
    "--model.compute-dtype": ("--dtype", "--arch.compute-dtype"),
}

FOREIGN_NAMES: dict[str, tuple[str, ...]] = {}
for _table in (TRL, TRAINER, PEFT, VERL, OLD):
    for _name, _ours in _table.items():
        FOREIGN_NAMES[_name] = (*FOREIGN_NAMES.get(_name, ()), *_ours)


def our_name(flag: str, known: Collection[str]) -> str | None:
    """The flag, perhaps with a value, that has this meaning here; None where no flag in `known` does.

    Args:
      flag: as it was typed, without a value.
      known: the flags of the command.
    """
    if flag in known:
        return None
    return next((ours for ours in FOREIGN_NAMES.get(flag, ()) if ours.split()[0] in known), None)
