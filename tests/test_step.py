"""The recurrent step as a torch module, before any ONNX, against transformers.

The truth is always transformers fed one token at a time.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import checkpoints
import pytest
import torch
import transformers
from checkpoints import SHAPES, assert_close, random_ids, reference_logits, rope
from stepping import OPERATORS, Growing, row
from torch import Tensor

from doge_onnx.export import checkpoint as checkpoint_reader
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.operators import STANDARD
from doge_onnx.export.step import RecurrentStep

CONTEXT = 64


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Checkpoints by their config overrides, each made once."""
    made: dict[str, Path] = {}

    def get(**overrides) -> Path:
        key = repr(sorted(overrides.items()))
        if key not in made:
            made[key] = checkpoints.make(tmp_path_factory.mktemp("checkpoint"), **overrides)
        return made[key]

    return get


@pytest.fixture(params=OPERATORS)
def eager(request):
    return partial(Growing, operators=request.param, context_length=CONTEXT)


def empty_state(step: Growing) -> list[tuple[Tensor, Tensor]]:
    heads = step.state.heads
    return [(torch.zeros(1, heads.num_keys, 0, heads.row),) * 2 for _ in range(step.layers)]


@pytest.fixture(scope="module")
def truth_of():
    """`reference_logits`, each run once for both sets of operators."""
    known: dict[tuple, Tensor] = {}

    def get(directory: Path, ids: list[int]) -> Tensor:
        key = (directory, *ids)
        if key not in known:
            known[key] = reference_logits(directory, ids)
        return known[key]

    return get


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape, make, truth_of, eager):
    directory = make(**SHAPES[shape])
    ids = random_ids(24)
    step = eager(directory)
    truth = truth_of(directory, ids)
    assert_close(step.run(row(ids))[0], truth)
    assert_close(step.run(row(ids), cuts=list(range(1, 24)))[0], truth)


def test_every_tensor_of_the_checkpoint_is_used(make):
    checkpoint = checkpoint_reader.read(make(**SHAPES["everything at once"]))
    RecurrentStep(checkpoint, GrowingState(checkpoint, CONTEXT, STANDARD), STANDARD)
    assert not checkpoint.tensors


def test_the_gates_of_these_checkpoints_matter(make, tmp_path):
    # Otherwise every comparison in this file would pass without Dynamic Mask Attention.
    ids = random_ids(24)
    directory = make()
    model = checkpoints.reference(directory)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.zero_()
    model.save_pretrained(tmp_path / "open")
    with pytest.raises(AssertionError):
        assert_close(
            reference_logits(tmp_path / "open", ids), reference_logits(directory, ids), 2e-2
        )


@pytest.mark.parametrize("seed", range(6))
def test_the_cut_into_steps_does_not_matter(seed, make, truth_of, eager):
    directory = make(**SHAPES["biases"])
    ids = random_ids(40)
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, len(ids)), rng.randint(1, 8)))
    assert_close(eager(directory).run(row(ids), cuts=cuts)[0], truth_of(directory, ids))


def test_a_state_can_be_continued_more_than_once(make, truth_of, eager):
    directory = make()
    step = eager(directory)
    shared, *endings = (random_ids(n, seed=n) for n in (9, 3, 5))
    with torch.no_grad():
        ones = torch.ones(1, 9, dtype=torch.long)
        _, state = step.step((row(shared), ones), empty_state(step))
        for ending in endings:
            mask = torch.ones(1, 9 + len(ending), dtype=torch.long)
            logits, _ = step.step((row(ending), mask), state)
            assert_close(logits[0], truth_of(directory, shared + ending)[9:])


@pytest.mark.parametrize("cuts", [[], [7, 8, 19], list(range(1, 20))], ids=["one", "few", "each"])
def test_a_left_padded_batch_gives_each_row_what_it_gives_alone(cuts, make, truth_of, eager):
    directory = make(**SHAPES["biases"])
    prompts = [random_ids(n, seed=n) for n in (20, 1, 13)]
    # What stands in the padding must not matter: row 1 and 2 have different tokens there.
    ids = torch.tensor([[5 * r] * (20 - len(p)) + p for r, p in enumerate(prompts)])
    mask = torch.tensor([[0] * (20 - len(p)) + [1] * len(p) for p in prompts])
    logits = eager(directory).run(ids, mask, cuts)
    assert logits.isfinite().all()
    for got, prompt in zip(logits, prompts, strict=True):
        assert_close(got[-len(prompt) :], truth_of(directory, prompt))


@pytest.mark.parametrize("cuts", [[], [5, 6, 12, 15]], ids=["one", "few"])
def test_padding_in_the_middle_is_as_if_it_were_not_there(cuts, make, truth_of, eager):
    # Past the trained context too, where RoPE no longer depends on differences only.
    directory = make(max_position_embeddings=10, **rope("dynamic", 2.0))
    ids = torch.tensor([random_ids(24, seed=4)])
    mask = torch.ones_like(ids)
    mask[0, [0, 1, 5, 6, 7, 14, 20]] = 0
    real = mask[0].bool()
    logits = eager(directory).run(ids, mask, cuts)[0, real]
    assert_close(logits, truth_of(directory, ids[0, real].tolist()))


def test_only_the_last_logits_can_be_asked_for(make):
    step = Growing(make(**SHAPES["untied"]))
    ids = row(random_ids(9))
    args = ((ids, torch.ones_like(ids)), empty_state(step))
    with torch.no_grad():
        everything, state = step.step(*args)
        for count, kept in ((1, 1), (4, 4), (9, 9), (0, 9)):
            logits, same_state = step.step(*args, torch.tensor([count]))
            torch.testing.assert_close(logits, everything[:, -kept:])
            torch.testing.assert_close(same_state, state)


ROPES = {
    "default": rope("default"),
    "default, other base": rope("default", theta=5e5),
    "linear": rope("linear", 3.0),
    "linear, other base": rope("linear", 2.5, theta=300.0),
    "dynamic": rope("dynamic", 4.0),
    "dynamic, other base": rope("dynamic", 1.5, theta=777.0),
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("cuts", [[], [15, 16, 17, 30]], ids=["one", "few"])
def test_rope_inside_and_past_the_trained_context(kind, cuts, make, truth_of, eager):
    directory = make(max_position_embeddings=16, num_hidden_layers=2, **ROPES[kind])
    ids = random_ids(48)
    step = eager(directory, context_length=48)
    assert_close(step.run(row(ids), cuts=cuts)[0], truth_of(directory, ids))


def test_rope_at_the_positions_of_a_real_model(tmp_path):
    # At position 2047 a wave length that is off by one part in a million shows.
    directory = checkpoints.make(
        tmp_path,
        num_hidden_layers=1,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        keep_window_size=4096,
        **rope("dynamic", 4.0),
    )
    ids = row(random_ids(2100))
    model = checkpoints.reference(directory)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        # One piece is the reference's own result as long as dynamic RoPE has not grown, and from
        # there on it is fed token by token. The cache goes by position, since its name is another
        # from transformers 5.24 on.
        rows = [model(ids[:, :2040], None, None, cache).logits[0]]
        rows += [model(ids[:, i : i + 1], None, None, cache).logits[0] for i in range(2040, 2100)]
    logits = Growing(directory, context_length=2100).run(ids)[0]
    assert_close(logits, torch.cat(rows))
