"""Measures how fast a bundle runs and how well it predicts a text."""
