"""What the text of a compiled program (HLO) tells: collectives and their bytes, large buffers.

Counts are of one device and one run of the program: what stands in the body of a loop counts as
often as the loop runs, where the text tells how often that is.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

# Bytes are those of the larger side: what is gathered, reduced, scattered or sent.
KINDS = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
    "collective-broadcast": "collective-broadcast",
}
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "tuple": 0}
# Instructions that make no buffer of their own.
_NO_BUFFER = {
    "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "optimization-barrier",
    "copy-start", "copy-done", "async-start", "async-done", "async-update", "constant", "after-all",
}  # fmt: skip
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^((?:\([^()]*(?:\([^()]*\)[^()]*)*\)|[^ (]+)\S*) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation|"
    r"called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: `name = shape opcode(rest`."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else self.name


def shape_bytes(shape: str, *, parts: str = "sum") -> int:
    """Bytes of a shape, without padding; of a tuple, the sum of its parts or the largest one.

    >>> shape_bytes("bf16[2,8]{1,0:T(8,128)}"), shape_bytes("(f32[4], s8[3])", parts="max")
    (32, 16)
    """
    sizes = [0]
    for dtype, dims in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", shape)):
        bits = _BITS.get(dtype)
        if bits is None:
            digits = re.search(r"\d+", dtype)
            bits = int(digits[0]) if digits else 0
        sizes.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return sum(sizes) if parts == "sum" else max(sizes)


class Program:
    """The computations of an optimized program, `compiled.as_text()`.

    Attributes:
      computations: instructions by computation, in the order of the text.
      runs: how often each computation runs.

    >>> program = Program('''
    ... body (p: s32[]) -> s32[] {
    ...   %x = f32[8] all-reduce(%p), channel_id=1, to_apply=%add
    ... }
    ... ENTRY main (p: s32[]) -> s32[] {
    ...   ROOT %w = s32[] while(%p), condition=%c, body=%body, \
    backend_config={"known_trip_count":{"n":"3"}}
    ... }
    ... ''')
    >>> program.collectives()
    {'all-reduce': {'count': 3, 'bytes': 96}}
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        entry, body = None, []
        for line in text.splitlines():
            if head := _HEAD.match(line):
                body = self.computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
            elif instruction := _INSTRUCTION.match(line):
                parts = _OPCODE.match(re.sub(r"/\*[^*]*\*/", "", instruction[3]))
                if parts:
                    body.append(Instruction(instruction[2], *parts.groups()))
        self._entry = entry
        self.runs: dict[str, int] = {}
        if entry is not None:
            self._count(entry, 1)

    def _count(self, name: str, times: int) -> None:
        self.runs[name] = self.runs.get(name, 0) + times
        for instruction in self.computations.get(name, ()):
            for called in _called(instruction):
                repeats = self._trips(instruction) if instruction.opcode == "while" else 1
                self._count(called, times * repeats)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: as XLA notes it, or as its condition `i < constant` says; or 1."""
        if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        inside = self.computations.get(condition[1], []) if condition else []
        if any("direction=LT" in x.rest for x in inside):
            limits = [x.rest for x in inside if x.opcode == "constant"]
            if len(limits) == 1 and (limit := re.match(r"(\d+)\)", limits[0])):
                return int(limit[1])
        return 1

    def collectives(self) -> dict[str, dict[str, int]]:
        """By kind: how many run, and their bytes together."""
        found: dict[str, dict[str, int]] = {}
        for name, times in self.runs.items():
            for instruction in self._collectives_of(name):
                kind = KINDS[instruction.opcode.removesuffix("-start")]
                parts = "max" if instruction.opcode.endswith("-start") else "sum"
                size = shape_bytes(instruction.shape, parts=parts)
                # The TPU compiler writes a reduce-scatter as a fusion of that name.
                if name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                if instruction.opcode == "reduce-scatter":
                    size *= _group_size(instruction.rest) or 1
                at = found.setdefault(kind, {"count": 0, "bytes": 0})
                at["count"] += times
                at["bytes"] += times * size
        return dict(sorted(found.items()))

    def _collectives_of(self, name: str) -> Iterator[Instruction]:
        for instruction in self.computations.get(name, ()):
            if instruction.opcode.removesuffix("-start") not in KINDS:
                continue
            if _group_size(instruction.rest) == 1:  # Nothing leaves the device.
                continue
            # One that other work overlaps is in the fusions of all that work, in steps of a chain.
            chain = re.search(r'chain_id="(\d+)"', instruction.rest)
            if chain and not self._is_first_of(chain[1], instruction.opcode, name):
                continue
            yield instruction

    def _is_first_of(self, chain: str, opcode: str, name: str) -> bool:
        if not hasattr(self, "_chains"):
            self._chains: dict[tuple[str, str], str] = {}
            for computation, instructions in self.computations.items():
                for x in instructions:
                    if computation in self.runs and (at := re.search(r'chain_id="(\d+)"', x.rest)):
                        self._chains.setdefault((at[1], x.opcode), computation)
        return self._chains[chain, opcode] == name

    def largest_buffers(self, count: int = 3) -> list[dict[str, object]]:
        """The shapes of the largest results, by the bytes of all copies that a loop carries.

        `bytes` are those of one, without padding; `copies` of that shape are in memory together;
        `origin` is the place in the Python program that one of them comes from. Results inside of
        fusions never reach memory.
        """
        bodies = self.computations.values()
        fused = {
            called
            for body in bodies
            for x in body
            if x.opcode not in ("while", "conditional", "call")
            for called in _called(x)
        }
        found: dict[str, list[str]] = {}
        for name in self.runs.keys() - fused:
            for x in self.computations.get(name, ()):
                if x.opcode not in _NO_BUFFER and (x.opcode != "parameter" or name == self._entry):
                    for shape in _shapes(x.shape):
                        found.setdefault(shape, [])
        for x in (x for body in bodies for x in body if "/" in x.op_name):
            for shape in found.keys() & set(_shapes(x.shape)):
                found[shape].append(x.op_name)
        loops = [_shapes(x.shape) for body in bodies for x in body if x.opcode == "while"]
        buffers = [
            {
                "bytes": shape_bytes(shape),
                "copies": max([1, *(loop.count(shape) for loop in loops)]),
                "shape": shape,
                "origin": min(origins, default=""),
            }
            for shape, origins in found.items()
        ]
        return sorted(buffers, key=lambda b: (-b["bytes"] * b["copies"], b["shape"]))[:count]


def _shapes(shape: str) -> list[str]:
    found = _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", shape))
    return [f"{dtype}[{dims}]" for dtype, dims in found]


def _called(instruction: Instruction) -> list[str]:
    names = _CALLED.findall(instruction.rest)
    return [n for group in names for n in re.findall(r"[\w.\-]+", group)]


def _group_size(rest: str) -> int | None:
    """Devices of one group: `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=4] {'a'}`; or None."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", named[2]))
    return None
