"""What a compiled step sends, read from its text: the collectives with their bytes."""

import dataclasses
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
KINDS = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
_LINE = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
# A TPU's asynchronous collective is spread over several fusions, each of which names it.
_CHAIN = re.compile(r'chain_id="(\d+)"')
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?\{?.*->.*\{\s*$")
"""The line that begins a computation, by its name."""
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations)=\{?%?([\w.\-]+(?:, ?%[\w.\-]+)*)\}?")

_WHILE = re.compile(r"\bwhile\(")
_OWN_WHILE = re.compile(r'op_name="[^"]*/while"')

CONTROL_BYTES = 256
"""Collectives of at most so much carry flags, sums of a metric, and where a round ends: left out of what is counted."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective: bytes of its result on one device; `in_loop` if it stands in a while loop's body."""

    kind: str
    num_bytes: int
    shapes: tuple[str, ...]
    in_loop: bool


def collectives(text: str) -> tuple[Collective, ...]:
    """All collectives of a module as `compiled.as_text()` writes it."""
    found, loops, chains = [], _in_loops(text), set()
    name = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            name = header.group(1)
            continue
        if match := _LINE.match(line):
            shapes = _SHAPE.findall(match["shape"])
            if match["start"] and match["kind"] != "all-reduce":
                shapes = shapes[len(shapes) // 2 :]  # (operands, results): async forms hold both.
            sizes = [_size(kind, dims) for kind, dims in shapes]
            texts = tuple(f"{kind}[{dims}]" for kind, dims in shapes)
            if chain := _CHAIN.search(line):
                key = (match["kind"], chain[1], texts)
                if key in chains:
                    continue
                chains.add(key)
            found.append(Collective(match["kind"], sum(sizes), texts, name in loops))
    return tuple(found)


def totals(found: tuple[Collective, ...], in_loop: bool = False) -> dict[str, int]:
    """Bytes by kind of what is more than control, outside loops or inside."""
    sums: dict[str, int] = {}
    for one in found:
        if one.in_loop == in_loop and one.num_bytes > CONTROL_BYTES:
            sums[one.kind] = sums.get(one.kind, 0) + one.num_bytes
    return sums


def serial_loops(text: str) -> int:
    """While loops that the program has none of: XLA's own, as for a scatter that it does a row at a time."""
    return sum(1 for line in text.splitlines() if _WHILE.search(line) and not _OWN_WHILE.search(line))


def largest_result(text: str, operations: tuple[str, ...]) -> int:
    """Bytes of the largest result of these operations, as `copy` or `all-gather`; 0 if there is none."""
    pattern = re.compile(rf"= (.*?) (?:{'|'.join(operations)})\(")
    sizes = [sum(_size(*shape) for shape in _SHAPE.findall(shapes)) for shapes in pattern.findall(text)]
    return max(sizes, default=0)


def _size(kind: str, dims: str) -> int:
    count = 1
    for dim in dims.split(",") if dims else ():
        count *= int(dim)
    return count * _BYTES.get(kind, 0)


def _in_loops(text: str) -> set[str]:
    """Computations that a while loop runs, or that such a computation calls."""
    calls: dict[str, set[str]] = {}
    looped: set[str] = set()
    name = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            name = header.group(1)
        called = {c.strip(" %") for group in _CALLED.findall(line) for c in group.split(",")}
        calls.setdefault(name, set()).update(called)
        if " while(" in line:
            looped |= called
    waiting = list(looped)
    while waiting:
        for other in calls.get(waiting.pop(), set()) - looped:
            looped.add(other)
            waiting.append(other)
    return looped
