"""ggml's C functions, bound once and checked at start.

The shared libraries are those inside the llama-cpp-python wheel, reached through the handle of libllama: a lookup in it
also searches what it depends on, so that we call the very copy of ggml that llama.cpp itself runs on. Opening
`libggml.so` by its path was turned down: wheels hold copies in place of symbolic links, and a second copy has its own
registry of devices. Only functions of the C API are used; of the one struct whose fields are read, the layout is tried
out on tensors of known shape before anything else is done.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from edgec.errors import RuntimeUnavailableError
from edgec.runtime.llama_cpp import import_llama_cpp

FLOOR = "0.3.36"
"""Oldest llama-cpp-python whose ggml this was written against and tested with."""

F32, F16, Q4_0, Q8_0, I32, I64, BF16 = 0, 1, 2, 8, 26, 27, 30
"""ggml's type numbers."""
PREC_F32 = 10
ROPE_NORMAL, ROPE_HALVES = 0, 2
"""Which dimensions rotate together: neighbours, or one of the first half with one of the second ("NeoX")."""
CPU, GPU, INTEGRATED_GPU = 0, 1, 2
"""Kinds of devices."""
USAGE_WEIGHTS = 1
MAX_DIMS = 4

_P = c_void_p

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    # contexts, tensors, graphs: result, then arguments
    "ggml_init": (_P, "init_params"),
    "ggml_free": (None, _P),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_new_graph_custom": (_P, _P, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, _P, _P),
    "ggml_graph_n_nodes": (c_int, _P),
    "ggml_graph_node": (_P, _P, c_int),
    "ggml_new_tensor": (_P, _P, c_int, c_int, _P),
    "ggml_nbytes": (c_size_t, _P),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_blck_size": (c_int64, c_int),
    "ggml_type_name": (c_char_p, c_int),
    "ggml_op_desc": (c_char_p, _P),
    "ggml_set_output": (None, _P),
    "ggml_prec_set_acc": (c_bool, _P, c_int),
    # operations
    "ggml_add": (_P, _P, _P, _P),
    "ggml_mul": (_P, _P, _P, _P),
    "ggml_scale": (_P, _P, _P, c_float),
    "ggml_tanh": (_P, _P, _P),
    "ggml_sum_rows": (_P, _P, _P),
    "ggml_rms_norm": (_P, _P, _P, c_float),
    "ggml_swiglu_split": (_P, _P, _P, _P),
    "ggml_geglu_split": (_P, _P, _P, _P),
    "ggml_mul_mat": (_P, _P, _P, _P),
    "ggml_mul_mat_id": (_P, _P, _P, _P, _P),
    "ggml_get_rows": (_P, _P, _P, _P),
    "ggml_set_rows": (_P, _P, _P, _P, _P),
    "ggml_cont": (_P, _P, _P),
    "ggml_cont_2d": (_P, _P, _P, c_int64, c_int64),
    "ggml_transpose": (_P, _P, _P),
    "ggml_permute": (_P, _P, _P, c_int, c_int, c_int, c_int),
    "ggml_reshape_4d": (_P, _P, _P, c_int64, c_int64, c_int64, c_int64),
    "ggml_view_1d": (_P, _P, _P, c_int64, c_size_t),
    "ggml_view_2d": (_P, _P, _P, c_int64, c_int64, c_size_t, c_size_t),
    "ggml_view_3d": (_P, _P, _P, c_int64, c_int64, c_int64, c_size_t, c_size_t, c_size_t),
    "ggml_soft_max_ext": (_P, _P, _P, _P, c_float, c_float),
    "ggml_flash_attn_ext": (_P, _P, _P, _P, _P, _P, c_float, c_float, c_float),
    "ggml_rope_ext": (_P, _P, _P, _P, _P, c_int, c_int, c_int, *(c_float,) * 6),
    # memory
    "ggml_backend_buft_alloc_buffer": (_P, _P, c_size_t),
    "ggml_backend_buft_name": (c_char_p, _P),
    "ggml_backend_buffer_free": (None, _P),
    "ggml_backend_buffer_clear": (None, _P, ctypes.c_uint8),
    "ggml_backend_buffer_get_base": (_P, _P),
    "ggml_backend_buffer_get_size": (c_size_t, _P),
    "ggml_backend_buffer_set_usage": (None, _P, c_int),
    "ggml_backend_cpu_buffer_from_ptr": (_P, _P, c_size_t),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, _P, _P),
    "ggml_backend_tensor_alloc": (c_int, _P, _P, _P),
    "ggml_backend_view_init": (c_int, _P),
    "ggml_backend_tensor_set": (None, _P, _P, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, _P, _P, c_size_t, c_size_t),
    "ggml_gallocr_new": (_P, _P),
    "ggml_gallocr_free": (None, _P),
    "ggml_gallocr_reserve": (c_bool, _P, _P),
    "ggml_gallocr_alloc_graph": (c_bool, _P, _P),
    "ggml_gallocr_get_buffer_size": (c_size_t, _P, c_int),
    # devices
    "ggml_backend_dev_count": (c_size_t,),
    "ggml_backend_dev_get": (_P, c_size_t),
    "ggml_backend_dev_type": (c_int, _P),
    "ggml_backend_dev_name": (c_char_p, _P),
    "ggml_backend_dev_description": (c_char_p, _P),
    "ggml_backend_dev_init": (_P, _P, c_char_p),
    "ggml_backend_dev_buffer_type": (_P, _P),
    "ggml_backend_dev_backend_reg": (_P, _P),
    "ggml_backend_dev_supports_op": (c_bool, _P, _P),
    "ggml_backend_reg_get_proc_address": (_P, _P, c_char_p),
    "ggml_backend_free": (None, _P),
    "ggml_backend_graph_compute": (c_int, _P, _P),
}


class InitParams(ctypes.Structure):
    """struct ggml_init_params: passed by value."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", _P), ("no_alloc", c_bool)]


class TensorHead(ctypes.Structure):
    """The first fields of struct ggml_tensor, all that is read (shapes) or written (a buffer, to ask what it takes)."""

    _fields_ = [("type", c_int), ("buffer", _P), ("ne", c_int64 * MAX_DIMS), ("nb", c_size_t * MAX_DIMS)]


class Library:
    """`library.mul_mat(ctx, a, b)` calls `ggml_mul_mat`. Pointers are ints; a null pointer is None."""

    def __init__(self, handles: list[ctypes.CDLL]) -> None:
        """Raises RuntimeUnavailableError naming the functions that are missing, or a struct of another layout."""
        missing = []
        for name, (result, *arguments) in _SIGNATURES.items():
            function = next((getattr(handle, name) for handle in handles if hasattr(handle, name)), None)
            if function is None:
                missing.append(name)
                continue
            function.restype = result
            function.argtypes = [InitParams if a == "init_params" else a for a in arguments]
            setattr(self, name.removeprefix("ggml_"), function)
        if missing:
            raise RuntimeUnavailableError(
                f"this llama-cpp-python lacks {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}; "
                f"edgec.runtime.ggml needs {FLOOR} or a later one that still has them: pip install 'edgec[gguf]'"
            )
        self._check_layout()

    def __getattr__(self, name: str) -> Any:  # only for names that __init__ did not bind
        raise AttributeError(f"ggml_{name} is not bound; add it to edgec.runtime.ggml.library")

    def _check_layout(self) -> None:
        """Are the fields where TensorHead has them?"""
        context = self.init(InitParams(4 * self.tensor_overhead() + 256, None, True))
        try:
            head = TensorHead.from_address(self.new_tensor(context, F16, 3, (c_int64 * 3)(7, 5, 3)))
            found = (head.type, head.buffer, tuple(head.ne), tuple(head.nb))
        finally:
            self.free(context)
        expected = (F16, None, (7, 5, 3, 1), (2, 14, 70, 210))
        if found != expected:
            raise RuntimeUnavailableError(
                f"ggml's tensors have another layout ({found}) than edgec.runtime.ggml knows ({expected}); "
                f"install llama-cpp-python {FLOOR}: pip install 'edgec[gguf]'"
            )


@cache
def library() -> Library:
    """The functions, bound on first use. Raises RuntimeUnavailableError."""
    if sys.platform == "win32":  # weights are read and mapped by calls that Windows does not have
        raise RuntimeUnavailableError("edgec's ggml runtime does not run on Windows; export with --target gguf instead")
    folder = Path(import_llama_cpp().__file__).parent / "lib"
    names = ["libllama.so", "libllama.dylib"]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise RuntimeUnavailableError(f"{folder} holds no libllama; pip install --force-reinstall 'edgec[gguf]'")
    try:
        return Library([ctypes.CDLL(str(path)) for path in found])
    except OSError as error:
        raise RuntimeUnavailableError(f"{found[0]} cannot be loaded ({error})") from error
