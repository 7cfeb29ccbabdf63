"""What users can do to a model between two of its updates."""

import copy
import types
from collections.abc import Callable
from multiprocessing import resource_sharer
from typing import Any
from unittest import mock

import numpy as np
import torch as th
import torch.multiprocessing  # registers how tensors are sent to processes
from models import (
    BY_ADAM,
    BY_KFAC,
    BY_SEGMENTS,
    CHOOSING,
    CRITICS,
    EVERY,
    OFF_POLICY,
    ON_POLICY,
    ONE_AGENT,
    SB3,
    SB3_OFF_POLICY,
    SB3_ON_POLICY,
    TRAINED_STD,
    VARIANTS,
    WITH_ALPHA,
    Fading,
    Wary,
    taking,
    using,
)
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.save_util import recursive_setattr
from stable_baselines3.common.torch_layers import MlpExtractor
from subjects import Intervention, Subject
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters
from torch.optim.optimizer import register_optimizer_step_post_hook

INTERVENTIONS: dict[str, Intervention] = {}


def intervention(**kwargs: Any) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Enter a function into the table under its name, for rows that there are of its variant."""
    known = VARIANTS[kwargs.get("variant", "mlp")].rows

    def enter(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        name = function.__name__.replace("_", " ")
        rows = tuple(row for row in kwargs.get("rows", EVERY) if row in known)
        INTERVENTIONS[name] = Intervention(name, function, **{**kwargs, "rows": rows})
        return function

    return enter


# Memory that moves; nothing else is changed


@intervention(acts=False)
def shared_memory(subject: Subject) -> None:
    subject.model.policy.share_memory()


@intervention(acts=False)
def sent_to_a_process(subject: Subject) -> None:
    """Sending moves tensors to shared memory; a process would receive what is received here."""
    sender, receiver = th.multiprocessing.Pipe()
    subject.undo.callback(resource_sharer.stop)
    with sender, receiver:
        sender.send(subject.model.policy.state_dict())
        receiver.recv()


@intervention(acts=False)
def new_memory(subject: Subject) -> None:
    for parameter in subject.model.policy.parameters():
        parameter.data = parameter.data.clone()


@intervention(acts=False)
def double_and_float(subject: Subject) -> None:
    subject.model.policy.double().float()


@intervention(acts=False)
def one_vector(subject: Subject) -> None:
    parameters = list(subject.model.policy.parameters())
    vector_to_parameters(parameters_to_vector(parameters).detach(), parameters)


@intervention(acts=False)
def swapped_tensors(subject: Subject) -> None:
    for parameter in subject.model.policy.parameters():
        th.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


@intervention(acts=False)
def new_moments(subject: Subject) -> None:
    for optimizer in subject.optimizers().values():
        for state in optimizer.state.values():
            for name, value in state.items():
                state[name] = value.clone()


@intervention(acts=False)
def no_gradients(subject: Subject) -> None:
    for parameter in subject.model.policy.parameters():
        parameter.grad = None


@intervention(variant="batch norm", rows=OFF_POLICY)
def new_memory_of_running_statistics(subject: Subject) -> None:
    """SB3 keeps what it had, and the targets' statistics follow no more."""
    for buffer in subject.model.policy.buffers():
        buffer.data = buffer.data.clone()


@intervention(variant="batch norm", rows=ON_POLICY, acts=False)
def new_memory_of_statistics_without_a_target(subject: Subject) -> None:
    for buffer in subject.model.policy.buffers():
        buffer.data = buffer.data.clone()


# Numbers, of every type that SB3 takes for them


def number(
    name: str,
    start: float,
    value: float,
    rows: tuple[str, ...],
    *,
    arrays: tuple[str, ...] = (),
    tensors: bool = True,
    **kwargs: Any,
) -> None:
    """
    Enter an intervention for each type that an attribute's value can be of, and for filling it in place.

    :param start: before
    :param value: after
    :param arrays: the rows that take arrays of no dimension, as SB3 does
    :param tensors: whether SB3 takes tensors
    """
    where, attribute = ("actor", name[6:]) if name.startswith("actor.") else ("", name)
    scalar = np.int32 if isinstance(value, int) else np.float32
    known = kwargs.pop("sb3", tuple(SB3))

    def owner(subject: Subject) -> Any:
        return getattr(subject.model, where) if where else subject.model

    def enter(how: str, do: Callable[[Subject], None], before: Callable[[Subject], None] | None = None) -> None:
        title = f"{name} {how}"
        others = how.endswith("array") or (how.endswith("tensor") and not tensors)  # arrays round otherwise, being of float64
        sb3 = () if others else known
        own = arrays if how.endswith("array") else rows
        INTERVENTIONS[title] = Intervention(title, do, rows=own, before=before, sb3=sb3, **kwargs)

    def setter(kind: Callable[[Any], Any], number: float) -> Callable[[Subject], None]:
        return lambda subject: setattr(owner(subject), attribute, kind(number))

    def fill(subject: Subject) -> None:
        getattr(owner(subject), attribute)[...] = value

    kinds: dict[str, Callable[[Any], Any]] = {"as a number": lambda x: x, "of numpy": scalar, "as a tensor": th.tensor}
    for how, kind in {**kinds, **({"as an array": np.array} if arrays else {})}.items():
        enter(how, setter(kind, value))
    enter("in a tensor", fill, setter(th.tensor, start))
    if arrays:
        enter("in an array", fill, setter(np.array, start))


REMEMBERING = tuple(row for row in EVERY if row != "ac")
"""Rows that learn from more than the last step."""
WITH_BUFFERS = tuple(row for row in REMEMBERING if row not in BY_SEGMENTS)
"""Rows that learn from what a buffer of SB3's holds."""
SMOOTHED = (("target_policy_noise", 0.5),)
TWICE = (("gradient_steps", 2),)

number("tau", 0.01, 0.3, taking("tau"))
number("gamma", 0.99, 0.5, EVERY, arrays=WITH_BUFFERS, sb3=SB3_OFF_POLICY)
number("gae_lambda", 0.95, 0.3, taking("gae_lambda"), arrays=taking("gae_lambda"), sb3=())
number("ent_coef", 0.0, 0.5, CHOOSING)
number("vf_coef", 0.5, 2.0, taking("vf_coef", "clip_range"))
number("max_grad_norm", 0.5, 1e-3, tuple(row for row in taking("max_grad_norm") if row in ON_POLICY))
number("target_kl", 100.0, 1e-5, taking("target_kl"), tensors=False)
number("n_epochs", 2, 3, using("n_epochs"))
number("target_policy_noise", 0.2, 0.8, taking("target_policy_noise"))
number("target_noise_clip", 0.5, 0.05, taking("target_noise_clip"), changes=SMOOTHED)
number("policy_delay", 2, 3, taking("policy_delay"), arrays=taking("policy_delay"))
number("target_update_interval", 1, 2, WITH_ALPHA, arrays=WITH_ALPHA, changes=TWICE)
number("target_update_every", 1, 3, WITH_ALPHA, arrays=WITH_ALPHA, sb3=())
number("critic_weight_decay", 0.0, 0.5, taking("critic_weight_decay"), sb3=())
number("logit_penalty", 0.0, 0.5, taking("logit_penalty"))
number("actor.temperature", 1.0, 3.0, taking("logit_penalty"))


@intervention(rows=using("batch_size"), turns=4)
def batch_size(subject: Subject) -> None:
    subject.model.batch_size = (4, np.int32(12), np.int64(5), 8)[subject.turn]


@intervention(rows=WITH_ALPHA, turns=3)
def target_entropy(subject: Subject) -> None:
    """SB3 asserts a float, of which NumPy's of 64 bits is a subclass."""
    subject.model.target_entropy = (-0.5, np.float64(-20.0), 3.0)[subject.turn]


@intervention(rows=WITH_ALPHA, changes=(("ent_coef", 0.2),), turns=4)
def ent_coef_tensor(subject: Subject) -> None:
    if subject.turn == 1:
        subject.model.ent_coef_tensor.fill_(0.02)
    else:
        subject.model.ent_coef_tensor = (th.tensor(2.0), None, th.tensor([0.5]), np.float32(0.1))[subject.turn]


@intervention(rows=WITH_ALPHA)
def log_ent_coef_filled(subject: Subject) -> None:
    subject.model.log_ent_coef.data.fill_(-3.0)


@intervention(rows=WITH_ALPHA, acts=False)
def log_ent_coef_moved(subject: Subject) -> None:
    subject.model.log_ent_coef.data = subject.model.log_ent_coef.data.clone()


@intervention(rows=WITH_ALPHA)
def log_ent_coef_replaced(subject: Subject) -> None:
    """Which the optimizer does not train."""
    subject.model.log_ent_coef = th.full((1,), -3.0, requires_grad=True)


@intervention(rows=WITH_ALPHA, sb3=())
def exact_log_prob(subject: Subject) -> None:
    """The two densities differ by 1e-6 of what lies at the limits, so actions go there."""
    subject.model.exact_log_prob = True
    subject.layer("actor", -2).bias.data.fill_(5.0)


@intervention(rows=taking("tau", "policy_delay"), error=TypeError)
def text_for_a_number(subject: Subject) -> None:
    subject.model.tau = "0.5"


@intervention(rows=("td3x", "sacx"), error=TypeError)
def an_array_where_torch_takes_none(subject: Subject) -> None:
    subject.model.tau = np.array(subject.model.tau)


BOUNDS = (("max_grad_norm", {"critic": 1.0}),)


WITH_ACTOR_AND_CRITIC = tuple(row for row in OFF_POLICY if row not in WITH_ALPHA)


@intervention(sb3=(), rows=WITH_ACTOR_AND_CRITIC, changes=BOUNDS, turns=3)
def entry_of_max_grad_norm(subject: Subject) -> None:
    subject.model.max_grad_norm["critic"] = (1e-3, np.float32(1e-2), th.tensor(1e-4))[subject.turn]


@intervention(sb3=(), rows=WITH_ACTOR_AND_CRITIC, changes=BOUNDS)
def another_entry_of_max_grad_norm(subject: Subject) -> None:
    subject.model.max_grad_norm["actor"] = 1e-3


@intervention(sb3=(), rows=taking("max_grad_norm"), turns=5)
def max_grad_norm(subject: Subject) -> None:
    """The last but one bounds the first network only."""
    first = next(iter(subject.model._networks()))
    subject.model.max_grad_norm = (1e-3, np.float32(1e-2), th.tensor(1e-4), {first: 1e-3}, None)[subject.turn]


NOISE = (("exploration_noise", {"type": "normal", "start": 0.5}),)


@intervention(sb3=(), rows=OFF_POLICY, changes=NOISE)
def exploration_noise(subject: Subject) -> None:
    subject.model.exploration_noise = {"type": "ornstein-uhlenbeck", "start": 0.1, "dt": 1.0}


@intervention(sb3=(), rows=OFF_POLICY, changes=NOISE)
def entry_of_exploration_noise(subject: Subject) -> None:
    subject.model.exploration_noise["start"] = np.float32(0.1)


@intervention(sb3=(), rows=OFF_POLICY, changes=NOISE)
def no_exploration_noise(subject: Subject) -> None:
    subject.model.exploration_noise = None


ACTION_NOISE = (("action_noise", NormalActionNoise(np.zeros(2), 0.1 * np.ones(2))),)


@intervention(rows=CRITICS, changes=ACTION_NOISE)
def action_noise(subject: Subject) -> None:
    subject.model.action_noise = NormalActionNoise(np.zeros(2), np.ones(2))


@intervention(rows=CRITICS, changes=ACTION_NOISE)
def sigma_of_action_noise(subject: Subject) -> None:
    subject.model.action_noise._sigma = np.full(2, 0.7)


@intervention()
def rate(subject: Subject) -> None:
    subject.model.lr_schedule = lambda _: 1e-4


@intervention(rows=OFF_POLICY, turns=2)
def gradient_steps(subject: Subject) -> None:
    subject.model.gradient_steps = (3, 1)[subject.turn]


@intervention(variant="dropout", draws=True)
def number_of_a_layer(subject: Subject) -> None:
    for layer in subject.model.policy.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.7


# Parameters and layers


@intervention()
def edited_in_place(subject: Subject) -> None:
    with th.no_grad():
        subject.layer("actor").weight.mul_(1.5)


@intervention(rows=OFF_POLICY)
def target_edited_in_place(subject: Subject) -> None:
    with th.no_grad():
        for parameter in subject.model.critic_target.parameters():
            parameter.mul_(1.5)


@intervention()
def weights_loaded(subject: Subject) -> None:
    state = subject.model.policy.state_dict()
    subject.model.policy.load_state_dict({name: 0.9 * value for name, value in state.items()})


@intervention(rows=BY_ADAM)
def weights_assigned(subject: Subject) -> None:
    """The networks' parameters are then not the optimizers'; K-FAC says so."""
    state = subject.model.policy.state_dict()
    subject.model.policy.load_state_dict({name: 0.9 * value for name, value in state.items()}, assign=True)


@intervention()
def weights_assigned_and_trained(subject: Subject) -> None:
    for name in ("actor", "critic"):
        network = subject.part(name)
        old = list(network.parameters())
        network.load_state_dict({key: 0.9 * value for key, value in network.state_dict().items()}, assign=True)
        for before, after in zip(old, network.parameters(), strict=True):
            subject.trains(before, after)


@intervention(acts=False)
def everything_set(subject: Subject) -> None:
    subject.model.set_parameters(copy.deepcopy(subject.model.get_parameters()))


@intervention()
def everything_halved(subject: Subject) -> None:
    parameters = copy.deepcopy(subject.model.get_parameters())
    parameters["policy"] = {name: 0.5 * value for name, value in parameters["policy"].items()}
    subject.model.set_parameters(parameters)


@intervention()
def other_parameter(subject: Subject) -> None:
    layer = subject.layer("critic")
    old, layer.weight = layer.weight, nn.Parameter(0.5 * layer.weight.detach())
    subject.trains(old, layer.weight)


@intervention(sb3=SB3_OFF_POLICY)
def other_parameter_that_is_not_trained(subject: Subject) -> None:
    """On-policy, SB3 bounds the gradient together with that of parameters that it does not train."""
    layer = subject.layer("critic")
    layer.weight = nn.Parameter(0.5 * layer.weight.detach())


@intervention(rows=OFF_POLICY)
def other_parameter_of_a_target(subject: Subject) -> None:
    parent = next(module for module in subject.model.critic_target.modules() if isinstance(module, nn.Linear))
    parent.weight = nn.Parameter(0.5 * parent.weight.detach(), requires_grad=False)


@intervention()
def other_layer(subject: Subject) -> None:
    parent, key = subject.linear("actor")
    old = getattr(parent, key)
    new = nn.Linear(old.in_features, old.out_features)
    with th.no_grad():
        new.weight.copy_(old.weight).mul_(0.5)
        new.bias.copy_(old.bias)
    setattr(parent, key, new)
    for before, after in zip(old.parameters(), new.parameters(), strict=True):
        subject.trains(before, after)


@intervention(sb3=SB3_OFF_POLICY)
def other_layer_that_is_not_trained(subject: Subject) -> None:
    parent, key = subject.linear("critic")
    new = copy.deepcopy(getattr(parent, key))
    new.weight.data.mul_(0.5)
    setattr(parent, key, new)


@intervention()
def other_activation(subject: Subject) -> None:
    parent, key = subject.activation("critic")
    setattr(parent, key, nn.Sigmoid())


@intervention()
def own_activation(subject: Subject) -> None:
    class Doubled(nn.Module):
        def forward(self, x: th.Tensor) -> th.Tensor:
            return 2 * th.relu(x)

    parent, key = subject.activation("actor")
    setattr(parent, key, Doubled())


@intervention()
def activation_that_looks_at_values(subject: Subject) -> None:
    parent, key = subject.activation("critic")
    setattr(parent, key, Wary())


@intervention()
def activation_that_counts(subject: Subject) -> None:
    parent, key = subject.activation("critic")
    setattr(parent, key, Fading())


@intervention(rows=OFF_POLICY, sb3=())
def other_networks(subject: Subject) -> None:
    for name in ("actor", "critic"):
        network = copy.deepcopy(getattr(subject.model, name))
        for parameter in network.parameters():
            parameter.data.mul_(0.9)
        setattr(subject.model.policy, name, network)
        setattr(subject.model, name, network)


@intervention(rows=("td3x", "sacx"))
def tied_streams(subject: Subject) -> None:
    """Two streams with one weight in their first layers."""
    for critic in (subject.model.critic, subject.model.critic_target):
        critic.qf1[0].weight = critic.qf0[0].weight


@intervention(rows=ONE_AGENT, draws=True)
def spectral_norm(subject: Subject) -> None:
    """Its buffers change with every forward pass in training mode."""
    targets = [subject.model.critic_target.qf0[0]] if subject.row in OFF_POLICY else []
    for layer in (subject.layer("critic"), *targets):
        parametrizations.spectral_norm(layer)
    if subject.row == "acer":  # whose average policy has the parameters of the policy
        subject.model.average_policy = copy.deepcopy(subject.model.policy)
        subject.model.average_policy.set_training_mode(False)


@intervention()
def frozen_bias(subject: Subject) -> None:
    subject.layer("critic").bias.requires_grad_(False)


@intervention()
def frozen_layer(subject: Subject) -> None:
    for one in subject.each():  # actors have one dimension
        one.layer("actor").requires_grad_(False)


@intervention()
def frozen_actor(subject: Subject) -> None:
    for one in subject.each():
        one.part("actor").requires_grad_(False)


@intervention(sb3=SB3_ON_POLICY)
def frozen_critic(subject: Subject) -> None:
    """SB3 raises off-policy; the actor can learn from a critic that does not."""
    subject.part("critic").requires_grad_(False)


@intervention(sb3=(), rows=WITH_ALPHA)
def frozen_entropy_coefficient(subject: Subject) -> None:
    subject.model.log_ent_coef.requires_grad_(False)


@intervention(turns=2)
def frozen_for_a_while(subject: Subject) -> None:
    for one in subject.each():
        one.part("actor").requires_grad_(subject.turn == 1)


# Hooks


@intervention(counts=True)
def forward_hook(subject: Subject) -> None:
    hook = subject.count("hook", lambda _, inputs, output: 0.9 * output)
    subject.hooks.append(subject.layer("critic").register_forward_hook(hook))


@intervention(counts=True, acts=False)
def forward_hook_that_looks(subject: Subject) -> None:
    subject.layer("actor").register_forward_hook(subject.count("hook"))


@intervention(counts=True)
def forward_pre_hook(subject: Subject) -> None:
    hook = subject.count("hook", lambda _, inputs: (0.9 * inputs[0],))
    subject.hooks.append(subject.layer("actor", -1).register_forward_pre_hook(hook))


@intervention(counts=True)
def backward_hook(subject: Subject) -> None:
    hook = subject.count("hook", lambda _, inputs, outputs: (0.5 * inputs[0],))
    subject.hooks.append(subject.layer("critic", -1).register_full_backward_hook(hook))


@intervention(counts=True)
def backward_pre_hook(subject: Subject) -> None:
    hook = subject.count("hook", lambda _, outputs: (0.5 * outputs[0],))
    subject.hooks.append(subject.layer("critic", -1).register_full_backward_pre_hook(hook))


@intervention(counts=True)
def gradient_hook(subject: Subject) -> None:
    subject.hooks.append(subject.layer("actor").weight.register_hook(subject.count("hook", lambda grad: 0.5 * grad)))


@intervention(counts=True)
def post_accumulate_hook(subject: Subject) -> None:
    def halve(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)

    subject.layer("critic").weight.register_post_accumulate_grad_hook(subject.count("hook", halve))


@intervention(counts=True)
def global_forward_hook(subject: Subject) -> None:
    hook = subject.count("hook", lambda module, _, output: 0.9 * output if isinstance(module, nn.Linear) else None)
    subject.undo.callback(nn.modules.module.register_module_forward_hook(hook).remove)


@intervention(counts=True, acts=False)
def global_forward_pre_hook(subject: Subject) -> None:
    subject.undo.callback(nn.modules.module.register_module_forward_pre_hook(subject.count("hook")).remove)


@intervention(counts=True, acts=False)
def global_backward_pre_hook(subject: Subject) -> None:
    subject.undo.callback(nn.modules.module.register_module_full_backward_pre_hook(subject.count("hook")).remove)


@intervention(counts=True)
def optimizer_pre_hook(subject: Subject) -> None:
    def shrink(optimizer: th.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.data.mul_(0.99)

    for name, optimizer in subject.optimizers().items():
        optimizer.register_step_pre_hook(subject.count(name, shrink))


@intervention(counts=True, acts=False)
def optimizer_post_hook(subject: Subject) -> None:
    for name, optimizer in subject.optimizers().items():
        optimizer.register_step_post_hook(subject.count(name))


@intervention(counts=True, acts=False)
def global_optimizer_hook(subject: Subject) -> None:
    subject.undo.callback(register_optimizer_step_post_hook(subject.count("hook")).remove)


# Optimizers


def replace_optimizers(subject: Subject, make: Callable[..., th.optim.Optimizer]) -> None:
    for name, optimizer in subject.optimizers().items():
        recursive_setattr(subject.model, name, make(optimizer.param_groups[0]["params"], lr=1e-3))


@intervention()
def rms_prop(subject: Subject) -> None:
    replace_optimizers(subject, lambda parameters, lr: th.optim.RMSprop(parameters, lr, eps=1e-2))


@intervention()
def gradient_descent(subject: Subject) -> None:
    replace_optimizers(subject, lambda parameters, lr: th.optim.SGD(parameters, lr, momentum=0.5))


@intervention()
def adam_w(subject: Subject) -> None:
    replace_optimizers(subject, lambda parameters, lr: th.optim.AdamW(parameters, lr, weight_decay=0.5, eps=1e-2))


@intervention()
def own_adam(subject: Subject) -> None:
    class Halved(th.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(0.5)
            return super().step(closure)

    replace_optimizers(subject, lambda parameters, lr: Halved(parameters, lr, eps=1e-2))


@intervention(rows=BY_ADAM)
def betas(subject: Subject) -> None:
    for optimizer in subject.optimizers().values():
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)


@intervention(rows=BY_ADAM, turns=3)
def options_of_adam(subject: Subject) -> None:
    name, value = (("weight_decay", 0.5), ("maximize", True), ("eps", 1.0))[subject.turn]
    for optimizer in subject.optimizers().values():
        optimizer.param_groups[0][name] = value


@intervention(rows=BY_ADAM)
def a_group_for_each_parameter(subject: Subject) -> None:
    for optimizer in subject.optimizers().values():
        (group,) = optimizer.param_groups
        optimizer.param_groups = [
            {**group, "params": [parameter], "betas": (0.9 / (1 + parameter.dim()), 0.99)} for parameter in group["params"]
        ]


@intervention(acts=False)
def optimizers_loaded(subject: Subject) -> None:
    for optimizer in subject.optimizers().values():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@intervention(rows=BY_ADAM)
def moments_edited(subject: Subject) -> None:
    for optimizer in subject.optimizers().values():
        for state in optimizer.state.values():
            state["exp_avg"].mul_(-1)


@intervention()
def moments_forgotten(subject: Subject) -> None:
    for optimizer in subject.optimizers().values():
        optimizer.state.clear()


@intervention(rows=BY_ADAM)
def counters_set(subject: Subject) -> None:
    """A first step's correction of the moments, for some of the parameters."""
    for optimizer in subject.optimizers().values():
        for state in list(optimizer.state.values())[::2]:
            state["step"].fill_(0)


@intervention(counts=True)
def step_replaced(subject: Subject) -> None:
    optimizer = subject.optimizers()["actor.optimizer"] if subject.row in OFF_POLICY else subject.policy.optimizer
    optimizer.step = subject.count("step")  # type: ignore[method-assign]  # which makes none


# Methods and classes


def scaled(method: Callable[..., Any], factor: float = 0.9) -> Callable[..., Any]:
    """The method with its result, or each of its results, times a factor."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        return tuple(factor * value for value in result) if isinstance(result, tuple) else factor * result

    return replacement


@intervention(rows=OFF_POLICY)
def forward_of_the_critic(subject: Subject) -> None:
    subject.model.critic.forward = scaled(subject.model.critic.forward)


@intervention(rows=OFF_POLICY)
def forward_of_the_actor(subject: Subject) -> None:
    subject.model.actor.forward = scaled(subject.model.actor.forward)


@intervention(rows=OFF_POLICY)
def forward_of_the_target(subject: Subject) -> None:
    subject.model.critic_target.forward = scaled(subject.model.critic_target.forward)


@intervention()
def forward_of_a_layer(subject: Subject) -> None:
    layer = subject.layer("critic")
    layer.forward = scaled(layer.forward)


@intervention(rows=WITH_ACTOR_AND_CRITIC)
def first_stream_alone(subject: Subject) -> None:
    subject.model.critic.q1_forward = scaled(subject.model.critic.q1_forward)


@intervention(rows=WITH_ALPHA)
def density_of_the_actor(subject: Subject) -> None:
    original = subject.model.actor.action_log_prob

    def replacement(observations: Any) -> tuple[th.Tensor, th.Tensor]:
        actions, log_prob = original(observations)
        return 0.9 * actions, log_prob

    subject.model.actor.action_log_prob = replacement


def patched(subject: Subject, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    subject.undo.enter_context(mock.patch.object(owner, name, replacement))


@intervention(rows=OFF_POLICY)
def forward_of_the_critics_class(subject: Subject) -> None:
    cls = type(subject.model.critic)
    patched(subject, cls, "forward", scaled(cls.forward))


@intervention()
def forward_of_linear_layers(subject: Subject) -> None:
    patched(subject, nn.Linear, "forward", lambda self, x: 0.9 * F.linear(x, self.weight, self.bias))


@intervention()
def forward_of_activations(subject: Subject) -> None:
    parent, key = subject.activation("critic")
    patched(subject, type(getattr(parent, key)), "forward", lambda self, x: F.leaky_relu(x, 0.5))


@intervention()
def class_of_a_layer(subject: Subject) -> None:
    layer = subject.layer("critic")
    layer.__class__ = type("Scaled", (type(layer),), {"forward": scaled(type(layer).forward)})


@intervention(rows=OFF_POLICY)
def class_of_the_critic(subject: Subject) -> None:
    critic = subject.model.critic
    critic.__class__ = type("Scaled", (type(critic),), {"forward": scaled(type(critic).forward)})


@intervention()
def class_of_the_policy(subject: Subject) -> None:
    for one in subject.each():
        policy = one.policy
        policy.__class__ = type("Scaled", (type(policy),), {"_predict": scaled(type(policy)._predict)})


@intervention()
def prediction_of_the_policy(subject: Subject) -> None:
    for one in subject.each():
        one.policy._predict = scaled(one.policy._predict)


@intervention()
def prediction_of_the_model(subject: Subject) -> None:
    original = subject.model.predict
    subject.model.predict = lambda *args, **kwargs: (0.5 * original(*args, **kwargs)[0], None)


def compiled(subject: Subject, function: Callable[..., Any]) -> Any:
    """The compiler switches the validation of distributions off in the whole process."""
    subject.undo.callback(th.distributions.Distribution.set_default_validate_args, True)
    subject.undo.callback(th.compiler.reset)
    return th.compile(function, backend="eager")


COMPILED: dict[str, Any] = {"acts": False, "ways": ("callback",)}
"""Once is enough, it takes a while."""


@intervention(**COMPILED, rows=OFF_POLICY)
def compiled_critic(subject: Subject) -> None:
    subject.model.critic.forward = compiled(subject, subject.model.critic.forward)


@intervention(**COMPILED, rows=("td3x",))
def compiled_actor(subject: Subject) -> None:
    subject.model.actor.forward = compiled(subject, subject.model.actor.forward)


@intervention(**COMPILED, rows=("td3x",))
def compiled_in_place(subject: Subject) -> None:
    compiled(subject, th.relu)  # what it leaves set is put back
    subject.model.critic.compile(backend="eager")


# Replay buffers and rollouts


def negate_rewards(subject: Subject, in_place: bool) -> None:
    """Those of the agents where there are several."""
    buffer = subject.model.replay_buffer if subject.row in OFF_POLICY else subject.model.rollout_buffer
    name = "agent_rewards" if hasattr(buffer, "agent_rewards") else "rewards"
    rewards = getattr(buffer, name)
    setattr(buffer, name, np.negative(rewards, out=rewards if in_place else None))


@intervention(rows=WITH_BUFFERS, turns=2)
def rewards_edited(subject: Subject) -> None:
    negate_rewards(subject, in_place=True)


@intervention(rows=WITH_BUFFERS, turns=2)
def rewards_replaced(subject: Subject) -> None:
    negate_rewards(subject, in_place=False)


@intervention(rows=OFF_POLICY)
def other_buffer(subject: Subject) -> None:
    subject.model.replay_buffer = copy.deepcopy(subject.model.replay_buffer)
    negate_rewards(subject, in_place=True)


@intervention(rows=OFF_POLICY)
def emptied_buffer(subject: Subject) -> None:
    subject.model.replay_buffer.reset()


@intervention(rows=OFF_POLICY)
def draws_of_the_buffer(subject: Subject) -> None:
    original = subject.model.replay_buffer.sample

    def sample(*args: Any, **kwargs: Any) -> Any:
        batch = original(*args, **kwargs)
        return batch._replace(rewards=-batch.rewards)

    subject.model.replay_buffer.sample = sample


# Actor-critic policies, between two actions of a rollout


@intervention(rows=ON_POLICY)
def log_std_filled(subject: Subject) -> None:
    subject.policy.log_std.data.fill_(-2.0)


@intervention(rows=ON_POLICY, acts=False)
def log_std_moved(subject: Subject) -> None:
    subject.policy.log_std.data = subject.policy.log_std.data.clone()


@intervention(rows=TRAINED_STD)
def log_std_replaced(subject: Subject) -> None:
    old = subject.policy.log_std
    subject.policy.log_std = nn.Parameter(old.detach() - 1)
    subject.trains(old, subject.policy.log_std)


@intervention(rows=TRAINED_STD, sb3=())
def log_std_replaced_by_one_that_is_not_trained(subject: Subject) -> None:
    subject.policy.log_std = nn.Parameter(subject.policy.log_std.detach() - 1)


@intervention(rows=TRAINED_STD)
def frozen_log_std(subject: Subject) -> None:
    for one in subject.each():
        one.policy.log_std.requires_grad_(False)


def replace_layer(subject: Subject, name: str, which: int, trained: bool) -> None:
    parent, key = subject.linear(name, which)
    old = getattr(parent, key)
    new = copy.deepcopy(old)
    for parameter in new.parameters():
        parameter.data.mul_(0.5)
    setattr(parent, key, new)
    for before, after in zip(old.parameters(), new.parameters(), strict=True) if trained else ():
        subject.trains(before, after)


@intervention(rows=ON_POLICY)
def other_action_net(subject: Subject) -> None:
    replace_layer(subject, "actor", -1, trained=True)


@intervention(rows=ON_POLICY)
def other_value_net(subject: Subject) -> None:
    replace_layer(subject, "critic", -1, trained=True)


@intervention(rows=ON_POLICY, sb3=())
def value_net_that_is_not_trained(subject: Subject) -> None:
    replace_layer(subject, "critic", -1, trained=False)


@intervention(rows=ON_POLICY, sb3=())
def other_mlp_extractor(subject: Subject) -> None:
    """Which the optimizer does not train."""
    layers = copy.deepcopy(subject.policy.mlp_extractor)
    for parameter in layers.parameters():
        parameter.data.mul_(0.5)
    subject.policy.mlp_extractor = layers


class Wide(DiagGaussianDistribution):
    """Twice the deviation that it is told."""

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> Any:
        return super().proba_distribution(mean_actions, log_std + np.log(2))


@intervention(rows=ON_POLICY)
def other_distribution(subject: Subject) -> None:
    subject.policy.action_dist = Wide(2)


def bent(density: Callable[..., th.Tensor]) -> Callable[..., th.Tensor]:
    """Another density, which differs by more than the length of its gradient."""

    def replacement(*args: Any) -> th.Tensor:
        log_prob = density(*args)
        return log_prob - 0.05 * log_prob.square()

    return replacement


@intervention(rows=CHOOSING)
def density_of_the_distribution(subject: Subject) -> None:
    distribution = subject.policy.action_dist
    distribution.log_prob = bent(distribution.log_prob)


@intervention(rows=CHOOSING)
def density_of_the_distributions_class(subject: Subject) -> None:
    patched(subject, DiagGaussianDistribution, "log_prob", bent(DiagGaussianDistribution.log_prob))


@intervention(rows=ON_POLICY)
def class_of_the_distribution(subject: Subject) -> None:
    subject.policy.action_dist.__class__ = Wide


@intervention(rows=CHOOSING)
def forward_of_the_policy(subject: Subject) -> None:
    subject.policy.forward = scaled(subject.policy.forward)


@intervention(rows=CHOOSING)
def forward_of_the_policys_class(subject: Subject) -> None:
    cls = type(subject.policy)
    patched(subject, cls, "forward", scaled(cls.forward))


@intervention(rows=taking("gae_lambda"))
def values_of_the_policy(subject: Subject) -> None:
    subject.policy.predict_values = scaled(subject.policy.predict_values)


EVALUATING = tuple(row for row in CHOOSING if row != "trpox")
"""Rows that ask for values and densities at once."""


@intervention(rows=EVALUATING)
def evaluation_of_the_policy(subject: Subject) -> None:
    subject.policy.evaluate_actions = scaled(subject.policy.evaluate_actions)


@intervention(rows=ON_POLICY)
def features_of_the_policy(subject: Subject) -> None:
    subject.policy.extract_features = scaled(subject.policy.extract_features)


@intervention(rows=ON_POLICY)
def forward_of_the_mlp_extractor(subject: Subject) -> None:
    layers = subject.policy.mlp_extractor
    layers.forward_actor = scaled(layers.forward_actor)


@intervention(rows=ON_POLICY)
def forward_of_the_mlp_extractors_class(subject: Subject) -> None:
    patched(subject, MlpExtractor, "forward_critic", scaled(MlpExtractor.forward_critic))


@intervention(rows=ON_POLICY)
def class_of_a_head(subject: Subject) -> None:
    layer = subject.policy.action_net
    layer.__class__ = type("Scaled", (type(layer),), {"forward": scaled(type(layer).forward)})


@intervention(rows=CHOOSING)
def class_of_the_acting_policy(subject: Subject) -> None:
    policy = subject.policy
    policy.__class__ = type("Scaled", (type(policy),), {"forward": scaled(type(policy).forward)})


@intervention(rows=tuple(row for row in ON_POLICY if row not in BY_KFAC), **COMPILED)
def compiled_evaluation(subject: Subject) -> None:
    """Not with K-FAC, which sees layers by a mode that PyTorch's compiler mistakes once something else was compiled."""
    subject.policy.evaluate_actions = compiled(subject, subject.policy.evaluate_actions)


@intervention(rows=ON_POLICY, **COMPILED)
def compiled_mlp_extractor(subject: Subject) -> None:
    subject.policy.mlp_extractor.forward = compiled(subject, subject.policy.mlp_extractor.forward)


@intervention(rows=tuple(row for row in taking("gae_lambda") if row in WITH_BUFFERS), turns=2)
def stored_values_edited(subject: Subject) -> None:
    subject.model.rollout_buffer.values *= 0.5


@intervention(rows=taking("target_kl"), turns=2)
def stored_log_probs_edited(subject: Subject) -> None:
    subject.model.rollout_buffer.log_probs -= 0.5


@intervention(rows=taking("n_steps", "ent_coef", "gae_lambda"), sb3=(), turns=3)
def n_steps(subject: Subject) -> None:
    """SB3 fails where its buffer has another size."""
    subject.model.n_steps = (4, 9, 6)[subject.turn]


@intervention(rows=using("clip_range", "n_epochs"))
def clip_range(subject: Subject) -> None:
    subject.model.clip_range = lambda _: 1e-4


@intervention(rows=using("clip_range", "n_epochs"), sb3=())
def clip_range_as_a_number(subject: Subject) -> None:
    """SB3 calls it."""
    subject.model.clip_range = 1e-4


@intervention(rows=taking("clip_range_vf"), turns=3)
def clip_range_vf(subject: Subject) -> None:
    subject.model.clip_range_vf = (lambda _: 1e-3, lambda _: 1e-2, None)[subject.turn]


@intervention(rows=taking("normalize_advantage"), turns=2)
def normalize_advantage(subject: Subject) -> None:
    subject.model.normalize_advantage = not subject.model.normalize_advantage


@intervention(rows=taking("surrogate"), sb3=(), turns=2)
def surrogate(subject: Subject) -> None:
    subject.model.surrogate = ("penalty", "clip")[subject.turn]


# Modes and switches


def without_a_mode(self: Any, mode: bool) -> None:
    """In place of ``set_training_mode``."""


@intervention(variant="dropout", draws=True)
def evaluation_mode_for_good(subject: Subject) -> None:
    subject.model.policy.set_training_mode(False)
    subject.model.policy.set_training_mode = types.MethodType(without_a_mode, subject.model.policy)


@intervention(variant="dropout", acts=False)
def evaluation_mode(subject: Subject) -> None:
    """Training sets the mode that it needs."""
    subject.model.policy.set_training_mode(False)


SELDOM = (("train_freq", 4), ("gradient_steps", 4))
"""So that what an update does not draw anew counts for some steps."""


@intervention(variant="gsde", rows=WITH_ALPHA, changes=SELDOM)
def noise_of_gsde_reset(subject: Subject) -> None:
    subject.model.actor.reset_noise()


@intervention(variant="gsde", rows=WITH_ALPHA, changes=SELDOM)
def noise_of_gsde_edited(subject: Subject) -> None:
    distribution = subject.model.actor.action_dist
    distribution.exploration_mat = 5 * distribution.exploration_mat


@intervention(variant="gsde", rows=ON_POLICY)
def noise_of_a_rollout_reset(subject: Subject) -> None:
    subject.model.policy.reset_noise()


@intervention(variant="gsde", rows=ON_POLICY)
def noise_of_a_rollout_edited(subject: Subject) -> None:
    distribution = subject.model.policy.action_dist
    distribution.exploration_mat = 2 * distribution.exploration_mat
    distribution.exploration_matrices = 2 * distribution.exploration_matrices


@intervention(variant="gsde", rows=ON_POLICY, turns=2)
def sde_sample_freq(subject: Subject) -> None:
    subject.model.sde_sample_freq = (2, -1)[subject.turn]


@intervention(acts=False)
def anomaly_mode(subject: Subject) -> None:
    subject.undo.callback(th.autograd.set_detect_anomaly, False)
    th.autograd.set_detect_anomaly(True)


@intervention(acts=False)
def number_of_threads(subject: Subject) -> None:
    subject.undo.callback(th.set_num_threads, th.get_num_threads())
    th.set_num_threads(2)


@intervention(acts=False)
def deterministic_algorithms(subject: Subject) -> None:
    subject.undo.callback(th.use_deterministic_algorithms, False)
    th.use_deterministic_algorithms(True)
