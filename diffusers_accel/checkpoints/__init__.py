"""Quantized checkpoints: loading stock pipelines from them, and saving them.

- `modelopt.py`: NVIDIA ModelOpt's layout: the configuration, and the tensors of each layer.
- `files.py`: the files of a model's weights, and files of other kinds.
- `loading.py`: `from_pretrained`. `saving.py`: `save_quantized`.
"""
