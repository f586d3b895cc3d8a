"""onnxruntime's aarch64 wheel on an x86-64 machine, under qemu-user: parity and operator coverage without a device.

`build` makes the root from Debian and PyPI packages, `root` runs models in it, `worker` is the program that runs
inside, `compare` holds an arm64 run against x86-64 ones, `op_graphs` and `model_inputs` make graphs and inputs.
Emulated times mean nothing and are not reported; whether a model loads, what it computes and how much memory
its session takes do mean something.
"""
