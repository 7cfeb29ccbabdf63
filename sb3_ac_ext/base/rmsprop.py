"""RMSProp as the asynchronous algorithms have it."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch as th
from annotated_types import Interval

from sb3_ac_ext.signatures import check_given
from sb3_ac_ext.validation import NonNegative, Positive


class RMSprop(th.optim.Optimizer):
    """
    RMSProp with eps inside of the root (Mnih et al. 2016, arXiv:1602.01783, section 4; TensorFlow's).

        g <- alpha g + (1 - alpha) d^2
        theta <- theta - lr d / sqrt(g + eps)

    With ``start`` 1 it is TensorFlow's and SB3's ``RMSpropTFLike``, with 0 that of A3C.

    :param params: theta
    :param lr: learning rate
    :param alpha: share of g that is kept
    :param eps: is added to g, in squared units of the gradient
    :param start: g before the first step
    :raises TypeError: if a number is none
    :raises ValueError: if one is out of range
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: NonNegative,
        alpha: Annotated[float, Interval(ge=0, lt=1)] = 0.99,
        eps: Positive = 1e-5,
        start: NonNegative = 1.0,
    ) -> None:
        options = {"lr": lr, "alpha": alpha, "eps": eps, "start": start}
        check_given(RMSprop, options)
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See PyTorch; g begins here, so that no step is another than the others."""
        super().add_param_group(param_group)
        self._begin(self.param_groups[-1])

    def _begin(self, group: dict[str, Any]) -> None:
        """Have g of all parameters, those too that have taken the place of others."""
        for parameter in group["params"]:
            if "square_avg" not in self.state[parameter]:
                self.state[parameter]["square_avg"] = th.full_like(parameter, group["start"], requires_grad=False)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """
        One step by the parameters' gradients; those that have none stay, and so does their g.

        :param closure: not taken
        """
        assert closure is None
        for group in self.param_groups:
            self._begin(group)
            self._step(group, group["lr"])

    def step_at(self, lr: th.Tensor | float) -> None:
        """
        `step` as operations on tensors alone, which the engine can record.

        :param lr: learning rate of all groups
        """
        for group in self.param_groups:
            self._step(group, lr)

    @th.no_grad()
    def _step(self, group: dict[str, Any], lr: th.Tensor | float) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        gradients: Any = [parameter.grad for parameter in parameters]
        averages = [self.state[parameter]["square_avg"] for parameter in parameters]
        th._foreach_mul_(averages, group["alpha"])
        th._foreach_addcmul_(averages, gradients, gradients, 1 - group["alpha"])
        roots = th._foreach_add(averages, group["eps"])
        th._foreach_sqrt_(roots)
        steps = th._foreach_div(gradients, roots)
        th._foreach_mul_(steps, lr)
        th._foreach_sub_(parameters, steps)
