"""How deep tuples lie in each other in a pickle, seen without unpickling it.

A tuple that holds another one twice, which holds another one twice, and so on, is a few bytes a level; as a key of a
dictionary it is hashed, which takes twice as long with every level. torch's restricted reader does not mind.
"""

import pickletools
from typing import IO

MARK = pickletools.markobject
PUTS, GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}


def tuple_depth(pickle: bytes | IO[bytes], enough: int) -> int:
    """The depth of the deepest tuple in the next pickle, 0 without tuples; reading ends when it exceeds `enough`.

    Raises ValueError, IndexError or another error of pickletools if the pickle is malformed.
    """
    deepest, memo = 0, {}
    stack: list = []  # the depth of each object, None for a mark
    for code, argument, _ in pickletools.genops(pickle):
        if code.name in PUTS:
            memo[int(argument)] = stack[-1]
        elif code.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code.name in GETS:
            stack.append(memo[int(argument)])
        else:
            taken = _take(stack, code.stack_before)
            if code.name in TUPLES:
                stack.append(1 + max((depth or 0 for depth in taken), default=0))
                deepest = max(deepest, stack[-1])
                if deepest > enough:
                    return deepest
            elif code.name == "DUP":
                stack += taken * 2
            else:
                stack += [None if kind is MARK else 0 for kind in code.stack_after]
    return deepest


def _take(stack: list, kinds: list) -> list:
    """Remove from the stack what an operation takes: so many objects, or all down to the last mark and some below."""
    taken, count = [], len(kinds)
    if MARK in kinds:
        while (depth := stack.pop()) is not None:
            taken.append(depth)
        count = kinds.index(MARK)
    return taken + [stack.pop() for _ in range(count)]
