"""Runs the command line as `python -m doge_onnx`."""

from doge_onnx.cli import main

main("python -m doge_onnx")
