"""A core in, a `QuantizedTensor` out. One file per method (`rtn`, `gptq`, `descent`), each with

    quantize(core, fmt, second_moment=None) -> QuantizedTensor

`formats` holds what both share: the block formats that MatMulNBits, GatherBlockQuantized and ggml execute,
their exact byte counts, packing and dequantization. This room knows arrays, not models.
"""
