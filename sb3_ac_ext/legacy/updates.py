"""The update loop that the algorithms share, so that each `train` reads as its paper."""

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import cache
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import FloatSchedule

from sb3_ac_ext.base.schedules import as_schedule
from sb3_ac_ext.base.typing import constructor_keys
from sb3_ac_ext.legacy.capture import Capture, CudaRecording
from sb3_ac_ext.legacy.descent import Descent, FlatAdam, backward, constant, parameters_of
from sb3_ac_ext.legacy.fused_mlp import Fused
from sb3_ac_ext.legacy.means import TensorMeans
from sb3_ac_ext.legacy.participants import Participants, modules_in
from sb3_ac_ext.legacy.tape import Tape
from sb3_ac_ext.legacy.workspace import Workspace
from sb3_ac_ext.validation import NonFiniteError, check_mapping, check_number, check_switch

Batch = TypeVar("Batch")


class UpdateMixin(BaseAlgorithm):
    """
    Learning rates, gradient steps and logging for algorithms with several optimizers.

    An algorithm names its optimizers in `_optimizers`. The network called ``x`` there has the learning rate
    ``x_learning_rate`` if the algorithm has such an argument and it is not None, ``learning_rate`` otherwise.
    """

    engine: bool = True
    max_grad_norm: float | dict[str, float] | None = None
    _rates: dict[str, FloatSchedule]
    _max_grad_norms: dict[str, float]
    _means: TensorMeans
    _descents: dict[str, Descent]
    _others: dict[str, list[th.nn.Parameter]]
    _workspace: Workspace
    _capture: Capture
    _records: bool
    _participants: Participants

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        """The optimizers by the name of their network."""
        raise NotImplementedError

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = as_schedule("learning_rate", self.learning_rate)

    def _setup_updates(self) -> None:
        """Parse the arguments that belong to single networks; call at the end of `_setup_model`."""
        check_switch("engine", self.engine)
        names = list(self._optimizers())
        rates = {name: getattr(self, f"{name}_learning_rate", None) for name in names}
        self._rates = {name: as_schedule(f"{name}_learning_rate", rate) for name, rate in rates.items() if rate is not None}
        bounds = self.max_grad_norm
        if not isinstance(bounds, dict):
            bounds = {} if bounds is None else dict.fromkeys(names, bounds)
        for name, bound in check_mapping("max_grad_norm", bounds, required=(), optional=names).items():
            check_number(f"max_grad_norm[{name!r}]", bound, low=1e-12)
        self._max_grad_norms = bounds
        self._means = TensorMeans()
        self._workspace = Workspace()
        self._capture = Capture(self._means, CudaRecording if self.device.type == "cuda" else Tape)
        self._records, self._participants = False, Participants(self, [])
        for module in self.policy.modules():
            if isinstance(module, Fused):
                module.fused = self.engine
        self._descents = {}
        self._look_around()

    def _choose_descent(self, network: str, optimizer: th.optim.Optimizer) -> Descent:
        """Flat steps where they are possible now: memory, layers, hooks may have changed since the last time."""
        current = self._descents.get(network)
        if self.engine and isinstance(current, FlatAdam) and current.optimizer is optimizer and current.is_current():
            return current
        fused = self._fused(optimizer)
        if self.engine and FlatAdam.obstacle(optimizer, fused) is None and FlatAdam.in_step(optimizer):
            return FlatAdam(optimizer, fused)
        return Descent(optimizer)

    def _fused(self, optimizer: th.optim.Optimizer) -> list[Fused]:
        own = {id(parameter) for parameter in parameters_of(optimizer)}
        fused = [module for module in self.policy.modules() if isinstance(module, Fused)]
        return [module for module in fused if own.issuperset(map(id, module.parameters()))]

    def engine_report(self) -> dict[str, str]:
        """
        What runs on the fast paths, and why something does not.

        :return: a sentence for each part
        """
        self._look_around()
        report = {}
        for name, optimizer in self._optimizers().items():
            obstacle = FlatAdam.obstacle(optimizer, self._fused(optimizer)) if self.engine else "engine=False"
            report[f"{name} update"] = "fused layers, flat Adam" if obstacle is None else f"PyTorch: {obstacle}"
        obstacle = self._capture_obstacle([text for text in report.values() if text.startswith("PyTorch")])
        report["operations"] = "recorded and replayed" if obstacle is None else f"from Python: {obstacle}"
        return report

    def _capture_obstacle(self, ordinary: list[Any]) -> str | None:
        """
        :param ordinary: networks that are not updated flat
        :return: why updates cannot be recorded and replayed; None if they can
        """
        if not self.engine:
            return "engine=False"
        if self.device.type not in ("cpu", "cuda"):
            return f"the device is {self.device}"
        if ordinary:
            return "not every network is updated flat"
        if th.is_anomaly_enabled():
            return "PyTorch looks for anomalies"
        return self._participants.obstacle() or self._capture.obstacle

    def _look_around(self) -> None:
        """Notice modules and parameters that somebody has replaced."""
        modules = modules_in(self.policy)
        if not self._participants.are(modules):
            self._participants = Participants(self, modules)
            self._others = {}

    def _choose_paths(self) -> None:
        """How each network is updated, and whether that is recorded, as everything is now."""
        self._look_around()
        self._descents = {name: self._choose_descent(name, optimizer) for name, optimizer in self._optimizers().items()}
        ordinary = [descent for descent in self._descents.values() if not isinstance(descent, FlatAdam)]
        self._records = self._capture_obstacle(ordinary) is None
        if self._records:
            self._capture.fix(self._fixed())

    def _fixed(self) -> Hashable:
        """What a recorded update has read from Python, and what it writes to."""
        values = tuple(getattr(self, name, None) for name in _arguments(type(self)))
        numbers = tuple(value for value in values if isinstance(value, (int, float, str)))
        written = tuple(descent.fixed() for descent in self._descents.values() if isinstance(descent, FlatAdam))
        return numbers, tuple(self._max_grad_norms.items()), written, self._participants

    def _begin_updates(self) -> None:
        """Training mode and this moment's learning rates."""
        self._choose_paths()
        self.policy.set_training_mode(True)
        progress = self._current_progress_remaining
        rate = self.lr_schedule(progress)
        self.logger.record("train/learning_rate", rate)
        for name, descent in self._descents.items():
            own = self._rates[name](progress) if name in self._rates else rate
            if name in self._rates:
                self.logger.record(f"train/{name}_learning_rate", own)
            descent.set_rate(own)

    def _descend(self, network: str, loss_of: Callable[[Batch], th.Tensor], batch: Batch) -> None:
        """
        One gradient step of one network; all others are constants of its loss.

        :param network: its name in `_optimizers`
        :param loss_of: from a batch to the scalar loss
        :param batch: the batch
        """
        with self._workspace.lend() if self.engine else nullcontext():
            with constant(self._parameters_except(network)):
                loss = loss_of(batch)
            backward(loss, [self._descents[network]])
            loss = loss.detach()
        self._step(network)
        self._means.add(f"{network}_loss", loss)

    def _step(self, network: str) -> None:
        """
        Clip and apply the gradients of one network.

        :param network: its name in `_optimizers`
        """
        descent = self._descents[network]
        norm = descent.gradient_norm()
        if network in self._max_grad_norms:
            descent.clip(self._max_grad_norms[network], norm)
        descent.step()
        self._means.add(f"{network}_grad_norm", norm)
        if not self._records:
            descent.settle()

    def _parameters_except(self, network: str) -> list[th.nn.Parameter]:
        """The trained parameters that ``network`` does not have."""
        if network not in self._others:
            parameters = {name: parameters_of(optimizer) for name, optimizer in self._optimizers().items()}
            own = {id(parameter) for parameter in parameters[network]}
            others = {id(parameter): parameter for group in parameters.values() for parameter in group}
            self._others[network] = [parameter for key, parameter in others.items() if key not in own]
        return self._others[network]

    def _end_updates(self) -> None:
        """
        Log the means and check that the networks are still finite.

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite
        """
        means = self._means.read({f"{name}_parameters": descent.norm() for name, descent in self._descents.items()})
        norms = {name: means.pop(f"{name}_parameters") for name in self._descents}
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for key, value in means.items():
            self.logger.record(f"train/{key}", value)
        for name, norm in norms.items():
            self._check_finite(name, "parameters", norm)
        for key, value in means.items():
            if key.endswith("_loss"):
                self._check_finite(key.removesuffix("_loss"), "loss", value)

    def _check_finite(self, network: str, what: str, value: Any) -> None:
        if not abs(value) < float("inf"):
            raise NonFiniteError(
                f"{type(self).__name__}: the {what} of the {network} became non-finite ({value}) by update {self._n_updates}; "
                "lower the learning rate, set max_grad_norm, or normalise observations and rewards"
            )

    def _excluded_save_params(self) -> list[str]:
        derived = (
            "_rates",
            "_max_grad_norms",
            "_means",
            "_descents",
            "_others",
            "_workspace",
            "_capture",
            "_participants",
        )
        return [*super()._excluded_save_params(), *derived]


@cache
def _arguments(kind: Any) -> tuple[str, ...]:
    return tuple(sorted(constructor_keys(kind)))
