"""Quantized checkpoints: reading them into stock pipelines, and writing them.

`modelopt.py`: NVIDIA ModelOpt's layout.
"""
