"""A hook of the site's generator: tables of the configuration's fields, from their declarations in the code.

`{{ fields: TeaCacheConfig }}` on a line of its own becomes a table of that class's fields. Its values, its
default and its meaning are read from the class, so a page cannot say otherwise. `{{ rows }}` becomes the lines of a
table of published constants.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

_PLACE = re.compile(r"^\{\{ fields: (\w+) \}\}$", re.MULTILINE)
_ROWS = "{{ rows }}"


def takes(field: dataclasses.Field[Any], annotation: str) -> str:
    """The values that a field takes, in a few words."""
    from diffusers_accel.config.fields import spec_of

    spec = spec_of(field)
    if spec.choices and annotation.startswith("str") and "tuple" not in annotation:
        return ", ".join(f'`"{each}"`' for each in spec.choices) + (", `None`" if "None" in annotation else "")
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("above", spec.exclusive_minimum), ("at least", spec.minimum), ("at most", spec.maximum))
        if bound is not None
    ]
    return " ".join([f"`{annotation.replace(' | ', ' or ')}`", *([f"({', '.join(bounds)})"] if bounds else [])])


def table(name: str) -> str:
    """The fields of a class of the configuration as a table in Markdown."""
    import diffusers_accel
    from diffusers_accel.config.fields import REQUIRED, spec_of

    kind = getattr(diffusers_accel, name)
    lines = ["| field | takes | default | |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(kind):
        default = "none: it must be given" if field.default is REQUIRED else f"`{field.default!r}`"
        cells = [f"`{field.name}`", takes(field, str(field.type)), default, spec_of(field).meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def rows() -> str:
    """The checkpoints that constants of caches are published for, as lines of a table."""
    from diffusers_accel.models import MAGCACHE_ROWS, TEACACHE_ROWS

    lines = []
    for name in dict.fromkeys([*TEACACHE_ROWS, *MAGCACHE_ROWS]):
        tea, mag = TEACACHE_ROWS.get(name), MAGCACHE_ROWS.get(name)
        threshold = "" if tea is None else f"threshold {tea.threshold:g}" + (", `use_ret_steps`" * tea.use_ret_steps)
        lines.append(f"| `{name}` | {threshold} | {'' if mag is None else f'{len(mag.ratios)} steps'} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the tables in their places; called by the generator for every page."""
    if _ROWS in markdown:
        markdown = markdown.replace(_ROWS, rows())
    return _PLACE.sub(lambda found: table(found[1]), markdown)
