"""Runs bundles with ONNX Runtime: the half of the package that an edge device needs.

Imports numpy, onnxruntime and tokenizers, but never torch, onnx or transformers.
"""
