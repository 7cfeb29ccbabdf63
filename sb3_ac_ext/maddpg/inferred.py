"""
The other agents' policies, inferred from what they do (Lowe et al. 2017, arXiv:1706.02275, section 4.2).

    once per call of `train`, before the gradient steps, for each agent i and each other agent j:
        take the latest joint transitions in which j was active
        mu_hat_ij: descend -mean [ log mu_hat_ij(a_j|o_j) + lambda H(mu_hat_ij(.|o_j)) ], one step             (eq. 7)
        mu_hat'_ij <- tau mu_hat_ij + (1 - tau) mu_hat'_ij
    in each update of the critics:
        y_i = r_i + gamma (1 - d_i) Q'_i(o'_1 .. o'_N, a'_1 .. mu'_i(o'_i) .. a'_N),  a'_j from mu_hat'_ij(o'_j)     (eq. 8)
"""

from collections.abc import Mapping
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ac_ext.base.off_policy import OffPolicyMixin
from sb3_ac_ext.engine import Network
from sb3_ac_ext.envs.joint_spaces import JointBox, size
from sb3_ac_ext.functional.divergences import categorical_kl
from sb3_ac_ext.functional.gumbel import gumbel_noise, one_hot_argmax
from sb3_ac_ext.functional.inference import Fit, categorical_fit, squashed_gaussian_fit
from sb3_ac_ext.functional.multi_agent import active_mean
from sb3_ac_ext.maddpg.buffer import JointReplayBuffer, JointTransitions
from sb3_ac_ext.maddpg.logged import log_keys
from sb3_ac_ext.maddpg.networks import JointModel
from sb3_ac_ext.validation import ArgumentError

LOG_STD = (-20.0, 2.0)
"""What the logarithm of a standard deviation is kept in."""


class InferredPolicies(JointModel):
    """
    mu_hat_ij(o_j) of every pair of an agent i and another agent j, P = N (N - 1) networks with no parameter in common.

    :param args: `JointModel`'s
    :param kwargs: `JointModel`'s
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, groups=(), **kwargs)
        agents = range(len(self.layout))
        self.pairs = [(i, j) for i in agents for j in agents if i != j]
        """i and j of each network."""
        outputs = [choices or 2 * size(part) for choices, part in zip(self.layout.choices, self.layout.actions, strict=True)]
        self.mu = nn.ModuleList(self._mlp(size(self.layout.observations[j]), outputs[j]) for _, j in self.pairs)

    def networks(self) -> list[nn.ModuleList]:
        """See `JointModel.networks`; each pair is a group of its own here."""
        return [self.mu]

    def names(self) -> dict[str, str]:
        """What the pairs are called in the log, by the numbers of i and j."""
        names = self.layout.names
        return {f"{i}_{j}": f"{names[i]}_of_{names[j]}" for i, j in self.pairs}

    def others(self, values: th.Tensor) -> th.Tensor:
        """
        :param values: ``(B, N)`` of each agent
        :return: ``(B, P)`` those of each pair's j
        """
        return th.stack([values[:, j] for _, j in self.pairs], dim=1)

    def outputs(self, obs: PyTorchObs) -> list[th.Tensor]:
        """
        :param obs: ``(B, ...)`` o of all agents
        :return: for each pair what its network makes of o_j: ``(B, n)`` logits, or ``(B, 2 A_j)`` mean and log std before tanh
        """
        features = self.extract_features(obs, self.features_extractor)
        inputs = [features[:, columns] for columns in self.layout.observations]
        return [network(inputs[j]) for (_, j), network in zip(self.pairs, self.mu, strict=True)]

    def fit(self, obs: PyTorchObs, actions: th.Tensor) -> Fit:
        """
        :param obs: ``(B, ...)`` o of all agents
        :param actions: ``(B, A)`` what they did
        :return: the two terms of the pairs' losses, ``(B, P)`` each
        """
        fits = [self._fit(j, output, actions) for (_, j), output in zip(self.pairs, self.outputs(obs), strict=True)]
        return Fit(*(th.stack(terms, dim=1) for terms in zip(*fits, strict=True)))

    def _fit(self, j: int, output: th.Tensor, actions: th.Tensor) -> Fit:
        own = actions[:, self.layout.actions[j]]
        return categorical_fit(output, own) if self.layout.choices[j] else squashed_gaussian_fit(*gaussian(output), own)

    def joint_actions(self, obs: PyTorchObs, actions: th.Tensor, sample: bool) -> th.Tensor:
        """
        For each agent the joint action in which it does what it does itself, and the others what it thinks they do.

        :param obs: ``(B, ...)`` o of all agents
        :param actions: ``(B, A)`` each agent's own
        :param sample: whether the others' are drawn; otherwise probabilities, or the tanh of a Gaussian's mean
        :return: ``(N, B, A)``
        """
        thought = dict(zip(self.pairs, self.outputs(obs), strict=True))
        agents, own = range(len(self.layout)), [actions[:, columns] for columns in self.layout.actions]
        joint = [[own[i] if i == j else self._act(j, thought[i, j], sample) for j in agents] for i in agents]
        return th.stack([th.cat(parts, dim=1) for parts in joint])

    def _act(self, j: int, output: th.Tensor, sample: bool) -> th.Tensor:
        if self.layout.choices[j]:
            return one_hot_argmax(output + gumbel_noise(output)) if sample else output.softmax(dim=1)
        mean, log_std = gaussian(output)
        return th.tanh(mean + log_std.exp() * th.empty_like(mean).normal_() if sample else mean)

    def departure(self, obs: PyTorchObs, outputs: th.Tensor) -> th.Tensor:
        """
        How far the models are from the policies themselves.

        :param obs: ``(B, ...)`` o of all agents
        :param outputs: ``(B, A)`` of their actors for these, see `JointActor.outputs`
        :return: ``(B, P)`` KL(mu_j || mu_hat_ij) in nats where j chooses; for a Box, where mu_j is a point, its mean absolute
            distance from the tanh of the mean
        """
        found = []
        for (_, j), output in zip(self.pairs, self.outputs(obs), strict=True):
            true = outputs[:, self.layout.actions[j]]
            if self.layout.choices[j]:
                found.append(categorical_kl(true, output))
            else:
                found.append((true.tanh() - gaussian(output)[0].tanh()).abs().mean(dim=1))
        return th.stack(found, dim=1)


def gaussian(output: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :param output: ``(B, 2 A)`` of a network
    :return: ``(B, A)`` mean and log std, which is kept in `LOG_STD`
    """
    mean, log_std = output.chunk(2, dim=1)
    return mean, log_std.clamp(*LOG_STD)


class InferenceMixin(OffPolicyMixin):
    """What MADDPG does with ``inferred_policies``, and does not without."""

    policy: Any
    inferred_policies: bool
    inferred_batch_size: int
    inferred_ent_coef: float
    inferred_learning_rate: Any
    inferred_input: str
    actor_learning_rate: Any

    def _check_arguments(self) -> None:
        super()._check_arguments()
        made = self.policy_kwargs.get("inferred_policies", self.inferred_policies)
        if made != self.inferred_policies:
            raise ArgumentError(
                f"inferred_policies must be what the policy was made with, {made}, got {self.inferred_policies}"
            )
        agents = len(self.action_space.parts) if isinstance(self.action_space, JointBox) else 1
        if self.inferred_policies and agents == 1:
            raise ArgumentError("inferred_policies must be False with one agent, which has no others to infer, got True")

    def _setup_model(self) -> None:
        if self.inferred_policies is True:  # anything else is refused
            self.policy_kwargs = {**self.policy_kwargs, "inferred_policies": True}  # not in the caller's dict
        super()._setup_model()

    def _networks(self) -> Mapping[str, Network]:
        """The inferred policies, all pairs as one network."""
        if not self.policy.inferred_policies:
            return {}
        inferred: InferredPolicies = self.policy.inferred
        rate = self.actor_learning_rate if self.inferred_learning_rate is None else self.inferred_learning_rate
        return {
            "inferred": self._network(
                *("inferred", inferred, inferred.optimizer, self.policy.inferred_target),
                rate=rate,
                clipped=inferred.network_parameters(),
            )
        }

    def _infer(self) -> Mapping[str, th.Tensor]:
        """One step of each pair on the latest transitions; what there is to be logged of it, by its name, ``(P,)``."""
        buffer = self.replay_buffer
        assert isinstance(buffer, JointReplayBuffer)
        batch = buffer.latest(self.inferred_batch_size, self._vec_normalize_env)
        return self._engine.run(self._update_inferred, (batch.observations, batch.actions, batch.active))

    def _update_inferred(self, batch: tuple[th.Tensor, th.Tensor, th.Tensor]) -> dict[str, th.Tensor]:
        """The sum of the pairs' losses, each of which is a mean over the transitions in which j was active."""
        observations, actions, active = batch
        inferred: InferredPolicies = self.policy.inferred
        fit, active = inferred.fit(observations, actions), inferred.others(active)
        losses = active_mean(fit.loss(self.inferred_ent_coef), active)  # (P,)
        loss = losses.sum()
        self._engine.minimise(loss, "inferred")
        self._engine.follow("inferred", self.tau)
        entropies = active_mean(fit.entropy.detach(), active)
        return {"inferred_loss": loss, "losses": losses.detach(), "entropies": entropies}

    def _compare(self, batch: tuple[th.Tensor, th.Tensor]) -> dict[str, th.Tensor]:
        """The only place where policies of others are looked at; nothing is learned from it."""
        observations, active = batch
        inferred: InferredPolicies = self.policy.inferred
        with th.no_grad():
            departure = inferred.departure(observations, self.policy.actor.outputs(observations))
            return {"departures": active_mean(departure, inferred.others(active))}

    def _record_inferred(self, fitted: Mapping[str, th.Tensor], batch: JointTransitions) -> None:
        """
        :param fitted: from `_infer`
        :param batch: from the replay buffer
        """
        inferred: InferredPolicies = self.policy.inferred
        compared = self._engine.run(self._compare, (batch.observations, batch.active))
        keys = log_keys(inferred.names(), "loss", "entropy", "kl", "distance")
        kinds = ["kl" if inferred.layout.choices[j] else "distance" for _, j in inferred.pairs]
        found = th.stack([fitted["losses"], fitted["entropies"], compared["departures"]]).tolist()
        for pair, (kind, values) in enumerate(zip(kinds, zip(*found, strict=True), strict=True)):
            for ending, value in zip(("loss", "entropy", kind), values, strict=True):
                self.logger.record(f"inferred/{keys[ending][pair]}", value)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, *(["policy.inferred.optimizer"] if self.policy.inferred_policies else [])], tensors
