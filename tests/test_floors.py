"""The floors: a module imports only from floors below its own. Read from the source, so nothing can slip by."""

from __future__ import annotations

import ast
from pathlib import Path

import diffusers_accel

ROOT = Path(diffusers_accel.__file__).parent
# From the bottom up. Modules on one floor do not import each other, except inside one folder.
FLOORS = [
    {"compat"},
    {"core"},
    {"kernels", "models", "policies"},
    {"checkpoints", "features"},
    {"names", "presets", "reporting", "sessions"},
    {"resolve"},
    {"api"},
    {"demo", "workers"},
    {"quality"},
    {"cli", "serve"},
]
FREE = {"config", "errors"}
NEVER = {"core": {"diffusers"}, "kernels": {"diffusers"}, "policies": {"diffusers", "torch"}}
# Modules of Triton kernels: they may import triton, and are themselves imported by loaders only.
TRITON = {
    "kernels/operands.py",
    "kernels/rounding.py",
    *(
        f"kernels/attention/{name}.py"
        for name in ("rows", "norm", "quantize", "low_bit", "block_lists", "clusters", "qk_norm_rope", "peer_writes")
    ),
    "kernels/elementwise/rows.py",
    *(f"kernels/linear/{name}.py" for name in ("gemm", "quantize_activations", "quantize_weights")),
}
OPTIONAL = {
    "triton",
    "flash_attn",
    "fa3_fwd_interface",
    "flash_attn_interface",
    "sageattention",
    "modelopt",
    "torchao",
    "transformer_engine",
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, whether at module level) of everything a file imports; ours start with `diffusers_accel.`."""
    tree, package = ast.parse(path.read_text()), list(path.relative_to(ROOT.parent).with_suffix("").parts[:-1])
    found = []
    top = {id(node) for node in ast.walk(tree) if isinstance(node, ast.Module) for node in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found += [(f"{name}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def place(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "diffusers_accel" and len(parts) > 1 else None


def floor(name: str) -> int | None:
    return next((index for index, names in enumerate(FLOORS) if name in names), None)


def source_files() -> list[tuple[str, Path]]:
    files = [path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem not in ("__init__", "__main__")]
    return [(path.relative_to(ROOT).parts[0].removesuffix(".py"), path) for path in files]


def test_every_module_stands_on_a_floor():
    assert {name for name, _ in source_files()} <= set().union(*FLOORS) | FREE


def test_imports_go_down():
    wrong = []
    for name, path in source_files():
        for dotted, _ in imports(path):
            other = place(dotted)
            if other is None or other in FREE or other == name or other == "__version__":
                continue
            if name in FREE or floor(other) is None or floor(other) >= floor(name):
                wrong.append(f"{path.relative_to(ROOT)} imports {dotted}")
    assert not wrong, wrong


def test_features_do_not_import_each_other():
    wrong = [
        f"{path.name} imports {dotted}"
        for name, path in source_files()
        if name == "features"
        and path.relative_to(ROOT).parts[1:] not in (("feature.py",), ("context.py",), ("__init__.py",))
        for dotted, _ in imports(path)
        if dotted.startswith("diffusers_accel.features.")
        and dotted.split(".")[2]
        not in ("context", "feature", "token_streams", path.relative_to(ROOT).parts[1].removesuffix(".py"))
    ]
    assert not wrong, wrong


def test_low_floors_do_not_import_diffusers():
    wrong = [
        f"{path.relative_to(ROOT)} imports {dotted}"
        for name, path in source_files()
        for dotted, _ in imports(path)
        if dotted.split(".")[0] in NEVER.get(name, ())
    ]
    assert not wrong, wrong


def test_optional_packages_are_imported_in_loaders_only():
    wrong = [
        f"{path.relative_to(ROOT)} imports {dotted}"
        for _, path in source_files()
        for dotted, top in imports(path)
        if top and dotted.split(".")[0] in OPTIONAL
        if not (dotted.startswith("triton") and str(path.relative_to(ROOT)) in TRITON)
    ]
    assert not wrong, wrong


def test_triton_modules_are_imported_in_loaders_only():
    modules = tuple("diffusers_accel." + name.removesuffix(".py").replace("/", ".") for name in TRITON)
    wrong = [
        f"{path.relative_to(ROOT)} imports {dotted}"
        for _, path in source_files()
        for dotted, top in imports(path)
        if top and dotted.startswith(modules) and str(path.relative_to(ROOT)) not in TRITON
    ]
    assert not wrong, wrong
    assert all((ROOT / name).is_file() for name in TRITON)
