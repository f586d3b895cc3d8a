"""The binding to ggml: every function is there, and what is missing is told in one line."""

import ctypes

import pytest

from edgec.errors import RuntimeUnavailableError
from edgec.runtime.ggml import library as binding

pytest.importorskip("llama_cpp")


def test_every_function_is_bound_and_the_layout_holds() -> None:
    lib = binding.library()
    assert lib.tensor_overhead() > ctypes.sizeof(binding.TensorHead)
    assert lib.row_size(binding.Q4_0, 64) == 36


def test_missing_symbols_are_named_with_the_floor() -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"lacks ggml_init.*0\.3\.36"):
        binding.Library([ctypes.CDLL(None)])


def test_an_unbound_name_is_an_error_of_ours() -> None:
    with pytest.raises(AttributeError, match="ggml_mul_matt"):
        _ = binding.library().mul_matt
