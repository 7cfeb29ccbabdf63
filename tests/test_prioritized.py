"""Prioritised replay against SB3's buffers, sums written out, and numbers by hand."""

import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from cliffwalk import Cliffwalk, updates_until_learned
from environments import BOX, CONTINUOUS, DICT, RandomEnv
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import DQN, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ac_ext.buffers.prioritized import (
    PrioritizedDictReplayBuffer,
    PrioritizedHerReplayBuffer,
    PrioritizedReplayBuffer,
    importance_weights,
)
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, NonFiniteError, UnsupportedError

ONE = spaces.Box(-np.inf, np.inf, (1,), np.float32)
FIELDS = ("observations", "actions", "next_observations", "dones", "rewards", "discounts")


def made(size: int = 8, n_envs: int = 1, cls: Any = PrioritizedReplayBuffer, space: Any = ONE, **kwargs: Any) -> Any:
    return cls(size * n_envs, space, ONE, device="cpu", n_envs=n_envs, **kwargs)


def add(buffer: Any, step: int, ends: str | list[str] = "", rewards: Any = None) -> None:
    """
    Transition ``step`` of every environment: from observation 100 env + step to that + 0.5, reward step + 1.

    ``ends`` has a letter for each environment: "t"erminated, "l" for a time limit, "i" for one in the info alone, or "-".
    """
    start = np.array([[100.0 * env + step] for env in range(buffer.n_envs)], np.float32)
    letters = ends or "-" * buffer.n_envs
    infos = [{"TimeLimit.truncated": letter in "li"} for letter in letters]
    done = np.array([letter in "tl" for letter in letters])
    if isinstance(buffer.observation_space, spaces.Dict):
        pair = ({"vector": start, "other": -start}, {"vector": start + 0.5, "other": -start})
    else:
        pair = (start, start + 0.5)  # type: ignore[assignment]
    given_ = np.full(buffer.n_envs, step + 1.0) if rewards is None else np.asarray(rewards)
    buffer.add(*pair, -start, given_, done, infos)


def filled(buffer: Any, steps: int, ends: dict[int, str] | None = None) -> Any:
    for step in range(steps):
        add(buffer, step, (ends or {}).get(step, ""))
    return buffer


def at(buffer: Any, *indices: int) -> Any:
    return buffer._samples(np.array(indices), None)


def assert_same(ours: Any, theirs: Any) -> None:
    for field in FIELDS:
        value, expected = getattr(ours, field), getattr(theirs, field)
        assert type(value) is type(expected)
        pairs = [(value[key], expected[key]) for key in expected] if isinstance(expected, dict) else [(value, expected)]
        for one, other in pairs:
            if other is not None:
                assert one.dtype == other.dtype and one.device == other.device and th.equal(one, other), field


# Numbers by hand


def test_probabilities_and_weights_by_hand() -> None:
    buffer = filled(made(4), 4)
    buffer.update_priorities(np.arange(4), np.array([1, 2, 4, 1]) - buffer.eps)
    leaves = buffer.tree.leaves
    np.testing.assert_allclose(leaves / leaves.sum(), (0.17202486, 0.26074093, 0.39520935, 0.17202486), rtol=0, atol=1e-8)
    for beta, raw, scaled in [
        (0.4, (1.16128688, 0.98331422, 0.8326167, 1.16128688), (1, 0.84674531, 0.71697762, 1)),
        (0.7, None, (1, 0.74742462, 0.55864357, 1)),
        (1.0, (1.45327832, 0.95880612, 0.63257613, 1.45327832), (1, 0.65975396, 0.43527528, 1)),
    ]:
        np.testing.assert_allclose(importance_weights(leaves, leaves.min(), beta), scaled, rtol=0, atol=1e-8)
        if raw is not None:
            np.testing.assert_allclose(importance_weights(leaves, leaves.mean(), beta), raw, rtol=0, atol=1e-8)
    x = np.array([1, 5, -2, 7])
    mean = (leaves / leaves.sum() * importance_weights(leaves, leaves.mean(), 1.0) * x).sum()
    assert mean == pytest.approx(x.mean(), abs=1e-12)


@pytest.mark.parametrize(("weight_norm", "expected"), [("batch", (0.84674531, 1)), ("buffer", (0.71697762, 0.84674531))])
def test_largest_weight_is_that_of_the_batch_or_of_the_buffer(weight_norm: str, expected: tuple[float, float]) -> None:
    buffer = filled(made(6, weight_norm=weight_norm), 4)
    buffer.update_priorities(np.arange(4), np.array([1, 2, 4, 1]) - buffer.eps)
    weights = at(buffer, 2, 1).weights
    th.testing.assert_close(weights, th.tensor(expected)[:, None], rtol=0, atol=1e-7)


def test_beta_rises_over_the_training() -> None:
    buffer = made()
    betas = []
    for step in (0, 250, 500, 1000, 2000):
        buffer.progress_remaining = 1 - step / 1000
        betas.append(buffer.beta)
    assert betas == pytest.approx([0.4, 0.55, 0.7, 1, 1])
    buffer.progress_remaining = 1.5
    assert buffer.beta == 0.4


def test_new_transitions_have_the_largest_priority_so_far() -> None:
    buffer = filled(made(), 3)
    buffer.update_priorities(np.array([0, 1]), np.array([0.5, -3]))
    add(buffer, 3)
    np.testing.assert_allclose(buffer.tree.leaves[:5], (0.65975475, 1.93318243, 1, 1.93318243, 0), rtol=0, atol=1e-8)
    assert buffer.max_priority == pytest.approx(3.000001, abs=1e-12)
    buffer.update_priorities(np.arange(4), np.zeros(4))
    add(buffer, 4)
    assert buffer.tree.leaves[4] == pytest.approx(3.000001**0.6)  # it does not decay


def test_one_of_each_part_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masses 0.5 and 3.5 of 4; the last place is drawn as the others are."""
    buffer = filled(made(4), 4)
    monkeypatch.setattr(np.random, "random", lambda size: np.array([0.25, 0.75]))
    assert buffer.sample(2).indices.tolist() == [0, 3]


TABLE = {
    0: (5.23, 3, 0, 2),
    1: (4.7, 2, 0, 2),
    2: (3, 1, 0, 2),
    3: (13.36, 3, 0.729, 5),
    4: (10.4, 2, 0.81, 5),
    5: (6, 1, 0.9, 5),
    6: (14.2, 2, 0.81, 7),
    7: (8, 1, 0.9, 7),
}
"""By its start: sum of rewards, their number, factor of the value behind them, and the last of them."""


@pytest.mark.parametrize("start", TABLE)
@pytest.mark.parametrize("shift", [0, 5], ids=["from the start", "over the end"])
def test_sums_of_three_rewards(start: int, shift: int) -> None:
    buffer = made(9, n_steps=3, gamma=0.9)
    for step in range(shift):
        add(buffer, -step)
    for step in range(8):
        add(buffer, step, {2: "t", 5: "l"}.get(step, ""))
    sum_, number, factor, last = TABLE[start]
    sample = at(buffer, (start + shift) % 9)
    assert sample.observations.item() == start and sample.actions.item() == -start
    assert sample.next_observations.item() == last + 0.5
    assert sample.rewards.item() == pytest.approx(sum_)
    assert sample.discounts.item() == pytest.approx(0.9**number)
    assert (sample.discounts * (1 - sample.dones)).item() == pytest.approx(factor)


# Against SB3's buffers


def walk(seed: int, buffers: list[Any], steps: int) -> None:
    """The same random episodes into all buffers."""
    random = np.random.default_rng(seed)
    for step in range(steps):
        ends = random.choice(list("---tli"), size=buffers[0].n_envs)
        for buffer in buffers:
            add(buffer, step, ends.tolist())


VECTORS = spaces.Dict({"vector": ONE, "other": ONE})
SB3S: dict[str, tuple[Any, Any, Any, dict[str, Any], dict[str, Any]]] = {
    "box": (PrioritizedReplayBuffer, ReplayBuffer, ONE, {}, {}),
    "n steps": (PrioritizedReplayBuffer, NStepReplayBuffer, ONE, {"n_steps": 3, "gamma": 0.9}, {}),
    "one step of n": (PrioritizedReplayBuffer, ReplayBuffer, ONE, {}, {"n_steps": 1, "gamma": 0.5}),
    "dict": (PrioritizedDictReplayBuffer, DictReplayBuffer, VECTORS, {}, {}),
    "no timeouts": (PrioritizedReplayBuffer, ReplayBuffer, ONE, {"handle_timeout_termination": False}, {}),
    "little memory": (
        PrioritizedReplayBuffer,
        ReplayBuffer,
        ONE,
        {"optimize_memory_usage": True, "handle_timeout_termination": False},
        {},
    ),
}


@pytest.mark.parametrize("kind", SB3S)
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "normalised"])
def test_without_priorities_it_is_sb3s(kind: str, n_envs: int, normalised: bool) -> None:
    cls, sb3s, space, both, own = SB3S[kind]
    ours = made(10, n_envs, cls, space, alpha=0, **both, **own)
    theirs = made(10, n_envs, sb3s, space, **both)
    env = None
    if normalised:
        env = VecNormalize(DummyVecEnv([lambda: RandomEnv(space, ONE)]), clip_obs=3)
        env.ret_rms.var = 4.0
    for steps in (4, 10, 7):
        walk(steps, [ours, theirs], steps)
        np.random.seed(1)
        sample = ours.sample(32, env=env)
        following = np.random.random()
        np.random.seed(1)
        assert_same(sample, theirs.sample(32, env=env))
        assert np.random.random() == following
        assert th.equal(sample.weights, th.ones(32, 1))
        ours.update_priorities(sample.indices, th.full((32, 1), 9.0), sample.versions)


@pytest.mark.parametrize("kind", SB3S)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_with_priorities_the_transitions_are_sb3s(kind: str, n_envs: int) -> None:
    """What stands at each place that is drawn."""
    cls, sb3s, space, both, own = SB3S[kind]
    ours, theirs = made(10, n_envs, cls, space, **both, **own), made(10, n_envs, sb3s, space, **both)
    walk(0, [ours, theirs], 27)
    sample = ours.sample(64)
    rows, envs = np.divmod(sample.indices, n_envs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "randint", lambda *args, **kwargs: envs)
        assert_same(sample, theirs._get_samples(rows))
    assert set(envs) == set(range(n_envs))


SB3 = [
    (TD3, lambda: RandomEnv(BOX, CONTINUOUS), "MlpPolicy", PrioritizedReplayBuffer, {}),
    (SAC, lambda: RandomEnv(BOX, CONTINUOUS), "MlpPolicy", PrioritizedReplayBuffer, {"n_steps": 3}),
    (SAC, lambda: RandomEnv(VECTORS, CONTINUOUS), "MultiInputPolicy", PrioritizedDictReplayBuffer, {}),
    (DQN, lambda: gym.make("CartPole-v1"), "MlpPolicy", PrioritizedReplayBuffer, {"gradient_steps": 2}),
]


@pytest.mark.parametrize(("cls", "env", "policy", "buffer", "options"), SB3, ids=["td3", "sac, n steps", "sac, dict", "dqn"])
def test_sb3s_algorithms_train_as_before(cls: Any, env: Any, policy: str, buffer: Any, options: dict[str, Any]) -> None:
    steps = options.get("n_steps", 1)
    sizes = {"learning_starts": 10, "batch_size": 8, "buffer_size": 60, "policy_kwargs": {"net_arch": [8]}, "seed": 0}

    def trained(**kwargs: Any) -> dict[str, th.Tensor]:
        model = cls(policy, make_vec_env(env, n_envs=2, seed=0), **{**sizes, **options, **kwargs}, device="cpu")
        model.learn(90)
        return {name: value.clone() for name, value in model.policy.state_dict().items()}

    own = {"n_steps": steps, "gamma": 0.99} if steps > 1 else {}
    ours = trained(replay_buffer_class=buffer, replay_buffer_kwargs={"alpha": 0, **own}, n_steps=1)
    theirs = trained()
    assert all(th.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_it_is_uniform_replay_until_a_priority_is_updated(n_envs: int) -> None:
    np.random.seed(0)
    buffer = filled(made(20, n_envs), 33)
    batches = [buffer.sample(50) for _ in range(120)]
    assert all(th.equal(batch.weights, th.ones(50, 1)) for batch in batches)
    counts = np.bincount(np.concatenate([batch.indices for batch in batches]), minlength=20 * n_envs)
    assert chi_square(counts, np.full(20 * n_envs, 6000 / 20 / n_envs)) < limit(20 * n_envs - 1)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def limit(degrees: int) -> float:
    """Five standard deviations above the mean; draws from equal parts vary less than that of independent ones."""
    return degrees + 5 * (2 * degrees) ** 0.5


def test_draws_follow_the_priorities() -> None:
    np.random.seed(0)
    buffer = filled(made(10, 3), 14)
    errors = np.random.exponential(size=30)
    buffer.update_priorities(np.arange(30), errors)
    expected = (errors + buffer.eps) ** 0.6
    counts = np.bincount(np.concatenate([buffer.sample(7).indices for _ in range(3000)]), minlength=30)
    assert chi_square(counts, 21000 * expected / expected.sum()) < limit(29)


def test_weights_undo_what_the_draws_favour() -> None:
    """The mean over the whole buffer, whatever the priorities are."""
    np.random.seed(0)
    buffer = filled(made(50, weight_norm="buffer"), 50)
    buffer.update_priorities(np.arange(50), np.random.exponential(size=50))
    buffer.progress_remaining = 0.0
    samples = [buffer.sample(50) for _ in range(2000)]
    weights, rewards = (np.concatenate([getattr(one, name)[:, 0] for one in samples]) for name in ("weights", "rewards"))
    assert (weights * rewards).mean() / weights.mean() == pytest.approx(25.5, rel=0.01)
    assert rewards.mean() != pytest.approx(25.5, rel=0.02)


def test_equal_seeds_give_equal_batches() -> None:
    buffer = filled(made(10, 3), 14)
    buffer.update_priorities(np.arange(30), np.arange(30))
    batches = []
    for _ in range(2):
        np.random.seed(3)
        batches.append(buffer.sample(16))
    assert_same(*batches)
    assert (batches[0].indices == batches[1].indices).all() and th.equal(batches[0].weights, batches[1].weights)


# Random histories


class Plain:
    """What a buffer holds, in lists: for each environment the transitions that are left."""

    def __init__(self, rows: int, n_envs: int, n_steps: int, gamma: float, alpha: float) -> None:
        self.rows, self.n_envs, self.n_steps, self.gamma, self.alpha = rows, n_envs, n_steps, gamma, alpha
        self.steps: list[str] = []
        self.priorities: dict[int, float] = {}
        self.largest = 1.0

    def add(self, ends: str) -> None:
        row = len(self.steps) % self.rows
        self.steps.append(ends)
        for env in range(self.n_envs):
            self.priorities[row * self.n_envs + env] = self.largest

    def update(self, index: int, error: float) -> None:
        self.priorities[index] = abs(error) + 1e-6
        self.largest = max(self.largest, self.priorities[index])

    def transition(self, index: int) -> tuple[int, int, float, float, int]:
        """Number of the first and the last step, sum of rewards, their number, whether it terminated."""
        row, env = divmod(index, self.n_envs)
        count = len(self.steps)
        first = max(step for step in range(count) if step % self.rows == row)
        sum_, last = 0.0, first
        for k in range(self.n_steps):
            last = first + k
            sum_ += self.gamma**k * (last + 1)
            if self.steps[last][env] in "tl" or last == count - 1:
                break
        return first, last, sum_, last - first + 1, int(self.steps[last][env] == "t")


@settings(max_examples=60)
@given(data=st.data(), rows=st.integers(3, 9), n_envs=st.integers(1, 3), n_steps=st.integers(1, 3))
def test_histories_against_lists(data: st.DataObject, rows: int, n_envs: int, n_steps: int) -> None:
    alpha, gamma = data.draw(st.sampled_from([0.3, 0.6, 1.0])), 0.9
    norm = data.draw(st.sampled_from(["batch", "buffer"]))
    buffer = made(rows, n_envs, n_steps=n_steps, gamma=gamma, alpha=alpha, weight_norm=norm)
    plain = Plain(rows, n_envs, n_steps, gamma, alpha)
    ends = st.lists(st.text("---tl", min_size=n_envs, max_size=n_envs), min_size=1, max_size=12)
    for letters in data.draw(st.lists(ends, min_size=1, max_size=4)):
        for one in letters:
            add(buffer, len(plain.steps), one)
            plain.add(one)
        sample = buffer.sample(6)
        expected = np.array([plain.priorities.get(index, 0) for index in range(rows * n_envs)])
        np.testing.assert_allclose(buffer.tree.leaves, np.where(expected, expected**alpha, 0), rtol=1e-12)
        leaves = buffer.tree.leaves[sample.indices]
        smallest = leaves.min() if norm == "batch" else buffer.tree.leaves[buffer.tree.leaves > 0].min()
        np.testing.assert_allclose(sample.weights[:, 0], (leaves / smallest) ** -0.4, rtol=1e-5)
        for at_, index in enumerate(sample.indices):
            first, last, sum_, number, terminated = plain.transition(index)
            start = 100 * (index % n_envs)
            assert sample.observations[at_].item() == start + first
            assert sample.next_observations[at_].item() == start + last + 0.5
            assert sample.rewards[at_].item() == pytest.approx(sum_, rel=1e-5)
            assert sample.dones[at_].item() == terminated
            if n_steps > 1:
                assert sample.discounts[at_].item() == pytest.approx(gamma**number, rel=1e-5)
        errors = data.draw(st.lists(st.floats(-9, 9), min_size=6, max_size=6))
        buffer.update_priorities(sample.indices, np.array(errors)[:, None], sample.versions)
        for index, error in zip(sample.indices, errors, strict=True):
            plain.update(index, error)
        assert buffer.max_priority == pytest.approx(plain.largest)


# What is not to be drawn, and what comes too late


def test_with_little_memory_the_place_between_old_and_new_is_not_drawn() -> None:
    """Its observation is the newest transition's next one."""
    buffer = made(5, 2, optimize_memory_usage=True, handle_timeout_termination=False, weight_norm="buffer")
    for step in range(13):
        add(buffer, step)
        sample = buffer.sample(40)
        indices = sample.indices
        assert th.equal(sample.weights, th.ones(40, 1))
        assert set(indices // 2) == set(range(min(step + 1, 5))) - ({buffer.pos} if step >= 4 else set())
    sample = buffer.sample(80)
    assert set((sample.next_observations - sample.observations).flatten().tolist()) == {0.5, 1.0}
    buffer.update_priorities(np.arange(10), np.ones(10))  # of which two are nothing now
    assert (buffer.tree.leaves > 0).sum() == 8 and not buffer.tree.leaves[2 * buffer.pos : 2 * buffer.pos + 2].any()


def test_errors_of_transitions_that_were_written_over_are_dropped() -> None:
    buffer = filled(made(4), 4)
    sample = at(buffer, 0, 1, 2)
    add(buffer, 4)
    buffer.update_priorities(sample.indices, th.tensor([[50.0], [2.0], [3.0]]), sample.versions)
    assert buffer.tree.leaves == pytest.approx([1, 2.000001**0.6, 3.000001**0.6, 1])
    assert buffer.max_priority == pytest.approx(3.000001)
    for step in range(4):
        add(buffer, step)
    before = buffer.tree.leaves.copy()
    buffer.update_priorities(sample.indices, np.array([7.0, 8.0, 9.0]), sample.versions)  # written over twice
    np.testing.assert_array_equal(buffer.tree.leaves, before)
    later = at(buffer, 0, 1, 2)
    buffer.update_priorities(later.indices, np.array([7.0, 8.0, 9.0]), later.versions)
    assert buffer.tree.leaves[:3] == pytest.approx(np.array([7.000001, 8.000001, 9.000001]) ** 0.6)


def test_of_an_index_that_was_drawn_twice_the_last_error_counts() -> None:
    buffer = filled(made(4), 4)
    buffer.update_priorities(np.array([1, 2, 1]), np.array([5.0, 6.0, 7.0]))
    assert buffer.tree.leaves == pytest.approx([1, 7.000001**0.6, 6.000001**0.6, 1])


def test_large_errors_are_not_clipped() -> None:
    buffer = filled(made(4, alpha=1), 4)
    buffer.update_priorities(np.array([0, 1]), np.array([2.0, 200.0]))
    assert buffer.tree.leaves[:2] == pytest.approx([2.000001, 200.000001])


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_errors_that_are_not_finite(wrong: float) -> None:
    buffer = filled(made(4), 4)
    with pytest.raises(NonFiniteError, match=f"td_errors must be finite, got {wrong}"):
        buffer.update_priorities(np.array([0, 1]), np.array([1.0, wrong]))
    assert buffer.tree.leaves.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("indices", "errors"), [([0, 1], [1.0]), ([0], [[1.0], [2.0]]), ([4], [1.0]), ([-1], [1.0])])
def test_indices_and_errors_that_do_not_match(indices: list[int], errors: Any) -> None:
    buffer = filled(made(4), 4)
    with pytest.raises(ArgumentError, match=r"(td_errors|indices) must be"):
        buffer.update_priorities(np.array(indices), np.array(errors))


def test_nothing_stored() -> None:
    with pytest.raises(RuntimeError, match="nothing to be drawn"):
        made().sample(2)


def test_reset() -> None:
    buffer = filled(made(4, weight_norm="buffer"), 6)
    old = buffer.sample(4)
    buffer.update_priorities(old.indices, np.full(4, 9.0))
    buffer.reset()
    add(buffer, 0)
    buffer.update_priorities(old.indices, np.full(4, 9.0), old.versions)
    assert buffer.tree.leaves.tolist() == [1, 0, 0, 0] and buffer.max_priority == 1
    assert th.equal(buffer.sample(3).weights, th.ones(3, 1))


# Saving, devices, memory


@pytest.mark.parametrize("cls", [PrioritizedReplayBuffer, PrioritizedDictReplayBuffer])
def test_a_loaded_buffer_goes_on(cls: Any, tmp_path: Any) -> None:
    space = VECTORS if cls is PrioritizedDictReplayBuffer else ONE
    buffer = filled(made(6, 2, cls, space, n_steps=2, weight_norm="buffer"), 9)
    buffer.update_priorities(np.arange(12), np.arange(12) / 3)
    buffer.progress_remaining = 0.25
    old = buffer.sample(6)
    loaded = pickle.loads(pickle.dumps(buffer))
    assert loaded.beta == buffer.beta == 0.85 and loaded.max_priority == buffer.max_priority
    for one in (buffer, loaded):
        add(one, 9)
        one.update_priorities(old.indices, np.full(6, 2.0), old.versions)
    np.testing.assert_array_equal(loaded.tree.leaves, buffer.tree.leaves)
    batches = []
    for one in (buffer, loaded):
        np.random.seed(0)
        batches.append(one.sample(20))
    assert_same(*batches)
    assert th.equal(batches[0].weights, batches[1].weights)


def test_sb3_saves_and_loads_it(tmp_path: Any) -> None:
    model = TD3(
        "MlpPolicy",
        RandomEnv(BOX, CONTINUOUS),
        buffer_size=50,
        learning_starts=5,
        batch_size=4,
        policy_kwargs={"net_arch": [4]},
        replay_buffer_class=PrioritizedReplayBuffer,
        replay_buffer_kwargs={"alpha": 0.5},
    )
    model.learn(20)
    model.replay_buffer.update_priorities(np.arange(3), np.array([2.0, 3.0, 4.0]))  # type: ignore[union-attr]
    leaves = model.replay_buffer.tree.leaves.copy()  # type: ignore[union-attr]
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.save(tmp_path / "model.zip")
    other = TD3.load(tmp_path / "model.zip", env=model.env)
    other.load_replay_buffer(tmp_path / "buffer.pkl")
    assert type(other.replay_buffer) is PrioritizedReplayBuffer
    np.testing.assert_array_equal(other.replay_buffer.tree.leaves, leaves)
    other.learn(10, reset_num_timesteps=False)


def test_batches_are_on_the_buffers_device() -> None:
    buffer = filled(made(4), 4)
    buffer.device = th.device("meta")  # which every PyTorch has
    sample = buffer.sample(2)
    tensors = [value for value in sample if isinstance(value, th.Tensor)]
    assert len(tensors) == 6 and all(value.device.type == "meta" for value in tensors)
    assert isinstance(sample.indices, np.ndarray)


def test_batches_are_copies() -> None:
    buffer = filled(made(4), 4)
    sample = buffer.sample(4)
    for value in sample[:5]:
        value.fill_(77)
    assert 77 not in buffer.observations and 77 not in buffer.rewards and 77 not in buffer.actions


def test_memory_is_sb3s_and_the_tree() -> None:
    ours, theirs = made(5000), made(5000, cls=ReplayBuffer)

    def arrays(buffer: Any) -> int:
        return sum(value.nbytes for value in vars(buffer).values() if isinstance(value, np.ndarray))

    assert arrays(ours) == arrays(theirs)
    assert sum(level.nbytes for level in ours.tree.levels) <= 2 * 8 * 5008
    assert made(alpha=0).tree is None


# Arguments


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "n_steps": ({"n_steps": 0}, ArgumentError, r"n_steps must be an integer >= 1, got 0"),
    "n_steps of a type": ({"n_steps": 1.5}, ArgumentTypeError, r"n_steps must be an integer >= 1, got 1.5"),
    "gamma": ({"gamma": 1.1}, ArgumentError, r"gamma must be a number in \[0, 1\], got 1.1"),
    "alpha": ({"alpha": -0.1}, ArgumentError, r"alpha must be a number in \[0, 1\], got -0.1"),
    "alpha above": ({"alpha": 1.5}, ArgumentError, r"alpha must be a number in \[0, 1\], got 1.5"),
    "beta_start": ({"beta_start": 2}, ArgumentError, r"beta_start must be a number in \[0, 1\], got 2"),
    "beta_end": ({"beta_end": "1"}, ArgumentTypeError, r"beta_end must be a number in \[0, 1\], got '1'"),
    "eps": ({"eps": 0}, ArgumentError, r"eps must be a number >= 1e-12, got 0"),
    "weight_norm": ({"weight_norm": "max"}, ArgumentError, r"weight_norm must be one of 'batch', 'buffer', got 'max'"),
    "too small for n": (
        {"n_steps": 9},
        ArgumentError,
        r"buffer_size must be an integer >= 18 with n_envs=2, n_steps=9 and optimize_memory_usage=False, got 16",
    ),
    "memory and timeouts": (
        {"optimize_memory_usage": True},
        UnsupportedError,
        r"optimize_memory_usage=True needs handle_timeout_termination=False, got True: .* truncation",
    ),
    "memory and n steps": (
        {"optimize_memory_usage": True, "handle_timeout_termination": False, "n_steps": 2},
        UnsupportedError,
        "optimize_memory_usage=True needs n_steps=1, got n_steps=2",
    ),
    "dict": ({"space": DICT}, UnsupportedError, "takes no Dict, got .*PrioritizedDictReplayBuffer does"),
    "no dict": ({"cls": PrioritizedDictReplayBuffer}, UnsupportedError, "takes a Dict, got Box"),
    "memory and dict": (
        {"cls": PrioritizedDictReplayBuffer, "space": DICT, "optimize_memory_usage": True},
        UnsupportedError,
        "optimize_memory_usage must be False for Dict",
    ),
    "unknown": ({"alhpa": 0.5}, TypeError, "alhpa"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    kwargs, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        made(n_envs=2, **kwargs)


def test_smallest_buffers() -> None:
    assert made(3, n_steps=3).buffer_size == 3
    with pytest.raises(ArgumentError, match="buffer_size must be an integer >= 2"):
        made(1, optimize_memory_usage=True, handle_timeout_termination=False)
    buffer = filled(made(1), 5)
    assert buffer.sample(3).observations.tolist() == [[4], [4], [4]]


# Hindsight


def flips(n_envs: int = 1) -> Any:
    return make_vec_env(lambda: BitFlippingEnv(n_bits=3, continuous=False, max_steps=4), n_envs=n_envs, seed=0)


def goals(n_envs: int = 1, cls: Any = PrioritizedHerReplayBuffer, rows: int = 10, **kwargs: Any) -> Any:
    env = flips(n_envs)
    return cls(rows * n_envs, env.observation_space, env.action_space, env, device="cpu", n_envs=n_envs, **kwargs)


def play(buffers: list[Any], steps: int, seed: int = 0) -> None:
    """Random episodes of the environment into all buffers."""
    env, random = buffers[0].env, np.random.default_rng(seed)
    obs = env.reset()
    for _ in range(steps):
        action = random.integers(0, 3, buffers[0].n_envs)
        next_obs, reward, done, infos = env.step(action)
        final = {key: value.copy() for key, value in next_obs.items()}
        for at_ in np.flatnonzero(done):
            for key in final:
                final[key][at_] = infos[at_]["terminal_observation"][key]
        for buffer in buffers:
            buffer.add(dict(obs), dict(final), action, reward, done, infos)
        obs = next_obs


def assert_drawn_are_the_valid(buffer: Any) -> None:
    np.testing.assert_array_equal(buffer.tree.leaves > 0, (buffer.ep_length > 0).reshape(-1))


@pytest.mark.parametrize("n_envs", [1, 3])
def test_without_priorities_it_is_sb3s_hindsight(n_envs: int) -> None:
    ours, theirs = goals(n_envs, alpha=0), goals(n_envs, HerReplayBuffer)
    for steps in (5, 9, 7):
        play([ours, theirs], steps, steps)
        np.random.seed(1)
        sample = ours.sample(20)
        np.random.seed(1)
        assert_same(sample, theirs.sample(20))
        assert sample.weights.shape == (20, 1)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_episodes_are_drawn_once_they_have_ended_until_they_are_written_over(n_envs: int) -> None:
    buffer = goals(n_envs, weight_norm="buffer")
    with pytest.raises(RuntimeError, match="no episode has ended"):
        buffer.sample(2)
    for steps in range(1, 30):
        play([buffer], steps % 7, steps)
        assert_drawn_are_the_valid(buffer)
        finite = np.isfinite(buffer._smallest.leaves)
        np.testing.assert_array_equal(finite, buffer.tree.leaves > 0)
        if finite.any():
            sample = buffer.sample(8)
            buffer.update_priorities(sample.indices, np.random.exponential(size=8), sample.versions)
            assert_drawn_are_the_valid(buffer)


def test_priorities_are_those_of_the_stored_transitions() -> None:
    """Whatever goal the drawn ones have; a row of the batch and its index are of one transition."""
    np.random.seed(0)
    buffer = goals(2)
    play([buffer], 17)
    sample = buffer.sample(12)
    rows, envs = np.divmod(sample.indices, 2)
    for key in ("observation", "achieved_goal"):
        np.testing.assert_array_equal(sample.observations[key], buffer.observations[key][rows, envs])
        np.testing.assert_array_equal(sample.next_observations[key], buffer.next_observations[key][rows, envs])
    own = int(12 - int(buffer.her_ratio * 12))
    np.testing.assert_array_equal(
        sample.observations["desired_goal"][:own], buffer.observations["desired_goal"][rows[:own], envs[:own]]
    )
    before = buffer.tree.leaves.copy()
    errors = np.arange(1.0, 13.0)
    buffer.update_priorities(sample.indices, errors, sample.versions)
    expected = before.copy()
    for index, error in zip(sample.indices, errors, strict=True):
        expected[index] = (error + 1e-6) ** 0.6
    np.testing.assert_allclose(buffer.tree.leaves, expected)


def test_old_and_new_transitions_get_other_goals_alike() -> None:
    """Draws from equal parts of the sum come in the order of the storage, and the goals must not."""
    np.random.seed(0)
    buffer = goals(rows=100)
    play([buffer], 99)
    places = np.array([buffer.sample(20).indices for _ in range(200)])
    assert places[:, :4].mean() == pytest.approx(places[:, 4:].mean(), rel=0.1)


def test_loaded_hindsight_closes_the_last_episode() -> None:
    buffer = goals(2)
    play([buffer], 9)
    loaded = pickle.loads(pickle.dumps(buffer))
    loaded.set_env(flips(2))
    with pytest.warns(UserWarning, match="last trajectory"):
        loaded.truncate_last_trajectory()
    assert_drawn_are_the_valid(loaded)
    assert (loaded.tree.leaves > 0).sum() > (buffer.tree.leaves > 0).sum()
    loaded.sample(4)


def test_hindsight_sums_no_rewards() -> None:
    with pytest.raises(UnsupportedError, match="n_steps must be 1 for PrioritizedHerReplayBuffer, got 3"):
        goals(n_steps=3)


def test_sb3_trains_with_hindsight() -> None:
    env = make_vec_env(lambda: BitFlippingEnv(n_bits=3, continuous=True, max_steps=4), n_envs=2, seed=0)
    sizes = {"learning_starts": 20, "batch_size": 8, "buffer_size": 60, "policy_kwargs": {"net_arch": [8]}, "seed": 0}

    def trained(cls: Any, **kwargs: Any) -> Any:
        model = SAC("MultiInputPolicy", env, replay_buffer_class=cls, replay_buffer_kwargs=kwargs, **sizes, device="cpu")  # type: ignore[arg-type]
        return model.learn(60)

    ours, theirs = trained(PrioritizedHerReplayBuffer, alpha=0), trained(HerReplayBuffer)
    states = ours.policy.state_dict(), theirs.policy.state_dict()
    assert all(th.equal(value, states[1][name]) for name, value in states[0].items())
    trained(PrioritizedHerReplayBuffer)


# The paper's cliff walk


def test_a_cliff_walk_takes_a_third_of_the_updates() -> None:
    """Of uniform replay's, with the paper's settings but for batches of 16, which take a tenth of the time."""
    walk_ = Cliffwalk(12, seed=0)
    prioritised = updates_until_learned(walk_, alpha=0.6, batch_size=16)
    uniform = updates_until_learned(walk_, alpha=0.0, batch_size=16)
    assert 3 * prioritised < uniform
