"""The families by name, for the command line: losses on pairs of `dpo.py`, algorithms of `grpo.py`."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from rlhf_jax.algorithms import group_members, unpaired
from rlhf_jax.algorithms import preference_members as pairs
from rlhf_jax.algorithms.group_members import Member, MemberFn
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
    "reinforce": group_members.reinforce,
    "reinforce++": group_members.reinforce_plus_plus,
    "reinforce++-baseline": group_members.reinforce_plus_plus_baseline,
    "rloo": group_members.rloo,
    "remax": group_members.remax,
    "opo": group_members.opo,
    "grpo": group_members.grpo,
    "bnpo": group_members.bnpo,
    "dr_grpo": group_members.dr_grpo,
    "dapo": group_members.dapo,
    "gspo": group_members.gspo,
    "luspo": group_members.luspo,
    "gmpo": group_members.gmpo,
    "cispo": group_members.cispo,
    "sapo": group_members.sapo,
    "vespo": group_members.vespo,
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
    if make is group_members.dr_grpo:
        make = functools.partial(make, max_length=max_length)
    if make is group_members.reinforce_plus_plus and "kl_coef" in given:
        make = functools.partial(make, kl_coef=given.pop("kl_coef"))
    member = make(**static)
    return dataclasses.replace(member, hyper=dataclasses.replace(member.hyper, **given))
