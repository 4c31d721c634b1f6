"""Names in a configuration that only registries know: kernels, formats, policies, published constants, backends and
modes of `torch.compile`.

The check is made as a configuration is applied, because a user may register a name after writing it. All names are
checked, also in fields that do not affect the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .config import AccelConfig
from .config.cache import MAGCACHE_ROW, POLICY, TEACACHE_ROW
from .config.sections import BACKEND, FORMAT, KERNEL, MODE
from .config.sparse import SELECTOR
from .core.registry import Registry
from .errors import UnknownName, nearest, shown
from .features.compile import options
from .kernels.attention import KERNELS, SELECTORS
from .kernels.linear import LINEARS
from .models import MAGCACHE_ROWS, TEACACHE_ROWS
from .policies import POLICIES

_REGISTRIES: dict[str, Registry[Any]] = {KERNEL: KERNELS, FORMAT: LINEARS, POLICY: POLICIES, SELECTOR: SELECTORS}
_NAMES: dict[str, Callable[[], Iterable[str]]] = {
    TEACACHE_ROW: lambda: TEACACHE_ROWS,
    MAGCACHE_ROW: lambda: MAGCACHE_ROWS,
    BACKEND: options.backends,
    MODE: options.modes,
}


def refuse_unknown(config: AccelConfig) -> None:
    """Refuses a configuration with an unregistered name.

    Raises:
        UnknownName: Nothing of that name is registered; it is a `ConfigError` and an `Unsupported`.
        ConfigError: An option of `torch.compile` is unknown, has a wrong type or would have no effect.
    """
    for field, what, name, besides in config.registry_names():
        if what in _REGISTRIES:
            if not _REGISTRIES[what].knows(name):
                raise _REGISTRIES[what].unknown(name, field, besides)
        elif name not in (found := tuple(_NAMES[what]())):
            reason = f"There is no {what} of that name."
            raise UnknownName(f"{field}={shown(name)}", reason, nearest(name, (*found, *besides)))
    if config.compile is not None:
        options.refuse_options(config.compile)
