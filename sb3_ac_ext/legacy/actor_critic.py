"""SB3's actor-critic policies with fused layers, what an update needs of them, and how PyTorch gives it."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_ac_ext.legacy.descent import Descent
from sb3_ac_ext.legacy.fused_mlp import FusedLinear, FusedMLP
from sb3_ac_ext.legacy.natural_gradient import (
    bernoulli_fisher,
    categorical_fisher,
    fisher_product,
    flatten,
    gaussian_fisher,
)
from sb3_ac_ext.networks.policies import ForDicts, ForImages

PARTS = ("policy", "value")
"""Of an actor-critic: the distribution of actions, and the value."""
ROWS = 8192
"""Observations that are evaluated together at most, which bounds the memory of the layers' outputs."""


class MlpPolicy(ActorCriticPolicy):
    """SB3's actor-critic policy with its layers fused."""

    value_optimizer: th.optim.Optimizer
    """Where an algorithm has one for the value alone."""

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        if type(self.mlp_extractor) is MlpExtractor:
            self.mlp_extractor.policy_net = FusedMLP(*self.mlp_extractor.policy_net)
            self.mlp_extractor.value_net = FusedMLP(*self.mlp_extractor.value_net)
        for name in ("action_net", "value_net"):
            if type(getattr(self, name)) is nn.Linear:
                setattr(self, name, FusedLinear.of(getattr(self, name)))

    def policy_parameters(self) -> list[nn.Parameter]:
        """What the distribution of actions depends on."""
        own = [self.log_std] if isinstance(getattr(self, "log_std", None), nn.Parameter) else []
        modules = (self.pi_features_extractor, self.mlp_extractor.policy_net, self.action_net)
        return [*own, *(parameter for module in modules for parameter in module.parameters())]

    def value_parameters(self) -> list[nn.Parameter]:
        """What the value depends on; some are `policy_parameters` too if a trained features extractor is shared."""
        modules = (self.vf_features_extractor, self.mlp_extractor.value_net, self.value_net)
        return [parameter for module in modules for parameter in module.parameters()]

    def separate_optimizers(self, rate: float, needed_by: str) -> None:
        """
        Give policy and value an optimizer each, `optimizer` and `value_optimizer`.

        :param rate: learning rate they start with
        :param needed_by: what asks for that, the start of the message
        :raises ValueError: if they share trained parameters
        """
        groups = self.policy_parameters(), self.value_parameters()
        if set(map(id, groups[0])) & set(map(id, groups[1])):
            raise ValueError(
                f"{needed_by} needs networks of their own for policy and value: set "
                "policy_kwargs=dict(share_features_extractor=False), got a shared features extractor"
            )
        self.optimizer, self.value_optimizer = (
            self.optimizer_class(own, lr=rate, **self.optimizer_kwargs)  # type: ignore[call-arg]  # rates are the subclasses'
            for own in groups
        )


class CnnPolicy(ForImages, MlpPolicy):
    """The policy for images."""


class MultiInputPolicy(ForDicts, MlpPolicy):
    """The policy for Dict observations."""


POLICIES: dict[str, type[BasePolicy]] = {"MlpPolicy": MlpPolicy, "CnnPolicy": CnnPolicy, "MultiInputPolicy": MultiInputPolicy}
"""By the names that the algorithms take."""


class SeparateFeatures(MlpPolicy):
    """With a features extractor each for policy and value, as two optimizers need: goes before the policy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"share_features_extractor": False, **kwargs})


class SeparateCnnPolicy(SeparateFeatures, CnnPolicy):
    """The policy for images, with separate features."""


class SeparateMultiInputPolicy(SeparateFeatures, MultiInputPolicy):
    """The policy for Dict observations, with separate features."""


SEPARATE_POLICIES: dict[str, type[BasePolicy]] = {
    "MlpPolicy": MlpPolicy,
    "CnnPolicy": SeparateCnnPolicy,
    "MultiInputPolicy": SeparateMultiInputPolicy,
}
"""The same, for algorithms with an optimizer for each network."""


class Evaluation(Protocol):
    """A policy at a batch of B observations and actions, and the way back from derivatives by what it says of them."""

    log_prob: Any
    """``(B,)`` log pi(a|s), in nats; None, as the others, if only the other part was evaluated."""
    entropy: Any
    """``(B,)`` H[pi(.|s)], or -log pi(a|s) where it has no closed form."""
    values: Any
    """``(B,)`` V(s), in reward units."""

    def kl(self, old: Any, reverse: bool = False) -> Any:
        """
        :param old: ``(B, K)`` rows of `ActorCritic.describe`
        :param reverse: whether KL(pi || old) is wanted
        :return: ``(B,)`` KL(old || pi), in nats
        """

    def backward(
        self, log_prob: Any = None, entropy: Any = None, values: Any = None, kl: tuple[Any, Any] | None = None
    ) -> None:
        """
        Gradients of a loss by the parameters of the networks that it depends on.

        :param log_prob: ``(B,)`` its derivative by the log-probabilities; None if it does not depend on them
        :param entropy: ``(B,)`` by the entropies
        :param values: ``(B,)`` by the values
        :param kl: the old distributions and ``(B,)`` by their divergences
        """

    def gradient(self, parameters: Sequence[nn.Parameter], log_prob: Any, entropy: Any = None) -> th.Tensor:
        """
        :param parameters: P numbers together, of the policy
        :param log_prob: ``(B,)`` derivative of a function by the log-probabilities
        :param entropy: ``(B,)`` by the entropies; None if it does not depend on them
        :return: ``(P,)`` its gradient by the parameters
        """

    def fisher_product(self, parameters: Sequence[nn.Parameter]) -> Callable[[th.Tensor], th.Tensor]:
        """
        :param parameters: P numbers together, of the policy
        :return: v -> F v for ``(P,)``, with F the policy's Fisher matrix by these, the mean over the batch
        """


class ActorCritic(Protocol):
    """A policy and how it is evaluated; arrays are numpy's or PyTorch's."""

    policy: Any

    def array(self, values: Any) -> Any:
        """A numpy array, or a dict of them, as `evaluate` takes it."""

    def act(self, obs: Any) -> np.ndarray:
        """``(N, ...)`` sampled actions, as the policy's distribution gives them."""

    def values(self, obs: Any) -> np.ndarray:
        """``(B,)`` V of numpy observations."""

    def evaluate(self, obs: Any, actions: Any, parts: Collection[str] = PARTS) -> Evaluation:
        """The policy at a batch, or only its action distribution or its value."""

    def describe(self, obs: Any) -> Any:
        """``(B, K)`` the distributions, for `Evaluation.kl`."""

    def receive(self, descents: Iterable[Descent]) -> None:
        """Where gradients go from now on."""


class TorchActorCritic:
    """
    Any of SB3's actor-critic policies, by its own methods and autograd.

    :param policy: the policy
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy
        self._descents: list[Descent] = []

    def array(self, values: Any) -> Any:
        return obs_as_tensor(values, self.policy.device)

    def receive(self, descents: Iterable[Descent]) -> None:
        self._descents = list(descents)

    def act(self, obs: Any) -> np.ndarray:
        with th.no_grad():
            actions, _, _ = self.policy(self.array(obs))
        result: np.ndarray = actions.cpu().numpy()
        return result

    def values(self, obs: Any) -> np.ndarray:
        with th.no_grad():
            parts = [self.policy.predict_values(self.array(part)) for part in pieces_of(obs)]
        return th.cat(parts).flatten().cpu().numpy()

    def describe(self, obs: Any) -> th.Tensor:
        with th.no_grad():
            return th.cat([_flat(self.policy.get_distribution(part)) for part in pieces_of(obs)])

    def evaluate(self, obs: Any, actions: th.Tensor, parts: Collection[str] = PARTS) -> "TorchEvaluation":
        return TorchEvaluation(self.policy, obs, actions, parts, self._descents)


class TorchEvaluation:
    """See `Evaluation`; a graph hangs on it if gradients are enabled."""

    def __init__(self, policy: Any, obs: Any, actions: th.Tensor, parts: Collection[str], descents: list[Descent]) -> None:
        self._descents = descents
        values = log_prob = entropy = None
        if isinstance(policy.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        if "policy" not in parts:
            values = policy.predict_values(obs)
        elif "value" not in parts:
            distribution = policy.get_distribution(obs)
            log_prob, entropy = distribution.log_prob(actions), distribution.entropy()
        else:
            values, log_prob, entropy = policy.evaluate_actions(obs, actions)
        if log_prob is not None:
            self._distribution = _parts_of(policy.action_dist)
            entropy = -log_prob if entropy is None else entropy
        self._graph = (log_prob, entropy, None if values is None else values.flatten())
        self.log_prob, self.entropy, self.values = (None if tensor is None else tensor.detach() for tensor in self._graph)

    def _kl(self, old: th.Tensor, reverse: bool = False) -> th.Tensor:
        pairs = zip(_rebuilt(self._distribution, old), self._distribution, strict=True)
        divergences = [th.distributions.kl_divergence(*(pair[::-1] if reverse else pair)) for pair in pairs]
        return th.stack([d if d.dim() == 1 else d.sum(dim=1) for d in divergences]).sum(dim=0)

    def kl(self, old: th.Tensor, reverse: bool = False) -> th.Tensor:
        return self._kl(old, reverse).detach()

    def backward(
        self, log_prob: Any = None, entropy: Any = None, values: Any = None, kl: tuple[Any, Any] | None = None
    ) -> None:
        pairs: list[tuple[Any, Any]] = list(zip(self._graph, (log_prob, entropy, values), strict=True))
        if kl is not None:
            pairs.append((self._kl(kl[0]), kl[1]))
        pairs = [(tensor, slope) for tensor, slope in pairs if slope is not None]
        with ExitStack() as stack:
            for descent in self._descents:
                stack.enter_context(descent.receiving())
            th.autograd.backward([tensor for tensor, _ in pairs], [slope for _, slope in pairs])

    def gradient(self, parameters: Sequence[nn.Parameter], log_prob: Any, entropy: Any = None) -> th.Tensor:
        pairs = [(self._graph[0], log_prob)] + ([] if entropy is None else [(self._graph[1], entropy)])
        tensors, slopes = zip(*pairs, strict=True)
        return flatten(th.autograd.grad(tensors, parameters, slopes, retain_graph=True))

    def fisher_product(self, parameters: Sequence[nn.Parameter]) -> Callable[[th.Tensor], th.Tensor]:
        statistics = [statistic for part in self._distribution for statistic in _statistics(part)]
        statistics = [(value, fisher) for value, fisher in statistics if value.requires_grad]

        def head(moved: Sequence[th.Tensor]) -> list[th.Tensor]:
            return [fisher(direction) for direction, (_, fisher) in zip(moved, statistics, strict=True)]

        return fisher_product([value for value, _ in statistics], parameters, head)


def pieces_of(obs: Any) -> Iterable[Any]:
    """``obs`` in pieces of at most `ROWS`."""
    size = len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)
    for start in range(0, size, ROWS):
        rows = slice(start, start + ROWS)
        yield {key: value[rows] for key, value in obs.items()} if isinstance(obs, dict) else obs[rows]


def _parts_of(distribution: Any) -> list[th.distributions.Distribution]:
    """PyTorch's distributions that SB3's holds now; the next batch gives it others."""
    own = distribution.distribution
    return own if isinstance(own, list) else [own]


def _statistics(distribution: Any) -> list[tuple[th.Tensor, Callable[[th.Tensor], th.Tensor]]]:
    """What a distribution is a function of, and products with its Fisher matrix in it; no element is between two of these."""
    if isinstance(distribution, th.distributions.Normal):
        log_std = distribution.scale.log()
        fixed = log_std.detach()
        return [
            (distribution.loc, lambda t: gaussian_fisher(t, t, fixed)[0]),
            (log_std, lambda t: gaussian_fisher(t, t, fixed)[1]),
        ]
    probs = distribution.probs.detach()
    product = bernoulli_fisher if isinstance(distribution, th.distributions.Bernoulli) else categorical_fisher
    return [(distribution.logits, lambda t: product(t, probs))]


def _flat(distribution: Distribution) -> th.Tensor:
    """``(B, K)`` the numbers that make a distribution: logits, or means and standard deviations."""
    columns: list[th.Tensor] = []
    for part in _parts_of(distribution):
        columns += [part.loc, part.scale] if isinstance(part, th.distributions.Normal) else [part.logits]  # type: ignore[attr-defined]
    return th.cat(columns, dim=1)


def _rebuilt(like: Sequence[Any], rows: th.Tensor) -> list[th.distributions.Distribution]:
    """The distributions that `_flat` made ``rows`` of."""
    if isinstance(like[0], th.distributions.Normal):
        mean, std = rows.chunk(2, dim=1)
        return [th.distributions.Normal(mean, std)]
    sizes = [part.logits.shape[1] for part in like]
    return [type(part)(logits=logits) for part, logits in zip(like, rows.split(sizes, dim=1), strict=True)]
