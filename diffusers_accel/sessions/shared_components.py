"""Components besides the denoisers (a VAE, a text encoder) that several pipelines share and sessions change.

A `SharedComponent` has the edits in force on one such component. It is kept on the component itself, and refers to its
sessions weakly. Sessions that change a component in the same way share one set of edits, until the last of them ends.
If all sessions were dropped without `restore`, the edits stay until a pipeline with the component is accelerated or
restored.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from ..core.edits import Journal
from ..errors import Unsupported
from ..features.context import PipelineContext
from .attributes import SHARED, modules_of

# Component -> feature -> the section that changes the component.
ComponentSections = Mapping[str, Mapping[str, Any]]


class Sharer(Protocol):
    """A session, as its components know it: its edits, and the pipelines that it was begun with."""

    journal: Journal
    pipes: weakref.WeakSet[Any]


@dataclass(eq=False)
class SharedComponent:
    """The edits of a component besides the denoisers, and the sessions that share them.

    Args:
        module: The component, held weakly.
        key: Feature -> section, of the features that change the component.

    Attributes:
        journal: The component's edits.
        sessions: The sessions with this `key` for the component, held weakly.
    """

    module: weakref.ref[nn.Module]
    key: Mapping[str, Any]
    journal: Journal = field(default_factory=Journal)
    sessions: weakref.WeakSet[Sharer] = field(default_factory=weakref.WeakSet)

    @classmethod
    def of(cls, module: nn.Module) -> SharedComponent | None:
        """A component's edits; `None` for a component without any."""
        found = vars(module).get(SHARED)
        return found if isinstance(found, cls) else None

    @classmethod
    def around(cls, module: nn.Module, key: Mapping[str, Any]) -> SharedComponent:
        """A component's edits, an empty journal if it has none."""
        found: SharedComponent = vars(module).setdefault(SHARED, cls(weakref.ref(module), key))
        return found

    def __reduce__(self) -> Any:
        return (type(None), ())  # a copied component is stock

    def adopt(self, session: Sharer) -> None:
        """Adds a session, and moves the session's edits of the component to this journal."""
        self.sessions.add(session)
        module = self.module()
        assert module is not None
        inside = {id(part) for part in module.modules()}
        session.journal.transfer(self.journal, lambda edit: id(getattr(edit, "target", None)) in inside)

    def undo(self) -> None:
        """Undoes the component's edits, and removes this object from the component."""
        self.journal.undo()
        module = self.module()
        if module is not None:
            vars(module).pop(SHARED, None)

    def others(self, session: Sharer | None) -> list[Sharer]:
        """The sessions in `sessions` except one."""
        if any(each is not session for each in self.sessions):
            gc.collect()  # removes sessions that only reference cycles keep
        return [each for each in self.sessions if each is not session]


def undo_abandoned(owner: Any) -> bool:
    """Undoes edits of components whose sessions were all dropped without `restore`.

    Args:
        owner: A component, or a pipeline with its components.

    Returns:
        Whether there were such edits.

    Raises:
        Unsupported: A component's stock weights were freed; that component was not changed.
    """
    if not isinstance(owner, nn.Module) and not hasattr(owner, "components"):
        return False  # no pipeline: the caller says so
    found = False
    for module in modules_of(owner):
        shared = SharedComponent.of(module)
        if shared is None or shared.others(None):
            continue
        for reason in shared.journal.irreversible:
            raise Unsupported("restore", f"{reason}.", "load the component again.", type(module).__name__)
        shared.undo()
        found = True
    return found


@contextmanager
def suspended_component(module: nn.Module) -> Iterator[None]:
    """A context within which a component besides the denoisers is stock."""
    shared = SharedComponent.of(module)
    if shared is None:
        yield
        return
    del vars(module)[SHARED]
    try:
        with shared.journal.suspended():
            yield
    finally:
        vars(module)[SHARED] = shared


def shared_components(context: PipelineContext, sections: ComponentSections, own: Sharer | None) -> frozenset[str]:
    """Components that another session has changed in the same way already.

    Args:
        context: The pipeline.
        sections: Components to change besides the denoisers, with the sections that do.
        own: The pipeline's own session, which ends first.

    Raises:
        Unsupported: Another session has changed such a component in another way.
    """
    found = set()
    for name, key in sections.items():
        shared = SharedComponent.of(context.pipe.components[name])
        if shared is None or (own is not None and set(shared.sessions) == {own}):
            continue
        others = shared.others(own)
        if shared.key != key and others:
            kinds = sorted(type(pipe).__name__ for each in others for pipe in each.pipes) or ["another pipeline"]
            features = ", ".join(sorted(set(key) | set(shared.key)))
            raise Unsupported(
                features,
                f"its {name} is shared with {', '.join(kinds)}, for which it was set otherwise.",
                f"the same setting for both, or restore(...) the other one, or a {name} of its own.",
                type(context.pipe).__name__,
            )
        if shared.key == key:
            found.add(name)
    return frozenset(found)
