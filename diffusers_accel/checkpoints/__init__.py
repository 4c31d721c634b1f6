"""Quantized checkpoints: reading them into stock pipelines, and writing them.

`modelopt.py`: NVIDIA ModelOpt's layout. `files.py`: which files weights are in, and of what kind they are.
`loading.py`: pipelines from them. `saving.py`: files from quantized pipelines.
"""
