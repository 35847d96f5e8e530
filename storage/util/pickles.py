"""Pickles of strangers, held to what they may cost before anything unpickles them.

A few bytes of a pickle can ask for gigabytes (a high memo slot), for time without end (tuples that
share themselves, as keys of a dictionary: each level doubles the work of its hash) or for more
stack than there is (tuples a million deep). The bytes are walked once, opcode by opcode; no object
is made and no code runs.
"""

import pickletools
from collections.abc import Iterator
from typing import Any, BinaryIO

MAX_OPCODES = 1 << 25
# Of nested tuples, lists and dictionaries; those of training codes are a dozen levels deep.
MAX_DEPTH = 200
# What calls and keys may take, per byte of the file, and beside it.
WORK, FREE_WORK = 64, 1 << 20
CALLS = frozenset({"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BUILD", "BINPERSID"})
GROWING = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
HASHED = frozenset({"SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET"})
# By the memo slots that they fill and read.
PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})


class PickleCost(Exception):
    """A pickle that would take far more memory, time or stack than its size."""


class _Value:
    """An object of the pickle: bytes and objects in it, each as often as it is referred to."""

    __slots__ = ("depth", "size")

    def __init__(self, size: int, depth: int = 0) -> None:
        self.size, self.depth = size, depth


def check_pickle(file: BinaryIO, size: int) -> None:
    """Walk the pickle at a file's position to its end; ``size`` is that of the file in bytes.

    Raises:
        PickleCost: if unpickling it would take much more than that.
        Exception: almost any, if it is damaged.
    """
    stack: list[_Value] = []
    marks: list[int] = []  # places in the stack
    memo: dict[int, _Value] = {}
    work = 0
    for count, (opcode, argument) in enumerate(_opcodes(file)):
        name = opcode.name
        if count > MAX_OPCODES:
            raise PickleCost(f"has more than {MAX_OPCODES:,} opcodes")
        if name in PUTS:
            slot = len(memo) if argument is None else int(argument)
            if slot > count:
                raise PickleCost(f"fills slot {slot:,} of its memo after {count:,} opcodes")
            memo[slot] = stack[-1]
        elif name in GETS:
            stack.append(memo[int(argument)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        else:
            before = opcode.stack_before
            start = len(stack) - len(before)
            if pickletools.markobject in before:
                start = marks.pop() - before.index(pickletools.markobject)
            if start < 0:
                raise ValueError("an empty stack")
            parts = stack[start:]
            del stack[start:]
            target = parts.pop(0) if name in GROWING else None
            added = sum(part.size for part in parts)
            depth = max((part.depth for part in parts), default=-1) + 1
            if name in CALLS:
                work += added
            elif name in HASHED:
                step = 2 if name in ("SETITEM", "SETITEMS", "DICT") else 1
                work += sum(part.size for part in parts[::step])
            if work > WORK * size + FREE_WORK:
                raise PickleCost("refers to the same values so often that it takes far more")
            if depth > MAX_DEPTH:
                raise PickleCost(f"nests values more than {MAX_DEPTH} deep")
            if target is not None:
                target.size += added
                target.depth = max(target.depth, depth)
                stack.append(target)
            elif opcode.stack_after:
                length = len(argument) if isinstance(argument, str | bytes | bytearray) else 0
                stack.append(_Value(1 + length + added, depth))


def _opcodes(file: BinaryIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """As ``pickletools.genops``, which refuses the byte strings of Python 2."""
    by_code = {opcode.code: opcode for opcode in pickletools.opcodes}
    while True:
        opcode = by_code[file.read(1).decode("latin1")]
        if opcode.name == "STRING":
            yield opcode, file.readline()
        else:
            yield opcode, opcode.arg and opcode.arg.reader(file)
        if opcode.name == "STOP":
            return
