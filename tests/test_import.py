"""What importing the package costs and loads, seen from fresh processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Diffusers loads some of these itself, so it is our own modules' imports that are looked at.
SCRIPT = """
import builtins
import diffusers
{more}
stock, found = builtins.__import__, set()

def watched(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {{}}).get("__name__", "")
    if level == 0 and importer.split(".")[0] == "diffusers_accel":
        found.add(name.split(".")[0])
    return stock(name, globals, locals, fromlist, level)

builtins.__import__ = watched
import diffusers_accel
from diffusers_accel import accelerate, restore, explain, stats, warmup, AccelConfig, register_attention, Unsupported
print("torch" in found, sorted(found & {{'triton', 'flash_attn', 'fa3_fwd_interface', 'flash_attn_interface',
      'sageattention', 'typer', 'rich', 'skimage', 'imageio', 'matplotlib', 'transformers', 'yaml', 'tqdm'}}))
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_no_kernel_package_and_nothing_heavy():
    assert run(SCRIPT.format(more="")) == "True []"


def test_every_public_name_exists():
    import diffusers_accel

    for name in diffusers_accel.__all__:
        assert getattr(diffusers_accel, name) is not None
    with pytest.raises(AttributeError, match="no_such"):
        diffusers_accel.no_such  # noqa: B018
