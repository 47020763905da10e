"""A foreign function on plain arrays: found by its import path, called by parameter names, differentiated in its framework.

JAX functions are differentiated by `jax.grad`, torch functions by autograd, NumPy functions by central differences in float64,
unless they return their own gradient.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.checking.cases import Arguments, Outcome

FRAMEWORKS = ("numpy", "jax", "torch")
STEP = 1e-6  # of central differences


class Foreign(NamedTuple):
    """A function under test with the parameters it is given."""

    name: str  # MODULE:FUNCTION
    function: Callable[..., Any]
    takes: tuple[str, ...]
    framework: str = ""  # one of FRAMEWORKS, once known


def load(path: str) -> Callable[..., Any]:
    """The function at MODULE:FUNCTION, importable from the working directory too. Raises ValueError of one line."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"--against {path}: expected MODULE:FUNCTION, such as my_pkg.losses:my_loss")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Any = importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"--against {path}: importing {module} raised {type(error).__name__}: {error}") from error
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise ValueError(f"--against {path}: {module} has no function {name}")
    return function


def parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Its parameters that can be given by name, and whether they have to be."""
    kinds = inspect.Parameter
    return {
        p.name: p.default is kinds.empty
        for p in inspect.signature(function).parameters.values()
        if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    }


def matched(name: str, function: Callable[..., Any], on_offer: Arguments, framework: str = "") -> Foreign:
    """The function with the parameters it will be given: arrays always, settings where it has no default of its own.

    Raises ValueError for one that is required and not on offer.
    """
    takes = []
    for parameter, required in parameters(function).items():
        if parameter in on_offer.arrays or (required and parameter in on_offer.settings):
            takes.append(parameter)
        elif required:
            offered = ", ".join([*sorted(on_offer.arrays), *on_offer.settings])
            raise ValueError(f"{name}: nothing is called {parameter!r}; on offer are {offered}")
    return Foreign(name, function, tuple(takes), framework)


def call(foreign: Foreign, on_offer: Arguments, views: Sequence[str], dtype: str) -> tuple[Outcome, str]:
    """Loss and gradients of one case (or advantages), and the framework that did it.

    Args:
      views: what can be differentiated; gradients come of those that the function takes.
      dtype: of the arrays it is given.
    Raises ValueError of one line with what the function raised, or what is wrong with what it returned.
    """
    wrt = tuple(name for name in foreign.takes if name in views)
    given = {name: on_offer.arrays.get(name, on_offer.settings.get(name)) for name in foreign.takes}
    tried: list[str] = []
    for framework in (foreign.framework,) if foreign.framework else FRAMEWORKS:
        if framework == "torch" and not foreign.framework and "torch" not in sys.modules:
            continue
        try:
            found = _CALLS[framework](foreign.function, given, wrt, dtype)
        except _OtherFramework as other:
            return call(foreign._replace(framework=str(other)), on_offer, views, dtype)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            if foreign.framework:
                text = f"{foreign.name}: raised {type(error).__name__}: {error} (called with {framework} arrays)"
                raise ValueError(text) from error
            tried.append(f"{type(error).__name__} with {framework} arrays ({error})")
            continue
        return _checked(foreign, found, on_offer.arrays["mask"].shape), framework
    raise ValueError(f"{foreign.name}: raised {'; '.join(tried)}; --framework says which it takes")


class _OtherFramework(Exception):
    """What a function returned belongs to the framework named."""


class _Found(NamedTuple):
    value: Any
    grads: Mapping[str, Any] | None
    noise: float = 0.0


def _split(returned: Any, wrt: tuple[str, ...]) -> tuple[Any, dict[str, Any] | None]:
    """Loss and own gradients: `loss`, `(loss, gradient)`, `(loss, {view: gradient})`, or `(loss, dict of anything else)`."""
    if not (isinstance(returned, tuple) and len(returned) == 2):
        return returned, None
    loss, second = returned
    if isinstance(second, Mapping):
        return loss, dict(second) if second and set(second) <= set(wrt) else None
    if isinstance(second, tuple | list):
        return loss, dict(zip(wrt, second, strict=True))
    return loss, {wrt[0]: second} if wrt else None


def _plain(x: Any, dtype: str, integer: type = np.int64) -> Any:
    """A copy of an array with floats of the dtype; settings as they are."""
    if not isinstance(x, np.ndarray):
        return x
    return x.astype({"f": dtype, "i": integer}.get(x.dtype.kind, x.dtype))


def _framework_of(x: Any) -> str:
    module = type(x).__module__.partition(".")[0]
    return "jax" if isinstance(x, jax.Array) else "torch" if module == "torch" else "numpy"


def _numpy(function: Callable[..., Any], given: dict[str, Any], wrt: tuple[str, ...], dtype: str) -> _Found:
    def run(dtype: str, **changed: np.ndarray):
        arrays = {name: _plain(x, dtype) for name, x in {**given, **changed}.items()}
        with np.errstate(all="ignore"):
            value, grads = _split(function(**arrays), wrt)
        if _framework_of(value) != "numpy":
            raise _OtherFramework(_framework_of(value))
        return value, grads

    value, grads = run(dtype)
    if grads is not None or np.size(value) != 1:
        return _Found(value, grads)
    arrays = {name: given[name].astype(np.float64) for name in wrt}
    return _Found(value, *central_differences(lambda views: float(run("float64", **views)[0]), arrays))


def central_differences(
    function: Callable[[dict[str, np.ndarray]], float], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], float]:
    """Derivatives of a scalar function by its float64 arrays, and the error to expect from rounding."""
    grads = {name: np.zeros(x.shape) for name, x in arrays.items()}
    largest = 1.0
    for name, x in arrays.items():
        for at in np.ndindex(x.shape):
            up, down = x.copy(), x.copy()
            up[at], down[at] = x[at] + STEP, x[at] - STEP
            above, below = function({**arrays, name: up}), function({**arrays, name: down})
            grads[name][at] = (above - below) / (2 * STEP)
            largest = max(largest, abs(above)) if np.isfinite(above) else largest
    return grads, 8 * np.finfo(float).eps / STEP * largest


def _jax(function: Callable[..., Any], given: dict[str, Any], wrt: tuple[str, ...], dtype: str) -> _Found:
    with jax.enable_x64(dtype == "float64"):
        arrays = {name: jnp.asarray(_plain(x, dtype)) if isinstance(x, np.ndarray) else x for name, x in given.items()}
        value, grads = _split(function(**arrays), wrt)
        if grads is None and np.size(value) == 1 and wrt:

            def loss(views: dict[str, jax.Array]) -> jax.Array:
                return jnp.reshape(_split(function(**{**arrays, **views}), wrt)[0], ())

            grads = jax.grad(loss)({name: arrays[name] for name in wrt})
        return _Found(np.asarray(value), grads)


def _torch(function: Callable[..., Any], given: dict[str, Any], wrt: tuple[str, ...], dtype: str) -> _Found:
    import torch

    arrays = {name: torch.from_numpy(_plain(x, dtype)) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    for name in wrt:
        arrays[name].requires_grad_()
    value, grads = _split(function(**arrays), wrt)
    value = torch.as_tensor(value)
    if grads is None and value.numel() == 1 and wrt:
        parts = [None] * len(wrt)
        if value.requires_grad:
            parts = torch.autograd.grad(value.reshape(()), [arrays[name] for name in wrt], allow_unused=True)
        grads = {n: torch.zeros_like(arrays[n]) if g is None else g for n, g in zip(wrt, parts)}
    grads = grads and {name: torch.as_tensor(g).detach().numpy() for name, g in grads.items()}
    return _Found(value.detach().numpy(), grads)


_CALLS = {"numpy": _numpy, "jax": _jax, "torch": _torch}


def _checked(foreign: Foreign, found: _Found, shape: tuple[int, ...]) -> Outcome:
    value = np.asarray(found.value, np.float64)
    if value.shape in (shape[:1], shape):
        return Outcome(value, {})
    if value.size != 1:
        raise ValueError(
            f"{foreign.name}: returned an array of shape {value.shape}, expected a loss [], or advantages [B] or [B, T]"
        )
    grads = {name: np.asarray(g, np.float64) for name, g in (found.grads or {}).items()}
    for name, g in grads.items():
        if g.shape != shape:
            raise ValueError(f"{foreign.name}: its gradient of {name} has shape {g.shape}, expected {shape}")
    return Outcome(value.reshape(()), grads, found.noise)
