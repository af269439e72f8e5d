"""Codes and scales of matrices in few bits, without any model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from doge_onnx.export import rounding
from doge_onnx.export.matrices import pack
from doge_onnx.export.operators import dequantize
from doge_onnx.export.rounding import compensated, nearest


def random_matrix(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def restored(blocks) -> torch.Tensor:
    return dequantize(blocks.codes, blocks.scales, blocks.bits)[:, : blocks.width]


@given(
    bits=st.sampled_from([4, 8]), rows=st.integers(1, 5), blocks=st.integers(1, 4), data=st.data()
)
def test_codes_stand_for_the_values_that_were_packed(bits, rows, blocks, data):
    limit = 2 ** (bits - 1)
    size = rows * blocks * 16
    values = data.draw(st.lists(st.integers(-limit, limit - 1), min_size=size, max_size=size))
    values = torch.tensor(values, dtype=torch.float32).view(rows, blocks, 16)
    codes = pack(values, bits)
    assert codes.shape == (rows, blocks, 16 * bits // 8)
    scales = torch.rand(rows, blocks) + 0.5
    expected = (values * scales.unsqueeze(-1)).flatten(1)
    torch.testing.assert_close(dequantize(codes, scales, bits), expected)


def test_the_first_of_two_codes_is_in_the_lower_half():
    values = torch.tensor([[[1.0, -8.0] + [0.0] * 14]])
    assert pack(values, 4)[0, 0, 0] == 9 + 0 * 16


@pytest.mark.parametrize(("bits", "largest"), [(8, 0.007), (4, 0.12)])
@pytest.mark.parametrize("width", [16, 40, 64, 100])
def test_numbers_are_near_what_they_were(bits, largest, width):
    matrix = random_matrix(30, width)
    blocks = nearest(matrix, bits, 32)
    assert blocks.codes.shape == (30, -(-width // 32), 32 * bits // 8)
    error = (restored(blocks) - matrix).square().mean().sqrt() / matrix.square().mean().sqrt()
    assert error < largest


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_stays_zero(bits):
    matrix = random_matrix(8, 64)
    matrix[:, 5] = 0
    matrix[3] = 0
    moments = torch.diag(torch.rand(64))
    moments[5] = 0
    for blocks in (nearest(matrix, bits, 16), compensated(matrix, bits, 16, moments)):
        assert (restored(blocks)[matrix == 0] == 0).all()
        assert blocks.scales.isfinite().all()


def test_what_is_important_is_rounded_best():
    matrix, importance = random_matrix(200, 32), torch.ones(32)
    importance[:4] = 1e4
    plain = (restored(nearest(matrix, 4, 32)) - matrix)[:, :4].square().mean()
    weighted = (restored(nearest(matrix, 4, 32, importance)) - matrix)[:, :4].square().mean()
    assert weighted < 0.7 * plain


@pytest.mark.parametrize("bits", [4, 8])
def test_independent_inputs_leave_nothing_to_make_up_for(bits):
    matrix, power = random_matrix(20, 48), torch.rand(48) + 0.5
    ours = compensated(matrix, bits, 16, torch.diag(power))
    # What damps the Hessian damps the importance, too.
    expected = nearest(matrix, bits, 16, power + 0.01 * power.mean())
    if bits == 8:
        torch.testing.assert_close(ours.scales, expected.scales)
        assert torch.equal(ours.codes, expected.codes)
        return
    # Scales are searched for among a few only, so a later visit may find better ones.
    errors = [(power * (restored(blocks) - matrix).square()).sum(1) for blocks in (ours, expected)]
    assert (errors[0] <= errors[1] * 1.001).all()


def test_scales_and_codes_of_four_bits_are_visited_again(monkeypatch):
    inputs = random_matrix(1000, 12, seed=1) @ random_matrix(12, 96, seed=2)
    inputs += 0.1 * random_matrix(1000, 96, seed=3)
    matrix, moments = random_matrix(60, 96), inputs.T @ inputs
    errors = []
    for times in (0, 1, 3):
        monkeypatch.setattr(rounding, "_REFINEMENTS", times)
        blocks = compensated(matrix, 4, 32, moments)
        errors.append(float((inputs @ (restored(blocks) - matrix).T).square().mean()))
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < errors[1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [48, 200])
def test_errors_of_dependent_inputs_make_up_for_each_other(bits, width):
    inputs = random_matrix(1000, 12, seed=1) @ random_matrix(12, width, seed=2)
    inputs += 0.1 * random_matrix(1000, width, seed=3)
    matrix = random_matrix(60, width)
    product = inputs @ matrix.T

    def error(blocks) -> float:
        return float((inputs @ restored(blocks).T - product).square().mean())

    apart = error(nearest(matrix, bits, 32))
    together = error(compensated(matrix, bits, 32, inputs.T @ inputs))
    assert together < 0.4 * apart
