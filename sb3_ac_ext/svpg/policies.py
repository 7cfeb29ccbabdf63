"""The particles as one policy."""

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ac_ext.networks.actor_critic import policy_parameters
from sb3_ac_ext.validation import ArgumentError


class Particles(BasePolicy):
    """
    n policies of SB3's, each with its networks, its distribution and its optimizer. What is asked of all is asked of the best.

    :param particles: the policies, which have the same spaces
    """

    particles: Sequence[ActorCriticPolicy]
    best: th.Tensor
    """``()`` which particle the algorithm thinks most of; saved with the parameters."""

    def __init__(self, particles: Sequence[ActorCriticPolicy]) -> None:
        first = particles[0]
        super().__init__(
            first.observation_space,
            first.action_space,
            features_extractor_class=first.features_extractor_class,
            features_extractor_kwargs=first.features_extractor_kwargs,
            normalize_images=first.normalize_images,
            optimizer_class=first.optimizer_class,
            optimizer_kwargs=first.optimizer_kwargs,
            squash_output=first.squash_output,
        )
        self.particles = nn.ModuleList(particles)  # type: ignore[assignment]  # which is a sequence of them
        self.register_buffer("best", th.zeros((), dtype=th.long, device=first.device))

    def __len__(self) -> int:
        return len(self.particles)

    @property
    def best_particle(self) -> ActorCriticPolicy:
        """The particle that acts where none is named."""
        return self.particles[int(self.best)]

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """See SB3's ``ActorCriticPolicy.forward``, of the best particle."""
        return self.best_particle(obs, deterministic)  # type: ignore[no-any-return]  # its forward's

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.best_particle._predict(observation, deterministic)

    def extract_features(self, obs: PyTorchObs, features_extractor: Any = None) -> Any:
        """See SB3's ``ActorCriticPolicy.extract_features``, of the best particle."""
        return self.best_particle.extract_features(obs, features_extractor)

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """See SB3's ``ActorCriticPolicy.evaluate_actions``, of the best particle."""
        return self.best_particle.evaluate_actions(obs, actions)

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """See SB3's ``ActorCriticPolicy.get_distribution``, of the best particle."""
        return self.best_particle.get_distribution(obs)

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """See SB3's ``ActorCriticPolicy.predict_values``, of the best particle."""
        return self.best_particle.predict_values(obs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        See PyTorch's ``Module.load_state_dict``.

        :raises RuntimeError: for parameters of more or fewer particles, as PyTorch for those of other layers
        """
        saved = len({name.split(".")[1] for name in state_dict if name.startswith("particles.")})
        if strict and saved != len(self):
            raise RuntimeError(f"the parameters are of {saved} particles, and there are {len(self)}")
        return super().load_state_dict(state_dict, strict, assign)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {"particles": list(self.particles)}


def actor_parameters(particles: Sequence[ActorCriticPolicy]) -> list[list[nn.Parameter]]:
    """
    :param particles: n policies
    :return: of each what its distribution of actions depends on, in one order, without what is trained in none of them
    :raises ValueError: if actors are not of the same size
    """
    every = [list(dict.fromkeys(policy_parameters(particle))) for particle in particles]
    shapes = [[tuple(parameter.shape) for parameter in own] for own in every]
    if (other := next((i for i, own in enumerate(shapes) if own != shapes[0]), None)) is not None:
        raise ArgumentError(
            f"actors of particles must have parameters of the same shapes to be compared by the kernel, got {shapes[0]} of "
            f"particle 0 and {shapes[other]} of particle {other}"
        )
    trained = [any(parameter.requires_grad for parameter in same) for same in zip(*every, strict=True)]
    return [list(compress(own, trained)) for own in every]


def flat(parameters: Sequence[Sequence[th.Tensor]]) -> th.Tensor:
    """
    :param parameters: of each of n particles tensors with d numbers in all
    :return: ``(n, d)`` theta
    """
    if not parameters[0]:
        return th.zeros(len(parameters), 0)
    return th.cat([th.stack(same).flatten(1) for same in zip(*parameters, strict=True)], dim=1)


def slopes(value: th.Tensor, parameters: Sequence[Sequence[nn.Parameter]]) -> th.Tensor:
    """
    :param value: ``()``, which is differentiated once more later
    :param parameters: of each of n particles, with d numbers in all
    :return: ``(n, d)`` its gradient, 0 where it does not depend on them, and where they are not trained
    """
    trained = [parameter for own in parameters for parameter in own if parameter.requires_grad]
    found = th.autograd.grad(value, trained, retain_graph=True, allow_unused=True) if trained else ()
    gradients = dict(zip(trained, found, strict=True))

    def slope(parameter: nn.Parameter) -> th.Tensor:
        gradient = gradients.get(parameter)
        return th.zeros_like(parameter) if gradient is None else gradient

    return flat([[slope(parameter) for parameter in own] for own in parameters])
