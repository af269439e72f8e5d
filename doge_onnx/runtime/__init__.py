"""Runs a bundle with ONNX Runtime: the half of the package that an edge device needs.

Imports numpy, onnxruntime and tokenizers, and never torch, onnx or transformers.
"""
