"""SB3's policies for DDPG with a critic that gives the distribution of the return."""

from typing import Annotated, Any, Literal

from annotated_types import Ge
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.td3.policies import TD3Policy

from sb3_ac_ext.d4pg.networks import CategoricalCritic, DistributionalCritic, MixtureCritic
from sb3_ac_ext.networks.policies import ForDicts, ForImages
from sb3_ac_ext.validation import Positive, PositiveInt

N_ATOMS = 51
OPTIONS = ("distribution", "n_atoms", "n_components", "init_std", "min_std")


class MlpPolicy(TD3Policy):
    """
    SB3's actor, and a critic of which each output is a part of the return's distribution.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: learning rate at the start; the algorithm sets each optimizer's rate before it updates
    :param distribution: what the algorithm's argument of this name says
    :param n_atoms: of the categorical distribution
    :param n_components: Gaussians of the mixture
    :param init_std: their standard deviation at the start, about, in reward units
    :param min_std: their smallest standard deviation, in reward units; where all returns of a state are the same, likelihoods
        would be unbounded without
    :param n_critics: SB3's
    :param kwargs: SB3's other arguments (net_arch, activation_fn, share_features_extractor, ...)
    """

    critic: DistributionalCritic
    critic_target: DistributionalCritic

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        distribution: Literal["categorical", "mixture"] = "categorical",
        n_atoms: Annotated[int, Ge(2)] = N_ATOMS,
        n_components: PositiveInt = 5,
        init_std: Positive = 1.0,
        min_std: Positive = 1e-3,
        n_critics: Literal[1] = 1,
        **kwargs: Any,
    ) -> None:
        self.distribution = distribution
        self.n_atoms = n_atoms
        self.n_components = n_components
        self.init_std = init_std
        self.min_std = min_std
        super().__init__(observation_space, action_space, lr_schedule, n_critics=n_critics, **kwargs)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> DistributionalCritic:
        """
        :param features_extractor: of the critic; None makes one of its own
        :return: the critic
        """
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        del kwargs["n_critics"]
        critic: DistributionalCritic
        if self.distribution == "categorical":
            critic = CategoricalCritic(n_atoms=self.n_atoms, **kwargs)
        else:
            critic = MixtureCritic(n_components=self.n_components, init_std=self.init_std, min_std=self.min_std, **kwargs)
        return critic.to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **{name: getattr(self, name) for name in OPTIONS}}


class CnnPolicy(ForImages, MlpPolicy):
    """The policy for images."""


class MultiInputPolicy(ForDicts, MlpPolicy):
    """The policy for Dict observations."""
