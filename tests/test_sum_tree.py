"""Sum trees against sums written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_ac_ext.buffers import sum_tree
from sb3_ac_ext.buffers.sum_tree import SumTree, Tree

Change = tuple[str, list[int], list[float]]


def tree_of(*leaves: float) -> SumTree:
    tree = SumTree(len(leaves))
    tree.assign(np.arange(len(leaves)), np.array(leaves, np.float64))
    return tree


def first_beyond(leaves: np.ndarray, mass: float) -> int:
    """As the definition has it: the first leaf with which the sum exceeds the mass."""
    sum_ = 0.0
    for index, leaf in enumerate(leaves):
        sum_ += leaf
        if sum_ > mass:
            return index
    return int(np.flatnonzero(leaves)[-1])


@pytest.fixture(params=[1, 4, 1024], ids=lambda roots: f"{roots} roots")
def roots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One root is a binary tree to the top, 1024 are no tree at all here."""
    monkeypatch.setattr(sum_tree, "ROOTS", request.param)
    return request.param


@pytest.mark.usefixtures("roots")
def test_masses_by_hand() -> None:
    tree = tree_of(1, 2, 4, 1, 3)
    assert tree.result == 11
    masses = np.array([0, 0.999, 1, 2.999, 3, 6.999, 7, 7.999, 8, 10.999])
    assert tree.find(masses).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.usefixtures("roots")
@pytest.mark.parametrize("mass", [11, 11.5, 1e9, np.inf])
def test_masses_beyond_the_sum_count_as_the_largest_below(mass: float) -> None:
    assert tree_of(1, 2, 4, 1, 3, 0).find(np.array([mass])) == [4]


def test_nothing_to_find() -> None:
    with pytest.raises(ValueError, match="no leaf above 0"):
        SumTree(3).find(np.zeros(1))


@given(data=st.data(), roots=st.sampled_from([1, 4, 1024]), size=st.integers(1, 20))
def test_histories_against_a_list(data: st.DataObject, roots: int, size: int) -> None:
    """Whole numbers, so that both sums are exact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sum_tree, "ROOTS", roots)
        tree, least = SumTree(size), Tree(size)
    leaves, places, values = np.zeros(size), st.integers(0, size - 1), st.integers(0, 9)
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):
            first = data.draw(places)
            behind, value = data.draw(st.integers(first + 1, size)), data.draw(values)
            leaves[first:behind] = value
            tree.fill(first, behind, value)
            least.fill(first, behind, value)
        else:
            changes = data.draw(st.lists(st.tuples(places, values), min_size=1, max_size=6))
            for place, value in changes:
                leaves[place] = value
            indices, numbers = np.array(changes).T
            tree.assign(indices, numbers)
            least.assign(indices, numbers)
        np.testing.assert_array_equal(tree.leaves, leaves)
        assert tree.result == leaves.sum()
    np.testing.assert_array_equal(least.leaves[leaves > 0], leaves[leaves > 0])
    assert least.result == least.leaves.min()
    if leaves.any():
        masses = np.arange(0, leaves.sum(), 0.5)
        assert tree.find(masses).tolist() == [first_beyond(leaves, mass) for mass in masses]


@given(
    leaves=st.lists(st.sampled_from([0.0, 1e-12, 0.1, 1 / 3, 1.0, 3.0, 1e16]), min_size=1, max_size=40).filter(any),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    roots=st.sampled_from([1, 4]),
)
def test_a_leaf_of_0_is_never_found(leaves: list[float], shares: list[float], roots: int) -> None:
    """Whatever rounding does to sums of numbers that far apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sum_tree, "ROOTS", roots)
        tree = tree_of(*leaves)
    assert tree.leaves[tree.find(tree.result * np.array([*shares, 1.0]))].all()


def test_rounding_behind_the_last_leaf_above_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest mass below the sum less the left half is rounded up to the right half, so the search is led to its end."""
    monkeypatch.setattr(sum_tree, "ROOTS", 1)
    left, right = 3 * 2.0**-53, 1 + 2.0**-51
    tree = tree_of(left, 0, right, 0)
    assert np.nextafter(tree.result, 0) - left == right
    assert tree.find(np.array([tree.result])) == [2]


def test_sums_after_many_changes() -> None:
    random, tree = np.random.default_rng(0), SumTree(5000)
    for _ in range(1000):
        tree.assign(random.integers(0, 5000, 100), 10 ** random.uniform(-6, 6, 100))
    tree.fill(100, 4000, 1e-6)  # what small numbers were rounded to beside large ones must not remain
    tree.assign(np.arange(5000), np.minimum(tree.leaves, 1e-6))
    assert tree.result == pytest.approx(np.sort(tree.leaves).sum(), rel=1e-12)


def test_changed_leaves_alone_change() -> None:
    tree = SumTree(3000)
    tree.fill(0, 3000, 2.0)
    tree.assign(np.array([7, 2999]), np.array([1.0, 5.0]))
    assert np.flatnonzero(tree.leaves != 2).tolist() == [7, 2999]
    assert tree.result == 6002


def test_of_an_index_that_is_there_twice_the_last_counts() -> None:
    tree = tree_of(1, 1, 1)
    tree.assign(np.array([1, 0, 1]), np.array([5.0, 2.0, 7.0]))
    assert tree.leaves.tolist() == [2, 7, 1] and tree.result == 10
