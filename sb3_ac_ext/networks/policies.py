"""What the policies of several algorithms have in common; each piece goes before SB3's class."""

from typing import Any

from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN

from sb3_ac_ext.networks.critics import LayerNormCritic
from sb3_ac_ext.validation import PositiveInt


class CriticPolicy(BasePolicy):
    """
    A policy whose critic can be normalised: ``class MlpPolicy(CriticPolicy, TD3Policy)``.

    :param critic_layer_norm: whether the critic's hidden layers are normalised
    :param n_critics: streams of the critic; targets are their smallest value
    :param kwargs: SB3's other arguments (net_arch, activation_fn, share_features_extractor, ...)
    """

    critic: ContinuousCritic
    critic_target: ContinuousCritic
    critic_kwargs: dict[str, Any]

    def __init__(self, *args: Any, critic_layer_norm: bool = False, n_critics: PositiveInt = 2, **kwargs: Any) -> None:
        self.critic_layer_norm = critic_layer_norm
        super().__init__(*args, n_critics=n_critics, **kwargs)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        """
        :param features_extractor: of the critic; None makes one of its own
        :return: the critic
        """
        if not self.critic_layer_norm:
            return super().make_critic(features_extractor)  # type: ignore[misc, no-any-return]  # of SB3's class behind
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return LayerNormCritic(**critic_kwargs).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "critic_layer_norm": self.critic_layer_norm}


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
