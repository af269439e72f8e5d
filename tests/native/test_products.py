"""Products of the native library, in every form of matrix, against float64."""

from __future__ import annotations

import ctypes
import platform

import numpy as np
import pytest
from matrix_forms import CODES, FORMS, matrix
from single_node import FLOAT, Node, floats, instruction_set

if platform.machine() in ("x86_64", "AMD64"):
    SETS = ["scalar", "avx2", "avx_vnni", "avx512_vnni"]
else:
    SETS = ["scalar", "neon", "neon_dotprod", "neon_i8mm"]
# Inputs and outputs: those that no block divides, one number, and more than a kernel takes at once.
SIZES = [(1, 1), (24, 7), (65, 33), (256, 64), (333, 70), (1040, 37)]


@pytest.fixture(params=SETS)
def kernels(request, native_library):
    """The library, with the kernels of one instruction set."""
    with instruction_set(request.param):
        if chosen(native_library) != request.param:
            pytest.skip(f"this machine has no {request.param}")
        yield native_library


def chosen(library):
    loaded = ctypes.CDLL(str(library))
    loaded.doge_onnx_instruction_set.restype = ctypes.c_char_p
    return loaded.doge_onnx_instruction_set().decode()


def product(library, h, weight, scales, bias, attributes, transposed=0, keep=0):
    """The node ProjectToVocabulary, which is a product with any number of rows."""
    inputs = {
        "h": h,
        "logits_to_keep": np.array([keep]),
        "weight": weight,
        "scales": scales,
        "bias": bias,
    }
    return Node(
        library,
        "ProjectToVocabulary",
        inputs,
        attributes | {"transposed": transposed},
        {"logits": FLOAT},
        constants=["weight"],
    )


def assert_close(actual, expected):
    # A row in int16 is exact to a 65,000th of its largest element.
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4 * scale)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_times_a_matrix(kernels, form, size):
    rng = np.random.default_rng(0)
    inputs, outputs = size
    weight, scales, attributes, values = matrix(rng, form, inputs, outputs)
    bias = floats(rng, outputs)
    h = floats(rng, 1, 17, inputs)
    node = product(kernels, h, weight, scales, bias, attributes)
    expected = h.astype(np.float64) @ values + bias
    for rows in (17, 9, 8, 5, 2, 1):
        assert_close(node.run(h=h[:, :rows])["logits"], expected[:, :rows])


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_a_table_as_a_matrix(kernels, form):
    rng = np.random.default_rng(1)
    weight, scales, attributes, values = matrix(rng, form, 65, 77, table=True)
    h = floats(rng, 2, 9, 65)
    node = product(kernels, h, weight, scales, None, attributes, transposed=1)
    for length in (9, 1):
        logits = node.run(h=h[:, :length])["logits"]
        assert_close(logits, h[:, :length].astype(np.float64) @ values)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("keep", [0, 1, 4, 6, 99])
def test_the_last_positions_are_kept(kernels, batch, keep):
    rng = np.random.default_rng(2)
    weight, scales, attributes, values = matrix(rng, (8, 32), 40, 50)
    h = floats(rng, batch, 6, 40)
    logits = product(kernels, h, weight, scales, None, attributes, keep=keep).run()["logits"]
    assert_close(logits, (h.astype(np.float64) @ values)[:, -keep:])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", [(300, 130), (1040, 37), (2100, 33)], ids=str)
def test_a_row_does_not_depend_on_the_others(kernels, form, size):
    inputs, outputs = size
    rng = np.random.default_rng(3)
    weight, scales, attributes, _ = matrix(rng, form, inputs, outputs)
    rows_have_their_own_bits(kernels, floats(rng, 1, 30, inputs), weight, scales, attributes)


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_a_row_times_a_table_does_not_depend_on_the_others(kernels, form):
    rng = np.random.default_rng(4)
    weight, scales, attributes, _ = matrix(rng, form, 301, 77, table=True)
    rows_have_their_own_bits(kernels, floats(rng, 1, 30, 301), weight, scales, attributes, 1)


def rows_have_their_own_bits(kernels, h, weight, scales, attributes, transposed=0):
    bias = floats(
        np.random.default_rng(5), weight.shape[0 if scales is not None or transposed else 1]
    )
    node = product(kernels, h, weight, scales, bias, attributes, transposed)
    together = node.run()["logits"]
    for count in (1, 2, 3, 8, 9):
        for first in range(0, h.shape[1] - count, count):
            some = node.run(h=h[:, first : first + count])["logits"]
            np.testing.assert_array_equal(some, together[:, first : first + count])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", [3, 12])
def test_infinity_and_nan_pass_through(kernels, form, rows):
    rng = np.random.default_rng(4)
    weight, scales, attributes, values = matrix(rng, form, 64, 20)
    h = floats(rng, 1, rows, 64)
    h[0, 0, 5], h[0, 1, 9] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        expected = h.astype(np.float64) @ values
    logits = product(kernels, h, weight, scales, None, attributes).run()["logits"]
    assert np.isnan(logits[0, 0]).all()
    np.testing.assert_array_equal(np.isfinite(logits[0, 1]), np.isfinite(expected[0, 1]))
    np.testing.assert_array_equal(np.sign(logits[0, 1]), np.sign(expected[0, 1]))
    assert_close(logits[0, 2:], expected[0, 2:])


@pytest.mark.parametrize("scale", [0.0, 1e-41, 1e-30, 1e30])
def test_very_small_and_very_large_rows(kernels, scale):
    rng = np.random.default_rng(5)
    weight, scales, attributes, values = matrix(rng, (8, 32), 64, 20)
    h = (floats(rng, 1, 2, 64).astype(np.float64) * scale).astype(np.float32)
    logits = product(kernels, h, weight, scales, None, attributes).run()["logits"]
    expected = h.astype(np.float64) @ values
    largest = np.abs(expected).max()
    # Processors may take the smallest numbers for 0.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=max(1e-4 * largest, 1e-37))


@pytest.mark.parametrize("form", CODES, ids=str)
def test_large_codes_do_not_overflow(kernels, form):
    rng = np.random.default_rng(6)
    bits, _ = form
    weight, scales, attributes, _ = matrix(rng, form, 512, 8)
    weight[:] = 255 if bits == 8 else 0x88
    values = np.repeat(
        (2 ** (bits - 1) - 1 if bits == 8 else 0) * scales, 512 // scales.shape[1], 1
    )
    for sign in (3.0, -3.0):
        h = np.full((1, 3, 512), sign, np.float32)
        node = product(kernels, h, weight, scales, None, attributes)
        for rows in (1, 3):
            logits = node.run(h=h[:, :rows])["logits"]
            assert_close(logits, h[:, :rows].astype(np.float64) @ values.T)


def changes(rng):
    """Inputs that do not fit each other, by what is wrong."""
    weight, scales, attributes, _ = matrix(rng, (8, 32), 64, 20)
    good = {"weight": weight, "scales": scales, "bias": floats(rng, 20), "attributes": attributes}
    yield "short rows of codes", good | {"weight": weight[:, :, :31]}
    yield "too few blocks", good | {"weight": weight[:, :1]}
    yield "too few scales", good | {"scales": scales[:19]}
    yield "no scales", good | {"scales": None}
    yield "short bias", good | {"bias": good["bias"][:19]}
    yield "other element type", good | {"weight": weight.astype(np.int32)}
    yield "codes that are floats", good | {"weight": weight.astype(np.float32)}
    for bits, block in ((8, 24), (8, 512), (3, 32), (0, 32), (8, 0), (-8, 32), (4, 32)):
        form = {"bits": bits, "block_size": block}
        yield f"{bits} bits in blocks of {block}", good | {"attributes": form}


@pytest.mark.parametrize(
    "changed", [pytest.param(c, id=what) for what, c in changes(np.random.default_rng(7))]
)
def test_a_damaged_graph_gives_an_error(native_library, changed):
    h = floats(np.random.default_rng(8), 1, 3, 64)
    with pytest.raises(Exception, match=r"doge_onnx|bits|attribute|block"):
        product(
            native_library,
            h,
            changed["weight"],
            changed["scales"],
            changed["bias"],
            changed["attributes"],
        ).run()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_embedding_looks_rows_up(kernels, form):
    rng = np.random.default_rng(9)
    table, scales, attributes, values = matrix(rng, form, 40, 30, table=True)
    norm = floats(rng, 40)
    ids = np.array([[0, 29, -1, 7]])
    node = Node(
        kernels,
        "Embed",
        {"input_ids": ids, "table": table, "scales": scales, "norm": norm},
        attributes | {"epsilon": 1e-6},
        {"h": FLOAT, "x": FLOAT},
        constants=["table"],
    )
    result = node.run()
    x = values.T[ids]
    assert_close(result["x"], x)
    assert_close(result["h"], x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm)
    for wrong in (30, -31):
        with pytest.raises(Exception, match="not in the table"):
            node.run(input_ids=np.array([[wrong]]))


def experts_reference(h, router, bias, down, up, wanted, normalize):
    """Experts with the activation ReLU: docs/native.md in NumPy."""
    n = router.shape[1] // 2
    out = np.zeros_like(h)
    for place in np.ndindex(h.shape[:-1]):
        scores = h[place] @ router + (0 if bias is None else bias)
        sums = (scores[:n, np.newaxis] + scores[n:]).ravel()
        best = np.argsort(-sums, kind="stable")[:wanted]
        weights = np.exp(sums[best] - sums[best].max())
        weights /= weights.sum()
        neurons = np.maximum(down.T[best] @ h[place], 0)
        out[place] = (neurons * weights) @ up.T[best]
    return out


@pytest.mark.parametrize("form", ["float32", "bfloat16", (8, 32), (4, 16)], ids=str)
@pytest.mark.parametrize(
    ("rows", "side", "wanted"), [((1, 1), 4, 1), ((1, 1), 9, 20), ((2, 7), 16, 16), ((1, 3), 2, 4)]
)
def test_experts(kernels, form, rows, side, wanted):
    rng = np.random.default_rng(10)
    h, bias = floats(rng, *rows, 40), floats(rng, 2 * side)
    router = floats(rng, 40, 2 * side)
    down, down_scales, attributes, down_values = matrix(rng, form, 40, side**2, table=True)
    up, up_scales, _, up_values = matrix(rng, form, 40, side**2, table=True)
    for normalize, given in ((0, bias), (1, None)):
        inputs = {
            "h": h,
            "router": router,
            "router_bias": given,
            "down": down,
            "down_scales": down_scales,
            "up": up,
            "up_scales": up_scales,
        }
        node = Node(
            kernels,
            "Experts",
            inputs,
            attributes
            | {"activation": "relu", "experts_per_token": wanted, "normalize": normalize},
            {"routed": FLOAT},
            constants=["down", "up"],
        )
        expected = experts_reference(
            h.astype(np.float64), router, given, down_values, up_values, wanted, normalize
        )
        assert_close(node.run()["routed"], expected)


def test_of_equal_experts_the_first_are_chosen(kernels):
    rng = np.random.default_rng(11)
    h, side = floats(rng, 1, 1, 8), 4
    table, _, attributes, values = matrix(rng, "float32", 8, side**2, table=True)
    inputs = {
        "h": h,
        "router": np.zeros((8, 2 * side), np.float32),
        "router_bias": None,
        "down": table,
        "down_scales": None,
        "up": table,
        "up_scales": None,
    }
    attributes |= {"activation": "relu", "experts_per_token": 3, "normalize": 0}
    result = Node(kernels, "Experts", inputs, attributes, {"routed": FLOAT}).run()["routed"]
    neurons = np.maximum(values.T[:3] @ h[0, 0].astype(np.float64), 0) / 3
    assert_close(result[0, 0], neurons @ values.T[:3])


@pytest.mark.parametrize("ids", [np.zeros((0, 3), np.int64), np.zeros((2, 0), np.int64)])
def test_no_tokens_give_no_rows(native_library, ids):
    rng = np.random.default_rng(12)
    table, _, attributes, _ = matrix(rng, "float32", 8, 5, table=True)
    inputs = {"input_ids": ids, "table": table, "scales": None, "norm": floats(rng, 8)}
    outputs = {"h": FLOAT, "x": FLOAT}
    node = Node(native_library, "Embed", inputs, attributes | {"epsilon": 1e-6}, outputs)
    assert node.run()["x"].shape == (*ids.shape, 8)
