"""Saving and loading that lets training go on exactly: random states, whole files, SB3's zips, no unknown keys."""

import base64
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file, recursive_getattr
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import nn

from sb3_ac_ext.base.typing import constructor_keys
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, UnsupportedError, check_keys

LIBRARIES = (__name__.partition(".")[0], "stable_baselines3", "sb3_contrib")
"""Whose policies are made for certain algorithms."""

RandomState = dict[str, Any]
changed_by_load: ContextVar[frozenset[str]] = ContextVar("changed_by_load", default=frozenset())
"""The arguments that the `load` which is running was given."""


def random_state(action_space: spaces.Space[Any], device: th.device) -> RandomState:
    """
    The states of the random generators that training draws from, as plain JSON values.

    :param action_space: its generator draws the uniform actions of the warm-up
    :param device: the learner's device; on CUDA its generator is included
    :return: one entry per generator
    """
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))  # noqa: NPY002 (SB3 draws from the global one)
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}
    state = {
        "numpy": numpy_state,
        "torch": _encode(th.get_rng_state()),
        "action_space": action_space.np_random.bit_generator.state,
    }
    if device.type == "cuda":
        state["cuda"] = _encode(th.cuda.get_rng_state(device))
    return state


def set_random_state(state: RandomState, action_space: spaces.Space[Any], device: th.device) -> None:
    """
    Put back what `random_state` returned.

    :param state: its result; the CUDA entry is used only on CUDA
    :param action_space: as there
    :param device: as there
    """
    numpy_state = {**state["numpy"], "state": {**state["numpy"]["state"]}}
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)  # noqa: NPY002
    th.set_rng_state(_decode(state["torch"]))
    action_space.np_random.bit_generator.state = state["action_space"]
    if device.type == "cuda" and "cuda" in state:
        th.cuda.set_rng_state(_decode(state["cuda"]), device)


def _encode(state: th.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> th.Tensor:
    return th.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())


def parameters_of(optimizer: th.optim.Optimizer) -> list[nn.Parameter]:
    """
    :param optimizer: an optimizer
    :return: everything that it changes
    """
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def split_optimizer_state(state: dict[str, Any], shares: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """
    An optimizer's state as the states of several that share its parameters out.

    :param state: what ``state_dict`` returned, with one parameter group
    :param shares: the numbers of its parameters that each takes, in the order in which it takes them
    :return: a state for each
    :raises ValueError: if not each of its parameters is taken once
    :raises UnsupportedError: if it has several parameter groups, of which nobody knows what is in them
    """
    if len(state["param_groups"]) > 1:
        raise UnsupportedError(
            f"the optimizer must have one parameter group to be shared out, got {len(state['param_groups'])}"
        )
    (group,) = state["param_groups"]
    taken = sorted(number for share in shares for number in share)
    if taken != list(range(len(group["params"]))):
        raise ValueError(f"the optimizer has {len(group['params'])} parameters, the networks have {len(taken)}")
    return [
        {
            "state": {i: state["state"][number] for i, number in enumerate(share) if number in state["state"]},
            "param_groups": [{**group, "params": list(range(len(share)))}],
        }
        for share in shares
    ]


@contextmanager
def atomic_file(path: str | pathlib.Path, suffix: str) -> Iterator[BinaryIO]:
    """
    A file that appears under its name only when it is whole: a killed process leaves the previous one as it was.

    Names are completed as SB3 does: ``suffix`` where there is none, missing folders made, "_2" where a folder is in the way.

    :param path: the file's name
    :param suffix: without the dot
    """
    path = pathlib.Path(path)
    if path.suffix == "":
        path = path.with_name(f"{path.name}.{suffix}")
    if path.is_dir():
        warnings.warn(f"{path} is a folder, saving to {path}_2 instead", stacklevel=3)
        path = path.with_name(f"{path.name}_2")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class CheckpointMixin(BaseAlgorithm):
    """
    `save` and `load` for every algorithm of the family; goes before the SB3 class.

    Random states are saved always and restored only where training goes on: at the first update, or at
    ``learn(reset_num_timesteps=False)``. Loading to predict disturbs nobody's random stream, and a seed given to `load`
    starts a new stream.
    """

    sb3_class: ClassVar[type[BaseAlgorithm]]
    """The SB3 algorithm whose zips load; its policy classes stand for ours of the same alias."""
    _random_state: RandomState | None = None
    """States of a loaded checkpoint that training has not taken up yet."""

    def _check_policy_class(self) -> None:
        """
        Files do not say whose they are, but their policies do.

        :raises ArgumentTypeError: if the policy was made for another algorithm
        """
        cls = type(self)
        ours = [*cls.policy_aliases.values(), *cls.sb3_class.policy_aliases.values()]
        made = next((base for base in self.policy_class.__mro__ if _is_made_for_algorithms(base)), None)
        if made is not None and not any(issubclass(policy, made) for policy in ours):
            names = ", ".join(sorted(one.__name__ for one in _known_algorithms() if made in one.policy_aliases.values()))
            raise ArgumentTypeError(
                f"policy must be one for {cls.__name__}, and a file is loaded by the class that saved it: "
                f"got {made.__module__}.{made.__qualname__}, which is for {names or 'another algorithm'}"
            )

    def _setup_model(self) -> None:
        self.policy_class = self._translated_policy_class(self.policy_class)
        super()._setup_model()  # type: ignore[safe-super]

    @classmethod
    def _translated_policy_class(cls, policy_class: type[BasePolicy]) -> type[BasePolicy]:
        ours = {theirs: cls.policy_aliases[alias] for alias, theirs in cls.sb3_class.policy_aliases.items()}
        return ours.get(policy_class, policy_class)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if reset_num_timesteps:
            self._random_state = None
        else:
            self._restore_random_state()
        return result

    def _restore_random_state(self) -> None:
        if self._random_state is not None:
            set_random_state(self._random_state, self.action_space, self.device)
            self._random_state = None

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: th.device | str = "auto") -> None:
        """
        See SB3's ``BaseAlgorithm.set_parameters``; parameters of the SB3 class are taken too.

        :param load_path_or_dict: file name, open binary file, or what ``get_parameters`` returned
        :param exact_match: whether all parameters have to be there
        :param device: where those of a file are put
        """
        parameters = load_path_or_dict
        if not isinstance(parameters, dict):
            _, parameters, _ = load_from_zip_file(parameters, device=device, load_data=False)
        super().set_parameters(self._translated_parameters(parameters), exact_match, device)

    def _joint_optimizers(self) -> dict[str, tuple[str, ...]]:
        """Each optimizer of the SB3 algorithm that is several here, by its attribute: their attributes."""
        return {}

    def _translated_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """
        :param parameters: of this class or of `sb3_class`, by the names of their attributes; not changed
        :return: the same by our names
        """
        translated = dict(parameters)
        several = self._joint_optimizers()
        for joint in several.keys() & translated.keys():
            optimizers = {name: recursive_getattr(self, name, None) for name in several[joint]}
            parts = {name: [*map(id, parameters_of(part))] for name, part in optimizers.items() if part is not None}
            if parts.keys() <= translated.keys():
                continue
            everything = {key for part in parts.values() for key in part}
            owner: nn.Module = recursive_getattr(self, joint.rpartition(".")[0])
            order = [id(parameter) for parameter in owner.parameters() if id(parameter) in everything]
            shares = [[order.index(key) for key in part] for part in parts.values()]
            translated.update(zip(parts, split_optimizer_state(translated.pop(joint), shares), strict=True))
        for name, state in translated.items():
            self._check_optimizer(name, state)
        return translated

    def _check_optimizer(self, name: str, state: Any) -> None:
        """
        :raises ArgumentError: for a state of another kind of optimizer than ours, whose options are others
        """
        optimizer = recursive_getattr(self, name, None)
        if isinstance(optimizer, th.optim.Optimizer) and isinstance(state, dict) and "param_groups" in state:
            saved, own = set(state["param_groups"][0]) - {"params"}, set(optimizer.defaults)
            if own - saved and saved - own:
                raise ArgumentError(
                    f"{name} must be the state of a {type(optimizer).__name__} with the options {', '.join(sorted(own))}, "
                    f"got one with {', '.join(sorted(saved))}"
                )

    def save(self, path: Any, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """
        Save as SB3 does, with the random states, and never leave half a file.

        :param path: file name, or an open binary file
        :param exclude: attributes to leave out in addition
        :param include: attributes to save that are left out by default
        """
        pending = self._random_state
        self._random_state = pending or random_state(self.action_space, self.device)
        try:
            if isinstance(path, (str, pathlib.Path)):
                with atomic_file(path, "zip") as file:
                    super().save(file, exclude, include)  # type: ignore[arg-type]
            else:
                super().save(path, exclude, include)
        finally:
            self._random_state = pending

    @classmethod
    def load(cls, path: Any, *args: Any, **kwargs: Any) -> Self:
        """
        Load a zip of this class or of the SB3 class (see ``BaseAlgorithm.load`` for the arguments).

        :param kwargs: arguments of the constructor to change
        :return: the model
        :raises TypeError: if a keyword is no argument of the constructor
        """
        load_arguments = {"env", "device", "custom_objects", "print_system_info", "force_reset"}
        check_keys(f"{cls.__name__}.load()", kwargs, (constructor_keys(cls) | load_arguments) - {"policy"})
        if "stats_window_size" in kwargs:
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
        token = changed_by_load.set(frozenset(kwargs))
        try:
            model = super().load(path, *args, **kwargs)
        finally:
            changed_by_load.reset(token)
        if "seed" in kwargs:
            model._random_state = None
        return model


def _is_made_for_algorithms(policy_class: type) -> bool:
    """Whether it is from this package or SB3, and no common piece."""
    root, _, room = policy_class.__module__.partition(".")
    return root in LIBRARIES and room.partition(".")[0] != "networks"


def _known_algorithms(cls: type[CheckpointMixin] = CheckpointMixin) -> set[type[BaseAlgorithm]]:
    found: set[type[BaseAlgorithm]] = set()
    for one in cls.__subclasses__():
        found |= {one, getattr(one, "sb3_class", one), *_known_algorithms(one)}
    return found
