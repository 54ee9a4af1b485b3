"""Pickles read as data: an allow-list of opcodes, and names that stand for nothing but what a table says of them.

Nothing is imported and no object of a class is made, so there is nothing that a pickle could call, patch or grow
beyond its own length. `calls` says what becomes of a known function's arguments; an object of a known class becomes
an `Instance`, which is its name and its fields.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlctl_train.config.errors import FAILED, UserError

LITERALS = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
})  # fmt: skip
"""Opcodes that push their own argument."""
CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
KEYS = (str, int, float, bytes, type(None))
"""What a key of a dictionary may be: hashing a tuple that holds a tuple a million deep would end the process."""


@dataclass(frozen=True)
class Name:
    """A function or class that a pickle refers to; never the thing itself."""

    text: str
    """Module and name, such as `torch.float32`."""


@dataclass(eq=False)
class Instance:
    """An object of a known class: what the pickle says of it."""

    kind: str
    """The class's own name, without its module, which moves from version to version."""
    arguments: tuple[Any, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What a pickle may refer to; whatever else it names is refused."""

    calls: Mapping[str, Callable[..., Any]]
    """Function or class, by module and name -> what its arguments become."""
    is_class: Callable[[str], bool]
    """Whether objects of a class of this name become instances."""
    is_constant: Callable[[str], bool]
    """Whether a name may stand for itself, such as a dtype."""


def read_pickle(data: bytes, known: Known, load_persistent: Callable[[Any], Any], where: str) -> Any:
    """Return what a pickle describes; raises UserError, which names `where` it lies, for all that is not allowed."""
    machine = _Machine(known, load_persistent, where)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        raise damaged(where, f"its pickle makes no sense ({error})") from error
    raise damaged(where, "its pickle has no end")


def refused(where: str, what: str) -> UserError:
    """Say that a file asks for what no checkpoint needs."""
    return UserError(
        f"{where}: refused; a checkpoint may not {what}",
        "do not load this file with anything else: ask whoever made it for safetensors",
        exit_code=FAILED,
    )


def damaged(where: str, what: str) -> UserError:
    """Say that a file is not what it should be."""
    return UserError(f"{where} is damaged: {what}", "copy it again from where it was written", exit_code=FAILED)


def instance(kind: Name, arguments: tuple[Any, ...]) -> Instance:
    """Return what stands for an object of a class."""
    return Instance(kind.text.rpartition(".")[2], arguments)


def checked_key(key: Any) -> Any:
    """Return a key of a dictionary that is text or a number or a tuple of such, or an instance, which is itself alone;
    raises TypeError for another.
    """
    if type(key) is tuple:
        if all(isinstance(part, KEYS) for part in key):
            return key
    elif isinstance(key, (*KEYS, Instance)):
        return key
    raise TypeError("a key of a dictionary is neither text nor number")


class _Machine:
    """The stack and memo of one pickle."""

    def __init__(self, known: Known, load_persistent: Callable[[Any], Any], where: str) -> None:
        self._known, self._load_persistent, self._where = known, load_persistent, where
        self.stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in STEPS:
            STEPS[name](self, argument)
        else:
            raise refused(self._where, f"use the pickle opcode {name}")

    def mark(self, _: Any) -> None:
        self._marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._marked.pop()
        return items

    def push_tuple(self, items: list[Any]) -> None:
        self.stack.append(tuple(items))

    def pack(self, count: int) -> None:
        items = self.stack[len(self.stack) - count :]
        if len(items) < count:
            raise IndexError("too few values for a tuple")
        self.stack[len(self.stack) - count :] = [tuple(items)]

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            target.update(checked_key(item) for item in items)
        else:
            raise TypeError("values are added to what is no list")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError("items are set in what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def name(self, module: Any, own_name: Any) -> None:
        text = f"{module}.{own_name}"
        known = self._known
        if not (text in known.calls or known.is_class(text) or known.is_constant(text)):
            raise refused(self._where, f"refer to {text}")
        self.stack.append(Name(text))

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.result(function, arguments))

    def result(self, function: Any, arguments: Any) -> Any:
        if type(function) is Name and type(arguments) is tuple:
            if function.text in self._known.calls:
                return self._known.calls[function.text](*arguments)
            if self._known.is_class(function.text):
                return instance(function, arguments)
        raise refused(self._where, f"call {function.text if type(function) is Name else 'what it made itself'}")

    def new(self, _: Any) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not Name or type(arguments) is not tuple or not self._known.is_class(kind.text):
            raise refused(self._where, f"make a {kind.text if type(kind) is Name else 'thing of a class of its own'}")
        self.stack.append(instance(kind, arguments))

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is dict:  # an OrderedDict with attributes, such as a module's `_metadata`
            return
        if type(target) is not Instance:
            raise refused(self._where, f"set the state of {target.text if type(target) is Name else 'what has none'}")
        is_pair = type(state) is tuple and len(state) <= 2  # of a dictionary and of what is in slots
        for part in state if is_pair else (state,):
            if type(part) is dict:
                target.fields.update(part)
            elif part is not None:
                target.fields["state"] = part

    def persistent(self, _: Any) -> None:
        self.stack.append(self._load_persistent(self.stack.pop()))


def _pop(machine: _Machine, _: Any) -> None:
    machine.stack.pop()


def _pop_mark(machine: _Machine, _: Any) -> None:
    machine.since_mark()


def _stack_global(machine: _Machine, _: Any) -> None:
    own_name, module = machine.stack.pop(), machine.stack.pop()
    machine.name(module, own_name)


def _set_one(machine: _Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "TUPLE": lambda machine, _: machine.push_tuple(machine.since_mark()),
    "TUPLE1": lambda machine, _: machine.pack(1),
    "TUPLE2": lambda machine, _: machine.pack(2),
    "TUPLE3": lambda machine, _: machine.pack(3),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": _set_one,
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
