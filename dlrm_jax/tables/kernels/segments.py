"""The update of a table's rows in one pass, on GPUs, by Pallas: the rules of rules.py, as they stand, in a kernel.

Slots are sorted by row and cut into pieces of equal length. A program walks along some pieces side by side: it adds up
the gradients of a row's slots, and where the row ends applies the rule to it, in place. So neither gradients of slots
nor sums of rows are written down, and a row that a whole batch looked up is not one long walk. What crosses pieces is
not finished: of each piece the sums of its first and of its last row are given, and those of rows that go on in another
piece are merged and applied by XLA, in a second pass over two rows a piece.

Pieces of 4 slots, of table rows 2, 2, 5, 5 | 5, 7, 7, 9 | 9, 9, 9, 9: the first program finishes 2, the second 7. The
second pass gets 5 twice (last of the first piece, first of the second) and 9 twice.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dlrm_jax.host.formulations import sort_ids
from dlrm_jax.tables.kernels import blocks
from dlrm_jax.tables.kernels.blocks import Block
from dlrm_jax.tables.rows import num_rows
from dlrm_jax.tables.rules import Arrays, Rows
from dlrm_jax.tables.updates import NOT_FINITE, BagGrad, SparseGrad, Stored, Update, flat_slots, merge_duplicates

_SHORTEST, _LONGEST, _PROGRAMS = 8, 64, 4096
"""Slots of a piece, and how many programs keep a large GPU busy."""


def update_segments(update: Update, bags: tuple[BagGrad, ...], stored: Stored, interpret: bool = False) -> Stored:
    """`Update.by_bags` by a kernel, of an update whose rows are whole; `interpret`: by XLA, anywhere, for tests.

    For NOT_FINITE sums are looked at while they grow: a gradient that is no number makes its sum none.
    """
    width = bags[0].d_bags_NxD.shape[1]
    void, block = num_rows(stored.weights, width), Block(width)
    ids_M, bag_M, scale_M, d_bags_NxD = flat_slots(bags)
    length = pl.next_power_of_2(max(1, len(ids_M) // (block.rows * _PROGRAMS)))
    length = min(max(length, _SHORTEST), _LONGEST)
    ids_M, order_M = sort_ids(jnp.where((ids_M >= 0) & (ids_M < void), ids_M, void))
    pad = functools.partial(jnp.pad, pad_width=(0, -len(ids_M) % (block.rows * length)))
    ids_M = pad(ids_M, constant_values=void)
    slots = {"bag": pad(bag_M[order_M])}
    if scale_M is not None:
        slots["scale"] = pad(scale_M[order_M])
    if update.noise is not None:
        slots["noise"] = update.noise.of_rows(ids_M)
    counted = stored.slots.get(NOT_FINITE)
    stored, sums_2PxD, bad_Px1 = _first_pass(update, block, length, ids_M, slots, d_bags_NxD, stored, interpret)
    crossing = SparseGrad(_crossing(ids_M.reshape(-1, length), void), sums_2PxD)
    merged = merge_duplicates(crossing, void)
    stored = update.of_merged(merged, stored)
    if counted is None:
        return stored
    bad_across = ~jnp.isfinite(merged.rows_MxD) & (merged.ids_M < void)[:, None]
    return stored._replace(slots=stored.slots | {NOT_FINITE: counted + bad_Px1.sum() + bad_across.sum()})


def _crossing(ids_PxL: jax.Array, void: int) -> jax.Array:
    """(2P,): the first and the last row of each piece, `void` where it does not go on in another piece."""
    first_P, last_P = ids_PxL[:, 0], ids_PxL[:, -1]
    none = jnp.full(1, -1, jnp.int32)
    began_P = first_P == jnp.concatenate([none, last_P[:-1]])
    goes_on_P = last_P == jnp.concatenate([first_P[1:], none])
    # A piece of one row that began before gives its sum once.
    goes_on_P &= ~(began_P & (first_P == last_P))
    return jnp.stack([jnp.where(began_P, first_P, void), jnp.where(goes_on_P, last_P, void)], axis=1).reshape(-1)


def _first_pass(
    update: Update,
    block: Block,
    length: int,
    ids_M: jax.Array,
    slots: Arrays,
    d_bags_NxD: jax.Array,
    stored: Stored,
    interpret: bool,
) -> tuple[Stored, jax.Array, jax.Array]:
    """(what is stored once rows that lie inside a piece are updated, (2P, D) sums of pieces' first and last rows, bad).

    `bad` (P, 1) says of each piece in how many columns a row's sum was NaN or infinite.
    """
    numbers = {"rate": update.rate, "count": update.count}
    if not isinstance(update.factor, float):
        numbers["factor"] = update.factor
    # Around the ids one more each, so that each slot has neighbours.
    given = {"ids": jnp.pad(ids_M, 1, constant_values=-1), "d_bags": d_bags_NxD, **slots}
    given |= {name: jnp.asarray(number).reshape(1) for name, number in numbers.items()}
    kept = {"": stored.weights, **{slot.name: stored.slots[slot.name] for slot in update.rule.slots}}
    num_pieces = len(ids_M) // length
    more = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2 * num_pieces, block.width), (num_pieces, 1))]

    def kernel(*refs: Any) -> None:
        inputs, (sums, bad, *outputs) = refs[: len(given) + len(kept)], refs[len(given) + len(kept) :]
        read = dict(zip(given, inputs, strict=False))
        old, new = (dict(zip(kept, some, strict=True)) for some in (inputs[len(given) :], outputs))
        _Walk(update, block, length, read, old, new, sums, bad).run()

    sums, bad, *new = pl.pallas_call(
        kernel,
        grid=(num_pieces // block.rows,),
        in_specs=[blocks.ANYWHERE] * (len(given) + len(kept)),
        out_specs=[blocks.ANYWHERE] * (len(more) + len(kept)),
        out_shape=[*more, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in kept.values())],
        input_output_aliases={len(given) + i: len(more) + i for i in range(len(kept))},
        compiler_params=blocks.warp(),
        interpret=interpret,
    )(*given.values(), *kept.values())
    arrays = dict(zip(kept, new, strict=True))
    return Stored(arrays.pop(""), arrays), sums, bad


@dataclasses.dataclass(frozen=True)
class _Walk:
    """One program: R pieces of `length` slots, side by side. `old` and `new` are what is stored, the weights as ""."""

    update: Update
    block: Block
    length: int
    given: dict[str, Any]
    old: dict[str, Any]
    new: dict[str, Any]
    sums: Any
    bad: Any

    def run(self) -> None:
        piece_R = self.block.numbers()
        first_R = piece_R * self.length
        began_R = self._of_slots("ids", first_R) == self._of_slots("ids", first_R + 1)
        void = num_rows(self.old[""], self.block.width)

        def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            sum_RxW, in_first_R, bad_RxW = carry
            slots = [first_R + i * blocks.IN_FLIGHT + j for j in range(blocks.IN_FLIGHT)]
            ids = [self._of_slots("ids", slot_R + 1) for slot_R in (*slots, slots[-1] + 1)]
            ends = [here_R != next_R for here_R, next_R in itertools.pairwise(ids)]
            firsts = [in_first_R]
            for ends_R in ends:
                firsts.append(firsts[-1] & ~ends_R)
            inside = [
                ends_R & ~(first & began_R) & (ids_R < void)
                for ids_R, ends_R, first in zip(ids, ends, firsts, strict=False)
            ]
            # All reads before the first write, which they would wait for. No row is finished twice.
            gradients = [self._gradient(slot_R) for slot_R in slots]
            old = [
                {name: self.block.load(ref, ids_R, inside_R) for name, ref in self.old.items()}
                for ids_R, inside_R in zip(ids, inside, strict=False)
            ]
            for j, slot_R in enumerate(slots):
                sum_RxW = sum_RxW + gradients[j]
                fine_RxW = (jnp.abs(sum_RxW) < jnp.inf) | ~self.block.spread(ids[j] < void)
                bad_RxW = jnp.where(fine_RxW, bad_RxW, 1.0)
                self.block.store(self.sums, 2 * piece_R, sum_RxW, ends[j] & firsts[j])
                self._finish(ids[j], inside[j], sum_RxW, old[j], slot_R)
                sum_RxW = jnp.where(self.block.spread(ends[j]), 0, sum_RxW)
            return sum_RxW, firsts[-1], bad_RxW

        zeros, every_R = jnp.zeros(self.block.shape, jnp.float32), jnp.ones(self.block.rows, bool)
        first = zeros, every_R, zeros
        sum_RxW, in_first_R, bad_RxW = jax.lax.fori_loop(0, self.length // blocks.IN_FLIGHT, step, first)
        self.block.store(self.sums, 2 * piece_R, sum_RxW, in_first_R)
        self.block.store(self.sums, 2 * piece_R + 1, sum_RxW, every_R)
        self.block.store(self.bad, piece_R, jnp.sum(bad_RxW, axis=1, keepdims=True), every_R)

    def _of_slots(self, name: str, slot_R: jax.Array) -> jax.Array:
        return triton.load(self.given[name].at[slot_R])

    def _gradient(self, slot_R: jax.Array) -> jax.Array:
        rows_RxW = self.block.load(self.given["d_bags"], self._of_slots("bag", slot_R), jnp.ones(len(slot_R), bool))
        if "scale" not in self.given:
            return rows_RxW
        return rows_RxW * self.block.spread(self._of_slots("scale", slot_R))

    def _finish(self, ids_R: jax.Array, where_R: jax.Array, sum_RxW: jax.Array, old: Arrays, slot_R: jax.Array) -> None:
        """The rule, applied to rows `ids_R` that count."""
        update, block = self.update, self.block
        rate, count = self.given["rate"][0], self.given["count"][0]
        factor = self.given["factor"][0] if "factor" in self.given else 1.0

        def row_mean(rows_RxW: jax.Array) -> jax.Array:
            # What a rule makes of lanes that are no columns is not known.
            counted = jnp.where(block.columns() < block.width, rows_RxW, 0)
            return jnp.sum(counted, axis=1, keepdims=True) / block.width

        weights_RxW = update.dtype.to_floats(old[""])
        gradient_RxW = sum_RxW if isinstance(factor, float) else sum_RxW * factor
        slots = {name: numbers for name, numbers in old.items() if name}
        row = Rows(gradient_RxW, weights_RxW, slots, rate, count, row_mean, block.width, factor)
        added_RxW, new = update.rule.step(row)
        bits_RxW = None
        if update.noise is not None:
            keys = [triton.load(self.given["noise"].at[slot_R, jnp.full(len(slot_R), i)]) for i in range(2)]
            bits_RxW = update.noise.bits(block.spread(keys[0]), block.spread(keys[1]), block.columns())
        block.store(self.new[""], ids_R, update.dtype.from_floats(weights_RxW + added_RxW, bits_RxW), where_R)
        for slot in update.rule.slots:
            kept = old[slot.name] + new[slot.name] if slot.adds else new[slot.name]
            block.store(self.new[slot.name], ids_R, kept, where_R)
