"""Calibrates both shipped checkpoints over captions of the training split, and ships the result: a YAML file for each
rule in the checkpoint's folder, a picture of the fits in docs/, the figures in benchmarks/results/.

    python benchmarks/calibration.py            # 32 captions: a minute on two cores
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import measure
from fidelity import captions

from diffusers_accel import calibrate, demo

DOCS = Path(__file__).resolve().parents[1] / "docs"


def calibrated(name: str, count: int) -> dict[str, Any]:
    record = demo.CHECKPOINTS[name]
    pipe = demo.load(name)
    pipe.set_progress_bar_config(disable=True)
    prompts, rows = captions(record.kind, count, "training"), {}
    for kind in ("teacache", "magcache"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = calibrate(pipe, prompts, kind=kind, output_type="latent", **record.arguments)
        found.save(record.folder / f"calibrated-{kind}.yaml")
        found.plot(DOCS / f"calibration-{name}-{kind}.png")
        rows[kind] = {
            "R2 on prompts left out": {denoiser: round(fit.r2, 4) for denoiser, fit in found.fits.items()},
            "thresholds": {f"{share:.0%}": float(f"{value:.4g}") for share, value in found.thresholds.items()},
            "warned": [str(item.message) for item in caught if "calibrate" in str(item.message)],
        }
        print(name, found, flush=True)
    return {"captions": count, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    found = {name: calibrated(name, options.count) for name in sorted(demo.CHECKPOINTS)}
    print(measure.write("calibration", found, options.out))


if __name__ == "__main__":
    main()
