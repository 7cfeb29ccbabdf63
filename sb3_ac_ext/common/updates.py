"""The update loop that the algorithms share, so that each `train` reads as its paper."""

from collections import defaultdict
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sb3_ac_ext.common.schedules import as_schedule
from sb3_ac_ext.common.validation import NonFiniteError, check_mapping, check_number


def parameters_of(optimizer: th.optim.Optimizer) -> list[th.nn.Parameter]:
    """
    :param optimizer: an optimizer
    :return: everything that it changes
    """
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class TensorMeans:
    """Means of scalar tensors, read together: one device synchronisation however many there are."""

    def __init__(self) -> None:
        self._values: defaultdict[str, list[th.Tensor]] = defaultdict(list)

    def add(self, name: str, value: th.Tensor) -> None:
        """
        :param name: of the quantity
        :param value: ``()`` one value of it
        """
        self._values[name].append(value.detach())

    def read(self) -> dict[str, float]:
        """
        :return: the mean of each quantity; everything added so far is forgotten
        """
        values, self._values = self._values, defaultdict(list)
        if not values:
            return {}
        return dict(zip(values, th.stack([th.stack(v).mean() for v in values.values()]).tolist(), strict=True))


class UpdateMixin(BaseAlgorithm):
    """
    Learning rates, gradient steps, clipping and logging for algorithms with several optimizers.

    An algorithm names its optimizers in `_optimizers`. The network called ``x`` there has the learning rate
    ``x_learning_rate`` if the algorithm has such an argument and it is not None, ``learning_rate`` otherwise.
    """

    max_grad_norm: float | dict[str, float] | None = None
    _rates: dict[str, FloatSchedule]
    _max_grad_norms: dict[str, float]
    _means: TensorMeans

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        """The optimizers by the name of their network."""
        raise NotImplementedError

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = as_schedule("learning_rate", self.learning_rate)

    def _setup_updates(self) -> None:
        """Parse the arguments that belong to single networks; call at the end of `_setup_model`."""
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

    def _begin_updates(self) -> None:
        """Training mode and this moment's learning rates."""
        self.policy.set_training_mode(True)
        progress = self._current_progress_remaining
        rate = self.lr_schedule(progress)
        self.logger.record("train/learning_rate", rate)
        for name, optimizer in self._optimizers().items():
            if name in self._rates:
                own = self._rates[name](progress)
                self.logger.record(f"train/{name}_learning_rate", own)
            update_learning_rate(optimizer, self._rates[name](progress) if name in self._rates else rate)

    def _descend(self, network: str, loss: th.Tensor) -> None:
        """
        One gradient step of one network; gradients of the others are not computed.

        :param network: its name in `_optimizers`
        :param loss: ``()`` its loss
        """
        optimizer = self._optimizers()[network]
        parameters = parameters_of(optimizer)
        optimizer.zero_grad()
        loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if network in self._max_grad_norms:
            clip_grads_with_norm_(parameters, self._max_grad_norms[network], norm)
        optimizer.step()
        self._means.add(f"{network}_loss", loss)
        self._means.add(f"{network}_grad_norm", norm)

    def _end_updates(self) -> None:
        """
        Log the means and check that the networks are still finite.

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite
        """
        optimizers = self._optimizers()
        for name, optimizer in optimizers.items():
            self._means.add(f"{name}_parameters", get_total_norm(parameters_of(optimizer)))
        means = self._means.read()
        norms = {name: means.pop(f"{name}_parameters") for name in optimizers}
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for key, value in means.items():
            self.logger.record(f"train/{key}", value)
        for name, norm in norms.items():
            self._check_finite(name, "parameters", norm)
            self._check_finite(name, "loss", means.get(f"{name}_loss", 0.0))

    def _check_finite(self, network: str, what: str, value: Any) -> None:
        if not abs(value) < float("inf"):
            raise NonFiniteError(
                f"{type(self).__name__}: the {what} of the {network} became non-finite ({value}) by update {self._n_updates}; "
                "lower the learning rate, set max_grad_norm, or normalise observations and rewards"
            )

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_rates", "_max_grad_norms", "_means"]
