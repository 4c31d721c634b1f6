"""The configuration: round trips, shorthands, errors that name the nearest legal value; nonsense and legal values drawn
for every field from its specification."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import math
import pickle
import random
import typing

import pytest
from drawn import INNER, SECTIONS, kinds_of, legal, of, whole

from diffusers_accel import AccelConfig, AttentionConfig, CompileConfig, ConfigError, TeaCacheConfig, VAEConfig
from diffusers_accel.config import CACHE_CONFIGS

FULL = AccelConfig(
    attention=AttentionConfig(backend="sdpa"),
    compile=CompileConfig(mode="max-autotune", dynamic=True),
    cache=TeaCacheConfig(threshold=0.25, coefficients=(1.0, -2.5e-3, 0.0), coefficients_2="wan2.1-t2v-14b"),
    vae=VAEConfig(tiling=True, slicing=False),
)


@pytest.mark.parametrize("config", [AccelConfig(), FULL, AccelConfig(cache="teacache")], ids=["empty", "full", "cache"])
def test_round_trips(config, tmp_path):
    assert AccelConfig.from_dict(config.to_dict()) == config
    config.to_yaml(tmp_path / "accel.yaml")
    assert AccelConfig.from_yaml(tmp_path / "accel.yaml") == config


def test_shorthands_mean_their_sections():
    assert AccelConfig(attention="fa3").attention == AttentionConfig(backend="fa3")
    assert AccelConfig(compile=True).compile == CompileConfig()
    assert AccelConfig(compile="max-autotune").compile == CompileConfig(mode="max-autotune")
    assert AccelConfig(compile=False).compile is None
    assert AccelConfig(cache="teacache").cache == TeaCacheConfig()
    assert AccelConfig(cache={"kind": "teacache", "threshold": 1}).cache == TeaCacheConfig(threshold=1.0)
    assert AccelConfig(vae={"tiling": True}).vae == VAEConfig(tiling=True)


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.attention = None
    with pytest.raises(TypeError):
        AttentionConfig("sdpa")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"atention": "auto"}, "Did you mean 'attention'"),
        ({"cache": {"kind": "teacache", "treshold": 1}}, "Did you mean 'threshold'"),
        ({"cache": "teacach"}, "Did you mean 'teacache'"),
        ({"compile": {"mod": "x"}}, "Did you mean 'mode'"),
        ({"attention": 3}, "attention: expected AttentionConfig"),
        ({"cache": {"kind": "teacache", "threshold": "much"}}, "cache.threshold"),
        ({"cache": {"kind": "teacache", "coefficients": [1, "a"]}}, "cache.coefficients"),
        ({"compile": {"fullgraph": 1}}, "compile.fullgraph"),
        ({"warmup": {"resolutions": ["480 by 832"]}}, "'<height>x<width>'"),
        ({"warmup": {"num_frames": [81.5]}}, "warmup.num_frames"),
        ({"warmup": {"num_inference_steps": 0}}, "at least 1, or None, got 0"),
        ({"cuda_graph": {"limit": 0}}, "cuda_graph.limit: expected a whole number of at least 1, got 0. Nearest: 1"),
        ([1], "mapping"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        AccelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no configuration file"),
        ("a: [", "is not YAML"),
        ("just words", "no mapping"),
        ("wat: 1", "'wat'"),
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- attention: sdpa", "is a list and holds no mapping"),
        (
            "attention: sdpa\ncompile: true\nattention: fa3",
            r"accel.yaml' is not YAML that can be read: line 3: the key 'attention' is there twice",
        ),
        ("attention: {backend: sdpa, backend: fa3}", "the key 'backend' is there twice"),
        ("linear: {algo: fp8, smallest: " + "1" * 5000 + "}", "not YAML"),
        ("linear: {algo: fp8, smallest: 2026-11-30}", "linear.smallest: expected a whole number.*got datetime.date"),
        ("linear: {algo: fp8, smallest: 2026-13-45}", "not YAML"),
        ("2026-11-30: 1", "Unknown configuration key datetime.date"),
        ("cache: {kind: teacache, threshold: .nan}", "cache.threshold.*got nan"),
        ("cache: {kind: teacache, threshold: 1e-3}", "cache.threshold.*Write 0.001: it was read as text"),
        ("linear: &a [*a]", "linear: expected LinearConfig"),
        ("attention: " + "[" * 5000 + "]" * 5000, "nested too deep"),
        ("---\nattention: sdpa\n---\nattention: fa3", "not YAML"),
    ],
)
def test_bad_files_are_named(text, message, tmp_path):
    path = tmp_path / "accel.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        AccelConfig.from_yaml(path)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "accel.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not YAML"):
        AccelConfig.from_yaml(tmp_path / "accel.yaml")
    with pytest.raises(ConfigError, match=r"^There is no configuration file"):
        AccelConfig.from_yaml(tmp_path)
    with pytest.raises(ConfigError):
        AccelConfig.from_yaml("x" * 5000 + ".yaml")


def test_keys_of_a_merged_mapping_may_be_overridden(tmp_path):
    (tmp_path / "accel.yaml").write_text(
        "cache: &a {kind: teacache, threshold: 0.1}\nattention: sdpa\n".replace("cache: &a", "cache: &a")
        + "vae: {<<: {tiling: true, compile: false}, tiling: false}\n"
    )
    assert AccelConfig.from_yaml(tmp_path / "accel.yaml").vae == VAEConfig(tiling=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cache": "policy"}, "cache.name: is needed"),
        ({"cache": {"kind": "policy"}}, "cache.name: is needed"),
        ({"cache": {"kind": ["teacache"]}}, r"cache.kind: expected the name of a rule, got \['teacache'\]"),
        ({"cache": {}}, "cache.kind: expected the name of a rule. Known"),
        ({"linear": {"quant_algo": ["FP8"]}}, r"linear.quant_algo: expected one of.*got \['FP8'\]"),
        ({"linear": {"quant_algo": None}}, "linear.quant_algo: expected one of.*got None"),
        ({"linear": {"quant_algo": "FP8", "quant_method": "gptq"}}, "linear.quant_method: expected one of 'modelopt'"),
        ({"linear": {"quant_algo": "FP8", "ignore": 3}}, "linear.ignore: expected a list"),
        ({"linear": {"quant_algo": "FP8", "ignore": [3]}}, "linear.ignore: expected a list"),
        ({"linear": {"quant_algo": "FP8", "dynamic": "no"}}, "linear.dynamic: expected true or false, got 'no'"),
        ({"linear": {"quant_algo": "FP8", "producer": 3}}, "linear.producer: expected a mapping"),
        ({"linear": {"quant_algo": "FP8", "quantized_layers": ["a"]}}, "linear.quantized_layers: expected a mapping"),
        ({"linear": {"quant_algo": "MIXED_PRECISION"}}, "linear.quantized_layers: MIXED_PRECISION takes its formats"),
        ({"linear": {"quant_algo": "FP8", "quantized_layers": {"a": "FP8"}}}, r"quantized_layers\['a'\]: expected"),
        ({"linear": {"quant_algo": "FP8", "quantized_layers": {"a": {}}}}, r"quantized_layers\['a'\]: expected"),
        (
            {"linear": {"quant_algo": "FP8", "quantized_layers": {"a": {"quant_algo": ["FP8"]}}}},
            r"linear.quantized_layers.quant_algo: expected one of.*got \['FP8'\]",
        ),
        (
            {"linear": {"quant_algo": "FP8", "quantized_layers": {"a": {"quant_algo": "NVFP4", "group_size": 32}}}},
            "group_size: NVFP4 has 16, got 32",
        ),
        ({"linear": {"algo": "fp8", "targets": []}}, "linear.targets: expected a list.*not an empty one"),
        ({"linear": {"algo": "fp8", "targets": ["unet", "unet"]}}, "linear.targets: expected a list.*each once"),
        ({"cache": {"kind": "teacache", "coefficients": []}}, "cache.coefficients: expected a list of one or more"),
        ({"cache": {"kind": "teacache", "coefficients": [0, 0.0]}}, "cache.coefficients: expected.*not all 0"),
        ({"cache": {"kind": "teacache", "threshold": 10**400}}, "cache.threshold: expected a finite number"),
        ({"cache": {"kind": "dbcache", "residual_diff_threshold": -0.1}}, "residual_diff_threshold.*Nearest: 0.0"),
        ({"warmup": {"resolutions": ["²x²"]}}, "warmup.resolutions: expected.*'²x²' is invalid"),
        ({"warmup": {"resolutions": ["0x32"]}}, "warmup.resolutions"),
        ({"warmup": {"num_frames": []}}, "warmup.num_frames: expected.*not an empty one"),
        ({"linear": {"algo": "fp8", "ignore": "*.to_q"}}, r"linear.ignore.*Write \['\*\.to_q'\]"),
        ({"compile": {"mode": "max-autotune", "backend": "eager"}}, "compile.mode: modes are inductor's"),
        ({"compile": {"options": {"a": object()}}}, "compile.options: expected a mapping of names to plain data"),
        ({"vae": "tiling"}, r"vae: expected VAEConfig, a mapping of its fields \(tiling, slicing, compile\), or None"),
        ({"fuse": 1}, "fuse: expected FuseConfig.*true, or None, got 1"),
        ({"cache": True}, "cache: expected the class of a rule.*teacache.*got True"),
        ({3: 1}, "Unknown configuration key 3"),
        ({"attention": {3: 1}}, "attention: unknown key 3"),
    ],
)
def test_what_was_raw_or_accepted(values, message):
    with pytest.raises(ConfigError, match=message):
        AccelConfig.from_dict(values)


def test_nothing_of_the_callers_is_kept_or_changed():
    written = {
        "linear": {"algo": "fp8", "ignore": ["a"], "plan": {"b": "none"}},
        "compile": {"options": {"x": [1, {"y": [2]}]}},
    }
    before, config = copy.deepcopy(written), AccelConfig.from_dict(written)
    assert written == before
    kept = copy.deepcopy(config)
    written["linear"]["ignore"].append("c")
    written["linear"]["plan"]["c"] = "fp8"
    written["compile"]["options"]["x"][1]["y"].append(3)
    assert config == kept
    with pytest.raises(TypeError):
        config.linear.plan["d"] = "fp8"
    with pytest.raises(TypeError):
        config.compile.options["x"][1].update(z=1)
    section = AttentionConfig(layers={"a": "sdpa"})
    assert AccelConfig(attention=section).attention is section


def test_a_section_says_what_its_fields_mean():
    for section in SECTIONS:
        for field in dataclasses.fields(section):
            assert f"{field.name}: " in section.__doc__ and len(field.metadata["spec"].meaning) > 10


# --- drawn from the declarations --------------------------------------------------------------------------------------

FIELDS = [
    pytest.param(section, field, id=f"{section.__name__}.{field.name}")
    for section in [*SECTIONS, *INNER]
    for field in dataclasses.fields(section)
]


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def itself():
    value = []
    value.append(value)
    return value


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no")


NONSENSE = {
    bool: [True, False],
    int: [0, 1, -1, 10**400, 10**5000],
    float: [0.5, math.nan, math.inf, -1e300],
    str: ["", "x", " ", "1", "nan", "x" * 1_000_000, "a\nb", "\ud800", "\0"],
    tuple: [
        [],
        [1],
        ["x"],
        ["\0"],
        [math.nan],
        [True],
        [None],
        [object()],
        [[1]],
        (),
        (1, 1, 1),
        deep(100_000),
        itself(),
    ],
    dict: [{}, {"a": 1}, {1: "x"}, {"a": object()}, {"": "x"}, {"a": "\0"}, {"a": {1: 2}}, {"a": math.nan}],
    type(None): [None],
    object: [object(), Unprintable(), datetime.date(2026, 11, 30), b"x", {1}, 1j, len, int, iter([])],
}


def wrong_items(kind):
    """Values that are no item of a list or mapping of this kind."""
    kind = typing.get_origin(kind) or kind
    others = {float: {int}, typing.Any: set(NONSENSE) - {object}}.get(kind, set())
    found = [
        value for other, values in NONSENSE.items() if other is not kind and other not in others for value in values
    ]
    return found + {
        int: [10**400], float: [10**400, math.nan, math.inf], str: ["", " ", "a\nb", "\ud800", "x" * 1_000_000],
        typing.Any: [math.nan, 10**5000, [object()], {1: 2}],
    }.get(kind, [])  # fmt: skip


def nonsense(section, field):
    """Values that a field must refuse, by its specification."""
    spec, kinds = field.metadata["spec"], kinds_of(section, field)
    # A section within takes a name, a mapping or true; its own fields say what is nonsense there.
    inner = (str, dict, bool) if set(INNER) & set(kinds) else ()
    for kind, values in NONSENSE.items():
        if kind in inner:
            continue
        if kind not in kinds and not (kind is int and float in kinds):
            yield from values
    numbers = {int, float} & {*kinds, *(kind for kind in kinds.values() if kind)}
    outside = [bound for bound in (spec.minimum, spec.maximum) if bound is not None]
    outside = [bound + (1 if bound == spec.maximum else -1) for bound in outside]
    outside += [spec.exclusive_minimum, spec.exclusive_minimum - 1] if spec.exclusive_minimum is not None else []
    outside += [10**400] if numbers else []
    outside += [math.nan, math.inf, -math.inf] if float in numbers else []
    if numbers & set(kinds):
        yield from outside
    if str in kinds:
        yield from ["", " ", "a\nb", "\ud800", "x" * 1_000_000]
        if spec.choices:
            yield from ["nothing of that kind", spec.choices[0] + "s"]
    for container, inner in kinds.items():
        items = [*wrong_items(inner), *(outside if numbers else [])] if inner else []
        if container is tuple:
            yield from ([item] * max(spec.min_items, 1) for item in items)
            if spec.min_items:
                yield []
        if container is dict:
            yield from ({"a": item} for item in items)
            yield from ({key: item} for item in NONSENSE[str][:2] for key in (1, None, "", "\0", ("a",)))


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_nonsense_is_refused_by_name(section, field):
    drawn = list(nonsense(section, field))
    assert len(drawn) > 20
    for value in drawn:
        with pytest.raises(ConfigError) as caught:
            of(section, field, value)
        text = str(caught.value)
        assert text.startswith(f"{section.section}.{field.name}: expected "), text
        assert "got " in text and len(text) < 900, text
        try:
            assert "cannot be printed" in text or repr(value)[:60] in text, text
        except (RuntimeError, ValueError):
            raise AssertionError(f"{text} shows what cannot be shown") from None


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_the_nearest_number_is_named(section, field):
    spec = field.metadata["spec"]
    for bound, beyond in ((spec.minimum, -1), (spec.maximum, 1)):
        if bound is not None and {int, float} & set(kinds_of(section, field)):
            with pytest.raises(ConfigError, match=rf"got {bound + beyond}.* Nearest: {bound}(\.0)?\."):
                of(section, field, bound + beyond)


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_the_nearest_name_is_named(section, field):
    for name in field.metadata["spec"].choices:
        with pytest.raises(ConfigError, match=rf"got '{name}s'\. Did you mean '{name}'\?"):
            of(section, field, f"{name}s")


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_legal_values_round_trip(section, field, tmp_path):
    if (section.kind, field.name) == ("taylorseer", "taylorseer_order"):
        pytest.skip("taylorseer has an order of its own")
    draw = random.Random(f"{section.__name__}.{field.name}")
    for _ in range(12):
        value = legal(section, field, draw)
        before = copy.deepcopy(value)
        if (section.section, field.name, value) == ("linear", "algo", None):
            continue
        made = of(section, field, value)
        assert value == before
        kept = getattr(made, field.name)
        same = isinstance(value, dict) or isinstance(kept, tuple(INNER))
        assert kept == (tuple(value) if isinstance(value, list) else kept if same else value)
        config = whole(made)
        assert AccelConfig.from_dict(config.to_dict()) == config
        config.to_yaml(tmp_path / "accel.yaml")
        assert AccelConfig.from_yaml(tmp_path / "accel.yaml") == config
        for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert twin == config and hash(twin) == hash(config)


def test_any_mapping_is_read_or_refused(tmp_path):
    """Nested junk in every place, from Python and from YAML text that is cut short or has a character changed."""
    draw = random.Random(21)
    names = [field.name for section in SECTIONS for field in dataclasses.fields(section)]
    names += [entry.name for entry in dataclasses.fields(AccelConfig)] + [*CACHE_CONFIGS, "kind", "quant_algo", "FP8"]
    scalars = [value for values in NONSENSE.values() for value in values if not isinstance(value, (list, dict))]

    def junk(depth):
        kind = draw.random()
        if depth and kind < 0.4:
            return {draw.choice([*names, 3, None, "", (1,)]): junk(depth - 1) for _ in range(draw.randint(0, 4))}
        if depth and kind < 0.6:
            return [junk(depth - 1) for _ in range(draw.randint(0, 3))]
        return draw.choice([*scalars, *names, *names])

    sections = [entry.name for entry in dataclasses.fields(AccelConfig)]
    refused = 0
    for _ in range(1500):
        try:
            AccelConfig.from_dict({draw.choice(sections): junk(3)} if draw.random() < 0.9 else junk(3))
        except ConfigError:
            refused += 1
    assert refused > 1000
    FULL.to_yaml(tmp_path / "accel.yaml")
    text = (tmp_path / "accel.yaml").read_text()
    for _ in range(300):
        place = draw.randrange(len(text))
        changed = text[:place] + draw.choice(
            ["", "\0", "é", "[", "}", ":", "-", "!!set", "&a", "*a", "\t", "'", "9" * 5000]
        )
        (tmp_path / "accel.yaml").write_text(changed + text[place + draw.choice([0, 1, len(text)]) :])
        with contextlib.suppress(ConfigError):
            AccelConfig.from_yaml(tmp_path / "accel.yaml")


def test_every_cache_has_its_section():
    assert all(kind.section == "cache" and kind.kind == name for name, kind in CACHE_CONFIGS.items())
