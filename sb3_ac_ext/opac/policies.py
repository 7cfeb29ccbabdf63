"""Policies of OPAC: networks for actor and critic, and the linear one."""

from typing import Any, Literal

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, get_actor_critic_arch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_ac_ext.networks.policies import ForDicts, ForImages
from sb3_ac_ext.opac.networks import Actor, BoxActor, ChoiceActor, Critic
from sb3_ac_ext.validation import Positive, PositiveInt

OPTIONS = (
    *("net_arch", "activation_fn", "critic_type", "n_critics", "min_std", "optimizer_class", "optimizer_kwargs"),
    *("features_extractor_class", "features_extractor_kwargs", "share_features_extractor"),
)


class MlpPolicy(BasePolicy):
    """
    A stochastic actor, critics and their target.

    :param observation_space: Observation space
    :param action_space: Discrete, or a Box with finite bounds
    :param lr_schedule: learning rate at the start; the algorithm sets each optimizer's rate before it updates
    :param net_arch: hidden layers of actor and critics, or ``{"pi": [...], "qf": [...]}``
    :param activation_fn: activation function
    :param critic_type: "v" or "q", what the algorithm's argument of this name says
    :param n_critics: critics, of whose values the smallest counts
    :param min_std: standard deviation that a Box action keeps in any case, before the tanh
    :param features_extractor_class: from observations to features
    :param features_extractor_kwargs: its arguments
    :param normalize_images: whether images are divided by 255
    :param optimizer_class: of actor and critic, each has one
    :param optimizer_kwargs: its arguments besides the rate
    :param share_features_extractor: whether actor and critics have one extractor, which learns from the actor's loss alone
    """

    actor: Actor
    critic: Critic
    critic_target: Critic

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        *,
        critic_type: Literal["v", "q"] = "q",
        n_critics: PositiveInt = 2,
        min_std: Positive = 0.05,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = False,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=isinstance(action_space, spaces.Box),
            normalize_images=normalize_images,
        )
        self.net_arch: list[int] | dict[str, list[int]] = [256, 256] if net_arch is None else net_arch
        self.activation_fn = activation_fn
        self.critic_type = critic_type
        self.n_critics = n_critics
        self.min_std = min_std
        self.share_features_extractor = share_features_extractor
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        self.actor = self.make_actor()
        shared = self.actor.features_extractor if self.share_features_extractor else None
        self.critic = self.make_critic(shared)
        self.critic_target = self.make_critic()  # which never shares
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.set_training_mode(False)
        self.actor.optimizer = self._optimizer(self.actor, lr_schedule)
        trained = self.critic if shared is None else nn.ModuleList(self.critic.q_networks)
        self.critic.optimizer = self._optimizer(trained, lr_schedule)

    def _optimizer(self, module: nn.Module, lr_schedule: Schedule) -> th.optim.Optimizer:
        return self.optimizer_class(module.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _net_kwargs(self, net_arch: list[int], features_extractor: BaseFeaturesExtractor | None) -> dict[str, Any]:
        kwargs = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "net_arch": net_arch,
            "activation_fn": self.activation_fn,
            "normalize_images": self.normalize_images,
        }
        return self._update_features_extractor(kwargs, features_extractor)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        """
        :param features_extractor: of the actor; None makes one of its own
        :return: the actor
        """
        kwargs = self._net_kwargs(get_actor_critic_arch(self.net_arch)[0], features_extractor)
        choices = isinstance(self.action_space, spaces.Discrete)
        actor = ChoiceActor(**kwargs) if choices else BoxActor(min_std=self.min_std, **kwargs)
        return actor.to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Critic:
        """
        :param features_extractor: of the critic; None makes one of its own
        :return: the critic
        """
        kwargs = self._net_kwargs(get_actor_critic_arch(self.net_arch)[1], features_extractor)
        options: dict[str, Any] = {"kind": self.critic_type, "n_critics": self.n_critics}
        return Critic(**kwargs, **options, share_features_extractor=self.share_features_extractor).to(self.device)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        outputs = self.actor(observation)
        actions = self.actor.mode(outputs) if deterministic else self.actor.sample(outputs)[0]
        return actions.reshape(-1, *(self.action_space.shape or ()))

    def log_prob(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(B, ...)``
        :param actions: ``(B, A)``, Box actions scaled to [-1, 1]
        :return: ``(B, 1)`` log pi(a|s)
        """
        return self.actor.log_prob(self.actor(obs), actions)

    def set_training_mode(self, mode: bool) -> None:
        self.actor.set_training_mode(mode)
        self.critic.set_training_mode(mode)
        self.training = mode

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in OPTIONS}
        return {**super()._get_constructor_parameters(), **own, "lr_schedule": self._dummy_schedule}


class CnnPolicy(ForImages, MlpPolicy):
    """The policy for images."""


class MultiInputPolicy(ForDicts, MlpPolicy):
    """The policy for Dict observations."""
