"""Rows in few bits: the reference's packing to the bit, ours within half a step, and what a table then weighs."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.serving.artifact.quantise import BITS, dequantise_rows, quantise_rows, stored_table, take_stored
from tests.helpers import SHARED

GOLDEN = SHARED / "goldens" / "quant_rowwise.npz"


@pytest.mark.golden
@pytest.mark.parametrize(("bits", "header"), [(8, "float32"), (4, "float16")])
def test_rows_equal_the_references(bits, header):
    if not GOLDEN.exists():
        pytest.skip("the reference's numbers are not beside this checkout")
    golden = np.load(GOLDEN)
    packed = quantise_rows(golden["w"], bits, header)
    np.testing.assert_array_equal(packed, golden[f"packed{bits}"])
    values = np.asarray(dequantise_rows(jnp.asarray(packed), bits, golden["w"].shape[1], header))
    np.testing.assert_allclose(values, golden[f"dequant{bits}"], atol=2e-7)
    bounds = np.append(golden["offsets"], len(golden["indices"]))
    for i, want in enumerate(golden[f"bag{bits}"]):
        got = values[golden["indices"][bounds[i] : bounds[i + 1]]].sum(axis=0)
        np.testing.assert_allclose(got, want, atol=1e-6)


@hypothesis.given(
    arrays.arrays(
        np.float32,
        st.sampled_from([(1, 1), (3, 7)]),
        elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
    ),
    st.sampled_from([8, 4]),
)
@hypothesis.settings(max_examples=100, deadline=None)
def test_every_value_is_within_half_a_step(rows, bits):
    packed = quantise_rows(rows, bits)
    values = np.asarray(dequantise_rows(jnp.asarray(packed), bits, rows.shape[1]))
    scale = np.ascontiguousarray(packed[:, -4:]).view(ml_dtypes.bfloat16)[:, :1].astype(np.float64)
    assert (np.abs(values - rows) <= scale * 0.5001 + np.abs(rows) * 1e-6 + 1e-30).all()


def test_a_constant_row_stays_itself_where_bfloat16_holds_it():
    rows = np.array([[0.5] * 6, [0.0] * 6, [-2.0] * 6], np.float32)
    for bits in BITS.values():
        np.testing.assert_array_equal(dequantise_rows(jnp.asarray(quantise_rows(rows, bits)), bits, 6), rows)


@pytest.mark.parametrize(("dim", "most"), [(16, 0.32), (64, 0.28)])
def test_int8_tables_weigh_less_than_a_third(dim, most):
    rows = np.random.default_rng(0).normal(size=(100, dim)).astype(np.float32)
    assert stored_table(rows, "int8").nbytes / rows.nbytes <= most
    assert stored_table(rows, "int4").nbytes / rows.nbytes <= most / 1.6
    assert stored_table(rows, "bfloat16").nbytes / rows.nbytes == 0.5


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_only_what_is_looked_up_is_dequantised(kind):
    rows = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    take = take_stored(kind, 5)
    got = take(jnp.asarray(stored_table(rows, kind)), jnp.asarray([[3, 49], [0, -1]]))
    assert got.shape == (2, 2, 5) and got.dtype == jnp.float32
    want = rows[[[3, 49], [0, 0]]]
    atol = {"float32": 0, "bfloat16": 0.02, "int8": 0.02, "int4": 0.25}[kind]
    np.testing.assert_allclose(got, want, atol=atol)


def test_a_nan_has_no_code():
    with pytest.raises(ConfigError, match="row 1 holds NaN or infinity"):
        quantise_rows(np.array([[0, 1], [np.nan, 2]], np.float32), 8)
