"""Quantized checkpoints: reading them into stock pipelines, and writing them.

`modelopt.py`: NVIDIA ModelOpt's layout. `loading.py`: pipelines from it. `saving.py`: it from quantized pipelines.
"""
