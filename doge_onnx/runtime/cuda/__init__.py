"""Runners whose state stays in the memory of a GPU, and steps that CUDA captures and replays."""
