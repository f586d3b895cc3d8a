"""Other tools as runtimes, for comparison only: a folder with `peer.json` in it is run by the loader that it names.

One file per tool, found by file name, with what a loader in `edgec.runtime` defines, and where it needs it

    warm(model, job) -> None        what has to happen once before anything is timed, such as compiling; counts as load

They live apart from `edgec.runtime` because they may import torch: they never reach a device, and the worker imports
none of them for an artifact.
"""
