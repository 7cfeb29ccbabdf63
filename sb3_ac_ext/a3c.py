"""
Asynchronous advantage actor-critic (A3C; Mnih et al. 2016, arXiv:1602.01783, algorithm S3).

    each worker, over and over: take the learner's weights theta; T steps with this policy
        R_t = r_t + gamma R_{t+1}; behind the last step V(s_T), behind a termination 0
        d = gradient of sum -(R - V(s)) log pi(a|s) + vf_coef sum 1/2 (R - V(s))^2 - ent_coef sum H[pi(.|s)]
        send d
    learner, for each d, whatever theta has become meanwhile:
        g <- alpha g + (1 - alpha) d^2;  theta <- theta - learning_rate d / sqrt(g + eps)        (section 4)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import A2C
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import explained_variance

from sb3_ac_ext.actors.actor import Actor, Weights
from sb3_ac_ext.actors.on_policy import OnPolicyActorArguments, OnPolicyActorsMixin, with_final_values
from sb3_ac_ext.base.on_policy import evaluation, forget_distribution
from sb3_ac_ext.buffers.segments import Result, SegmentBatch, stacked
from sb3_ac_ext.engine import Network
from sb3_ac_ext.engine.network import identical
from sb3_ac_ext.functional.returns import gae
from sb3_ac_ext.functional.surrogates import reduced, squared_error
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import Acts, Needs, NonNegative, Positive, PositiveInt, UnitInterval

NUMBERS = ("gamma", "gae_lambda", "ent_coef", "vf_coef")
"""What a worker's gradient depends on, as the learner has it, besides "loss_reduction"."""


@dataclass(kw_only=True)
class Gradient(Result):
    """
    What a worker sends.

    :param gradients: d, by the names of the policy's parameters; those that the loss does not depend on are not there
    :param measures: what is logged of it
    """

    gradients: dict[str, np.ndarray]
    measures: dict[str, float]


class A3CArguments(OnPolicyActorArguments):
    """
    What a worker is told before it acts.

    :param vf_coef: weight of half the value's squared error; SB3's A2C has the whole one, so that its 0.5 is 1 here
    """

    gamma: Annotated[UnitInterval, Acts.ROLLOUT]
    ent_coef: Annotated[NonNegative, Acts.ROLLOUT]
    vf_coef: Annotated[NonNegative, Acts.ROLLOUT]


class Worker(Actor):
    """An actor that makes gradients of what it sees."""

    gamma: float
    gae_lambda: float
    ent_coef: float
    vf_coef: float
    loss_reduction: str
    _optimizer: th.optim.Optimizer | None = None
    """Never steps; it holds what is differentiated by."""

    def _networks(self) -> Mapping[str, Network]:
        parameters = [*self.policy.parameters()]
        if self._optimizer is None or not identical(parameters, self._optimizer.param_groups[0]["params"]):
            self._optimizer = th.optim.SGD(parameters)
        return {"policy": Network(self.policy, self._optimizer)}

    def gradient(self, weights: Weights) -> Gradient:
        """
        Act for some steps, and differentiate the loss of them.

        :param weights: whose settings have `NUMBERS`, "loss_reduction" and "n_steps"
        :return: the gradient
        :raises NonFiniteError: as `Actor.segment`, and if the gradient is not finite
        """
        segment = self.segment(weights)
        for name in (*NUMBERS, "loss_reduction"):
            setattr(self, name, weights.settings[name])
        self._mode.set(True)
        self._engine.begin()
        with self._lock:
            dtype = next(self.policy.parameters()).dtype
            batch = stacked([segment], self.policy.action_space, self.policy.device, dtype)
            outputs = self._engine.run(self._differentiate, with_final_values(self.policy, [segment], batch))
            measures = self._engine.end()
            forget_distribution(self.policy)
            named = self.policy.named_parameters()
            gradients = {name: one.grad.cpu().numpy().copy() for name, one in named if one.grad is not None}
        if not all(np.isfinite(gradient).all() for gradient in gradients.values()):
            self.refuse("gradient", segment)
        values, returns = (outputs[name].cpu().numpy().flatten() for name in ("values", "returns"))
        if returns.var() > 0:
            measures["explained_variance"] = float(explained_variance(values, returns))
        shared = {name: getattr(segment, name) for name in ("rewards", "dones", "infos", "original")}
        return Gradient(gradients=gradients, measures=measures, **shared)

    def _differentiate(self, batch: SegmentBatch) -> dict[str, th.Tensor]:
        values, log_prob, entropy = (part.view_as(batch.rewards) for part in evaluation(self.policy, batch))  # (T, N)
        with th.no_grad():
            next_values = batch.next_values(values, self.policy.predict_values(batch.last_observations).flatten())
            ends = batch.terminated, batch.truncated
            advantages = gae(batch.rewards, values, next_values, *ends, self.gamma, self.gae_lambda)
            returns = advantages + values
        policy_loss = reduced(-advantages * log_prob, self.loss_reduction)
        value_loss = reduced(0.5 * squared_error(values, returns), self.loss_reduction)
        entropy_loss = reduced(-entropy, self.loss_reduction)
        loss = policy_loss + self.vf_coef * value_loss + self.ent_coef * entropy_loss
        self._engine.differentiate(loss, "policy")
        losses = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy_loss": entropy_loss}
        return {**losses, "values": values, "returns": returns}


class A3C(OnPolicyActorsMixin, OnPolicyAlgorithm):
    """
    Workers that act and differentiate by themselves, each with weights that may be a few updates old, and one shared RMSProp.

    Differences from the paper: an update is atomic, so none is lost to another one that runs at the same time; a worker always
    takes ``n_steps`` steps of each of its environments, and episodes that end within them cut the returns, which are
    bootstrapped where an episode was truncated; gradients are clipped by the learner, their mean where
    ``gradients_per_update`` joins several; advantages may be GAE.

    With ``actors="inline"`` the workers act in turns, each with the newest weights, or with those of ``simulated_lag`` updates
    ago. One worker without lag is SB3's A2C where ``loss_reduction="mean"``, ``vf_coef=1``, ``max_grad_norm=0.5``,
    ``ent_coef=0``, and its optimizer ``RMSpropTFLike`` with ``rms_prop_init=1`` and ``rms_prop_eps=1e-5``;
    ``gradients_per_update=n_actors`` is that with the environments of all workers, one part of the batch each.

    A2C is as good for as many steps, and simpler; the asynchrony as such gains nothing (as many who have written both report).
    So take SB3's ``A2C`` where one process steps all environments fast enough, PPOX where steps are expensive, as it uses each
    several times, and IMPALA where workers are many or far away, since it corrects for their lag. A3C is for workers whose
    environments are slow and whose gradients cost more than the learner could compute alone, and for comparisons.

    As only gradients are sent, callbacks find rewards, dones and infos of a step in ``locals``, no actions and observations.

    Logged: ``train/policy_lag``, updates that there have been since a worker took the weights that its gradient is of;
    ``train/policy_loss``, ``train/value_loss``, ``train/entropy_loss``, ``train/explained_variance``, means over the gradients
    since the last log, each as its worker has it (a sum of ``n_steps`` terms per environment with ``loss_reduction="sum"``);
    ``train/policy_grad_norm``, the 2-norm of what an update was given, before it was clipped.

    :param max_grad_norm: bound on the 2-norm of the gradient by all parameters; None does not clip
    :param rms_prop_eps: is added to the mean square inside of the root, so in squared units of the gradient: 0.1 is large
        beside the gradients of small tasks with ``loss_reduction="mean"``, where 1e-5 (SB3's) learns faster
    :param use_rms_prop: whether RMSProp trains the policy, with decay 0.99 (other options as
        ``policy_kwargs={"optimizer_kwargs": {"alpha": 0.95}}``); otherwise, and with an ``optimizer_class`` in
        ``policy_kwargs``, SB3's policy says what does
    :param rms_prop_init: mean square before the first update: with 0 first steps are large, with 1 (TensorFlow's) small
    :param loss_reduction: a gradient is of the "sum" over a worker's samples, or of their "mean" (A2C), which is smaller by
        their number
    :param gradients_per_update: how many gradients an update takes the mean of; with ``n_actors`` of them and inline actors
        no gradient is older than another
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction, and where the environments of workers cannot be made
    :raises UnsupportedError: for spaces that SB3's A2C cannot take, and gSDE
    """

    sb3_class = OnPolicyAlgorithm
    declarations = A3CArguments
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = A2C.policy_aliases
    work = Worker.gradient
    overlaps = False

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 7e-4,
        n_steps: int = 5,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        ent_coef: float = 0.01,
        vf_coef: float = 0.5,
        max_grad_norm: float | dict[str, float] | None = 40.0,
        rms_prop_eps: Annotated[Positive, Acts.NEVER, Needs("use_rms_prop", True)] = 0.1,
        use_rms_prop: Annotated[bool, Acts.NEVER] = True,
        *,
        rms_prop_init: Annotated[NonNegative, Acts.NEVER, Needs("use_rms_prop", True)] = 0.0,
        loss_reduction: Annotated[Literal["mean", "sum"], Acts.ROLLOUT] = "sum",
        gradients_per_update: Annotated[PositiveInt, Acts.ROLLOUT] = 1,
        actors: Literal["inline", "ray"] = "inline",
        n_actors: int = 2,
        simulated_lag: int = 0,
        max_policy_lag: int | None = None,
        ray_address: str | None = None,
        actor_resources: dict[str, float] | None = None,
        actor_env_fn: Callable[..., gym.Env[Any, Any]] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        engine: bool = True,
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(**passed_on(A3C, locals()), use_sde=False, sde_sample_freq=-1, _init_setup_model=False)
        self.rms_prop_eps = rms_prop_eps
        self.use_rms_prop = use_rms_prop
        self.rms_prop_init = rms_prop_init
        self.loss_reduction = loss_reduction
        self.gradients_per_update = gradients_per_update
        if _init_setup_model:
            self._setup_model()

    @property
    def _actor_class(self) -> type[Actor]:
        return Worker

    def _networks(self) -> Mapping[str, Network]:
        return {"policy": self._network("policy", self.policy, self.policy.optimizer)}

    def _settings(self) -> dict[str, Any]:
        numbers = {name: float(getattr(self, name)) for name in NUMBERS}
        return {**super()._settings(), **numbers, "loss_reduction": self.loss_reduction}

    def _results_per_update(self) -> int:
        return self.gradients_per_update

    def train(self) -> None:
        """
        One step by the gradients that were taken, by their mean if there are several; for parameters that callbacks have put
        in the place of others since there is none.

        :raises NonFiniteError: if a gradient or a parameter is NaN or infinite afterwards
        """
        names = [name for name, _ in self.policy.named_parameters() if name in self._results[0].gradients]
        gradients = {name: np.mean([result.gradients[name] for result in self._results], axis=0) for name in names}
        with self._updates():
            self._run(self._step_by, (gradients,))
            self._n_updates += 1
        for result in self._results:
            for name, value in result.measures.items():
                self.logger.record_mean(f"train/{name}", value)
        if self._pool is not None:
            self._pool.begin(self._weights())

    def _step_by(self, batch: tuple[dict[str, th.Tensor]]) -> None:
        named = self.policy.named_parameters()  # others than before, where somebody has changed layers since
        products = [(parameter * batch[0][name]).sum() for name, parameter in named if name in batch[0]]
        if products:
            self._engine.minimise(th.stack(products).sum(), "policy")  # whose gradient is the one given
