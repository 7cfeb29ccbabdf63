"""MADDPG: DDPG with one agent, the paper's losses with several, and each agent by itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from batches import SGD, batches, engine_on_and_off, feed, flat
from environments import BOX, CONTINUOUS, IMAGE, RandomEnv
from gymnasium.wrappers import TimeLimit
from matrix_game import evaluate, train
from models import small_model
from parallel_environments import Crowd, Meadow
from stable_baselines3 import DDPG
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_ac_ext.maddpg import Agent, JointEnv
from sb3_ac_ext.maddpg.buffer import JointReplayBuffer, JointTransitions
from sb3_ac_ext.maddpg.logged import log_keys
from sb3_ac_ext.maddpg.networks import JointCritic

SMALL: dict[str, Any] = {"net_arch": [16, 16]}


def make(env: Any = None, cls: Any = "maddpg", **kwargs: Any) -> Any:
    return small_model(cls, env=Meadow() if env is None else env, **{"policy_kwargs": SMALL, **kwargs})


def joint_batch(model: Any, rows: int = 32, dtype: th.dtype = th.float64, seed: int = 3) -> JointTransitions:
    """Random transitions of the model's agents: some end, some have ended before; every number is the agent's own."""
    generator = th.Generator().manual_seed(seed)

    def normal(*shape: int) -> th.Tensor:
        return th.randn(*shape, generator=generator, dtype=dtype)

    layout, agents = model.policy.layout, len(model.policy.layout)
    features = layout.observations[-1].stop
    actions = normal(rows, layout.action_dim).tanh()
    for columns, choices in zip(layout.actions, layout.choices, strict=True):
        if choices:
            actions[:, columns] = nn.functional.one_hot(actions[:, columns].argmax(dim=1), choices).to(dtype)
    return JointTransitions(
        observations=normal(rows, features),
        actions=actions,
        next_observations=normal(rows, features),
        dones=(normal(rows, agents) > 0.7).to(dtype),
        rewards=normal(rows, agents),
        active=(normal(rows, agents) > -1.0).to(dtype),
        discounts=th.tensor(float(model.gamma), dtype=th.float64),
    )


def critic_loss(model: Any, batch: JointTransitions) -> th.Tensor:
    return model._critic_loss(model.critic(batch.observations, batch.actions), model._target(batch), batch)


def shift(model: Any) -> None:
    """Make online and target networks differ."""
    for i, name in enumerate(("actor", "critic", "actor_target", "critic_target")):
        for parameter in getattr(model, name).parameters():
            parameter.data.add_(0.02 * (i + 1))


def alone(transitions: Any) -> JointTransitions:
    """A batch of one agent."""
    b = transitions
    return JointTransitions(b.observations, b.actions, b.next_observations, b.dones, b.rewards, th.ones_like(b.dones))


# One agent


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("centralised", [True, False], ids=["central", "independent"])
@engine_on_and_off
def test_one_agent_is_ddpg(centralised: bool, engine: bool) -> None:
    """Update by update, in float64; the optimizers too."""
    unequal = {"net_arch": {"pi": [8], "qf": [16, 8, 4]}, "activation_fn": nn.Tanh}
    kwargs = {"policy_kwargs": unequal, "learning_rate": lambda progress: 1e-3 * progress}
    env = RandomEnv(BOX, CONTINUOUS)
    models = theirs, ours = make(env, DDPG, **kwargs), make(env, engine=engine, centralised=centralised, **kwargs)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)  # same seed, same initial weights
    samples = [batch._replace(discounts=None) for batch in batches(6, dtype=th.float64)]
    feed(theirs, samples)
    feed(ours, [alone(batch) for batch in samples])
    for model in models:
        model.policy.double()
    for update in range(6):
        for model in models:
            model._current_progress_remaining = 1 - update / 10
            model.train(gradient_steps=1, batch_size=8)
        th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-10)
        for network in ("actor", "critic"):
            moments = [getattr(model, network).optimizer.state_dict()["state"] for model in models]
            th.testing.assert_close(*moments, rtol=0, atol=1e-10)


@engine_on_and_off
def test_one_agent_learns_the_same_as_ddpg_from_the_same_seed(engine: bool) -> None:
    """Bit for bit without the engine."""
    noise = {"action_noise": NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))}
    theirs, ours = make("Pendulum-v1", DDPG, **noise).learn(120), make("Pendulum-v1", engine=engine, **noise).learn(120)
    np.testing.assert_allclose(ours.replay_buffer.actions[:40], theirs.replay_buffer.actions[:40], atol=1e-6)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-4 if engine else 0)


# The losses of several agents


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("centralised", [True, False], ids=["central", "independent"])
@pytest.mark.parametrize(
    ("env", "sharing"),
    [(Meadow, None), (lambda: Crowd(3), None), (lambda: Crowd(3), "all"), (lambda: Crowd(4), [["agent_1", "agent_3"]])],
    ids=["unequal agents", "alike agents", "all share", "two share"],
)
@pytest.mark.parametrize("n_critics", [1, 2, 3])
def test_losses_are_the_sums_of_each_agents(env: Callable[[], Any], sharing: Any, centralised: bool, n_critics: int) -> None:
    """Agent by agent, from the papers: target actors of all, own reward, own end, the others' actions from the batch."""
    options = {"n_critics": n_critics, "parameter_sharing": sharing}
    model = make(env(), centralised=centralised, policy_kwargs={**SMALL, **options}, gamma=0.9)
    shift(model)
    model.policy.double()
    batch = joint_batch(model)

    def value(critic: JointCritic, stream: int, agent: int, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        group = next(members for members in model.policy.groups if agent in members)
        order = list(range(len(model.policy.layout))) if centralised else [agent]
        if centralised:
            order[group[0]], order[agent] = agent, group[0]
        parts = [obs[:, model.policy.layout.observations[i]] for i in order]
        parts += [actions[:, model.policy.layout.actions[i]] for i in order]
        mlp = getattr(critic, f"qf{stream}")[model.policy.groups.index(group)]
        return nn.Sequential(*mlp)(th.cat(parts, dim=1)).squeeze(1)

    def act(actor: Any, obs: th.Tensor) -> th.Tensor:
        parts = []
        for agent, columns in enumerate(model.policy.layout.observations):
            group = next(number for number, members in enumerate(model.policy.groups) if agent in members)
            out = nn.Sequential(*actor.mu[group])(obs[:, columns])
            choices = model.policy.layout.choices[agent]
            noise = -th.empty(len(obs), 1, choices, dtype=obs.dtype).exponential_().log() if choices else None
            if noise is None:
                parts.append(out.tanh())
            else:
                soft = (out + noise[:, 0]).softmax(dim=1)
                parts.append((nn.functional.one_hot(soft.argmax(dim=1), choices) - soft).detach() + soft)
        return th.cat(parts, dim=1)

    def mean(values: th.Tensor, agent: int) -> th.Tensor:
        return values[batch.active[:, agent] == 1].mean()

    agents = range(len(model.policy.layout))
    th.manual_seed(1)
    loss = critic_loss(model, batch)
    th.manual_seed(1)
    with th.no_grad():
        next_actions = act(model.actor_target, batch.next_observations)
    expected = 0
    for i in agents:
        qs = [value(model.critic_target, k, i, batch.next_observations, next_actions).detach() for k in range(n_critics)]
        y = batch.rewards[:, i] + 0.9 * (1 - batch.dones[:, i]) * th.stack(qs).min(dim=0).values
        for k in range(n_critics):
            expected += mean((value(model.critic, k, i, batch.observations, batch.actions) - y) ** 2, i)
    th.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    compare_gradients(loss, expected, model.critic, [model.actor, model.actor_target, model.critic_target])

    th.manual_seed(2)
    actor_loss = model._actor_loss(batch)
    th.manual_seed(2)
    actions = act(model.actor, batch.observations)
    expected = 0
    for i in agents:
        columns = model.policy.layout.actions[i]
        joint = batch.actions.clone()
        joint[:, columns] = actions[:, columns]
        expected -= mean(value(model.critic, 0, i, batch.observations, joint), i)
    th.testing.assert_close(actor_loss, expected, rtol=0, atol=1e-10)
    compare_gradients(actor_loss, expected, model.actor, [model.actor_target, model.critic_target])


def compare_gradients(loss: th.Tensor, expected: th.Tensor, network: nn.Module, untouched: list[nn.Module]) -> None:
    ours, theirs = (gradients(value, list(network.parameters())) for value in (loss, expected))
    assert ours.abs().max() > 1e-6
    th.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    for module in untouched:
        assert not gradients(loss, list(module.parameters())).any()


def gradients(loss: th.Tensor, parameters: list[nn.Parameter]) -> th.Tensor:
    """All of them as one tensor, 0 where the loss does not depend on the parameter."""
    found = th.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return th.cat([(th.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)])


def test_smoothing_moves_boxes_only() -> None:
    """By clipped noise, and not out of the box; one-hots stay as they are."""
    model = make(Meadow(), target_policy_noise=0.5, target_noise_clip=0.3)
    shift(model)
    batch = joint_batch(model, dtype=th.float32)
    seen = {}
    original = model.critic_target.forward
    model.critic_target.forward = lambda obs, actions: seen.update(actions=actions) or original(obs, actions)
    th.manual_seed(0)
    critic_loss(model, batch)
    th.manual_seed(0)
    plain = model.actor_target(batch.next_observations)
    noise = th.empty_like(plain).normal_(0, 0.5)
    assert noise.abs().max() > 0.3
    smoothed = (plain + noise.clip(-0.3, 0.3)).clip(-1, 1)
    boxes = [0, 4, 5]
    th.testing.assert_close(seen["actions"][:, boxes], smoothed[:, boxes])
    assert th.equal(seen["actions"][:, 1:4], plain[:, 1:4])


def test_logit_penalty_is_each_agents_mean_square() -> None:
    model = make(Meadow())
    batch = joint_batch(model, dtype=th.float32)
    losses = []
    for penalty in (0.0, 0.5):
        model.logit_penalty = penalty
        th.manual_seed(0)
        losses.append(model._actor_loss(batch))
    outputs = model.actor.outputs(batch.observations)
    squares = [outputs[:, part].square().mean(dim=1) for part in (slice(0, 1), slice(1, 4), slice(4, 6))]
    expected = sum(own[batch.active[:, i] == 1].mean() for i, own in enumerate(squares))
    th.testing.assert_close(losses[1] - losses[0], 0.5 * expected)


@pytest.mark.parametrize("centralised", [True, False])
def test_agents_that_share_parameters_act_alike_and_know_themselves(centralised: bool) -> None:
    """Exchange two of them, with all they see and do: their actions and values are exchanged, and nobody else's change."""
    kwargs = {"policy_kwargs": {**SMALL, "parameter_sharing": [["agent_0", "agent_2"]]}}
    model = make(Crowd(3), centralised=centralised, **kwargs)
    assert len(model.actor.mu) == len(model.critic.qf0) == 2
    batch = joint_batch(model, dtype=th.float32)
    exchanged = [
        values.reshape(-1, 3, values.shape[1] // 3)[:, [2, 1, 0]].reshape(values.shape)
        for values in (batch.observations, batch.actions)
    ]
    actions, other_actions = (model.actor(obs).reshape(-1, 3, 2) for obs in (batch.observations, exchanged[0]))
    th.testing.assert_close(actions[:, [2, 1, 0]], other_actions)
    (q,), (other,) = model.critic(batch.observations, batch.actions), model.critic(*exchanged)
    th.testing.assert_close(q[:, 0], other[:, 2])
    th.testing.assert_close(q[:, 2], other[:, 0])
    assert (q[:, 0] != q[:, 2]).all()


# The engine


MATD3 = {"policy_kwargs": {**SMALL, "n_critics": 2}, "policy_delay": 2, "target_policy_noise": 0.2}
SHARED = {"policy_kwargs": {**SMALL, "n_critics": 3, "parameter_sharing": [["agent_1", "agent_0"]]}, "max_grad_norm": 0.05}
INDEPENDENT = {"centralised": False, "logit_penalty": 0.1}
TASKS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "unequal": (Meadow, {"max_grad_norm": 0.05}),
    "unequal, matd3": (Meadow, MATD3),
    "unequal, independent": (Meadow, INDEPENDENT),
    "boxes": (lambda: Crowd(4), {}),
    "boxes, matd3": (lambda: Crowd(4), MATD3),
    "boxes, three shared critics": (lambda: Crowd(4), SHARED),
    "choices": (lambda: Crowd(3, discrete=True), {}),
    "choices, independent": (lambda: Crowd(3, discrete=True), INDEPENDENT),
    "choices, three shared critics": (lambda: Crowd(3, discrete=True), SHARED),
}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(("env", "kwargs"), TASKS.values(), ids=TASKS)
def test_replayed_updates_are_the_updates(env: Callable[[], Any], kwargs: dict[str, Any]) -> None:
    """Draw for draw."""
    models = [make(env(), engine=engine, **kwargs) for engine in (True, False)]
    for model in models:
        model.policy.double()
        feed(model, [joint_batch(model, seed=i) for i in range(16)])
    for update in range(16):
        states = []
        for model in models:
            th.manual_seed(update)
            model.train(gradient_steps=1, batch_size=32)
            states.append(th.get_rng_state())
        assert th.equal(*states)  # as many draws
        th.testing.assert_close(flat(models[0].policy), flat(models[1].policy), rtol=0, atol=1e-10)
    assert {how for name, how in models[0].engine_report().items() if "update" in name} == {"replayed"}


@engine_on_and_off
def test_weights_of_transitions(engine: bool) -> None:
    """A transition of weight 2 counts twice; what is wrong with it is the mean over critics and agents that took part."""
    model = make(Meadow(), engine=engine, policy_kwargs={**SMALL, "n_critics": 2})
    model._engine.begin()
    for seed in range(8):
        batch = joint_batch(model, dtype=th.float32, seed=seed)
        batch = batch._replace(weights=th.linspace(0.2, 2, 32).unsqueeze(1))
        values, active = model.critic(batch.observations, batch.actions), batch.active
        th.manual_seed(seed)
        target = model._target(batch)
        errors = [(q - target).detach() for q in values]
        loss = sum((batch.weights * td.square() * active).sum(dim=0) / active.sum(dim=0) for td in errors).sum()
        means = (sum(td.abs() for td in errors) / 2 * active).sum(dim=1, keepdim=True) / active.sum(dim=1, keepdim=True).clamp(
            1
        )
        th.manual_seed(seed)
        outputs = model._engine.run(model._update, batch, True)
        th.testing.assert_close(outputs["critic_loss"], loss)
        th.testing.assert_close(outputs["td_errors"], means)
    assert not engine or model.engine_report()["update(True)"] == "replayed"


@engine_on_and_off
def test_gradients_are_clipped_for_each_agent(engine: bool) -> None:
    """With plain SGD and rate 1 an agent's networks move by their clipped gradient, whatever the others' are."""
    kwargs = {"policy_kwargs": {**SMALL, **SGD}, "learning_rate": 1.0, "engine": engine}
    model = make(Crowd(3), max_grad_norm={"critic": 1e-2}, **kwargs)
    samples = [joint_batch(model, dtype=th.float32, seed=i) for i in range(8)]
    for batch in samples:
        batch.rewards[:, 0] *= 1e4
        batch.rewards[:, 2] *= 1e-4
    feed(model, samples)
    for _ in samples:
        before = [th.cat([p.detach().flatten().clone() for p in own]) for own in model.critic.network_parameters()]
        model.train(gradient_steps=1, batch_size=32)
        after = [th.cat([p.detach().flatten() for p in own]) for own in model.critic.network_parameters()]
        moved = [(new - old).norm().item() for old, new in zip(before, after, strict=True)]
        assert moved == pytest.approx([1e-2] * 3, rel=1e-2)
    assert not engine or model.engine_report()["update(True)"] == "replayed"


# Data


@pytest.mark.parametrize("lengths", [(5,), (3, 4, 5)], ids=["one environment", "three"])
def test_rows_hold_one_step_of_all_agents(lengths: tuple[int, ...]) -> None:
    """Environments with different lengths of episodes are soon at different steps."""
    env = DummyVecEnv([lambda length=length: JointEnv(Meadow(length=length)) for length in lengths])
    model = make(env, learning_starts=200).learn(40 * len(lengths))
    assert type(model.replay_buffer) is JointReplayBuffer
    np.random.seed(0)
    batch = model._sample(64)
    t = batch.next_observations[:, 0]
    th.testing.assert_close(batch.observations[:, 0], t - 1)
    assert th.equal(batch.next_observations[:, 10:].argmax(dim=1).float(), t)  # the fly's one-hot of t
    th.testing.assert_close(batch.rewards, th.stack([t, -t, 10 * t], dim=1))
    assert batch.active.all()
    th.testing.assert_close(batch.next_observations[:, 5], 1.5 * (batch.actions[:, 0] + 1))
    th.testing.assert_close(batch.next_observations[:, 6], batch.actions[:, 1:4].argmax(dim=1).float() + 1)
    fly = th.stack([batch.actions[:, 4], 2 * (batch.actions[:, 5] + 1)], dim=1)
    th.testing.assert_close(batch.next_observations[:, 7:9], fly)


@pytest.mark.parametrize("kind", ["terminates", "truncates"])
def test_an_agent_that_ends_early(kind: str) -> None:
    model = make(Meadow(length=4, ends={"fly": (2, kind)}), learning_starts=100).learn(4)
    batch = model.replay_buffer._get_samples(np.arange(4))
    assert batch.active.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert batch.dones[:, 2].tolist() == [0, float(kind == "terminates"), 0, 0]
    assert batch.dones[:, 0].tolist() == [0, 0, 0, 1]
    assert batch.rewards[:, 2].tolist() == [10, 20, 0, 0]
    assert batch.next_observations[1, 10:].argmax() == 2  # its last observation
    assert not batch.next_observations[2:, 10:].any()


@pytest.mark.parametrize(
    ("env", "done"),
    [
        (lambda: Meadow(length=3), 1.0),
        (lambda: Meadow(length=3, truncates=True), 0.0),
        (lambda: TimeLimit(JointEnv(Meadow(length=5)), 3), 0.0),
    ],
    ids=["terminates", "truncates", "time limit"],
)
def test_the_end_of_the_episode(env: Callable[[], Any], done: float) -> None:
    model = make(env(), learning_starts=100).learn(6)
    batch = model.replay_buffer._get_samples(np.arange(6))
    assert batch.dones.tolist() == [[0] * 3, [0] * 3, [done] * 3] * 2
    assert batch.next_observations[:, 0].tolist() == [1, 2, 3, 1, 2, 3]


def test_zero_sum_game_keeps_both_rewards() -> None:
    model = make(Crowd(2, zero_sum=True), learning_starts=100).learn(20)
    batch = model._sample(32)
    assert th.equal(batch.rewards[:, 0], -batch.rewards[:, 1])
    assert batch.rewards[:, 0].abs().min() > 0
    assert not model.replay_buffer.rewards.any()  # their sum


def test_warm_up_draws_one_hots_and_stores_them_unscaled() -> None:
    env = Meadow()
    model = make(env, learning_starts=40).learn(60)
    stored = model.replay_buffer.actions[:60, 0]
    choices = stored[:, 1:4]
    assert ((choices == 0) | (choices == 1)).all() and (choices.sum(axis=1) == 1).all()
    assert [seen["dog"] for seen in env.seen] == (1 + choices.argmax(axis=1)).tolist()
    assert set(choices[:40].argmax(axis=1)) == {0, 1, 2}
    np.testing.assert_allclose([seen["cow"][0] for seen in env.seen], 1.5 * (stored[:, 0] + 1), atol=1e-6)
    assert stored[:40, [0, 4, 5]].min() < -0.5 and stored[:40, [0, 4, 5]].max() > 0.5


def test_noise_moves_boxes_only() -> None:
    noise = {"type": "normal", "start": 0.5}
    model = make(Meadow(), learning_starts=0, exploration_noise=noise)
    model._last_obs = model.env.reset()
    model.predict = lambda obs, deterministic: (model.policy.predict(obs, deterministic=True)[0], None)
    scaled = model.policy.scale_action(model.predict(model._last_obs, False)[0])
    model._setup_learn(10)
    action, stored = model._sample_action(0, model.action_noise)
    np.testing.assert_array_equal(stored[:, 1:4], scaled[:, 1:4])
    assert (np.abs(stored - scaled)[:, [0, 4, 5]] > 1e-3).all()
    np.testing.assert_array_equal(action[:, 1:4], stored[:, 1:4])


def test_exploration_draws_choices_from_the_policy() -> None:
    model = make(Crowd(2, discrete=True))
    obs = model.env.reset()
    draws = np.stack([model.predict(obs)[0][0] for _ in range(2000)])
    with th.no_grad():
        logits = model.actor.outputs(th.as_tensor(obs)).reshape(2, 3)
    np.testing.assert_allclose(draws.mean(axis=0).reshape(2, 3), logits.softmax(dim=1), atol=0.05)
    modes = np.stack([model.predict(obs, deterministic=True)[0][0] for _ in range(3)])
    np.testing.assert_array_equal(modes, np.eye(3)[logits.argmax(dim=1)].reshape(1, 6).repeat(3, axis=0))


def test_returns_of_each_agent_are_logged() -> None:
    model = make(Meadow(length=3), learning_starts=100).learn(6)
    logged = model.logger.name_to_value
    assert [logged[f"rollout/{name}_return"] for name in ("cow", "dog", "fly")] == [6, -6, 60]


class Renamed(Crowd):
    """A crowd of agents with names."""

    def __init__(self, *names: str) -> None:
        super().__init__(len(names))
        self.possible_agents = list(names)


def test_returns_of_agents_whose_names_begin_alike_are_logged(tmp_path: Path) -> None:
    """SB3's logger refuses keys that are the same where it cuts them."""
    start = "a_walker_on_the_northern_side_"  # 30 letters
    names = [f"{start}of_the_river", f"{start}of_the_hill", "dog", "one_with_a_long_name_of_its_own_kind"]
    model = make(Renamed(*names), learning_starts=100)
    model.set_logger(configure(str(tmp_path), ["log", "csv"]))
    model.learn(14, log_interval=1)
    model.logger.close()
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    returns = {key.removeprefix("rollout/") for key in header if key.endswith("_return")}
    assert returns == {f"{names[3]}_return", "dog_return", f"{start[:17]}...0_return", f"{start[:17]}...1_return"}
    assert log_keys({0: "cow", 1: "dog"}, "return") == {"return": ["cow_return", "dog_return"]}


def test_observations_may_be_normalised() -> None:
    env = VecNormalize(make_vec_env(lambda: JointEnv(Meadow()), n_envs=2), norm_reward=False)
    model = make(env).learn(60)
    assert model._n_updates > 0
    raw = model.replay_buffer._get_samples(np.arange(10))
    np.random.seed(0)
    normalised = model.replay_buffer._get_samples(np.arange(10), env=env)
    assert not th.equal(raw.observations[:, 0], normalised.observations[:, 0])
    np.random.seed(0)
    rows = np.random.randint(0, high=2, size=10)
    expected = env.normalize_obs(model.replay_buffer.observations[np.arange(10), rows])
    np.testing.assert_allclose(normalised.observations, expected, rtol=1e-6)
    np.testing.assert_array_equal(normalised.rewards, model.replay_buffer.agent_rewards[np.arange(10), rows])


# Acting


def test_predict_agent_is_its_part_of_predict() -> None:
    model = make(Meadow()).learn(30)
    observations, _ = Meadow().reset(seed=5)
    env = JointEnv(Meadow())
    joint, _ = env.reset(seed=5)
    expected = model.agent_actions(model.predict(joint, deterministic=True)[0])
    for index, (name, obs) in enumerate(observations.items()):
        for agent in (name, index):
            action = model.predict_agent(agent, obs, deterministic=True)
            assert Meadow.actions[name].contains(action)
            np.testing.assert_allclose(action, expected[name], atol=1e-6)


def test_agent_actions_of_a_batch() -> None:
    model = make(Meadow())
    joint, _ = model.predict(np.stack([JointEnv(Meadow()).reset(seed=i)[0] for i in range(4)]))
    actions = model.agent_actions(joint)
    assert {name: values.shape for name, values in actions.items()} == {"cow": (4, 1), "dog": (4,), "fly": (4, 2, 1)}
    assert set(actions["dog"]) <= {1, 2, 3}
    np.testing.assert_array_equal(actions["dog"], joint[:, 1:4].argmax(axis=1) + 1)


def test_predict_agent_of_a_batch_and_bad_observations() -> None:
    model = make(Meadow())
    observations = np.random.default_rng(0).normal(size=(3, 4))
    actions = model.predict_agent("cow", observations)
    assert actions.shape == (3, 1)
    np.testing.assert_allclose(actions[1], model.predict_agent("cow", observations[1]), atol=1e-6)
    with pytest.raises(ValueError, match=r"agent must be one of 'cow', 'dog', 'fly' or its number from 0, got 'cat'"):
        model.predict_agent("cat", observations)
    with pytest.raises(ValueError, match=r"observation of agent 'cow' must be of Box"):
        model.predict_agent("cow", np.zeros(5))
    with pytest.raises(ValueError, match=r"observation of agent 'fly' must be of Discrete\(6\), got 6"):
        model.predict_agent("fly", 6)


@pytest.mark.parametrize("name", ["cow", "dog", "fly"])
def test_one_agent_runs_without_the_others(name: str, tmp_path: Path) -> None:
    model = make(Meadow()).learn(30)
    model.save_agent(name, tmp_path / name)
    saved = (tmp_path / f"{name}.pth").read_bytes()
    agent = Agent.load(tmp_path / name)
    obs = Meadow().reset(seed=1)[0][name]
    np.testing.assert_array_equal(agent.predict(obs, deterministic=True), model.predict_agent(name, obs, deterministic=True))
    numbers = sum(parameter.numel() for parameter in agent.network.parameters())
    assert numbers == sum(parameter.numel() for parameter in model.policy.agent(name).network.parameters())
    assert len(saved) < 4 * numbers + 20_000  # nobody else's networks
    model.save_agent(name, tmp_path / "other.pth")
    assert Agent.load(tmp_path / "other.pth").name == name


def test_one_agents_choices_are_drawn() -> None:
    model = make(Meadow())
    obs = Meadow().reset(seed=1)[0]["dog"]
    draws = [int(model.predict_agent("dog", obs)) for _ in range(300)]
    assert set(draws) == {1, 2, 3}
    assert len({int(model.predict_agent("dog", obs, deterministic=True)) for _ in range(20)}) == 1


def test_images_cannot_be_saved_for_one_agent(tmp_path: Path) -> None:
    model = make(RandomEnv(IMAGE, CONTINUOUS))
    with pytest.raises(NotImplementedError, match=r"agent 'agent' must not observe images to act by itself"):
        model.save_agent("agent", tmp_path / "agent")


# Saving


def test_buffer_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    env = RandomEnv(BOX, CONTINUOUS)
    make(env, DDPG).learn(10).save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match=r"must be a JointReplayBuffer, got a ReplayBuffer"):
        make(env).load_replay_buffer(tmp_path / "buffer")


def test_parameters_are_tensors_by_themselves() -> None:
    """So that what is saved of one is not all of them."""
    for value in make(Crowd(3)).learn(20).policy.state_dict().values():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


# Learning


@pytest.mark.slow
def test_learns_the_cooperative_matrix_game() -> None:
    """Recorded at -0.0003 with central critics and -0.0023 without (medians), random actions at -0.8; then set."""
    central, independent = ([train(seed, name)["final"] for seed in range(3)] for name in ("central critics", "independent"))
    assert evaluate(None) < -0.5
    assert np.median(central) >= -0.01 and min(central) >= -0.05
    assert np.median(central) > np.median(independent)
