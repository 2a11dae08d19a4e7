"""Rows of a table's array, by number: take, add, set. Also where several rows share a line of 128 lanes.

A TPU keeps arrays in tiles of 128 lanes. A gather of rows narrower than that makes XLA lay out the whole table anew
in every step; a table stored `pack` rows a line is gathered and scattered line by line, in place. `pack` is never
passed along: it is the array's width over the rows' width.
"""

import jax
import jax.numpy as jnp

LANES = 128


def pack_for(width: int, packed: bool) -> int:
    """Rows a line for rows of `width` floats; 1 where lines are not packed or cannot be."""
    return LANES // width if packed and width < LANES and LANES % width == 0 else 1


def num_rows(table: jax.Array, width: int) -> int:
    """Rows of `width` floats that an array holds."""
    return table.shape[0] * (table.shape[1] // width)


def take_rows(table: jax.Array, ids_M: jax.Array, width: int) -> jax.Array:
    """(M, width): the rows `ids_M`, which must be inside the table or, for a row nobody will use, are clamped."""
    pack = table.shape[1] // width
    if pack == 1:
        return table.at[jnp.maximum(ids_M, 0)].get(mode="clip")
    lines_Mx1x1, in_line_Mxpx1 = _places(ids_M, pack)
    lines_Mxpxw = table.at[jnp.maximum(lines_Mx1x1, 0)].get(mode="clip").reshape(-1, pack, width)
    return jnp.where(in_line_Mxpx1, lines_Mxpxw, 0).sum(axis=1, dtype=table.dtype)


def add_rows(table: jax.Array, ids_M: jax.Array, rows_Mxw: jax.Array) -> jax.Array:
    """The table with `rows_Mxw` added, repeated ids each time; ids outside the table are left out."""
    width = rows_Mxw.shape[1]
    pack = table.shape[1] // width
    # Scatter drops what lies beyond the end, but lets negative ids wrap.
    ids_M = jnp.where(ids_M < 0, table.shape[0] * pack, ids_M)
    if pack == 1:
        return table.at[ids_M].add(rows_Mxw, mode="drop")
    lines_M, in_line_Mxpx1 = _places(ids_M, pack)
    lines_Mxpxw = jnp.where(in_line_Mxpx1, rows_Mxw[:, None], 0)
    return table.at[lines_M].add(lines_Mxpxw.reshape(-1, pack * width), mode="drop")


def add_unique_rows(table: jax.Array, ids_M: jax.Array, old_Mxw: jax.Array, rows_Mxw: jax.Array) -> jax.Array:
    """As `add_rows` where no id repeats and the rows there are known to be `old_Mxw`: a write without a read."""
    if table.shape[1] == rows_Mxw.shape[1]:
        return table.at[ids_M].set(old_Mxw + rows_Mxw, mode="drop")
    return add_rows(table, ids_M, rows_Mxw)


def set_unique_rows(table: jax.Array, ids_M: jax.Array, rows_Mxw: jax.Array) -> jax.Array:
    """The table with rows replaced, none twice; ids outside the table are left out.

    Of lines that rows share a row is cleared and added: both are exact, and lines may repeat.
    """
    width = rows_Mxw.shape[1]
    pack = table.shape[1] // width
    if pack == 1:
        return table.at[jnp.where(ids_M < 0, table.shape[0], ids_M)].set(rows_Mxw, mode="drop")
    lines_M, in_line_Mxpx1 = _places(jnp.where(ids_M < 0, table.shape[0] * pack, ids_M), pack)
    others = jnp.broadcast_to(~in_line_Mxpx1, (len(ids_M), pack, width)).reshape(-1, pack * width)
    table = table.at[lines_M].multiply(others.astype(table.dtype), mode="drop")
    return add_rows(table, ids_M, rows_Mxw)


def _places(ids_M: jax.Array, pack: int) -> tuple[jax.Array, jax.Array]:
    in_line = jnp.arange(pack, dtype=jnp.int32)[None] == (ids_M % pack)[:, None]
    return ids_M // pack, in_line[:, :, None]
