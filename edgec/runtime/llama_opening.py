"""Where llama.cpp puts a model that it opens: the processor alone, without what crashes there, or one GPU."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

from edgec.errors import CheckpointError, RuntimeUnavailableError

logger = logging.getLogger(__name__)

_ALL_LAYERS = 1 << 16
"""More layers than any model has [count]: llama.cpp puts them all on the GPU."""
_NO_AMX = "CFLAGS=-mno-amx-int8 CXXFLAGS=-mno-amx-int8"
"""What leaves the AMX code out, for GCC and Clang on x86-64; the Makefile has the same."""


FOR_GPUS = (
    "build it with one: CMAKE_ARGS=-DGGML_CUDA=on (or GGML_VULKAN, GGML_METAL) pip install --force-reinstall "
    "--no-cache-dir --no-deps llama-cpp-python"
)


def open_model(lib: Any, path: Path, *, vocab_only: bool = False, gpu: int | None = None) -> Any:
    """llama.cpp's pointer to a model. gpu: see RuntimeOptions. Raises CheckpointError, RuntimeUnavailableError."""
    params = model_params(lib, vocab_only=vocab_only, gpu=gpu)
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise CheckpointError(f"llama.cpp cannot load {path}; --debug shows its reasons")
    return model


def model_params(lib: Any, *, vocab_only: bool = False, gpu: int | None = None) -> Any:
    """llama.cpp's own parameters for a model on the CPU, without what crashes there (`uses_amx`), or for a GPU, with
    every layer on it (the table of tokens stays in the processor's memory). Raises RuntimeUnavailableError.
    """
    params = lib.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = 0 if gpu is None else _ALL_LAYERS
    if gpu is None:
        # Without a list, a build for GPUs sends long prompts to one though no layer lies there.
        _name_devices(params)
    else:
        handle = _handle(gpu)
        params.split_mode, params.main_gpu = lib.LLAMA_SPLIT_MODE_NONE, gpu if handle is None else 0
        if handle is not None:
            _name_devices(params, handle)
        elif not lib.llama_supports_gpu_offload():
            raise RuntimeUnavailableError(f"this llama-cpp-python has no GPU back end; {FOR_GPUS}")
    if not vocab_only and uses_amx(lib):  # a vocabulary multiplies nothing, so there is nothing to warn of
        params.use_extra_bufts = False
    return params


def _name_devices(params: Any, *handles: int) -> None:
    """The devices that llama.cpp may use beside the processor."""
    params.kept = devices = (ctypes.c_void_p * (len(handles) + 1))(*handles, None)  # as long as the parameters live
    params.devices = ctypes.addressof(devices)


def _handle(number: int) -> int | None:
    """ggml's handle of a GPU, because llama.cpp numbers them otherwise where one has two drivers; None where ggml is
    out of reach (Windows, libraries of one's own), and llama.cpp's numbers count. Raises RuntimeUnavailableError where
    ggml has no such GPU.
    """
    # Here, because both open ggml through `llama_cpp`, which imports this file.
    from edgec.runtime.ggml.library import library
    from edgec.runtime.ggml.tensors import gpu_device

    if os.environ.get("LLAMA_CPP_LIB_PATH"):
        return None
    try:
        library()
    except RuntimeUnavailableError as error:
        logger.debug("llama.cpp's own numbers of GPUs: %s", error)
        return None
    return gpu_device(number)


@cache
def uses_amx(lib: Any) -> bool:
    """Would this build multiply with AMX on this machine? Says once what to do about it.

    ggml's AMX code ends the process with a fault when it was compiled by GCC 13 or older, which drops the tile
    configuration that is handed to an assembler statement by address, and on kernels that want each thread to ask for
    tiles (both in ggml-org/llama.cpp pull request 26954, not in 0.3.36). Whether a build is sound can only be found by
    trying it, so none is used.
    """
    found = b"AMX_INT8 = 1" in lib.llama_print_system_info()
    if found:
        logger.warning(
            "this llama-cpp-python was compiled with AMX, which can crash; edgec leaves it and all repacked weights "
            "out, which is slower. Compile it without: %s pip install --force-reinstall --no-cache-dir --no-deps "
            "llama-cpp-python",
            _NO_AMX,
        )
    return found
