"""Kernels compile for a GPU that is not there: the interpreter runs code that Triton's compiler refuses (a name of two
types on two sides of a branch, say)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Kernel -> its constants, one set per form that is used. Rows may be fewer than in use: the same code, unrolled less.
FORMS = {
    "attention.quantize._reduce": [
        {"PER_HEAD": per_head, "NORM": norm, "ROPE": rope, "FIRST": 0, "STAGES": 3, "D": dim, "DP": 128,
         "ROWS": 32, "SPLITS": 16, "SAMPLE": 4 if norm else 1}
        for per_head, norm, rope, dim in ((True, "", "", 128), (False, "head", "half", 96),
                                            (True, "head", "interleaved", 128), (True, "all", "interleaved", 128))
    ],
    "attention.block_lists._means": [
        {"SCALED": scaled, "GROUP": 128, "POOL": 32, "TOKENS": 64, "D": 96, "DP": 128, "DIRECTIONS": not scaled}
        for scaled in (True, False)
    ],
    "attention.block_lists._scores": [
        {"QS": parts, "KS": parts, "D": 96, "DP": 128, "R": 64 // parts, "C": 64 // parts} for parts in (4, 1)
    ],
    "attention.block_lists._select": [
        {"RULE": rule, "FORCED": rule == "mass", "MARK": rule != "count", "PACK": rule == "spread", "WIDTH": 1024}
        for rule in ("count", "mass", "spread", "mask", "bits")
    ],
    "attention.clusters._singular_vectors": [{"D": 96, "DP": 128, "RANK": 8, "COLUMNS": 16, "ITERATIONS": 8}],
    "attention.clusters._project": [{"D": 96, "DP": 128, "ROWS": 128, "RANK": 8, "COLUMNS": 16}],
    "attention.clusters._tree": [{"CHUNK": 1024, "LEVELS": 5, "RANK": 8}],
    "attention.clusters._move": [{"D": 96, "DP": 128, "ROWS": 64, "BACK": back} for back in (False, True)],
    "attention.norm._rstd": [{"D": 128, "DP": 128, "HEADS": 16, "TOKENS": 4}],
    "attention.quantize._combine": [{"MEAN": True, "VALUES": True, "D": 96, "DP": 128, "SPLITS": 16}],
    "attention.quantize._round": [
        {"NORM": norm, "ROPE": rope, "LEVELS": 3, "INT8": int8, "KB": 16, "CORRECT_LSE": lse, "D": 128, "DP": 128,
         "ROWS": 32, "FIRST": 0}
        for norm, rope, int8, lse in (("", "", True, True), ("head", "half", False, False),
                                          ("head", "interleaved", True, False), ("all", "interleaved", True, True))
    ],
    "attention.quantize._round_per_head": [
        {"NORM": norm, "ROPE": rope, "LEVELS": 3, "CORRECT_LSE": lse, "G": 2, "D": 128, "DP": 128, "ROWS": 32,
         "TILES": 16, "SPLITS": 16}
        for norm, rope, lse in (("", "", True), ("head", "half", False), ("head", "interleaved", True),
                                    ("all", "interleaved", False))
    ],
    "attention.quantize._add": [{"D": 128, "G": 2, "ROWS": 16, "WIDTH": 512}],
    "attention.qk_norm_rope._qk_norm_rope": [
        {"NORM": norm, "ROPE": rope, "D": 128, "W": 32, "HEADS": 32}
        for norm, rope in (("head", "interleaved"), ("all", "half"), ("", "interleaved"), ("all", ""))
    ],
    "elementwise.rows._residual_norm": [
        {"RESIDUAL": vectors > 0, "GATE": vectors, "WEIGHT": not vectors, "BIAS": not vectors, "FACTOR": vectors,
         "PLUS_ONE": vectors > 0, "SHIFT": vectors, "RMS": not vectors, "ROUND": rounded, "INT8": int8, "WIDTH": 4096}
        for vectors, rounded, int8 in ((1, False, False), (0, False, False), (2, True, False), (1, True, True))
    ],
    "elementwise.rows._concat_quantize": [
        {"A": one, "B": two, "INT8": int8, "A1": 2048, "A2": 1024, "B1": first, "B2": second}
        for one, two, first, second, int8 in (("", "gelu_tanh", 8192, 4096, False), ("swiglu", "swiglu", 0, 0, True),
                                              ("gelu", "silu", 4096, 0, False))
    ],
    "linear.quantize_activations._rows": [{"INT8": int8, "ROWS": 2, "WIDTH": 4096} for int8 in (True, False)],
    "linear.quantize_activations._groups": [{"ROWS": 32, "WIDTH": 128}],
    "linear.quantize_activations._amax": [{"WIDTH": 4096}],
    "linear.quantize_activations._tensor": [{"WIDTH": 4096}],
    "linear.quantize_weights._pack": [{"ROWS": 16, "WIDTH": 256}],
    "linear.gemm._skinny_gemm": [
        {"SILU": silu, "SCALE": low, "BIAS": True, "WIDTH": 8, "DEPTH": 1024}
        for silu, low in ((True, True), (False, False))
    ],
    "linear.gemm._precomputed_gemm": [
        {"SCALE": low, "BIAS": low, "WIDTH": 32, "DEPTH": 256, "WHOLE": 4096} for low in (True, False)
    ],
    "linear.gemm._dequantize_nvfp4": [
        {"PER_ROW": by_row, "RANK": rank, "R": max(rank, 16), "ROWS": 32, "WIDTH": 128}
        for by_row, rank in ((False, 0), (True, 32))
    ],
}  # fmt: skip
# Parameter -> its type in Triton, where it is not a float32's address, or a number.
TYPES = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "qn_ptr", "kn_ptr", "x_ptr", "left_ptr", "right_ptr"), "*bf16"),
    **dict.fromkeys(("y_ptr", "gate_ptr", "sum_ptr", "factor_ptr", "shift_ptr"), "*bf16"),
    **dict.fromkeys(("a_ptr", "ag_ptr", "b_ptr", "bg_ptr", "qo_ptr", "ko_ptr"), "*bf16"),
    **dict.fromkeys(("eps", "softmax_scale_log2", "logit_scale"), "fp32"),
    "packed_ptr": "*u8",
    **dict.fromkeys(("forced_ptr", "kept_ptr"), "*u8"),
    **dict.fromkeys(("index_ptr", "count_ptr", "bits_ptr", "order_ptr", "passing_ptr"), "*i32"),
    "factor": "fp32",
    "scale": "fp32",
}
OUTPUTS = {
    "_round": {"qo_ptr": "*i8", "ko_ptr": "*i8", "vo_ptr": "*fp8e4nv"},
    "_round_per_head": dict.fromkeys(("qo_ptr", "ko_ptr", "vo_ptr"), "*fp8e4nv"),
    "_pack": {"out_ptr": "*u8"},
    "_dequantize_nvfp4": {"out_ptr": "*bf16", "scale_ptr": "*fp8e4nv"},
    "_add": {"out_ptr": "*bf16"},
    "_means": {"x_ptr": "*i8", "out_ptr": "*fp32"},
    "_scores": {"q_ptr": "*fp32", "k_ptr": "*fp32", "out_ptr": "*fp32"},
    "_singular_vectors": {},
    "_project": {"out_ptr": "*fp16"},
    "_tree": {"y_ptr": "*fp16"},
    "_move": {"out_ptr": "*bf16"},
    "_qk_norm_rope": dict.fromkeys(("qo_ptr", "ko_ptr"), "*bf16"),
}


def main() -> None:
    import importlib

    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.compiler import compile as compiled

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)

    def front_end(source):
        """Triton's IR of a kernel, by the compiler's front end."""
        options, context = backend.parse_options({"num_warps": 4}), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        generators = backend.get_codegen_implementation(options), backend.get_module_map()
        backend.make_ttir(source.make_ir(target, options, *generators, context), {}, options, 90)

    for path, forms in FORMS.items():
        module, _, name = path.rpartition(".")
        kernel = getattr(importlib.import_module(f"diffusers_accel.kernels.{module}"), name).kernel
        for constants in forms:
            outputs = OUTPUTS.get(name, {"out_ptr": "*i8" if constants.get("INT8") else "*fp8e4nv"})
            if name in ("_skinny_gemm", "_precomputed_gemm"):
                outputs = {"out_ptr": "*bf16", "weight_ptr": "*fp8e4nv" if constants["SCALE"] else "*bf16"}
                outputs |= dict.fromkeys(("bias_ptr", "rows_ptr", "outputs_ptr"), "*bf16")
                outputs |= dict.fromkeys(("step_ptr", "misses_ptr"), "*i32")
            if constants.get("RULE") == "bits":
                outputs = {"score_ptr": "*i32"}
            if constants.get("ROUND") is False:
                outputs = {"out_ptr": "*bf16"}
            if "INT8" in constants and name == "_round" and not constants["INT8"]:
                outputs = dict.fromkeys(outputs, "*fp8e4nv")
            signature = {
                argument: "constexpr"
                if argument in constants
                else (outputs | {key: item for key, item in TYPES.items() if key not in outputs}).get(
                    argument, "*fp32" if argument.endswith("_ptr") else "i32"
                )
                for argument in kernel.arg_names
            }
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            # A kernel's first form is compiled to machine code. For the others the front end does: it refuses code that
            # the interpreter runs, and takes a fiftieth of the time.
            if constants is forms[0]:
                compiled(source, target=target, options={"num_warps": 4})
            else:
                front_end(source)
            print("compiled", path, constants, flush=True)


@pytest.mark.thorough
def test_every_kernel_compiles(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    found = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr[-3000:]
    assert found.stdout.count("compiled") == sum(map(len, FORMS.values()))


if __name__ == "__main__":
    main()
