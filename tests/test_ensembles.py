"""Policy ensembles of MADDPG: who acts, who learns from what, equation 9."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from batches import SGD, engine_on_and_off, flat
from environments import BOX, CONTINUOUS, RandomEnv
from gymnasium import spaces
from models import small_model
from parallel_environments import Crowd, Meadow
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_ac_ext import MADDPG
from sb3_ac_ext.base.off_policy import OffPolicyMixin
from sb3_ac_ext.maddpg import Agent, JointEnv
from sb3_ac_ext.maddpg.buffer import JointReplayBuffer, PrioritizedJointReplayBuffer
from sb3_ac_ext.maddpg.ensemble_buffer import SUB_POLICIES, EnsembleReplayBuffer
from sb3_ac_ext.maddpg.evaluation import returns_of_pairs
from sb3_ac_ext.validation import UnsupportedError

HERD = [["cow", "fly"]]
"""Of the meadow; the dog is alone."""


class Same(Meadow):
    """A meadow that always begins in the same state."""

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed)
        self.start = 0.0
        return self._observe({}), {agent: {} for agent in self.agents}


class Hunt(Crowd):
    """Two who hunt a third."""

    def __init__(self) -> None:
        super().__init__(3)
        self.possible_agents = ["hunter_0", "hunter_1", "prey_0"]


class Line(Crowd):
    """Two agents that see and do a number each."""

    def __init__(self) -> None:
        super().__init__(2, size=1)
        self.possible_agents = ["row", "column"]

    def action_space(self, agent: str) -> Any:
        return spaces.Box(-1, 1, (1,), np.float32)


def make(env: Any = None, k: int = 2, **kwargs: Any) -> Any:
    teams = {"teams": HERD} if env is None and k > 1 and "ensemble_draw" not in kwargs else {}
    return small_model("maddpg", env=Meadow() if env is None else env, n_sub_policies=k, **{**teams, **kwargs})


def collected(steps: int, **kwargs: Any) -> Any:
    """A model with experience and no update yet."""
    return make(learning_starts=0, gradient_steps=0, **kwargs).learn(steps)


def meadows(*lengths: int) -> DummyVecEnv:
    return DummyVecEnv([lambda n=n: JointEnv(Meadow(length=n)) for n in lengths])


def rows_of(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Observations ``(T, n_envs, O)`` and indices ``(T, n_envs, N)`` of the replay buffer."""
    size = model.replay_buffer.size()
    return model.replay_buffer.observations[:size], model.replay_buffer.sub_policies[:size]


# Equation 9


def line_model(k: int, rows: list[tuple[float, float, int]], **kwargs: Any) -> Any:
    """
    A model of `Line` with actors a_1 = theta o_1, a critic Q = a_1 a_2 + 3 a_1, and a replay buffer of these transitions.

    :param rows: o_1, a_2 and the sub-policy that the first agent acted by; the second one acts by 0
    """
    policy_kwargs = {"net_arch": [], **SGD}
    model = make(Line(), k, policy_kwargs=policy_kwargs, learning_rate=1.0, batch_size=4, engine=False, **kwargs)
    for o_1, a_2, index in rows:
        obs, action = np.array([[o_1, 0.0]], np.float32), np.array([[0.3, a_2]], np.float32)
        info = {"agent_rewards": np.zeros(2), "agent_terminated": np.zeros(2), "agent_active": np.ones(2)}
        for _ in range(4):
            model.replay_buffer.add(obs, obs, action, np.zeros(1), np.zeros(1), [{**info, SUB_POLICIES: [index, 0]}])
    for networks in model.policy.sub_policies:
        networks.actor.act = lambda outputs, deterministic=False: outputs
        networks.critic.q1_forward = lambda obs, actions, agents=None: th.cat(
            [(a[:, :1] * a[:, 1:] + 3 * a[:, :1]) for a in actions], dim=1
        )
    return model


def moved(model: Any) -> list[float]:
    """By how much one step at a rate of 1 moves the first agent's theta of each sub-policy."""

    def weights() -> list[float]:
        return [networks.actor.mu[0][0].weight.item() for networks in model.policy.sub_policies]

    before = weights()
    model.train(1, model.batch_size)
    return [new - old for old, new in zip(before, weights(), strict=True)]


def test_each_sub_policy_ascends_by_its_own_transitions_over_k() -> None:
    """D^(1): o_1 = 2, a_2 = .5; D^(2): o_1 = 1, a_2 = -1. Gradients 7 and 2, halved; of a common replay 4.5 for both."""
    assert moved(line_model(2, [(2, 0.5, 0), (1, -1, 1)])) == pytest.approx([3.5, 1.0])
    assert moved(line_model(1, [(2, 0.5, 0)])) == pytest.approx([7.0])


def test_a_sub_policy_without_a_batch_waits() -> None:
    model = line_model(2, [(2, 0.5, 0)])
    assert moved(model) == pytest.approx([3.5, 0.0])
    assert model.logger.name_to_value["train/sub_policies_updated"] == 0.5  # the second agent acted by one of two as well


def by_hand(model: Any, batch: Any, part: int, team: tuple[int, ...], k: int, rows: int) -> tuple[th.Tensor, th.Tensor]:
    """Losses of a team's sub-policy, agent by agent and transition by transition for the targets."""
    layout, policies = model.policy.layout, model.policy.sub_policies
    own = slice(part * rows, (part + 1) * rows)
    obs, actions, next_obs = batch.observations[own], batch.actions[own], batch.next_observations[own]
    next_actions = []
    for row, numbers in zip(next_obs, batch.sub_policies[own].tolist(), strict=True):
        nets = [nn.Sequential(*policies[number].actor_target.mu[j]) for j, number in enumerate(numbers)]
        next_actions.append(th.cat([net(row[layout.observations[j]]) for j, net in enumerate(nets)]).tanh())
    next_joint = th.cat([next_obs, th.stack(next_actions)], dim=1)
    critic_loss, actor_loss = th.zeros(2)
    for i in team:
        reward, done, active = (values[own, i] for values in (batch.rewards, batch.dones, batch.active))
        target = reward + 0.9 * (1 - done) * policies[k].critic_target.qf0[i](next_joint)[:, 0]
        q = policies[k].critic.qf0[i](th.cat([obs, actions], dim=1))[:, 0]
        critic_loss = critic_loss + (q - target.detach())[active == 1].square().mean()
        joint = actions.clone()
        joint[:, layout.actions[i]] = policies[k].actor.mu[i](obs[:, layout.observations[i]]).tanh()
        q = policies[k].critic.qf0[i](th.cat([obs, joint], dim=1))[:, 0]
        actor_loss = actor_loss - q[active == 1].mean() / 2
    return critic_loss, actor_loss


@pytest.mark.parametrize("targets", ["stored", "current"])
def test_losses_are_those_of_every_agent_and_sub_policy(targets: str) -> None:
    """Own critics and actors, co-players' targets of the stored indices or of the environments' present ones."""
    env = DummyVecEnv([lambda: JointEnv(Hunt())] * 2)
    model = collected(100, env=env, gamma=0.9, ensemble_targets=targets, engine=False)
    shift(model)
    model._drawn = np.array([[0, 0, 1], [1, 1, 0]])
    due = ((0, 0), (1, 0), (0, 1), (1, 1))
    np.random.seed(3)
    drawn = [model.replay_buffer.places((0, 2)[team], k, 8) for team, k in due]
    np.random.seed(3)
    batch = model._sample_due(due, 8)
    rows, envs = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    expected = model.replay_buffer.sub_policies[rows, envs] if targets == "stored" else model._drawn[envs].copy()
    teams = ((0, 1), (2,))
    for part, (team, k) in enumerate(due):
        assert (model.replay_buffer.sub_policies[rows, envs][part * 8 : part * 8 + 8][:, teams[team]] == k).all()
        expected[part * 8 : part * 8 + 8, list(teams[team])] = k  # those that are trained, in any case
    np.testing.assert_array_equal(batch.sub_policies.numpy(), expected)
    assert (batch.sub_policies != th.as_tensor(model.replay_buffer.sub_policies[rows, envs])).any() == (targets == "current")

    model._engine.begin()
    before = copy.deepcopy(model.policy)
    critic_loss, q_before = th.zeros(()), model.policy.sub_policies[1].critic.qf0[0][0].weight.clone()
    for part, (team, k) in enumerate(due):
        critic_loss = critic_loss + by_hand(model, batch, part, teams[team], k, 8)[0]
    outputs = model._engine.run(model._update_some, batch, due, False)
    th.testing.assert_close(outputs["critic_loss"], critic_loss, rtol=1e-5, atol=1e-5)
    assert not th.equal(q_before, model.policy.sub_policies[1].critic.qf0[0][0].weight)
    model.policy.load_state_dict(before.state_dict())
    model.critic_learning_rate = 0.0  # so that the actors see the critics that the hand sees
    model._engine.begin()
    actor_loss = sum(by_hand(model, batch, part, teams[team], k, 8)[1] for part, (team, k) in enumerate(due))
    outputs = model._engine.run(model._update_some, batch, due, True)
    th.testing.assert_close(outputs["actor_loss"], actor_loss, rtol=1e-5, atol=1e-5)


def shift(model: Any) -> None:
    """Make all networks differ, targets and online ones too."""
    for i, parameter in enumerate(model.policy.parameters()):
        parameter.data.add_(0.01 * (i % 7))


TASKS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "unequal": (Meadow, {"teams": HERD, "max_grad_norm": 0.05}),
    "choices, apart": (lambda: Crowd(2, discrete=True), {"ensemble_draw": "agent", "ensemble_targets": "current"}),
    "shared, matd3": (
        lambda: Crowd(3),
        {
            "policy_kwargs": {"parameter_sharing": [["agent_0", "agent_2"]], "n_critics": 2},
            **{"policy_delay": 2, "target_policy_noise": 0.2, "logit_penalty": 0.1, "k": 3},
        },
    ),
}


@pytest.mark.parametrize(("env", "kwargs"), TASKS.values(), ids=TASKS)
def test_replayed_updates_are_the_updates(env: Callable[[], Any], kwargs: dict[str, Any]) -> None:
    """With the same draws, also after one where not all were due, which the ordinary path takes."""
    models = [collected(70, env=env(), engine=engine, **kwargs) for engine in (True, False)]
    for model in models:
        model.set_random_seed(1)
        model.train(5, 8)
        number = model.replay_buffer.number
        model.replay_buffer.number = lambda agent, k, number=number: number(agent, k) if k else 0
        model.train(1, 8)
        model.replay_buffer.number = number
        model.train(3, 8)
    th.testing.assert_close(flat(models[0].policy), flat(models[1].policy), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(*(rows_of(model)[1] for model in models))
    report = models[0].engine_report()
    assert report["act(False)"] == "replayed"
    assert {how for name, how in report.items() if name.startswith("update_all")} == {"replayed"}
    (some,) = (how for name, how in report.items() if name.startswith("update_some"))
    assert some == "ordinary: the size of its batches varies"


OPTIMIZERS = {
    "adam": {},
    "momentum": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}},
}


@engine_on_and_off
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_update_of_one_leaves_the_others_as_they_are(optimizer: dict[str, Any], engine: bool) -> None:
    """Bit for bit, though all have momentum: online networks, targets, and what the optimizers keep of them."""
    model = collected(60, engine=engine, policy_kwargs=optimizer)
    model.train(3, 8)
    number = model.replay_buffer.number
    for agent, k, own in ((0, 1, ("0", "2")), (1, 0, ("1",)), (0, 0, ("0", "2"))):
        model.replay_buffer.number = lambda i, j, only=(agent, k): number(i, j) if (i, j) == only else 0
        before = {name: value.clone() for name, value in model.policy.state_dict().items()}
        kept = copy.deepcopy(model.actor.optimizer.state_dict()["state"])
        model.train(2, 8)
        changed = {name for name, value in model.policy.state_dict().items() if not th.equal(value, before[name])}
        networks = [name for name in before if name.startswith("further.") == (k == 1)]
        assert changed == {name for name in networks if name.split("mu." if "mu." in name else "qf0.")[1][0] in own}
        state = model.actor.optimizer.state_dict()["state"]
        touched = {i for i in state if any(not th.equal(v, kept[i][n]) for n, v in state[i].items() if v is not None)}
        assert len(touched) == 4 * len(own)  # two layers each
        model.replay_buffer.number = number
        model.train(1, 8)  # and all again


# Who acts


@pytest.mark.parametrize("draw", ["team", "agent"])
def test_an_index_lasts_an_episode_and_is_a_teams(draw: str) -> None:
    """In three environments whose episodes have different lengths, warm-up included, and over the end of a `learn`."""
    own = {"teams": HERD} if draw == "team" else {"ensemble_draw": "agent"}
    model = make(meadows(3, 4, 5), 3, learning_starts=60, gradient_steps=0, buffer_size=1000, **own).learn(201)
    model.learn(201, reset_num_timesteps=False)
    obs, numbers = rows_of(model)
    cow, dog, fly = (numbers[..., agent] for agent in range(3))
    episodes: dict[tuple[int, float], set[tuple[int, ...]]] = {}
    for step, env in np.ndindex(numbers.shape[:2]):
        episodes.setdefault((env, float(obs[step, env, 1])), set()).add(tuple(numbers[step, env].tolist()))
    assert len(episodes) > 90
    assert all(len(drawn) == 1 for drawn in episodes.values())
    assert (cow == fly).all() == (draw == "team")
    assert (cow != dog).any() and (cow[:, 0] != cow[:, 1]).any()
    for agent in range(3):
        for k in range(3):
            rows, envs = model.replay_buffer.places(agent, k, 50)
            assert (numbers[rows, envs, agent] == k).all()
            assert model.replay_buffer.number(agent, k) == (numbers[..., agent] == k).sum() > 0


def test_teams_by_names_by_lists_or_all() -> None:
    assert make(Hunt()).draw_groups() == ((0, 1), (2,))
    assert make(Hunt(), teams="all").draw_groups() == ((0, 1, 2),)
    assert make(Hunt(), teams=[["hunter_1", "prey_0"]]).draw_groups() == ((0,), (1, 2))
    assert make(Hunt(), ensemble_draw="agent").draw_groups() == ((0,), (1,), (2,))
    assert make(Meadow(), teams=None).draw_groups() == ((0,), (1,), (2,))


@pytest.mark.parametrize("training", [True, False])
def test_indices_are_uniform_and_teams_independent(training: bool) -> None:
    """Nine pairs of 9000: each count has a std of 30; 150 is five of them."""
    model = make(Hunt(), 3)
    drawn = model._draw(9000, None if training else model._evaluation_random)
    pairs = np.bincount(3 * drawn[:, 0] + drawn[:, 2], minlength=9)
    assert np.abs(pairs - 1000).max() < 150
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])


def test_the_drawn_sub_policies_act() -> None:
    """Each agent of each environment by its own, in training as by `predict`; each is another one."""
    model = collected(60, env=DummyVecEnv([lambda: JointEnv(Hunt())] * 2))
    obs, numbers = rows_of(model)
    stored = model.replay_buffer.actions[: len(obs)]
    for env in range(2):
        for agent, columns in enumerate(model.policy.layout.actions):
            by_each = [model.predict(obs[:, env], ensemble_index=k)[0] for k in range(2)]
            by_each = [model.policy.scale_action(actions)[:, columns] for actions in by_each]
            own = numbers[:, env, agent, None]
            np.testing.assert_allclose(stored[:, env, columns], np.where(own, by_each[1], by_each[0]), atol=1e-5)
            assert np.abs(by_each[0] - by_each[1]).max() > 1e-3
    mixed, (state,) = model.predict(obs[0], ensemble_index=[1, 0, 1])
    parts = [model.predict(obs[0], ensemble_index=k)[0] for k in range(2)]
    np.testing.assert_allclose(mixed, np.concatenate([parts[1][:, :2], parts[0][:, 2:4], parts[1][:, 4:]], axis=1), atol=1e-6)
    assert state.tolist() == [[1, 0, 1]] * 2


def test_sub_policies_begin_apart_and_targets_as_they_are() -> None:
    model = make(k=3)
    for name in ("actor", "critic"):
        weights = [flat(getattr(networks, name)) for networks in model.policy.sub_policies]
        assert all((weights[a] != weights[b]).any() for a, b in ((0, 1), (0, 2), (1, 2)))
        for networks, own in zip(model.policy.sub_policies, weights, strict=True):
            assert th.equal(flat(getattr(networks, f"{name}_target")), own)
    first = make(k=1)
    assert th.equal(flat(first.actor), flat(model.actor)) and th.equal(flat(first.critic), flat(model.critic))


@engine_on_and_off
def test_predict_draws_for_an_episode(engine: bool) -> None:
    model, obs = make(engine=engine), np.stack([JointEnv(Meadow()).reset(seed=i)[0] for i in range(4)])
    _, first = model.predict(obs, deterministic=True)
    assert first[0].shape == (4, 3)
    np.testing.assert_array_equal(model.predict(obs, first, np.zeros(4, bool))[1][0], first[0])
    state, seen = first, []
    for step in range(40):
        starts = np.array([False, True, step % 2 == 0, False])
        before = state[0].copy()
        actions, state = model.predict(obs, state, starts, deterministic=True)
        assert (state[0][~starts] == before[~starts]).all()
        seen.append(state[0][1].tolist())
        for row, numbers in enumerate(state[0]):
            np.testing.assert_allclose(
                actions[row], model.predict(obs[row], ensemble_index=numbers, deterministic=True)[0], atol=1e-6
            )
    assert {tuple(numbers) for numbers in seen} == {(a, b, a) for a in (0, 1) for b in (0, 1)}
    assert {tuple(model.predict(obs[0])[1][0][0]) for _ in range(40)} == {(a, b, a) for a in (0, 1) for b in (0, 1)}


def test_evaluation_is_of_the_mixture() -> None:
    """As SB3 evaluates: one draw an episode, and not always the same."""
    model, seen = make(), []
    env = DummyVecEnv([lambda: JointEnv(Meadow(length=4))] * 2)
    evaluate_policy(
        model, env, 30, callback=lambda now, _: seen.append((now["i"], *now["states"][0][now["i"]], now["done"])), warn=False
    )
    for i in range(2):
        steps = [numbers for env, *numbers in seen if env == i]
        episodes = [steps[j : j + 4] for j in range(0, len(steps), 4)]
        assert all(episode[0][:3] == step[:3] for episode in episodes for step in episode)
        assert all(episode[-1][3] for episode in episodes)
    assert {numbers[1] for numbers in seen} == {numbers[2] for numbers in seen} == {0, 1}


@engine_on_and_off
def test_evaluations_leave_training_as_it_is(engine: bool) -> None:
    models = []
    for callback in (None, EvalCallback(MADDPG._wrap_env(Crowd(2)), eval_freq=15, n_eval_episodes=3, verbose=0)):
        models.append(make(Crowd(2), engine=engine, ensemble_draw="agent", train_freq=4).learn(50, callback))
    assert th.equal(flat(models[0].policy), flat(models[1].policy))
    np.testing.assert_array_equal(*(rows_of(model)[1] for model in models))


def test_a_seed_fixes_what_is_drawn() -> None:
    obs = JointEnv(Meadow()).reset(seed=0)[0]
    draws = [[model.predict(obs)[1][0].tolist() for _ in range(20)] for model in (make(), make(), make(seed=1))]
    assert draws[0] == draws[1] != draws[2]


def test_agents_by_themselves_need_an_index(tmp_path: Path) -> None:
    model, obs = make(), Meadow().reset(seed=1)[0]["cow"]
    actions = [model.predict_agent("cow", obs, ensemble_index=k) for k in range(2)]
    joint = JointEnv(Meadow()).reset(seed=1)[0]
    for k in range(2):
        expected = model.agent_actions(model.predict(joint, ensemble_index=k)[0])["cow"]
        np.testing.assert_allclose(actions[k], expected, atol=1e-6)
        model.save_agent("cow", tmp_path / "cow", ensemble_index=k)
        np.testing.assert_array_equal(Agent.load(tmp_path / "cow").predict(obs), actions[k])
    assert actions[0] != actions[1]
    for call in (lambda: model.predict_agent("cow", obs), lambda: model.save_agent("cow", tmp_path / "cow")):
        with pytest.raises(ValueError, match=r"ensemble_index must be an integer in \[0, 1\], one of .*, got None"):
            call()
    with pytest.raises(ValueError, match=r"ensemble_index must be an integer in \[0, 1\], one of the sub-policies, got 2"):
        model.policy.agent("cow", 2)
    assert make(k=1).predict_agent("cow", obs, ensemble_index=0).shape == (1,)


def test_a_policy_by_itself(tmp_path: Path) -> None:
    """Is saved with all sub-policies, and draws at each call."""
    policy = make(k=3).policy
    policy.save(tmp_path / "policy.pth")
    loaded = type(policy).load(tmp_path / "policy.pth")
    th.testing.assert_close(loaded.state_dict(), policy.state_dict(), rtol=0, atol=0)
    assert len(loaded.sub_policies) == 3
    obs = np.tile(JointEnv(Meadow()).reset(seed=0)[0], (60, 1))
    assert len(np.unique(loaded.predict(obs, deterministic=True)[0][:, 0].round(5))) == 3


def test_returns_of_pairs() -> None:
    """Rewards of `Line` are what the agents see; in this one they are who acts."""
    model = make(Told(), teams=None)
    for networks, value in zip(model.policy.sub_policies, (-9.0, 9.0), strict=True):
        for parameter in networks.actor.parameters():
            parameter.data.zero_()
        for net in networks.actor.mu:
            net[-1].bias.data.fill_(value)
    table = returns_of_pairs(model, Told(), n_eval_episodes=2)
    for first, second in np.ndindex(2, 2):
        np.testing.assert_allclose(table[first, second], [7 * (2 * first - 1), 70 * (2 * second - 1)], rtol=1e-4)
    with pytest.raises(UnsupportedError, match="two teams that draw apart, got 1"):
        returns_of_pairs(make(Hunt(), teams="all"), Hunt())


class Told(Line):
    """What an agent gets is what it does, the second one ten times that."""

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        result = super().step(actions)
        return result[0], {"row": float(actions["row"][0]), "column": 10 * float(actions["column"][0])}, *result[2:]


# One sub-policy


class Without(MADDPG):
    """MADDPG past all that ensembles add around its update."""

    predict = OffPolicyMixin.predict
    _sample_action = OffPolicyMixin._sample_action
    _setup_learn = OffPolicyMixin._setup_learn
    _acting_batch = OffPolicyMixin._acting_batch
    _act = OffPolicyMixin._act
    set_random_seed = OffPolicyMixin.set_random_seed


@engine_on_and_off
def test_one_sub_policy_is_the_class_without(engine: bool) -> None:
    """Bit for bit, with the same random numbers left, and the names in the file."""
    models, numbers = [], []
    for cls in (MADDPG, Without):
        env = DummyVecEnv([lambda: JointEnv(Crowd(2, discrete=True))] * 2)
        noise = {"exploration_noise": {"type": "normal", "start": 0.1}}
        models.append(small_model(cls, env=env, engine=engine, train_freq=4, **noise).learn(80))
        numbers.append(np.random.random(3).tolist() + th.rand(3).tolist())
    assert th.equal(flat(models[0].policy), flat(models[1].policy))
    np.testing.assert_array_equal(*(model.replay_buffer.actions for model in models))
    assert numbers[0] == numbers[1]
    assert type(models[0].replay_buffer) is JointReplayBuffer
    assert "_drawn" not in vars(models[0])
    parts = [("actor.mu", "actor_target.mu", "critic.qf0", "critic_target.qf0"), "01", "02", ("weight", "bias")]
    assert set(models[0].policy.state_dict()) == {".".join(names) for names in itertools.product(*parts)}
    assert models[0].predict(np.zeros((3, 8), np.float32), state=("passed",), ensemble_index=0)[1] == ("passed",)


# The replay buffer


def test_rows_are_drawn_uniformly_also_where_the_oldest_has_no_next() -> None:
    """50 rows, of which a few are the sub-policy's; 200 draws of each in the mean, whose std is 14."""
    for frugal in ({}, {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}):
        model = collected(250, env=meadows(3, 4), buffer_size=100, teams=HERD, **frugal)
        buffer = model.replay_buffer
        assert buffer.full
        for agent, k in np.ndindex(3, 2):
            own = buffer.sub_policies[..., agent] == k
            if frugal:
                own[buffer.pos] = False
            assert buffer.number(agent, k) == own.sum() > 5
            rows, envs = buffer.places(agent, k, 200 * int(own.sum()))
            drawn = np.zeros(own.shape)
            np.add.at(drawn, (rows, envs), 1)
            assert (drawn[~own] == 0).all()
            assert np.abs(drawn[own] - 200).max() < 75


def test_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """The episode ends at the save; the index of the next one, which is drawn, is in the file."""
    for include in (True, False):
        model = make(Same(), teams=HERD, engine=include, train_freq=10).learn(50)
        model.save(tmp_path / "model", include=["replay_buffer"] if include else None)
        model.save_replay_buffer(tmp_path / "buffer")
        model.learn(50, reset_num_timesteps=False)
        np.random.seed(9)
        loaded = MADDPG.load(tmp_path / "model", env=Same(), device="cpu")
        loaded.set_logger(model.logger)
        if not include:
            loaded.load_replay_buffer(tmp_path / "buffer")
        loaded.learn(50, reset_num_timesteps=False)
        assert th.equal(flat(loaded.policy), flat(model.policy))
        np.testing.assert_array_equal(rows_of(loaded)[1], rows_of(model)[1])
        assert loaded.replay_buffer._counts == model.replay_buffer._counts
        for name in ("actor", "critic"):
            states = [getattr(one, name).optimizer.state_dict()["state"] for one in (loaded, model)]
            th.testing.assert_close(*states, rtol=0, atol=0)


def test_a_file_is_loaded_where_an_episode_runs(tmp_path: Path) -> None:
    model = collected(52, env=Same(length=5), teams=HERD)
    drawn = model._drawn.copy()
    model.save(tmp_path / "model")
    loaded = MADDPG.load(tmp_path / "model", env=Same(length=5), device="cpu", force_reset=False)
    np.testing.assert_array_equal(loaded._drawn, drawn)
    more = MADDPG.load(tmp_path / "model", env=meadows(3, 4, 5), device="cpu").learn(9, reset_num_timesteps=False)
    assert more._drawn.shape == (3, 3)


def test_buffers_of_other_ensembles_are_refused(tmp_path: Path) -> None:
    files = {}
    for name, kwargs in {"one": {"k": 1}, "two": {}, "three": {"k": 3}, "apart": {"ensemble_draw": "agent"}}.items():
        collected(60, **kwargs).save_replay_buffer(tmp_path / name)
        files[name] = tmp_path / name
    make().load_replay_buffer(files["two"])
    make(ensemble_draw="agent").load_replay_buffer(files["two"])
    for kwargs, name, message in (
        ({}, "one", "one of n_sub_policies=2, got a JointReplayBuffer"),
        ({"k": 1}, "two", "one of n_sub_policies=1, got a EnsembleReplayBuffer"),
        ({}, "three", "one of n_sub_policies=2, got one of sub-policies up to number 2"),
        ({}, "apart", "one of the same teams, got one whose agents drew apart with teams="),
    ):
        with pytest.raises(ValueError, match=message):
            make(**kwargs).load_replay_buffer(files[name])


# Bad input


TWO = {"n_sub_policies": 2}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"n_sub_policies": 0}, ValueError, r"n_sub_policies must be an integer >= 1, got 0"),
        ({"n_sub_policies": 2.0}, TypeError, r"n_sub_policies must be an integer >= 1, got 2.0 of type float"),
        ({"n_sub_policies": True}, TypeError, r"n_sub_policies must be an integer >= 1, got True"),
        ({"ensemble_draw": "agent"}, ValueError, r"ensemble_draw='agent' needs n_sub_policies, got n_sub_policies=1"),
        ({"ensemble_targets": "current"}, ValueError, r"ensemble_targets='current' needs n_sub_policies, got n_sub"),
        ({"teams": "all"}, ValueError, r"teams='all' needs n_sub_policies, got n_sub_policies=1"),
        ({**TWO, "ensemble_draw": "both"}, ValueError, r"ensemble_draw must be one of 'team', 'agent', got 'both'"),
        ({**TWO, "ensemble_targets": 1}, ValueError, r"ensemble_targets must be one of 'stored', 'current', got 1"),
        ({**TWO, "teams": ["cow"]}, TypeError, r'teams must be None, "all", or lists of names of agents, got'),
        ({**TWO, "teams": [["cow", "hen"]]}, ValueError, r"teams must be .*'hen'.*agent must be one of 'cow', 'dog'"),
        ({**TWO, "teams": [["cow"], ["cow"]]}, ValueError, r"teams must be .* each in one list, got"),
        (
            {**TWO, "teams": "all", "ensemble_draw": "agent"},
            *(ValueError, r"teams='all' needs ensemble_draw='team', got ensemble_draw='agent'"),
        ),
        ({**TWO, "buffer_size": 15}, ValueError, r"at least n_sub_policies \* batch_size = 16, .* got 15"),
        ({"policy_kwargs": TWO}, ValueError, r"n_sub_policies must be what the policy .* with, 2, got 1"),
        (
            {**TWO, "replay_buffer_class": PrioritizedJointReplayBuffer},
            *(UnsupportedError, r"replay_buffer_class must be None .*Ensemble.*got .*Prioritized.*n_sub_policies=2"),
        ),
    ],
    ids=str,
)
def test_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_model("maddpg", env=Meadow(), **kwargs)


@pytest.mark.parametrize("draw", [{"ensemble_draw": "agent"}, {"teams": [["agent_0", "agent_1"]]}])
def test_agents_that_share_parameters_draw_together(draw: dict[str, Any]) -> None:
    sharing = {"policy_kwargs": {"parameter_sharing": [["agent_0", "agent_2"]]}}
    make(Crowd(3), **sharing)
    with pytest.raises(ValueError, match=r"parameter_sharing must be in one list of teams .*agent_0, agent_2 with"):
        make(Crowd(3), **sharing, **draw)


def test_inferred_policies_are_not_of_ensembles() -> None:
    with pytest.raises(UnsupportedError, match=r"inferred_policies must be False .* got True and n_sub_policies=2"):
        make(inferred_policies=True)


def test_bad_indices_and_states() -> None:
    model, obs = make(), np.stack([JointEnv(Meadow()).reset(seed=i)[0] for i in range(2)])
    for index in (2, -1, True, 0.0, "0", [0, 1], [0, 1, 2], [[0, 1, 0]]):
        with pytest.raises(ValueError, match=r"ensemble_index must be an integer in \[0, 1\] or one for each of 3 agents"):
            model.predict(obs, ensemble_index=index)
    for state in ((np.zeros((1, 3), int),), (np.full((2, 3), 2),), (np.zeros((2, 3)),), np.zeros((2, 3), int), ()):
        with pytest.raises(ValueError, match=r"state must be what predict\(\) returned for 2 observations, got"):
            model.predict(obs, state)
    with pytest.raises(ValueError, match=r"ensemble_index must be an integer in \[0, 0\]"):
        make(k=1).predict(obs, ensemble_index=1)


def test_arguments_at_load(tmp_path: Path) -> None:
    make().save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"n_sub_policies must be what the policy was made with, 2, got 3"):
        MADDPG.load(tmp_path / "model", n_sub_policies=3)
    assert MADDPG.load(tmp_path / "model", ensemble_draw="agent", teams=None).draw_groups() == ((0,), (1,), (2,))
    collected(20).save(tmp_path / "model", include=["replay_buffer"])
    with pytest.raises(ValueError, match=r"teams must be left out where the file has its replay buffer"):
        MADDPG.load(tmp_path / "model", teams="all")


def test_an_environment_of_one_agent() -> None:
    model = make(RandomEnv(BOX, CONTINUOUS), train_freq=10).learn(60)
    assert isinstance(model.replay_buffer, EnsembleReplayBuffer)
    assert model.logger.name_to_value["train/sub_policies_updated"] == 1
    assert set(rows_of(model)[1].ravel()) == {0, 1}


def test_an_array_is_no_number_of_sub_policies() -> None:
    with pytest.raises(TypeError, match="n_sub_policies must be an integer"):
        MADDPG("MlpPolicy", Crowd(), n_sub_policies=np.array([1, 2]))  # type: ignore[arg-type]
