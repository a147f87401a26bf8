# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tensors without values on the CPU, on which operations cost some microseconds each.

What an operation returns, in shapes and in what shares memory with what, depends on the shapes that it is given.
`torch._subclasses.FakeTensorMode` tells it, at hundreds of microseconds; here it is asked once for every kind of call.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten


class Home:
    """The memory of one tensor and its views, for as long as any of them lives.

    Attributes:
        size: in bytes.
    """

    __slots__ = ("size", "__weakref__")

    def __init__(self, size: int):
        self.size = size

    def nbytes(self) -> int:
        return self.size


class Ghost(torch.Tensor):
    """A tensor with a `form` (`form_of`) and a `home` in place of memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})

    def __repr__(self):
        return f"Ghost({list(self.shape)}, {self.dtype})"


def ghost(form: tuple, home: Home | None = None) -> Ghost:
    """A ghost of `form`, as `form_of`; in a home of its own if none is given."""
    shape, stride, offset, dtype = form
    made = torch.Tensor._make_wrapper_subclass(
        Ghost, shape, strides=stride, storage_offset=offset, dtype=dtype, device="cpu"
    )
    made.form, made.home = form, home or Home(_bytes(form))
    return made


def empty(shape, dtype: torch.dtype = torch.float32) -> Ghost:
    """A contiguous ghost of `shape`."""
    stride, strides = 1, []
    for size in reversed(tuple(shape)):
        strides.append(stride)
        stride *= max(size, 1)
    return ghost((tuple(shape), tuple(reversed(strides)), 0, dtype))


def form_of(tensor) -> tuple:
    """(shape, stride, offset, dtype) of any tensor."""
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype


def memory_of(tensor):
    """What a tensor shares with its views."""
    return tensor.home if isinstance(tensor, Ghost) else tensor.untyped_storage()


def _bytes(form) -> int:
    shape, stride, offset, dtype = form
    last = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride))
    return (offset + last) * dtype.itemsize


_KNOWN: dict[tuple, list] = {}  # call -> what `_learn` tells of it
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_FAKE = FakeTensorMode(allow_non_fake_inputs=True)
_FAKE.cache_enabled = False  # nothing is asked twice
CPU = torch.device("cpu")
ARGUMENT, VIEW, NEW, VALUE = range(4)  # what an output is


def call(func, args, kwargs):
    """What `func` returns: of real tensors what it does, of ghosts ghosts.

    Raises:
        Exception: of any kind, from an operation that needs values.
    """
    key, tensors = [func], []
    try:
        _look_at(args, key, tensors)
        if kwargs:
            _look_at(kwargs.items(), key, tensors)
        key = tuple(key)
    except TypeError:  # an argument that does not compare, such as a generator
        key = None
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    known = _KNOWN.get(key)
    if known is None:
        if not any(isinstance(tensor, Ghost) for tensor in tensors):
            return func(*args, **kwargs)
        known = _learn(func, args, kwargs, tensors)
        if key is not None and not any(kind == VALUE and value is not None for kind, value, _ in known[0]):
            _KNOWN[key] = known
    outputs, spec = known
    if spec is None:
        what, which, form = outputs[0]
        if what == NEW:  # as most are
            return ghost(form, Home(which[1]))
        return _made(what, which, form, tensors, {})
    homes = {}
    return tree_unflatten([_made(*output, tensors, homes) for output in outputs], spec)


def _look_at(values, key: list, tensors: list) -> None:
    """Add what tells `values` from others to `key`, and the tensors among them to `tensors`."""
    for value in values:
        kind = value.__class__
        if kind in _PLAIN:
            key += kind, value
        elif kind is Ghost:
            tensors.append(value)
            key.append(value.form)
        elif isinstance(value, torch.Tensor):
            tensors.append(value)
            key += "real", form_of(value)
        elif kind is list or kind is tuple or kind is torch.Size:
            key.append(len(value))
            _look_at(value, key, tensors)
        else:
            raise TypeError


def _made(what, which, form, tensors, homes):
    """An output, from what `_learn` tells of it."""
    if what == ARGUMENT:
        return tensors[which]
    if what == VIEW:
        return ghost(form, tensors[which].home)
    if what == VALUE:
        return which
    number, size = which
    if number not in homes:
        homes[number] = Home(size)
    return ghost(form, homes[number])


def _learn(func, args, kwargs, tensors):
    """(outputs, how they lie in what is returned: None for one alone), from fake tensors in the places of ghosts.

    Of an output: whether it is an argument or a view of one, and of which; or new, with (which of the new ones,
    bytes); or no tensor, and its value.
    """
    if torch.Tag.inplace_view in func.tags:
        return _changed(func, args, kwargs, tensors)
    returns = func._schema.returns
    if not returns:  # what changes values alone
        return [(VALUE, None, None)], None
    if len(returns) == 1 and returns[0].alias_info and returns[0].alias_info.is_write and args[0] is tensors[0]:
        return [(ARGUMENT, 0, None)], None
    fakes = {}
    for tensor in tensors:
        if isinstance(tensor, Ghost) and id(tensor) not in fakes:
            fakes[id(tensor)] = _fake(tensor)
    places = {id(fakes.get(id(tensor), tensor)): place for place, tensor in enumerate(tensors)}
    storages = {
        fakes[id(tensor)].untyped_storage()._cdata: place
        for place, tensor in enumerate(tensors)
        if isinstance(tensor, Ghost)
    }
    fake_args, fake_kwargs = tree_map_only(Ghost, lambda tensor: fakes[id(tensor)], (args, kwargs))
    with _FAKE:
        leaves, spec = tree_flatten(func(*fake_args, **fake_kwargs))
    outputs, homes = [], {}
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            outputs.append((VALUE, leaf, None))
        elif id(leaf) in places:
            outputs.append((ARGUMENT, places[id(leaf)], None))
        elif (storage := leaf.untyped_storage())._cdata in storages:
            outputs.append((VIEW, storages[storage._cdata], form_of(leaf)))
        else:
            number = homes.setdefault(storage._cdata, len(homes))
            outputs.append((NEW, (number, storage.nbytes()), form_of(leaf)))
    return outputs, None if spec.is_leaf() else spec


def _fake(tensor: Ghost) -> FakeTensor:
    shape, stride, offset, dtype = tensor.form
    with no_dispatch():
        whole = torch.empty(tensor.home.size // dtype.itemsize, dtype=dtype, device="meta")
        meta = whole.as_strided(shape, stride, offset).requires_grad_(tensor.requires_grad)
        return FakeTensor(_FAKE, meta, CPU)


def _changed(func, args, kwargs, tensors):
    """As `_learn`, of an operation that makes its argument a view of itself, such as `squeeze_`."""
    with no_dispatch():
        func(*args, **kwargs)
    for tensor in tensors:
        if isinstance(tensor, Ghost):
            tensor.form = form_of(tensor)
    return [(VALUE, tensors[0], None)], None


def seen(tensor: Ghost) -> Ghost:
    """`tensor`, as an operation has made it, for those who watch what operations return."""
    return tensor.detach()


class RememberedOnMeta(TorchDispatchMode):
    """Operations on the meta device return what they returned before: there, much of PyTorch tells it in Python.

    What should be a view is a tensor of its own, which only those who look at shapes can do with.
    """

    def __init__(self):
        super().__init__()
        self.known: dict[tuple, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, key, tensors = kwargs or {}, [func], []
        try:
            _look_at(args, key, tensors)
            _look_at(kwargs.items(), key, tensors)
        except TypeError:
            return func(*args, **kwargs)
        if not tensors or func._schema.is_mutable or not all(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        if (key := tuple(key)) not in self.known:
            output = func(*args, **kwargs)
            if not isinstance(output, torch.Tensor) or not output.is_meta:
                return output
            self.known[key] = form_of(output)
        shape, stride, _, dtype = self.known[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
