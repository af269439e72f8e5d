"""Generates text: options, logits processors, samplers, the generation loop, and its results."""
