"""Saving and loading that lets training go on exactly: random states, whole files, SB3's zips, no unknown keys."""

import base64
import json
import os
import pathlib
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file, open_path, recursive_getattr
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import nn

from sb3_ac_ext.base.declarations import check_device
from sb3_ac_ext.signatures import arguments_of
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, UnsupportedError, check_keys, shown

LIBRARIES = (__name__.partition(".")[0], "stable_baselines3", "sb3_contrib")
"""Whose policies are made for certain algorithms."""
SIGNS = {
    "MADDPG": "centralised",
    "DDPGX": "parameter_noise",
    "SACX": "exact_log_prob",
    "PPOX": "surrogate",
    "TRPOX": "kl_direction",
    "ACKTR": "inversion",
    "AC": "actor_trace_lambda",
    "Reinforce": "use_baseline",
    "TD3X": "critic_learning_rate",
    "ARS": "delta_std_schedule",
    "QRDQN": "sb3_contrib.qrdqn.policies",
    "DQN": "exploration_fraction",
    "TQC": "top_quantiles_to_drop_per_net",
    "CrossQ": "sb3_contrib.crossq.policies",
    "MaskablePPO": "sb3_contrib.common.maskable.policies",
    "RecurrentPPO": "sb3_contrib.common.recurrent.policies",
    "PPO": "n_epochs",
    "TRPO": "cg_damping",
    "SAC": "target_entropy",
    "TD3": "target_noise_clip",
    "A2C": "normalize_advantage",
}
"""
By what a zip is known that does not name its algorithm (SB3's, and ours of earlier versions): an argument, or the policy's
module. The first that is there counts.
"""
SB3_DDPG = {"policy_delay": 1, "target_noise_clip": 0, "target_policy_noise": 0.1}
"""By what its zips differ from those of TD3, which it is a case of."""

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
    """
    The SB3 algorithm whose zips load; its policy classes stand for ours of the same alias. A class that sets it is an
    algorithm, and loads the zips of its subclasses, and they its own, unless they set it too.
    """
    _saver: tuple[str, str]
    """The class and the algorithm that it is, by name, so that a zip says whose it is."""
    _random_state: RandomState | None = None
    """States of a loaded checkpoint that training has not taken up yet."""

    def _check_policy_class(self) -> None:
        """
        Take our policy where the class is SB3's.

        :raises ArgumentTypeError: if the policy was made for another algorithm
        """
        cls = type(self)
        self.policy_class = self._translated_policy_class(self.policy_class)
        ours = [*cls.policy_aliases.values(), *cls.sb3_class.policy_aliases.values()]
        made = next((base for base in self.policy_class.__mro__ if _is_made_for_algorithms(base)), None)
        if made is not None and not any(issubclass(policy, made) for policy in ours):
            names = ", ".join(sorted(one.__name__ for one in _algorithms() if made in one.policy_aliases.values()))
            raise ArgumentTypeError(
                f"policy must be one for {cls.__name__}, got {made.__module__}.{made.__qualname__}, "
                f"which is for {names or 'another algorithm'}"
            )

    @classmethod
    def _algorithm(cls) -> type[Self]:
        return next(one for one in cls.__mro__ if "sb3_class" in vars(one))

    @classmethod
    def _check_saver(cls, path: Any) -> None:
        """
        :param path: see `load`
        :raises ArgumentError: if it is a zip of another algorithm
        """
        algorithm, content = cls._algorithm(), _content_of(path)
        is_ours = algorithm.__module__.partition(".")[0] == LIBRARIES[0]  # those of users may have the same arguments
        saver, name = content.get("_saver") or (None, _told_by_signs(content) if is_ours else None)
        if name in (None, algorithm.__name__, algorithm.sb3_class.__name__):
            return
        known = [one for one in _algorithms() if name in (one.__name__, getattr(one, "sb3_class", one).__name__)]
        loaders = [saver] if saver else [one.__name__ for one in known]
        raise ArgumentError(
            f"path must be a file of {algorithm.__name__}, got one that {saver or name} saved: "
            f"load it with {' or '.join(f'{loader}.load()' for loader in loaders)}"
        )

    def _setup_model(self) -> None:
        self._saver = type(self).__name__, self._algorithm().__name__
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
        :raises ArgumentError: for a zip of another algorithm
        """
        load_arguments = {"env", "device", "custom_objects", "print_system_info", "force_reset"}
        check_keys(f"{cls.__name__}.load()", kwargs, (arguments_of(cls).keys() | load_arguments) - {"policy"})
        if "device" in kwargs:  # which SB3 takes first
            check_device("device", kwargs["device"])
        cls._check_saver(path)
        if "stats_window_size" in kwargs:
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
        token = changed_by_load.set(frozenset(kwargs))
        changed = {name: value for name, value in kwargs.items() if name not in load_arguments}
        try:
            model = super().load(path, *args, **kwargs)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, ArgumentError) or not changed:
                raise
            given = ", ".join(f"{name.lstrip('_')}={shown(value)}" for name, value in changed.items())
            raise ArgumentError(f"what the file has does not go with {given}: {error}") from error
        finally:
            changed_by_load.reset(token)
        if "seed" in kwargs:
            model._random_state = None
        return model


def _is_made_for_algorithms(policy_class: type) -> bool:
    """Whether it is from this package or SB3, and no common piece."""
    root, _, room = policy_class.__module__.partition(".")
    return root in LIBRARIES and room.partition(".")[0] != "networks"


def _algorithms() -> list[type[BaseAlgorithm]]:
    """Those of `LIBRARIES`, ours first."""
    found = [one for library in LIBRARIES for one in vars(import_module(library)).values()]
    return [one for one in found if isinstance(one, type) and issubclass(one, BaseAlgorithm)]


def _content_of(path: Any) -> dict[str, Any]:
    """
    What a zip has as JSON, with nothing unpickled.

    :param path: file name, or an open binary file, which is left where it was
    :return: by attribute; nothing if it cannot be read, which SB3 gives the reason of
    """
    file = open_path(path, "r", suffix="zip")
    position = file.tell() if file.seekable() else None
    try:
        with zipfile.ZipFile(file) as archive:
            return dict(json.loads(archive.read("data")))
    except Exception:
        return {}
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()
        elif position is not None:
            file.seek(position)


def _told_by_signs(content: dict[str, Any]) -> str | None:
    """
    :param content: of a zip
    :return: the algorithm of which `SIGNS` are there
    """
    policy = content.get("policy_class")
    there = {*content, policy.get("__module__") if isinstance(policy, dict) else None}
    found = next((name for name, sign in SIGNS.items() if sign in there), None)
    return "DDPG" if found == "TD3" and all(content.get(name) == value for name, value in SB3_DDPG.items()) else found
