"""What the policies of several algorithms have in common; each piece goes before SB3's class."""

from typing import Any

from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.td3.policies import Actor, TD3Policy

from sb3_ac_ext.legacy.fused_mlp import FusedMLP
from sb3_ac_ext.networks.critics import TwinStreamCritic


class TwinStreamPolicy(BasePolicy):
    """
    A policy whose critic is the twin-stream critic: ``class MlpPolicy(TwinStreamPolicy, TD3Policy)``.

    :param critic_layer_norm: whether the critic's hidden layers are normalised
    :param kwargs: SB3's other arguments (net_arch, activation_fn, share_features_extractor, ...)
    :raises ValueError: if ``n_critics`` is given and is not 2
    """

    critic: TwinStreamCritic
    critic_target: TwinStreamCritic
    critic_kwargs: dict[str, Any]

    def __init__(self, *args: Any, critic_layer_norm: bool = False, n_critics: int = 2, **kwargs: Any) -> None:
        if n_critics != 2:
            raise ValueError(f"n_critics must be 2, the streams of the critic, got {n_critics}")
        self.critic_layer_norm = critic_layer_norm
        super().__init__(*args, **kwargs)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        """
        :param features_extractor: of the critic; None makes one of its own
        :return: the `TwinStreamCritic`, which is no ``ContinuousCritic``
        """
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        del critic_kwargs["n_critics"]
        return TwinStreamCritic(**critic_kwargs, layer_norm=self.critic_layer_norm).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "critic_layer_norm": self.critic_layer_norm}


class DeterministicPolicy(TD3Policy):
    """SB3's TD3 policy with the actor's layers as a `FusedMLP`."""

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        """
        :param features_extractor: of the actor; None makes one of its own
        :return: the actor
        """
        actor = super().make_actor(features_extractor)
        actor.mu = FusedMLP(*actor.mu)
        return actor


class ForImages(BasePolicy):
    """Takes SB3's convolutional features: ``class CnnPolicy(ForImages, MlpPolicy)``."""

    def __init__(self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN, **kwargs: Any) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


class ForDicts(BasePolicy):
    """Takes SB3's features of Dict observations: ``class MultiInputPolicy(ForDicts, MlpPolicy)``."""

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor, **kwargs: Any
    ) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)
