"""Sections of the configuration, and legal values of their fields, drawn by the fields' specifications."""

from __future__ import annotations

import dataclasses
import math
import typing

from diffusers_accel import AccelConfig

SECTIONS = [
    kind
    for entry in dataclasses.fields(AccelConfig)
    for section in [entry.metadata["section"]]
    for kind in (section.values() if isinstance(section, dict) else [section])
]
# Sections within sections: fields of these hold them.
INNER = [
    kind
    for section in SECTIONS
    for annotation in typing.get_type_hints(section).values()
    for kind in typing.get_args(annotation)
    if isinstance(kind, type) and hasattr(kind, "section")
]
# What a section must have besides the field that is drawn.
BESIDE = {
    "LinearConfig": {"algo": "fp8"},
    "PolicyConfig": {"name": "mine"},
    "SparseConfig.threshold_scale_factor": {"selector": "skip-softmax"},
    "SparseConfig.target_sparsity": {"selector": "skip-softmax"},
}


def of(section, field, value):
    beside = BESIDE.get(section.__name__, {}) | BESIDE.get(f"{section.__name__}.{field.name}", {})
    return section(**{**beside, field.name: value})


def whole(section):
    """The configuration that holds a section, which may be within another one."""
    outer, _, inner = section.section.partition(".")
    return AccelConfig(**{outer: {inner: section} if inner else section})


def kinds_of(section, field):
    """The types that a field takes: plain ones, and (tuple, of) or (dict, of)."""
    annotation = typing.get_type_hints(section)[field.name]
    alternatives = (
        [annotation] if isinstance(annotation, type) or typing.get_origin(annotation) in (tuple, dict)
        else typing.get_args(annotation)
    )  # fmt: skip
    found = {}
    for kind in alternatives:
        origin, of = typing.get_origin(kind), typing.get_args(kind)
        found[origin or kind] = of[1] if origin is dict else of[0] if origin is tuple else None
    return found


def legal(section, field, draw):
    """A value that a field must take, by its specification."""
    spec, kinds = field.metadata["spec"], kinds_of(section, field)
    if spec.examples:
        return draw.choice(spec.examples)
    kind = draw.choice(list(kinds))

    def one(kind):
        if kind is bool:
            return draw.random() < 0.5
        least = (
            spec.minimum
            if spec.minimum is not None
            else spec.exclusive_minimum + 1e-3
            if spec.exclusive_minimum is not None
            else -1000
        )
        most = spec.maximum if spec.maximum is not None else 1000
        if kind is int:
            return draw.randint(math.ceil(least), math.floor(most))
        if kind is float:
            return draw.choice(
                [draw.uniform(least, most), float(most), round(most), 1e-7 if least <= 0 else float(most)]
            )
        if kind is str:
            return draw.choice(
                [*spec.choices, *spec.extra_choices]
                or ["fp8", "*.to_q", "null", "1e3", "yes", "ä [x]: #", "2026-11-30"]
            )
        if kind is typing.Any:
            return draw.choice([None, True, 3, 0.25, math.inf, "", "text", [1, [2.5]], {"a": [1, {"b": None}]}])
        return None

    if kind is tuple:
        fixed = typing.get_args(typing.get_type_hints(section)[field.name])
        count = (
            2 if fixed and fixed[-1] is not Ellipsis and not spec.min_items else draw.randint(max(spec.min_items, 1), 5)
        )
        items = [one(kinds[tuple]) for _ in range(count)]
        return list(dict.fromkeys(items)) if spec.min_items == 1 else items
    if kind is dict:
        return {draw.choice(["*", "blocks.0.*", "null", "ä: 1"]): one(kinds[dict]) for _ in range(draw.randint(0, 3))}
    return one(kind)
