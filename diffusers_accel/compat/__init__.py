"""Private names of other packages: the one place where they stand.

A private name begins with an underscore or lies in a module that does. Its package may rename it in any version, so
callers read a public name here. There is one module per package, called `<package>_private`: a module `torch` would be
taken for the package. In each:

- `READ` is the versions in which the names were read.
- `NAMES` says of each private name what depends on it.
- The definitions say what the names are.

`tests/test_compat.py` compares every name with the installed version, and finds private names that stand elsewhere.
Nothing here imports diffusers, accelerate or torch's compiler before a function needs it.
"""
