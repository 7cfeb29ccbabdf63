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
from models import Fading, Wary
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.save_util import recursive_setattr
from subjects import OFF_POLICY, ONE_AGENT, Intervention, Subject
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters
from torch.optim.optimizer import register_optimizer_step_post_hook

INTERVENTIONS: dict[str, Intervention] = {}


def intervention(**kwargs: Any) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Enter a function into the table under its name."""

    def enter(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        name = function.__name__.replace("_", " ")
        INTERVENTIONS[name] = Intervention(name, function, **kwargs)
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


@intervention(variant="batch norm", rows=ONE_AGENT)
def new_memory_of_running_statistics(subject: Subject) -> None:
    """SB3 keeps what it had, and the targets' statistics follow no more."""
    for buffer in subject.model.policy.buffers():
        buffer.data = buffer.data.clone()


# Numbers, of every type that SB3 takes for them


def number(name: str, start: float, value: float, rows: tuple[str, ...], *, arrays: bool = False, **kwargs: Any) -> None:
    """
    Enter an intervention for each type that an attribute's value can be of, and for filling it in place.

    :param start: before
    :param value: after
    :param arrays: whether SB3 takes arrays of no dimension
    """
    where, attribute = ("actor", name[6:]) if name.startswith("actor.") else ("", name)
    scalar = np.int32 if isinstance(value, int) else np.float32
    known = kwargs.pop("sb3", True)

    def owner(subject: Subject) -> Any:
        return getattr(subject.model, where) if where else subject.model

    def enter(how: str, do: Callable[[Subject], None], before: Callable[[Subject], None] | None = None) -> None:
        title = f"{name} {how}"
        sb3 = known and not how.endswith("array")  # which rounds otherwise, as it is of float64
        INTERVENTIONS[title] = Intervention(title, do, rows=rows, before=before, sb3=sb3, **kwargs)

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


SMOOTHED = (("target_policy_noise", 0.5),)
TWICE = (("gradient_steps", 2),)

number("tau", 0.01, 0.3, OFF_POLICY)
number("gamma", 0.99, 0.5, OFF_POLICY, arrays=True)
number("target_policy_noise", 0.2, 0.8, ("td3x", "maddpg"))
number("target_noise_clip", 0.5, 0.05, ("td3x", "maddpg"), changes=SMOOTHED)
number("policy_delay", 2, 3, ("td3x", "maddpg"), arrays=True)
number("target_update_interval", 1, 2, ("sacx",), arrays=True, changes=TWICE)
number("target_update_every", 1, 3, ("sacx",), arrays=True, sb3=False)
number("critic_weight_decay", 0.0, 0.5, ("ddpgx",), sb3=False)
number("logit_penalty", 0.0, 0.5, ("maddpg",))
number("actor.temperature", 1.0, 3.0, ("maddpg",))


@intervention(turns=4)
def batch_size(subject: Subject) -> None:
    subject.model.batch_size = (4, np.int32(12), np.int64(5), 8)[subject.turn]


@intervention(rows=("sacx",), turns=3)
def target_entropy(subject: Subject) -> None:
    """SB3 asserts a float, of which NumPy's of 64 bits is a subclass."""
    subject.model.target_entropy = (-0.5, np.float64(-20.0), 3.0)[subject.turn]


@intervention(rows=("sacx",), changes=(("ent_coef", 0.2),), turns=4)
def ent_coef_tensor(subject: Subject) -> None:
    if subject.turn == 1:
        subject.model.ent_coef_tensor.fill_(0.02)
    else:
        subject.model.ent_coef_tensor = (th.tensor(2.0), None, th.tensor([0.5]), np.float32(0.1))[subject.turn]


@intervention(rows=("sacx",))
def log_ent_coef_filled(subject: Subject) -> None:
    subject.model.log_ent_coef.data.fill_(-3.0)


@intervention(rows=("sacx",), acts=False)
def log_ent_coef_moved(subject: Subject) -> None:
    subject.model.log_ent_coef.data = subject.model.log_ent_coef.data.clone()


@intervention(rows=("sacx",))
def log_ent_coef_replaced(subject: Subject) -> None:
    """Which the optimizer does not train."""
    subject.model.log_ent_coef = th.full((1,), -3.0, requires_grad=True)


@intervention(rows=("sacx",), sb3=False)
def exact_log_prob(subject: Subject) -> None:
    """The two densities differ by 1e-6 of what lies at the limits, so actions go there."""
    subject.model.exact_log_prob = True
    subject.layer("actor", -2).bias.data.fill_(5.0)


@intervention(rows=("td3x", "maddpg"), error=TypeError)
def text_for_a_number(subject: Subject) -> None:
    subject.model.tau = "0.5"


@intervention(rows=("td3x", "sacx"), error=TypeError)
def an_array_where_torch_takes_none(subject: Subject) -> None:
    subject.model.tau = np.array(subject.model.tau)


BOUNDS = (("max_grad_norm", {"critic": 1.0}),)


@intervention(sb3=False, rows=("td3x", "ddpgx", "maddpg"), changes=BOUNDS, turns=3)
def entry_of_max_grad_norm(subject: Subject) -> None:
    subject.model.max_grad_norm["critic"] = (1e-3, np.float32(1e-2), th.tensor(1e-4))[subject.turn]


@intervention(sb3=False, rows=("td3x", "ddpgx", "maddpg"), changes=BOUNDS)
def another_entry_of_max_grad_norm(subject: Subject) -> None:
    subject.model.max_grad_norm["actor"] = 1e-3


@intervention(sb3=False, turns=5)
def max_grad_norm(subject: Subject) -> None:
    subject.model.max_grad_norm = (1e-3, np.float32(1e-2), th.tensor(1e-4), {"actor": 1e-3}, None)[subject.turn]


NOISE = (("exploration_noise", {"type": "normal", "start": 0.5}),)


@intervention(sb3=False, changes=NOISE)
def exploration_noise(subject: Subject) -> None:
    subject.model.exploration_noise = {"type": "ornstein-uhlenbeck", "start": 0.1, "dt": 1.0}


@intervention(sb3=False, changes=NOISE)
def entry_of_exploration_noise(subject: Subject) -> None:
    subject.model.exploration_noise["start"] = np.float32(0.1)


@intervention(sb3=False, changes=NOISE)
def no_exploration_noise(subject: Subject) -> None:
    subject.model.exploration_noise = None


ACTION_NOISE = (("action_noise", NormalActionNoise(np.zeros(2), 0.1 * np.ones(2))),)


@intervention(rows=ONE_AGENT, changes=ACTION_NOISE)
def action_noise(subject: Subject) -> None:
    subject.model.action_noise = NormalActionNoise(np.zeros(2), np.ones(2))


@intervention(rows=ONE_AGENT, changes=ACTION_NOISE)
def sigma_of_action_noise(subject: Subject) -> None:
    subject.model.action_noise._sigma = np.full(2, 0.7)


@intervention()
def rate(subject: Subject) -> None:
    subject.model.lr_schedule = lambda _: 1e-4


@intervention(turns=2)
def gradient_steps(subject: Subject) -> None:
    subject.model.gradient_steps = (3, 1)[subject.turn]


@intervention(variant="dropout", rows=ONE_AGENT, draws=True)
def number_of_a_layer(subject: Subject) -> None:
    for layer in subject.model.policy.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.7


# Parameters and layers


@intervention()
def edited_in_place(subject: Subject) -> None:
    with th.no_grad():
        subject.layer("actor").weight.mul_(1.5)


@intervention()
def target_edited_in_place(subject: Subject) -> None:
    with th.no_grad():
        for parameter in subject.model.critic_target.parameters():
            parameter.mul_(1.5)


@intervention()
def weights_loaded(subject: Subject) -> None:
    state = subject.model.policy.state_dict()
    subject.model.policy.load_state_dict({name: 0.9 * value for name, value in state.items()})


@intervention()
def weights_assigned(subject: Subject) -> None:
    """The networks' parameters are then not the optimizers'."""
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


@intervention()
def other_parameter_that_is_not_trained(subject: Subject) -> None:
    layer = subject.layer("critic")
    layer.weight = nn.Parameter(0.5 * layer.weight.detach())


@intervention()
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


@intervention()
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


@intervention(sb3=False)
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
    for critic in (subject.model.critic, subject.model.critic_target):
        parametrizations.spectral_norm(critic.qf0[0])


@intervention()
def frozen_bias(subject: Subject) -> None:
    subject.layer("critic").bias.requires_grad_(False)


@intervention()
def frozen_layer(subject: Subject) -> None:
    subject.layer("actor").requires_grad_(False)


@intervention()
def frozen_actor(subject: Subject) -> None:
    subject.model.actor.requires_grad_(False)


@intervention(sb3=False)
def frozen_critic(subject: Subject) -> None:
    """SB3 raises; the actor can learn from a critic that does not."""
    subject.model.critic.requires_grad_(False)


@intervention(sb3=False, rows=("sacx",))
def frozen_entropy_coefficient(subject: Subject) -> None:
    subject.model.log_ent_coef.requires_grad_(False)


@intervention(turns=2)
def frozen_for_a_while(subject: Subject) -> None:
    subject.model.actor.requires_grad_(subject.turn == 1)


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

    subject.layer("actor").weight.register_post_accumulate_grad_hook(subject.count("hook", halve))


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
    replace_optimizers(subject, th.optim.RMSprop)


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


@intervention()
def betas(subject: Subject) -> None:
    for optimizer in subject.optimizers().values():
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)


@intervention(turns=3)
def options_of_adam(subject: Subject) -> None:
    name, value = (("weight_decay", 0.5), ("maximize", True), ("eps", 1.0))[subject.turn]
    for optimizer in subject.optimizers().values():
        optimizer.param_groups[0][name] = value


@intervention()
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


@intervention()
def moments_edited(subject: Subject) -> None:
    for optimizer in subject.optimizers().values():
        for state in optimizer.state.values():
            state["exp_avg"].mul_(-1)


@intervention()
def moments_forgotten(subject: Subject) -> None:
    for optimizer in subject.optimizers().values():
        optimizer.state.clear()


@intervention()
def counters_set(subject: Subject) -> None:
    """A first step's correction of the moments, for some of the parameters."""
    for optimizer in subject.optimizers().values():
        for state in list(optimizer.state.values())[::2]:
            state["step"].fill_(0)


@intervention(counts=True)
def step_replaced(subject: Subject) -> None:
    optimizer = subject.optimizers()["actor.optimizer"]
    optimizer.step = subject.count("step")  # type: ignore[method-assign]  # which makes none


# Methods and classes


def scaled(method: Callable[..., Any], factor: float = 0.9) -> Callable[..., Any]:
    """The method with its result, or each of its results, times a factor."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        return tuple(factor * value for value in result) if isinstance(result, tuple) else factor * result

    return replacement


@intervention()
def forward_of_the_critic(subject: Subject) -> None:
    subject.model.critic.forward = scaled(subject.model.critic.forward)


@intervention()
def forward_of_the_actor(subject: Subject) -> None:
    subject.model.actor.forward = scaled(subject.model.actor.forward)


@intervention()
def forward_of_the_target(subject: Subject) -> None:
    subject.model.critic_target.forward = scaled(subject.model.critic_target.forward)


@intervention()
def forward_of_a_layer(subject: Subject) -> None:
    layer = subject.layer("critic")
    layer.forward = scaled(layer.forward)


@intervention(rows=("td3x", "ddpgx", "maddpg"))
def first_stream_alone(subject: Subject) -> None:
    subject.model.critic.q1_forward = scaled(subject.model.critic.q1_forward)


@intervention(rows=("sacx",))
def density_of_the_actor(subject: Subject) -> None:
    original = subject.model.actor.action_log_prob

    def replacement(observations: Any) -> tuple[th.Tensor, th.Tensor]:
        actions, log_prob = original(observations)
        return 0.9 * actions, log_prob

    subject.model.actor.action_log_prob = replacement


def patched(subject: Subject, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    subject.undo.enter_context(mock.patch.object(owner, name, replacement))


@intervention()
def forward_of_the_critics_class(subject: Subject) -> None:
    cls = type(subject.model.critic)
    patched(subject, cls, "forward", scaled(cls.forward))


@intervention()
def forward_of_linear_layers(subject: Subject) -> None:
    patched(subject, nn.Linear, "forward", lambda self, x: 0.9 * F.linear(x, self.weight, self.bias))


@intervention()
def forward_of_activations(subject: Subject) -> None:
    patched(subject, nn.ReLU, "forward", lambda self, x: F.leaky_relu(x, 0.5))


@intervention()
def class_of_a_layer(subject: Subject) -> None:
    layer = subject.layer("critic")
    layer.__class__ = type("Scaled", (type(layer),), {"forward": scaled(type(layer).forward)})


@intervention()
def class_of_the_critic(subject: Subject) -> None:
    critic = subject.model.critic
    critic.__class__ = type("Scaled", (type(critic),), {"forward": scaled(type(critic).forward)})


@intervention()
def class_of_the_policy(subject: Subject) -> None:
    policy = subject.model.policy
    policy.__class__ = type("Scaled", (type(policy),), {"_predict": scaled(type(policy)._predict)})


@intervention()
def prediction_of_the_policy(subject: Subject) -> None:
    subject.model.policy._predict = scaled(subject.model.policy._predict)


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


@intervention(**COMPILED)
def compiled_critic(subject: Subject) -> None:
    subject.model.critic.forward = compiled(subject, subject.model.critic.forward)


@intervention(**COMPILED, rows=("td3x",))
def compiled_actor(subject: Subject) -> None:
    subject.model.actor.forward = compiled(subject, subject.model.actor.forward)


@intervention(**COMPILED, rows=("td3x",))
def compiled_in_place(subject: Subject) -> None:
    compiled(subject, th.relu)  # what it leaves set is put back
    subject.model.critic.compile(backend="eager")


# Replay


def negate_rewards(buffer: ReplayBuffer, in_place: bool) -> None:
    """Those of the agents where there are several."""
    name = "agent_rewards" if hasattr(buffer, "agent_rewards") else "rewards"
    rewards = getattr(buffer, name)
    setattr(buffer, name, np.negative(rewards, out=rewards if in_place else None))


@intervention()
def rewards_edited(subject: Subject) -> None:
    negate_rewards(subject.model.replay_buffer, in_place=True)


@intervention()
def rewards_replaced(subject: Subject) -> None:
    negate_rewards(subject.model.replay_buffer, in_place=False)


@intervention()
def other_buffer(subject: Subject) -> None:
    subject.model.replay_buffer = copy.deepcopy(subject.model.replay_buffer)
    negate_rewards(subject.model.replay_buffer, in_place=True)


@intervention()
def emptied_buffer(subject: Subject) -> None:
    subject.model.replay_buffer.reset()


@intervention()
def draws_of_the_buffer(subject: Subject) -> None:
    original = subject.model.replay_buffer.sample

    def sample(*args: Any, **kwargs: Any) -> Any:
        batch = original(*args, **kwargs)
        return batch._replace(rewards=-batch.rewards)

    subject.model.replay_buffer.sample = sample


# Modes and switches


def without_a_mode(self: Any, mode: bool) -> None:
    """In place of ``set_training_mode``."""


@intervention(variant="dropout", rows=ONE_AGENT, draws=True)
def evaluation_mode_for_good(subject: Subject) -> None:
    subject.model.policy.set_training_mode(False)
    subject.model.policy.set_training_mode = types.MethodType(without_a_mode, subject.model.policy)


@intervention(variant="dropout", rows=ONE_AGENT, acts=False)
def evaluation_mode(subject: Subject) -> None:
    """Training sets the mode that it needs."""
    subject.model.policy.set_training_mode(False)


SELDOM = (("train_freq", 4), ("gradient_steps", 4))
"""So that what an update does not draw anew counts for some steps."""


@intervention(variant="gsde", rows=("sacx",), changes=SELDOM)
def noise_of_gsde_reset(subject: Subject) -> None:
    subject.model.actor.reset_noise()


@intervention(variant="gsde", rows=("sacx",), changes=SELDOM)
def noise_of_gsde_edited(subject: Subject) -> None:
    distribution = subject.model.actor.action_dist
    distribution.exploration_mat = 5 * distribution.exploration_mat


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
