"""The one table of algorithms; the Zoo patch, the README's table and the tests are derived from it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_ac_ext
from sb3_ac_ext.a3c import A3C
from sb3_ac_ext.ac import AC
from sb3_ac_ext.acer import ACER
from sb3_ac_ext.acktr import ACKTR
from sb3_ac_ext.d4pg import D4PG
from sb3_ac_ext.ddpgx import DDPGX
from sb3_ac_ext.impala import IMPALA
from sb3_ac_ext.maddpg import MADDPG
from sb3_ac_ext.opac import OPAC
from sb3_ac_ext.ppox import PPOX
from sb3_ac_ext.reinforce import Reinforce
from sb3_ac_ext.sacx import SACX
from sb3_ac_ext.svpg import SVPG
from sb3_ac_ext.td3x import TD3X
from sb3_ac_ext.trpox import TRPOX
from sb3_ac_ext.zoo.samplers import actors, off_policy, on_policy, opac

Sampler = Callable[..., dict[str, Any]]
Converter = Callable[[dict[str, Any]], dict[str, Any]]


def data_dir(name: str) -> Path:
    """
    The folder of package data called ``name`` ("hyperparams" or "zoo_configs").

    It stands at the top of a checkout and inside an installed package. In an editable install both exist and the copy
    in the package is as old as the installation, so the checkout is asked first.

    :param name: the folder's name
    :return: its path
    """
    package = Path(sb3_ac_ext.__file__).parent
    checkout = package.parent
    return (checkout if (checkout / "pyproject.toml").is_file() else package) / name


@dataclass(frozen=True)
class AlgoSpec:
    """One row of the table."""

    cls: type[BaseAlgorithm]
    sample: Sampler
    """Optuna trial -> constructor keyword arguments, with the Zoo's signature (trial, n_actions, n_envs, additional_args)."""
    convert: Converter
    """Stored trial parameters -> hyperparameters as the Zoo's YAML files have them."""

    @property
    def name(self) -> str:
        """The value of ``--algo``: the class name in lower case, as the Zoo and the Hub expect."""
        return self.cls.__name__.lower()

    @property
    def config(self) -> Path:
        """The default hyperparameter file."""
        return data_dir("hyperparams") / f"{self.name}.yml"


ALGORITHMS: tuple[AlgoSpec, ...] = (
    AlgoSpec(TD3X, off_policy.sample_td3x, off_policy.convert_td3x),
    AlgoSpec(DDPGX, off_policy.sample_ddpgx, off_policy.convert_ddpgx),
    AlgoSpec(SACX, off_policy.sample_sacx, off_policy.convert_sacx),
    AlgoSpec(PPOX, on_policy.sample_ppox, on_policy.convert_ppox),
    AlgoSpec(TRPOX, on_policy.sample_trpox, on_policy.convert_trpox),
    AlgoSpec(ACKTR, on_policy.sample_acktr, on_policy.convert_acktr),
    AlgoSpec(Reinforce, on_policy.sample_reinforce, on_policy.convert_reinforce),
    AlgoSpec(AC, on_policy.sample_ac, on_policy.convert_ac),
    AlgoSpec(D4PG, off_policy.sample_d4pg, off_policy.convert_d4pg),
    AlgoSpec(MADDPG, off_policy.sample_maddpg, off_policy.convert_maddpg),
    AlgoSpec(IMPALA, actors.sample_impala, actors.convert_impala),
    AlgoSpec(A3C, actors.sample_a3c, actors.convert_a3c),
    AlgoSpec(OPAC, opac.sample_opac, opac.convert_opac),
    AlgoSpec(ACER, actors.sample_acer, actors.convert_acer),
    AlgoSpec(SVPG, on_policy.sample_svpg, on_policy.convert_svpg),
)
