"""The section of sparse attention, which stands within `attention`, and the translation of VisualGen's settings."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, nearest, shown
from .fields import Section, option

# Kind of registered names (`FieldSpec.registry`).
SELECTOR = "selector of sparse attention"

# The fields that `selector="auto"` sets.
AUTO_SPARSE: dict[str, Any] = {
    "selector": "sub-blocks",
    "keep": 0.25,
    "order": "clusters",
    "centroids": True,
    "dense_steps": 0.2,
    "min_tokens": 16384,
}


@dataclass(frozen=True, kw_only=True)
class SparseConfig(Section):
    """Sparse self-attention over the tokens of pictures and videos: each block of queries attends to the blocks of keys
    that score highest. Blocks with tokens of text or sound are always kept, and their queries attend to everything.

    Four rules read queries and keys. `"sub-blocks"` scores pairs of blocks by the logits between means of their
    quarters, `"means"` by the logit between their means. `"similarity"` (SpargeAttention) does so too, and keeps blocks
    whose tokens differ. `"bands"` (Sparse VideoGen) takes near frames, or one place in all frames, as each head needs.
    Two rules read places alone. `"window"` takes the nearest blocks, `"radial"` (Radial Attention) fewer with each
    doubling of the distance in frames. A name given to `register_sparse` is another rule. `"auto"` sets all fields that
    have their defaults. `"skip-softmax"` needs no blocks: the kernel computes all logits, and leaves out tiles of keys
    that are far below the maximum so far.

    Raises:
        ConfigError: A value has another type than its field, or is out of its range.
    """

    selector: str = option(
        "sub-blocks", "The rule that scores pairs of blocks.", registry=SELECTOR, extra_choices=("auto",)
    )
    keep: float | None = option(
        None,
        """Share of the blocks of keys that each block of queries attends to; above 0 and up to 1. `None` is 0.5, unless
        `top_p` or `tau` decides.""",
        exclusive_minimum=0,
        maximum=1,
    )
    top_p: float | None = option(
        None,
        """Share of the softmax over scores that the kept blocks have at least; above 0 and up to 1. It needs a rule
        whose scores are logits: `"sub-blocks"`, `"means"`, `"similarity"`. `None` for a fixed share of blocks.""",
        exclusive_minimum=0,
        maximum=1,
    )
    tau: float | None = option(
        None,
        """Number of standard deviations above the mean of its row of scores from which on a block is kept. `None` for a
        fixed share of blocks.""",
        minimum=-10,
        maximum=10,
    )
    threshold_scale_factor: float | None = option(
        None,
        """For `"skip-softmax"`: this number over the number of keys is the share of the running maximum below which the
        weights of a tile are left out. `None` is the number of ModelOpt's calibration in the checkpoint; without one it
        is 5000, the example of TensorRT-LLM. Calls with no more keys than that are dense.""",
        exclusive_minimum=0,
        maximum=1e9,
    )
    target_sparsity: float | None = option(
        None,
        """For `"skip-softmax"`: share of the tiles to leave out. A formula of the checkpoint, to which ModelOpt has
        fitted it, gives the threshold. `None` for `threshold_scale_factor`, or the checkpoint's own share.""",
        minimum=0,
        maximum=1,
    )
    block: int = option(
        128,
        "Tokens of a block: 32, 64 or 128. Blocks of 32 suit small pictures; a GPU computes them slowly.",
        condition=lambda value: value in (32, 64, 128),
        expected="32, 64 or 128",
        examples=(32, 64, 128),
    )
    order: str = option(
        "model",
        """The order of picture and video tokens in the denoiser: `"model"` for the model's own, row by row and frame by
        frame; `"cubes"` for cubes of as many tokens as a block; `"morton"` for the Morton order; `"clusters"` for an
        order in each head and call that puts queries which attend alike, and keys which are attended to alike, into
        one block.""",
        choices=("model", "cubes", "morton", "clusters"),
    )
    centroids: bool = option(
        False,
        "Whether blocks that are not kept take part by the mean of their keys and of their values, with their number.",
    )
    refresh: int | None = option(
        None,
        """Largest number of steps that share a choice of blocks, of each layer and guidance branch. `None` is 1, a
        choice in every step; with `drift` it is no bound.""",
        minimum=1,
        maximum=1000,
    )
    drift: float | None = option(
        None,
        """Relative L1 change of the denoiser's latents since a choice of blocks from which on a step chooses anew;
        conditioning channels and reference pictures count among them. Each step then waits for one number from the GPU.
        `None` for no such bound.""",
        exclusive_minimum=0,
        maximum=10,
    )
    dense_steps: float = option(
        0.0, "Share of the steps, at the beginning, that are dense; between 0 and 1.", minimum=0, maximum=1
    )
    dense_until: float | None = option(
        None,
        """Noise level, between 0 and 1, down to which steps are dense: the sigma of flow matching, which is the
        timestep over 1000. `None` for no such bound.""",
        minimum=0,
        maximum=1,
    )
    dense_layers: float = option(
        0.0, "Share of the blocks, at the beginning, that are dense; between 0 and 1.", minimum=0, maximum=1
    )
    layers: dict[str, float] | None = option(
        None,
        """Globs of attention modules -> share of blocks that they keep, e.g. `{"blocks.0.*": 1.0}` for a dense layer.
        The first matching glob overrides `keep`, `top_p` and `tau`.""",
        exclusive_minimum=0,
        maximum=1,
        examples=(None, {"*": 0.5}),
    )
    heads: dict[str, tuple[float, ...]] | None = option(
        None,
        """Globs of attention modules -> share of blocks that each of their heads keeps, e.g. `{"blocks.0.*": [0.5,
        0.25]}` for two heads. The first matching glob overrides `keep`, `top_p`, `tau` and `layers`.""",
        exclusive_minimum=0,
        maximum=1,
        min_items=1,
        examples=(None, {"*": [0.5, 0.25]}),
    )
    min_tokens: int = option(
        4096, "Number of picture or video tokens from which on a call is sparse. Shorter calls are dense.", minimum=1
    )

    section: typing.ClassVar[str] = "attention.sparse"
    shorthand: typing.ClassVar[str | None] = "selector"
    switch: typing.ClassVar[bool] = True

    def validate(self) -> None:
        given = [name for name in ("keep", "top_p", "tau") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"{self.section}.{given[1]}: {given[0]}={getattr(self, given[0])} decides how many blocks already. "
                "Give one of the two."
            )
        if self.selector != "skip-softmax":
            for name in ("threshold_scale_factor", "target_sparsity"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{self.section}.{name}: {self.selector!r} has no threshold. Nearest: selector='skip-softmax'."
                    )
            return
        if self.threshold_scale_factor is not None and self.target_sparsity is not None:
            raise ConfigError(
                f"{self.section}.target_sparsity: threshold_scale_factor={self.threshold_scale_factor:g} is the "
                "threshold already. Give one of the two."
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("keep", "top_p", "tau", "block", "order", "centroids", "refresh", "drift", "layers", "heads"):
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{self.section}.{name}: 'skip-softmax' chooses no blocks. Nearest: {name}={defaults[name]!r}."
                )

    @classmethod
    def normalize_mapping(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of this class from a mapping; VisualGen's `sparse_attention_config` is translated.

        Raises:
            ConfigError: The `algorithm` is unknown, has no counterpart, or is given a key of another.
        """
        if "algorithm" not in values:
            return values
        name, where = values["algorithm"], f"{cls.section}.algorithm"
        keys: dict[str, tuple[str, ...]] = {
            "skip_softmax": ("threshold_scale_factor", "target_sparsity", "disabled_until_timestep"),
            "vsa": ("vsa_sparsity",),
            "sol_attn": ("tau", "thresh_type", "disabled_until_timestep", "dense_layers"),
        }
        if name not in keys:
            raise ConfigError(f"{where}: unknown algorithm {shown(name)}. {nearest(str(name), tuple(keys))}")
        given = {key: value for key, value in values.items() if key != "algorithm"}
        for key in given:
            if key not in keys[name]:
                raise ConfigError(
                    f"{cls.section}: unknown key {shown(key)} of {name!r}. {nearest(str(key), keys[name])}"
                )
        if name == "skip_softmax":
            # TensorRT-LLM prefers the factor where both are given.
            factor = given.get("threshold_scale_factor")
            return {
                "selector": "skip-softmax", "threshold_scale_factor": factor,
                "target_sparsity": given.get("target_sparsity") if factor is None else None,
                "dense_until": given.get("disabled_until_timestep"),
            }  # fmt: skip
        try:
            if name == "vsa":
                kept = round(1 - float(given.get("vsa_sparsity", 0.9)), 6)
                return {"selector": "means", "block": 64, "order": "cubes", "keep": kept}
            dense = {f"*.{block}.*": 1.0 for block in range(int(given.get("dense_layers", 0)))}
        except (TypeError, ValueError):
            raise ConfigError(f"{where}: expected numbers of {name!r}, got {shown(given)}.") from None
        return {
            "selector": "means", "block": 64, "order": "morton", "centroids": True, "tau": given.get("tau", 1.0),
            "dense_until": given.get("disabled_until_timestep", 0.909), "layers": dense or None,
        }  # fmt: skip

    @property
    def share(self) -> float:
        """The share of blocks that `keep` stands for."""
        return 0.5 if self.keep is None else self.keep

    @property
    def shared_steps(self) -> int:
        """The largest number of steps that share a choice of blocks."""
        if self.refresh is not None:
            return self.refresh
        return 1 if self.drift is None else sys.maxsize

    @property
    def scale_factor(self) -> float:
        """The factor that `threshold_scale_factor` stands for."""
        return 5000.0 if self.threshold_scale_factor is None else self.threshold_scale_factor

    def resolved(self) -> SparseConfig:
        """The section with the rule that `"auto"` stands for. A field with another value than its default stays."""
        if self.selector != "auto":
            return self
        amounts = ("keep", "top_p", "tau")
        given = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}
        if given.intersection(amounts):
            given.update(amounts)
        values = {name: value for name, value in AUTO_SPARSE.items() if name == "selector" or name not in given}
        return dataclasses.replace(self, **values)

    def described(self) -> str:
        """The blocks that are kept, in words."""
        if self.selector == "skip-softmax":
            return f"tiles whose weights are not all below {self.scale_factor:g} / keys of the maximum so far"
        count = f"{self.share:.0%} of blocks"
        if self.top_p is not None:
            count = f"the blocks that hold {self.top_p:.0%} of the softmax"
        elif self.tau is not None:
            count = f"the blocks {self.tau:g} standard deviations above the mean"
        orders = {"model": "", "clusters": ", clustered in each head"}
        order = orders.get(self.order, f" in {self.order} order")
        rest = ", and to the means of the others" if self.centroids else ""
        return f"{count} of {self.block} tokens{order}, chosen by {self.selector!r}{rest}"
