"""ONNX: front ends that build a dense graph (encoders, decoders), its lowering to factored and quantised cores."""
