"""SACX with policies of SB3's kind that it did not make, and copies of its own."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from batches import engine_on_and_off
from models import features, small_model
from stable_baselines3 import SAC
from stable_baselines3.sac.policies import SACPolicy
from subjects import numbers
from torch import nn

from sb3_ac_ext.sacx.policies import divided

ATOL = 1e-5


class Halved(th.optim.Adam):
    """Steps with half of each gradient; the factor is an attribute of the object."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = 0.5

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.factor)
        return super().step(closure)


class Trunk(nn.Module):
    """Two critics on common layers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        hidden = th.tanh(self.trunk(th.cat([obs, actions], dim=1)))
        return self.a(hidden), self.b(hidden)

    def set_training_mode(self, mode: bool) -> None:
        self.train(mode)


class TrunkPolicy(SACPolicy):
    """Has no separate networks for the critics."""

    def make_critic(self, features_extractor: Any = None) -> Any:
        return Trunk()


class GroupsPolicy(SACPolicy):
    """Decays the weights of the critics, and not their biases."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        weights, biases = ([p for p in self.critic.parameters() if (p.dim() > 1) is wanted] for wanted in (True, False))
        groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": 0.1}, {"params": biases}]
        self.critic.optimizer = th.optim.Adam(groups, lr=lr_schedule(1), eps=1e-2)


class HalfPolicy(SACPolicy):
    """Acts with half of the actor's action."""

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        return 0.5 * super()._predict(observation, deterministic)


@engine_on_and_off
@pytest.mark.parametrize(
    ("policy", "policy_kwargs"),
    [
        (TrunkPolicy, {}),
        (GroupsPolicy, {}),
        (HalfPolicy, {}),
        (HalfPolicy, {"n_critics": 1}),
        (HalfPolicy, {"n_critics": 3}),
        (HalfPolicy, features(share=True)),
        (HalfPolicy, {"optimizer_class": Halved}),
        (HalfPolicy, {"optimizer_class": th.optim.RMSprop}),
    ],
)
def test_policies_of_others_are_trained_as_by_sac(policy: Any, policy_kwargs: dict[str, Any], engine: bool) -> None:
    results = []
    changes: list[tuple[Any, dict[str, Any]]] = [("sacx", {"engine": engine}), (SAC, {})]
    for cls, own in changes:
        model = small_model(cls, policy=policy, policy_kwargs=policy_kwargs, **own)
        model.set_random_seed(0)
        results.append(numbers(model.learn(40)))
        assert type(model.policy) is policy
    th.testing.assert_close(*results, rtol=0, atol=ATOL if engine else 0)


def test_rates_of_its_own_for_a_policy_of_others() -> None:
    model = small_model("sacx", policy=HalfPolicy, q_b_learning_rate=0.0).learn(15)
    before = [[parameter.clone() for parameter in stream.parameters()] for stream in model.critic.q_networks]
    model.learn(5, reset_num_timesteps=False)
    same = [all(map(th.equal, old, stream.parameters())) for old, stream in zip(before, model.critic.q_networks, strict=True)]
    assert same == [False, True]


def test_an_optimizer_in_place_of_sb3s_is_taken_up() -> None:
    model = small_model("sacx", learning_rate=0.5).learn(15)
    before = th.cat([parameter.detach().flatten() for parameter in model.critic.parameters()])
    model.critic.optimizer = th.optim.SGD(model.critic.parameters(), lr=1.0)
    model.learn(1, reset_num_timesteps=False)
    assert type(model.policy.q_a_optimizer) is type(model.policy.q_b_optimizer) is th.optim.SGD
    gradients = th.cat([parameter.grad.flatten() for parameter in model.critic.parameters()])
    after = th.cat([parameter.detach().flatten() for parameter in model.critic.parameters()])
    th.testing.assert_close(after, before - 0.5 * gradients)


def test_optimizers_are_divided_with_what_they_know() -> None:
    shared, first, second = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 1)
    groups = [{"params": shared.parameters(), "eps": 0.1}, {"params": [*first.parameters(), *second.parameters()]}]
    whole = Halved(groups, lr=1.0)
    whole.factor = 0.25
    for parameter in (*shared.parameters(), *first.parameters()):
        parameter.grad = th.ones_like(parameter)
    whole.step()
    modules = [nn.Sequential(shared, first), nn.Sequential(shared, second), nn.Sequential(first)]
    one, two, three, rest = divided(whole, modules)
    assert three is rest is None
    assert isinstance(one, Halved) and isinstance(two, Halved)
    assert [group["params"] for group in one.param_groups] == [[*shared.parameters()], [*first.parameters()]]
    assert [group["eps"] for group in one.param_groups] == [0.1, 1e-8]
    assert [group["params"] for group in two.param_groups] == [[*second.parameters()]]
    assert (len(one.state), len(two.state)) == (4, 0)
    assert one.factor == two.factor == 0.25


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["copy", "pickle"])
@pytest.mark.parametrize("variant", ["mlp", "gsde"])
def test_actors_are_copied_without_a_graph(variant: str, copied: Any) -> None:
    """New, in the middle of a rollout, and after updates."""
    model = small_model("sacx", variant)
    batch = np.ones((3, 4), np.float32)

    def check(*_: Any) -> bool:
        for thing in (model.policy, model.actor, model):
            other = copied(thing)
            actor = getattr(other, "actor", other)
            with th.no_grad():
                th.testing.assert_close(actor(th.as_tensor(batch), True), model.actor(th.as_tensor(batch), True))
        return True

    check()
    model.learn(14, callback=check)
    model.train(3, 8)
    check()
    model.actor.action_log_prob(th.as_tensor(batch))
    check()


def test_copying_leaves_the_graph_of_the_original() -> None:
    actor = small_model("sacx").actor
    actions, _ = actor.action_log_prob(th.ones(3, 4))
    other = copy.deepcopy(actor)
    assert actor.action_dist.distribution.mean.requires_grad
    assert not other.action_dist.distribution.mean.requires_grad
    actions.sum().backward()
    assert actor.mu.weight.grad is not None
