"""onnxruntime-genai's model builder, corrected and kept in memory.

The builder writes the decoder graphs that onnxruntime runs fastest (GroupQueryAttention, SkipSimplifiedLayerNorm), so
edgec uses it rather than a second exporter. As it comes, though, it loads weights its own way, saves them dense, and is
wrong in places (each override below says where). `patched` subclasses a family's builder with exactly those changes.
The alternative, correcting the finished graph, would have to undo packed and split weights without knowing them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir
import torch

from edgec.errors import RuntimeUnavailableError
from edgec.export.onnx.rotary import ROTARY_HEAD_DIM_FACTOR, rope_parameters, rotary_table

_log = logging.getLogger(__name__)

OPTIONS = {
    "fuse_qkv": False,  # q, k and v may be planned differently
    # The builder's KV caches of window size refuse an empty past (Gemma 2); full-size caches with the window in the
    # attention's mask compute the same and work everywhere.
    "windowed_kv_cache": False,
    "shared_embeddings": False,  # see EdgecBuilder.make_embedding_lookup
    "hf_token": False,
    "hf_remote": False,
}
"""Options of the builder that every export uses."""


class _LineLogger:
    """A text stream that sends what the builder prints to the log, line by line.

    Warnings go as such, the rest as debug.
    """

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                _log.log(logging.WARNING if line.lower().startswith("warning") else logging.DEBUG, "%s", line.strip())
        return len(text)

    def flush(self) -> None:
        """Nothing is held back but an unfinished line."""


@contextlib.contextmanager
def printing_to_log() -> Iterator[None]:
    """The builder prints its progress; a library must not."""
    with contextlib.redirect_stdout(_LineLogger()):
        yield


def builders() -> ModuleType:
    """`onnxruntime_genai.models.builders`, imported without its side effects.

    The package appends its folder to `sys.path` for imports of the bare names `quantization` and `loaders`: appended,
    they would be shadowed by any such module in the working directory, and `builder` would stay importable for the
    whole process. onnxruntime's quantizer, which it imports, calls `logging.basicConfig` at INFO.
    """
    root = logging.getLogger()
    before = list(sys.path), list(root.handlers), root.level
    try:
        package = importlib.import_module("onnxruntime_genai")
        sys.path.insert(0, str(Path(str(package.__file__)).parent / "models"))
        return importlib.import_module("onnxruntime_genai.models.builders")
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"exporting a causal LM needs onnxruntime-genai 0.18 ({error}); pip install 'onnxruntime-genai>=0.18,<0.19'"
        ) from error
    finally:
        sys.path[:], root.handlers[:] = before[0], before[1]
        root.setLevel(before[2])


def patched(base: Any) -> Any:
    """A subclass of the family's builder class `base` with edgec's corrections; see `EdgecBuilder`."""

    class EdgecBuilder(base):  # type: ignore[misc]
        """Builds from a given torch model, notes which node came from which module, and keeps packed modules packed.

        torch_model: the transformers model; its tensors are used as they are (memory-mapped, any float type) and cast
        to
            fp32 only when the graph's lazy initialisers are read.
        local: per layer, whether it attends to a sliding window. context: positions in the rotary tables.
        """

        def __init__(self, torch_model: Any, local: tuple[bool, ...], context: int, config: Any, cache: Path) -> None:
            self.torch_model, self.local = torch_model, local
            self.rope_types = rope_parameters(torch_model.config)  # the builder rewrites its own copy of the config
            self.module_nodes: dict[int, str] = {}  # id of the module → name of its MatMul or Gather
            self.current_layer = 0
            super().__init__(config, ir.DataType.FLOAT, ir.DataType.FLOAT, "cpu", str(cache), dict(OPTIONS))
            self.context_length = context
            if self.embed_attrs["scale"] != 1:
                # Gemma: the builder rounds sqrt(hidden_size) to two decimals.
                self.embed_attrs["scale"] = float(self.hidden_size) ** 0.5

        def load_weights(self, input_path: str) -> Any:
            del input_path
            return self.torch_model

        # Rotary tables come from the torch model: edgec.export.onnx.rotary says why.

        def make_rope_init(self, config: Any) -> None:
            del config

        def make_rotary_embedding_multi_cache(self, **_: Any) -> None:
            """Gemma 3 makes both of its tables in its constructor, before the layers are known."""

        def make_rotary_embedding_caches(self, **_: Any) -> tuple[str, str]:
            layer_type = self.layer_types[self.current_layer] if "" not in self.rope_types else ""
            suffix = f"_{layer_type}" if layer_type else ""
            names = f"cos_cache{suffix}", f"sin_cache{suffix}"
            if names[0] not in self.values:
                tables = rotary_table(self.torch_model.model.rotary_emb, self.context_length, layer_type)
                for name, table in zip(names, tables, strict=True):
                    self.make_initializer(table, name)
            return names

        def is_fused_rope_supported(self) -> bool:
            rotated = self.rope_attrs["rotary_embedding_dim"]  # 0: the whole head
            return bool(self.head_size % ROTARY_HEAD_DIM_FACTOR == 0 and rotated % ROTARY_HEAD_DIM_FACTOR == 0)

        # Which layers see a window, and which have no position embedding.

        def is_local(self, layer_id: int) -> bool:
            # The builder looks at `layer_types` only, which Mistral and Phi-3 configs do not have.
            return self.local[layer_id]

        def make_attention(self, layer_id: int, attention: Any, root_input: str, **kwargs: Any) -> None:
            self.current_layer = layer_id
            no_rope = getattr(self.torch_model.config, "no_rope_layers", None)  # SmolLM3: 0 marks a layer without
            attributes = self.attention_attrs
            saved = attributes["rope"], attributes["use_rope_in_attn"]
            if no_rope and not no_rope[layer_id]:
                attributes["rope"] = attributes["use_rope_in_attn"] = False
            super().make_attention(layer_id, attention, root_input, **kwargs)
            attributes["rope"], attributes["use_rope_in_attn"] = saved

        # Modules and nodes, one to one.

        def has_lm_head(self, module: Any) -> bool:
            # The builder takes any Linear with `vocab_size` outputs for the head.
            return module is self.torch_model.get_output_embeddings()

        def make_matmul(self, matmul: Any, basename: str, root_input: str, **kwargs: Any) -> str:
            self.module_nodes[id(matmul)] = basename
            return str(super().make_matmul(matmul, basename, root_input, **kwargs))

        def make_embedding_lookup(self, embedding: Any, basename: str, lm_head: Any) -> str:
            # A tied table would be read through a Transpose of the head's weight. Both nodes get an initialiser of
            # their
            # own here (over the same memory), so that each can be replaced without looking at the other; what is still
            # dense in both afterwards is shared again by `decoder.share_tied_table`.
            self.module_nodes[id(self.torch_model.get_input_embeddings())] = f"{basename}/Gather"
            return str(super().make_embedding_lookup(embedding, basename, lm_head))

        # Phi-3's packed modules stay packed: the builder would split them into q, k, v and gate, up.

        def make_attention_input_proj(self, layer_id: int, attention: Any, root_input: str, **kwargs: Any) -> None:
            packed = getattr(attention, "qkv_proj", None)
            if packed is None:
                super().make_attention_input_proj(layer_id, attention, root_input, **kwargs)
                return
            output = self._linear(packed, f"/model/layers.{layer_id}/attn/qkv_proj", root_input)
            paths = [output, "", ""]  # GroupQueryAttention reads q, k, v from a packed query
            if not self.attention_attrs["use_rope_in_attn"]:
                paths = self._split(
                    output, f"/model/layers.{layer_id}/attn/qkv_proj", (self.q_size, self.kv_size, self.kv_size)
                )
            for key, path in zip(("q_path", "k_path", "v_path"), paths, strict=True):
                self.attention_attrs[key] = path

        def make_mlp(self, layer_id: int, mlp: Any, root_input: str) -> None:
            packed = getattr(mlp, "gate_up_proj", None)
            if packed is None:
                super().make_mlp(layer_id, mlp, root_input)
                return
            base_name = f"/model/layers.{layer_id}/mlp"
            width = self.intermediate_size
            output = self._linear(packed, f"{base_name}/gate_up_proj", root_input)
            gate, up = self._split(output, f"{base_name}/gate_up_proj", (width, width))
            activation = self.make_activation(layer_id, root_input=gate)
            shape = self.make_hidden_state_shape(last_dim=width)
            self.make_mul(f"{base_name}/Mul", [f"{activation}/output_0", up], dtype=self.io_dtype, shape=shape)
            self.layernorm_attrs["skip_input"] = self._linear(
                mlp.down_proj, f"{base_name}/down_proj", f"{base_name}/Mul/output_0"
            )

        def _linear(self, module: Any, name: str, root_input: str) -> str:
            """y = x Wᵀ (+ b) as MatMul and Add; returns the name of y."""
            output = f"{self.make_matmul(module, f'{name}/MatMul', root_input)}/output_0"
            if module.bias is None:
                return output
            self.make_add_bias(module.bias, f"{name}/Add", root_input=output)
            return f"{name}/Add/output_0"

        def _split(self, value: str, name: str, widths: tuple[int, ...]) -> list[str]:
            """[batch, sequence, sum of widths] into its consecutive parts along the last axis."""
            outputs = [f"{name}/Split/output_{i}" for i in range(len(widths))]
            self.make_split(
                f"{name}/Split",
                [value, f"/model/constants/INT64/{list(widths)}"],
                outputs,
                [self.io_dtype] * len(widths),
                [self.make_hidden_state_shape(last_dim=width) for width in widths],
            )
            return outputs

    return EdgecBuilder


@torch.no_grad()
def small_tensors_to_fp32(model: torch.nn.Module) -> None:
    """Norm weights and biases to fp32, in place, matrices untouched.

    The builder adds Gemma's +1 to a norm weight before it casts: in bf16 that keeps three decimals.
    """
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.data = parameter.data.to(torch.float32)
