"""`env` and the app itself."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import diffusers_accel
from diffusers_accel.cli import env as env_module
from diffusers_accel.core.platform import Device
from diffusers_accel.kernels.attention import KERNELS
from diffusers_accel.kernels.linear import LINEARS


def test_env_names_every_kernel_and_why_it_cannot_run(cli, monkeypatch):
    h100 = Device("cuda", "NVIDIA H100", (9, 0))
    monkeypatch.setattr(env_module.platform, "default_device", lambda: h100)
    result = cli("env")
    assert result.exit_code == 0
    assert f"torch            {importlib.metadata.version('torch')}" in result.stdout
    lines = result.stdout.splitlines()
    for name in (name for name in KERNELS if "/" not in name):
        row = next(line for line in lines if line.startswith(f"│ {name} "))
        reason = KERNELS.get(name).missing(h100)
        assert (" yes " if reason is None else " no ") in row.split("│")[2]
        assert reason is None or f"{name} {reason}" in lines
    assert "sage-fp8 recipes: int8-1-128-1, int8-1-16-1" in result.stdout


def test_env_names_every_format_and_why_it_cannot_run(cli, monkeypatch):
    for device, expected in (
        (
            Device("cuda", "NVIDIA A100", (8, 0)),
            {"fp8": " no ", "fp8-block": " no ", "int8": " yes ", "nvfp4": " yes "},
        ),
        (
            Device("cpu", "x86_64", None),
            {name: " reference " if LINEARS.get(name).everywhere else " no " for name in LINEARS},
        ),
    ):
        monkeypatch.setattr(env_module.platform, "default_device", lambda device=device: device)
        lines = cli("env").stdout.splitlines()
        for name, here in expected.items():
            row = next(line for line in lines if line.startswith(f"│ {name} "))
            assert here in row.split("│")[2], row


def test_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "diffusers_accel", "env"], capture_output=True, text=True, check=True
    )
    assert "sdpa" in result.stdout
    assert "Traceback" not in result.stderr


def test_version_and_help(cli):
    assert cli("--version").stdout.strip() == f"diffusers-accel {diffusers_accel.__version__}"
    for command in ("demo", "run", "explain", "env"):
        assert command in cli("--help").stdout
        assert cli(command, "--help").exit_code == 0


def test_the_package_loads_without_the_command_line():
    program = (
        "import sys, diffusers_accel, diffusers_accel.quality.metrics\n"
        "loaded = {'typer', 'skimage', 'imageio', 'matplotlib'} & set(sys.modules)\n"
        "loaded |= {name for name in sys.modules if name.startswith('diffusers_accel.cli')}\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
