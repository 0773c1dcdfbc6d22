"""The families by name, for the command line: losses on pairs of `dpo.py`, algorithms of `grpo.py`."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from rlhf_jax.algorithms import grpo_variants, unpaired
from rlhf_jax.algorithms import preference_members as pairs
from rlhf_jax.algorithms.grpo_variants import Member, MemberFn
from rlhf_jax.algorithms.preference import PairLossFn

NOTHING: Mapping[str, float | None] = MappingProxyType({})

PairLoss = Literal[
    "dpo",
    "robust",
    "hinge",
    "ipo",
    "exo",
    "nca",
    "bco_pair",
    "sppo",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "length_normalised",
    "orpo",
    "cpo",
    "simpo",
    "alpha_po",
]
PAIR_LOSSES: dict[PairLoss, PairLossFn] = {
    "dpo": pairs.dpo,
    "robust": pairs.robust,
    "hinge": pairs.hinge,
    "ipo": pairs.ipo,
    "exo": pairs.exo,
    "nca": pairs.nca,
    "bco_pair": pairs.bco_pair,
    "sppo": pairs.sppo,
    "aot": pairs.aot,
    "aot_unpaired": pairs.aot_unpaired,
    "apo_zero": pairs.apo_zero,
    "apo_down": pairs.apo_down,
    "discopop": pairs.discopop,
    "length_normalised": pairs.length_normalised,
    "orpo": pairs.orpo,
    "cpo": pairs.cpo,
    "simpo": pairs.simpo,
    "alpha_po": pairs.alpha_po,
}
UnpairedLoss = Literal["kto", "bco"]
"""They know only whether a response is desirable."""
UNPAIRED: dict[UnpairedLoss, unpaired.Config] = {
    "kto": unpaired.Config(),
    "bco": unpaired.Config(shift_decay=0.9),
}
SORTING: tuple[PairLoss, ...] = ("aot", "aot_unpaired")
"""They compare pairs with each other, so a batch cannot be computed in parts."""

GroupAlgorithm = Literal[
    "reinforce",
    "reinforce++",
    "reinforce++-baseline",
    "rloo",
    "remax",
    "opo",
    "grpo",
    "bnpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "luspo",
    "gmpo",
    "cispo",
    "sapo",
    "vespo",
]
_GROUP_ALGORITHMS: dict[GroupAlgorithm, MemberFn] = {
    "reinforce": grpo_variants.reinforce,
    "reinforce++": grpo_variants.reinforce_plus_plus,
    "reinforce++-baseline": grpo_variants.reinforce_plus_plus_baseline,
    "rloo": grpo_variants.rloo,
    "remax": grpo_variants.remax,
    "opo": grpo_variants.opo,
    "grpo": grpo_variants.grpo,
    "bnpo": grpo_variants.bnpo,
    "dr_grpo": grpo_variants.dr_grpo,
    "dapo": grpo_variants.dapo,
    "gspo": grpo_variants.gspo,
    "luspo": grpo_variants.luspo,
    "gmpo": grpo_variants.gmpo,
    "cispo": grpo_variants.cispo,
    "sapo": grpo_variants.sapo,
    "vespo": grpo_variants.vespo,
}


LONE: tuple[GroupAlgorithm, ...] = ("reinforce", "reinforce++", "remax")
"""They do not compare answers to one prompt with each other, so a group may be a single one."""


def group_member(
    name: GroupAlgorithm, *, max_length: int, changes: Mapping[str, float | None] = NOTHING, **static: int
) -> Member:
    """An algorithm of the GRPO family, with the hyperparameters that it is published with.

    Args:
      max_length: tokens of the longest answer, for Dr. GRPO.
      changes: hyperparameters that replace the published ones, None for none. The KL of REINFORCE++ stands
        in the reward, so that is where its `kl_coef` goes.
      static: of `group.Config`.
    """
    make, given = _GROUP_ALGORITHMS[name], {k: v for k, v in changes.items() if v is not None}
    if make is grpo_variants.dr_grpo:
        make = functools.partial(make, max_length=max_length)
    if make is grpo_variants.reinforce_plus_plus and "kl_coef" in given:
        make = functools.partial(make, kl_coef=given.pop("kl_coef"))
    member = make(**static)
    return dataclasses.replace(member, hyper=dataclasses.replace(member.hyper, **given))
