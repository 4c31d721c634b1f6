"""What importing the package costs and loads, seen from fresh processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, time
import diffusers
{more}
before = set(sys.modules)
import diffusers_accel
from diffusers_accel import accelerate, restore, explain, stats, warmup, AccelConfig, register_attention, Unsupported
new = set(sys.modules) - before
roots = {{name.split('.')[0] for name in new}}
print(sorted(roots & {{'triton', 'flash_attn', 'fa3_fwd_interface', 'flash_attn_interface', 'sageattention', 'typer',
                       'rich', 'skimage', 'imageio', 'matplotlib', 'transformers', 'yaml', 'tqdm'}}))
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_no_kernel_package_and_nothing_heavy():
    assert run(SCRIPT.format(more="")) == "[]"


def test_every_public_name_exists():
    import diffusers_accel

    for name in diffusers_accel.__all__:
        assert getattr(diffusers_accel, name) is not None
    with pytest.raises(AttributeError, match="no_such"):
        diffusers_accel.no_such  # noqa: B018
