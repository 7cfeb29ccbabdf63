"""What algorithms share that train by the engine: rates, bounds, the log, acting, and what a model leaves behind."""

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import FloatSchedule
from torch import nn

from sb3_ac_ext.base.arguments import POLICY_GETS, check_kwargs
from sb3_ac_ext.base.declarations import CommonArguments
from sb3_ac_ext.base.schedules import as_schedule
from sb3_ac_ext.engine import Engine, Network
from sb3_ac_ext.signatures import arguments_of, check_arguments, documented
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, NonFiniteError, check_keys, check_mapping, check_number

ATTRIBUTES = {"stats_window_size": "_stats_window_size", "policy": "policy_class"}
"""Where SB3 keeps arguments under other names than theirs."""


class TrainingMixin(BaseAlgorithm):
    """
    Goes before the SB3 class, whose networks are trained as `_networks` says.

    An update function runs through ``self._engine``, see `Engine`. It may be recorded and replayed, so it does nothing
    but operations on tensors.
    """

    declarations: ClassVar[type] = CommonArguments
    """What is declared of the arguments that the algorithms of a kind share."""
    written_doc: ClassVar[str | None]
    """The docstring as it stands in the module; `documented` makes the one that is shown."""
    engine: bool = True
    max_grad_norm: float | dict[str, float] | None = None
    _engine: Engine
    _training_mode: "TrainingMode"
    _acting_lock: threading.RLock
    """Of SB3's policies, whose distributions are one for all threads."""
    _schedules: dict[str, tuple[Any, FloatSchedule]]
    _given_rate: Any
    """What ``lr_schedule`` was made of; it may have been replaced since."""
    _flat_space: tuple[Any, bool] = (None, False)
    """An observation space, and whether it has numbers in one vector."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        check_keys(f"{cls.__name__}()", kwargs, arguments_of(cls).keys() | {"_init_setup_model"})
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.written_doc, cls.__doc__ = cls.__doc__, documented(cls)

    def _check_arguments(self) -> None:
        """
        Called by `_setup_model`, so after `load` too: the arguments as they are declared, and what a subclass adds to that.

        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if one is out of range or contradicts another
        :raises UnsupportedError: if the spaces or a combination of arguments cannot be served
        """
        for name, number in check_arguments(type(self), self._arguments()).items():
            setattr(self, ATTRIBUTES.get(name, name), number)
        check_kwargs("policy_kwargs", self.policy_kwargs, self.policy_class, POLICY_GETS)

    def _arguments(self) -> dict[str, Any]:
        """The constructor's arguments as they are now; their defaults where a user's class does not keep them."""
        arguments = arguments_of(type(self)).items()
        return {name: getattr(self, ATTRIBUTES.get(name, name), argument.default) for name, argument in arguments}

    def _networks(self) -> Mapping[str, Network]:
        """The networks that are trained, by their names, as everything is now; see `_network`."""
        raise NotImplementedError

    def _network(
        self,
        name: str,
        module: nn.Module | None,
        optimizer: th.optim.Optimizer,
        target: nn.Module | None = None,
        *,
        rate: Any = None,
        weight_decay: float = 0.0,
        clipped: Sequence[Sequence[nn.Parameter]] | None = None,
    ) -> Network:
        """
        :param name: of the network, in the log and in ``max_grad_norm``
        :param module: the network
        :param optimizer: what trains it
        :param target: what follows it
        :param rate: the argument for its own learning rate; None for ``learning_rate``
        :param weight_decay: L2 decay of its weights
        :param clipped: parameters whose gradients are bounded each by themselves; None for all together
        :return: the record for the engine
        :raises ArgumentError: for a bound in ``max_grad_norm`` that is none
        """
        if self.learning_rate != self._given_rate:
            self._setup_lr_schedule()
        progress = self._current_progress_remaining
        current = self.lr_schedule(progress) if rate is None else self._schedule(name, rate)(progress)
        bound = self.max_grad_norm.get(name) if isinstance(self.max_grad_norm, dict) else self.max_grad_norm
        if bound is not None:
            check_number(f"max_grad_norm[{name!r}]", bound, low=1e-12)
        largest = None if bound is None else float(bound)
        return Network(module, optimizer, target, current, float(weight_decay), largest, clipped)

    def _schedule(self, name: str, rate: Any) -> FloatSchedule:
        given, schedule = self._schedules.get(name, (None, None))
        if schedule is None or given is not rate:
            schedule = as_schedule(f"{name}_learning_rate", rate)
            self._schedules[name] = rate, schedule
        return schedule

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule, self._given_rate = as_schedule("learning_rate", self.learning_rate), self.learning_rate

    def _setup_engine(self) -> None:
        """Call at the end of `_setup_model`."""
        self._make_engine()
        names = list(self._networks())
        if isinstance(self.max_grad_norm, dict):
            check_mapping("max_grad_norm", self.max_grad_norm, required=(), optional=names)

    def _make_engine(self) -> None:
        self._schedules = {}
        self._training_mode = TrainingMode(self.policy)
        self._acting_lock = threading.RLock()
        self._engine = Engine(self, self._networks, enabled=self.engine, device=self.device)

    # Training

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        """See SB3; not where a model is made, as one that was trained on CUDA may act on a CPU."""
        options = "policy_kwargs['optimizer_kwargs']"
        for group in [group for network in self._networks().values() for group in network.optimizer.param_groups]:
            if group.get("capturable") and self.device.type == "cpu":
                raise ArgumentError(f"{options}['capturable'] must be False to learn on a CPU, got True")
            if group.get("differentiable"):
                raise ArgumentError(f"{options}['differentiable'] must be False, got True")
            for name, value in group.items():
                if isinstance(value, np.ndarray):  # which no tensor can be multiplied in place with
                    raise ArgumentTypeError(f"{options}[{name!r}] must be a number, got {value!r} of type ndarray")
        return super()._setup_learn(*args, **kwargs)

    @contextmanager
    def _updates(self) -> Iterator[Engine]:
        """
        Gradient steps: rates and training mode before, the log and the search for NaN after.

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        if self._engine.enabled is not self.engine:
            self._make_engine()
        self._set_training_mode(True)
        self._engine.begin()
        self._record_rates()
        try:
            yield self._engine
        except ValueError:  # as of PyTorch's distributions
            self._engine.end()
            self._check_finite({})  # which says where it comes from, if it is that
            raise
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            raise NonFiniteError(
                f"{type(self).__name__}: a step became larger than a float32 by update {self._n_updates}; "
                "lower the learning rate"
            ) from error
        means = self._engine.end()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, value in means.items():
            self.logger.record(f"train/{name}", value)
        self._check_finite(means)

    def _record_rates(self) -> None:
        self.logger.record("train/learning_rate", self.lr_schedule(self._current_progress_remaining))
        for name in self._schedules.keys() & self._engine.networks.keys():
            self.logger.record(f"train/{name}_learning_rate", self._engine.networks[name].rate)

    def _check_finite(self, means: Mapping[str, float]) -> None:
        for name, value in self._engine.parameter_norms().items():
            self._raise_unless_finite(name, "parameters", value)
        for name, value in means.items():
            if name.endswith("_loss"):
                self._raise_unless_finite(name.removesuffix("_loss"), "loss", value)

    def _raise_unless_finite(self, network: str, what: str, value: float) -> None:
        if not abs(value) < float("inf"):
            raise NonFiniteError(
                f"{type(self).__name__}: the {what} of the {network} became non-finite ({value}) by update {self._n_updates}; "
                "lower the learning rate, set max_grad_norm, or normalise observations and rewards"
            )

    def engine_report(self) -> dict[str, str]:
        """
        What the engine replays, and why it does not replay the rest.

        :return: a sentence for each function that has run, and for acting if it is never replayed
        """
        if not self.engine:
            return {"engine": "engine=False"}
        obstacle = self._acting_obstacle(self.policy)
        return self._engine.report() | ({} if obstacle is None else {"act": f"ordinary: {obstacle}"})

    # Acting

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        The policy's action, see SB3's ``BaseAlgorithm.predict``; for flat observations on a CPU it is replayed.

        :param observation: ``(...)`` one observation or ``(N, ...)`` of them
        :param state: passed through
        :param episode_start: not used, policies are not recurrent
        :param deterministic: whether a stochastic policy gives its mode
        :return: action or ``(N, ...)`` actions in the environment's range, and ``state``
        :raises ValueError: for an observation that is not of the environment's space, and where SB3 raises it
        """
        actions = self._replayed_actions(self.policy, observation, deterministic)
        if actions is None:
            with self._acting_lock:
                return super().predict(observation, state, episode_start, deterministic)
        return actions, state

    def _replayed_actions(
        self, policy: BasePolicy, observation: Any, deterministic: bool, *options: Hashable
    ) -> np.ndarray | None:
        """
        :param policy: that acts
        :param observation: see `predict`
        :param deterministic: see `predict`
        :param options: what `_act` takes besides
        :return: the action or actions; None where SB3's ordinary path is to be taken
        """
        shape = self.observation_space.shape
        if not self.engine or type(observation) is not np.ndarray or self._acting_obstacle(policy) is not None:
            return None
        single = observation.shape == shape
        batch = observation[None] if single else observation
        if batch.shape[1:] != shape or len(batch) == 0:
            return None
        if policy.training:
            self._set_training_mode(False)
        outputs = self._engine.evaluate(self._act, self._acting_batch(batch), bool(deterministic), *options)
        if outputs is None:
            return None
        actions = outputs["actions"].reshape(-1, *self.action_space.shape)  # type: ignore[misc]  # a Box has one
        if policy.squash_output:
            actions = policy.unscale_action(actions)
        elif isinstance(self.action_space, spaces.Box):
            actions = np.clip(actions, self.action_space.low, self.action_space.high)
        return actions.squeeze(axis=0) if single else actions

    def _acting_obstacle(self, policy: BasePolicy) -> str | None:
        """Why actions do not follow from a policy's networks and an observation of numbers alone; None if they do."""
        space, kind = self.observation_space, type(policy)
        if self._flat_space[0] is not space:
            self._flat_space = space, isinstance(space, spaces.Box) and not is_image_space(space)
        if not self._flat_space[1]:
            return f"observations are {space}"
        if super().predict.__func__ is not BaseAlgorithm.predict:  # type: ignore[attr-defined]  # a method
            return "SB3's class acts in its own way"
        if kind.predict is not BasePolicy.predict or kind.obs_to_tensor is not BasePolicy.obs_to_tensor:
            return f"a {kind.__name__} acts in its own way"
        return None if self.device.type == "cpu" else f"the device is {self.device}"

    def _acting_batch(self, observations: np.ndarray) -> tuple[np.ndarray, ...]:
        """What `_act` computes actions of, ``(N, ...)`` each."""
        return (observations,)

    def _act(self, batch: tuple[th.Tensor, ...], deterministic: bool) -> dict[str, th.Tensor]:
        with self._acting_lock:
            return {"actions": self.policy._predict(batch[0], deterministic)}

    def _set_training_mode(self, mode: bool) -> None:
        if self._training_mode.policy is not self.policy:
            self._training_mode = TrainingMode(self.policy)
        self._training_mode.set(mode)

    # What is left behind

    def _excluded_save_params(self) -> list[str]:
        own = ["_engine", "_training_mode", "_acting_lock", "_schedules", "_given_rate", "_flat_space"]
        return [*super()._excluded_save_params(), *own]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_engine", "_training_mode", "_acting_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "policy" in state:
            self._make_engine()


class TrainingMode:
    """
    ``policy.set_training_mode`` in a tenth of its time, where all that it does is to set the flags of its modules.

    :param policy: the policy
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self._trees: list[dict[str, Any]] = []
        self._copies: list[dict[str, Any]] = []
        self._flags: list[dict[str, Any]] = []

    def set(self, mode: bool) -> None:
        """
        :param mode: True for training
        """
        if not self._flags or self._trees != self._copies or "set_training_mode" in vars(self.policy):
            self._look(mode)
        else:
            for flags in self._flags:
                flags["training"] = mode

    def _look(self, mode: bool) -> None:
        modules = list(self.policy.modules())
        self.policy.set_training_mode(not mode)
        before = [module.training for module in modules]
        self.policy.set_training_mode(mode)
        changed = [module for module, was in zip(modules, before, strict=True) if module.training is not was]
        plain = all(type(m).train is nn.Module.train and "train" not in vars(m) for m in modules)
        self._flags = [vars(module) for module in changed] if plain else []
        self._trees = [module._modules for module in modules]
        self._copies = [dict(tree) for tree in self._trees]
