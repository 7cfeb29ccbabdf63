"""
Adds the algorithms of sb3_ac_ext to RL Zoo when, and only when, RL Zoo is imported.

RL Zoo has no plugin system, and ``python -m rl_zoo3.train`` gives nobody else a chance to run. Python executes this module
at every start (``sb3_ac_ext_zoo.pth``; from Python 3.15 on, ``sb3_ac_ext_zoo.start``), so it imports only what the
interpreter has already loaded and never raises. ``SB3_AC_EXT_ZOO=0`` in the environment switches it off.
"""

import os
import sys

ZOO_MODULES = ("rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")
"""The modules that `sb3_ac_ext.zoo.patch` changes."""

_searching: set[str] = set()
_warned = False


class _Finder:
    """Finds nothing by itself: lets the other finders find the Zoo's modules and has them patched once they have run."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in ZOO_MODULES or name in _searching:
            return None
        _searching.add(name)  # another finder of this kind may ask us in turn
        try:
            for finder in sys.meta_path:
                find = None if finder is _Finder else getattr(finder, "find_spec", None)
                spec = find(name, path, target) if find else None
                if spec is not None:
                    return _patched_after_execution(spec)
        finally:
            _searching.discard(name)
        return None


def _patched_after_execution(spec):
    """Replace one method of the found loader, not the loader: inspect and importlib.resources need its other methods."""
    execute = getattr(spec.loader, "exec_module", None)
    if execute is None:
        return spec

    def exec_module(module):
        execute(module)
        if module.__name__ == spec.name:  # a zip file has one loader for all of its modules
            _patch(spec.name)

    spec.loader.exec_module = exec_module
    return spec


def _patch(name):
    """Apply the package's patch to one Zoo module; on failure the Zoo stays as it was and the user is told what to do."""
    global _warned
    try:
        from sb3_ac_ext.zoo.patch import apply

        apply(name)
    except Exception as error:
        if _warned:
            return
        _warned = True
        import warnings

        if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] == "sb3_ac_ext":
            here = os.path.dirname(os.path.abspath(__file__))
            remedy = (
                "the package is gone but its startup hook is still there: install sb3_ac_ext again, or delete "
                f"sb3_ac_ext_zoo.pth, sb3_ac_ext_zoo.start and _sb3_ac_ext_hook.py from {here}"
            )
        else:
            remedy = "SB3_AC_EXT_ZOO=0 in the environment switches this attempt off"
        warnings.warn(f"sb3_ac_ext could not add its algorithms to RL Zoo ({error!r}); {remedy}", stacklevel=2)


def startup():
    """Install the finder, and patch what has been imported before. Safe to call again."""
    if os.environ.get("SB3_AC_EXT_ZOO") == "0" or _Finder in sys.meta_path:
        return
    sys.meta_path.insert(0, _Finder)
    for name in ZOO_MODULES:
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _patch(name)
