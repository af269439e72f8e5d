"""The options of generation in genai_config.json, with which test_genai.py runs its engine."""

from __future__ import annotations

from pathlib import Path

import fake_bundle
import pytest
from conftest import TINY_CHECKPOINT

from doge_onnx.export.genai import genai_config
from doge_onnx.export.model_config import DogeConfig

PLAIN = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "max_length": fake_bundle.CONTEXT,
    "past_present_share_buffer": True,
}


@pytest.mark.parametrize(
    ("file", "search"),
    [
        ({}, {}),
        ({"do_sample": True}, {"do_sample": True, "top_k": 50}),
        ({"do_sample": True, "top_k": 0}, {"do_sample": True}),
        ({"top_k": -1, "temperature": "0.7", "top_p": 5}, {}),
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
        ({"no_repeat_ngram_size": 0, "min_length": 0, "num_beams": 1}, {}),
        ({"min_length": 7, "max_length": 30}, {"min_length": 7, "max_length": 30}),
        ({"max_length": 10**6}, {}),
        # It has no limits of new tokens, which go before those of the whole length.
        ({"min_length": 7, "min_new_tokens": 3, "max_length": 30, "max_new_tokens": 9}, {}),
        (
            {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True},
            {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True},
        ),
        # What it does not parse.
        ({"num_beams": 4, "early_stopping": "never"}, {"num_beams": 4}),
        ({"length_penalty": 0.5, "early_stopping": True, "typical_p": 0.9}, {"top_k": 50}),
    ],
)
def test_options_that_onnxruntime_genai_follows(file, search):
    config = DogeConfig.from_file(TINY_CHECKPOINT / "config.json")
    written = genai_config(config, fake_bundle.manifest(), file, Path("checkpoint"))
    assert written["search"] == PLAIN | search
