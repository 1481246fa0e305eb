"""Arguments and results as JSON text and back, driven by annotations.

What is written comes back as what was given, or is refused before anything is sent. No message
holds a value or a key of a mapping, since those may be secret: only types, positions and the
names of arguments and fields.

How values are stored: Decimal, UUID, date, datetime (with its offset, not its zone's name) and
Path as text, bytes as base64, timedelta as a number of seconds, an Enum as its value, sets as
sorted lists, dataclasses as objects of what their constructors take, pydantic and msgspec models
as they dump themselves. Without an annotation only str, int, float, bool, None, list and dict are
taken; a tuple is not. jsonb changes three things: a float from 1e16 up comes back as an int unless
it is annotated as float, -0.0 comes back as 0.0, and the keys of objects change their order.
"""

import inspect
import json
import math
import re
import sys
import typing
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from functools import cache, cached_property, partial
from inspect import Parameter
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union
from uuid import UUID

from sqlqueue.errors import BadArguments, NotRepresentable

MAX_BYTES = 1 << 20  # of UTF-8: the arguments of one call, or one result
MAX_DEPTH = 64  # lists and objects inside one another, the object of arguments included
_MAX_INT = 10**4300  # Python reads no number of more digits, unless it is told to
_TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels, or holds itself"

# Circles are found by their depth before the encoder sees them.
_ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))
_DECODER = json.JSONDecoder()
_SURROGATE = re.compile("[\ud800-\udfff]")

_Convert = Callable[[Any], Any]


class _Codec(NamedTuple):
    """`write` turns a value into plain JSON values, `read` turns those back."""

    write: _Convert
    read: _Convert


def _same(value: Any) -> Any:
    return value


_WRITE, _READ = 0, 1  # the sides of a codec
_ANY = _Codec(_same, _same)


class Shape:
    """How the arguments of one function are stored: one JSON object, by the names of parameters.

    Values that have no name of their own (positional-only ones and `*args`) are a list under the
    key "*". Annotations are looked up when first needed, so they may name what is defined later.
    With `skip_first` the first parameter is no argument: a transactional task's session.
    """

    def __init__(self, function: Callable[..., Any], skip_first: bool = False) -> None:
        self._function = function
        self._name = getattr(function, "__qualname__", type(function).__qualname__)
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        if skip_first and not any(p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters[:1]):
            raise BadArguments(f"{self._name} has no first parameter to take the session")
        parameters = parameters[skip_first:]
        self._signature = signature.replace(parameters=parameters)

        def names(kind: Any) -> list[str]:
            return [p.name for p in parameters if p.kind is kind]

        self._nameless = names(Parameter.POSITIONAL_ONLY)
        self._order = names(Parameter.POSITIONAL_OR_KEYWORD)
        self._rest = names(Parameter.VAR_POSITIONAL)
        self._extra = names(Parameter.VAR_KEYWORD)
        self._is_plain = not (self._nameless or self._rest or self._extra)
        self._all = frozenset(p.name for p in parameters)
        self._required = frozenset(p.name for p in parameters if p.default is p.empty)

    def encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Write the arguments of a call as JSON text; defaults are not filled in.

        Raises BadArguments if they do not fit the signature, NotRepresentable if one of them
        does not fit its annotation or cannot be stored.
        """
        named = dict(zip(self._order, args, strict=False)) | kwargs
        if not self._fits(named) or len(named) != len(args) + len(kwargs):
            named = self.bind(args, kwargs).arguments
        named = _convert(named.items(), self.codecs, _WRITE, "{key}")
        if not self._is_plain:
            nameless = [named.pop(name) for name in self._nameless if name in named]
            for name in self._rest:
                nameless += named.pop(name, [])
            for name in self._extra:
                named |= _checked_names(named.pop(name, {}))
            named |= {"*": nameless} if nameless else {}
        return _dumps("arguments", _checked(named))

    def decode(self, text: str) -> tuple[list[Any], dict[str, Any]]:
        """Read the positional and keyword arguments to call the function with.

        Raises BadArguments if they do not fit its signature (any more), NotRepresentable if a
        value does not fit its annotation.
        """
        named = _loads("arguments", text)
        if type(named) is not dict or type(named.get("*", [])) is not list:
            raise BadArguments(f"{self._name}: what is stored is no object of arguments")
        named = _checked(named)
        if self._fits(named):
            return [], _convert(named.items(), self.codecs, _READ, "{key}")
        nameless = named.pop("*", [])
        at = len(self._nameless)
        if len(nameless) > at and named.keys() >= set(self._order):
            # Values for *args: what was named before them must be passed by position too.
            nameless[at:at] = [named.pop(name) for name in self._order]
        bound = self.bind(nameless, named)
        bound.arguments = _convert(bound.arguments.items(), self.codecs, _READ, "{key}")
        return list(bound.args), bound.kwargs

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """Match arguments with parameters. Raises BadArguments, which names no values."""
        try:
            return self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise BadArguments(f"{self._name}: {error}") from error

    def _fits(self, named: dict[str, Any]) -> bool:
        """Whether a call with these names needs no binding."""
        return self._is_plain and self._required <= named.keys() <= self._all

    @property
    def returns(self) -> Any:
        """The annotation of the result, for `encode_value`; Any if there is none."""
        return self._hints.get("return", Any)

    @cached_property
    def codecs(self) -> dict[str, _Codec]:
        """The codec of each parameter; `*args` are a tuple, `**kwargs` a dict."""
        hints = {name: self._hints.get(name, Any) for name in self._signature.parameters}
        hints |= {name: GenericAlias(tuple, (hints[name], ...)) for name in self._rest}
        hints |= {name: GenericAlias(dict, (str, hints[name])) for name in self._extra}
        return {name: _codec(hint) for name, hint in hints.items()}

    @cached_property
    def _hints(self) -> dict[str, Any]:
        try:
            return typing.get_type_hints(self._function, include_extras=True)
        except Exception as error:  # annotations are user code
            problem = f"its annotations cannot be looked up: {error}"
            raise BadArguments(f"{self._name}: {problem}") from error


def encode_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Write the arguments of a function whose signature is not known here.

    Positional ones are a list under the key "*". Raises NotRepresentable.
    """
    named = _checked_names(kwargs) | ({"*": list(args)} if args else {})
    return _dumps("arguments", _checked(named))


def encode_value(value: Any, annotation: Any = None) -> str:
    """Write a result as JSON text; None whatever the annotation. Raises NotRepresentable."""
    if value is None:
        return "null"
    named = _convert([("result", value)], {}, _WRITE, "{key}", _codec(annotation or Any))
    return _dumps("result", _checked(named)["result"])


def decode_value(text: str, annotation: Any = None) -> Any:
    """Read a result. Raises NotRepresentable if it does not fit the annotation."""
    if text == "null":
        return None
    named = _checked({"result": _loads("result", text)})
    return _convert(named.items(), {}, _READ, "{key}", _codec(annotation or Any))["result"]


def decode_headers(text: str | None) -> dict[str, str]:
    """Read the headers of a job."""
    headers: dict[str, str] = json.loads(text or "{}")
    return headers


def _dumps(where: str, tree: Any) -> str:
    text = _ENCODER.encode(tree)
    if (size := len(text.encode())) > MAX_BYTES:
        problem = f"{size} bytes as JSON, {MAX_BYTES} allowed; store them elsewhere, pass their key"
        raise NotRepresentable(where, problem)
    return text


def _loads(where: str, text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):  # the error may quote the text
        raise NotRepresentable(where, "is no JSON that Python can read") from None


def _checked(named: dict[str, Any]) -> dict[str, Any]:
    return _convert(named.items(), {}, _WRITE, "{key}", _CHECK)


def _checked_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    if "*" in kwargs:
        raise NotRepresentable("arguments", 'no argument can be named "*"')
    _checked({"arguments": dict.fromkeys(kwargs)})
    return kwargs


def _check(value: Any, room: int = MAX_DEPTH - 1) -> Any:
    """Return `value` if jsonb gives it back as it is; it may be `room` levels deep."""
    kind, problem = type(value), ""
    if kind is str:
        if "\0" in value or (not value.isascii() and _SURROGATE.search(value)):
            problem = "holds a NUL character or a lone surrogate, which Postgres cannot store"
    elif kind is int:
        if not -_MAX_INT < value < _MAX_INT:
            problem = "is an int of more than 4300 digits"
    elif kind is float:
        if not math.isfinite(value):
            problem = "is NaN or infinite, which is no number in JSON"
    elif kind is dict or kind is list:
        _check_items(value, room)
    elif value is not None and kind is not bool:
        problem = f"a {_name_of(kind)} would come back from JSON as something else; annotate it"
    if problem:
        raise NotRepresentable("", problem)
    return value


def _check_items(value: Any, room: int) -> None:
    if room == 0:
        raise NotRepresentable("", _TOO_DEEP)
    place, items = "[{}]", value
    if type(value) is dict:
        place, items = ".values()[{}]", value.values()
        for key in value:
            if type(key) is not str:
                raise NotRepresentable("", f"has a key of type {_name_of(type(key))}, not str")
            _check(key)
    done = 0
    try:
        for item in items:
            _check(item, room - 1)
            done += 1
    except NotRepresentable as error:
        raise NotRepresentable(place.format(done) + error.where, error.problem) from None


_CHECK = _Codec(_check, _check)


def _convert(
    pairs: Iterable[tuple[Any, Any]],
    codecs: Mapping[Any, _Codec],
    side: int,
    place: str,
    other: _Codec = _ANY,
) -> dict[Any, Any]:
    """Convert each item by the codec for its key, else by `other`; an error says its place."""
    done: dict[Any, Any] = {}
    try:
        for key, item in pairs:
            done[key] = codecs.get(key, other)[side](item)
    except NotRepresentable as error:
        where = place.format(key=key, index=len(done)) + error.where
        raise NotRepresentable(where, error.problem) from None
    return done


def _step(kind: Any, accepted: Any, convert: _Convert, is_exact: bool = False) -> _Convert:
    """Make a converter that refuses what is not `accepted`, or what `convert` raises for.

    The error that `convert` raised is dropped: it may quote the value.
    """

    def step(value: Any) -> Any:
        if not isinstance(value, accepted) or (is_exact and type(value) is not kind):
            problem = f"expected {_name_of(kind)}, got {_name_of(type(value))}"
            raise NotRepresentable("", problem)
        try:
            return convert(value)
        except NotRepresentable:
            raise
        except BadArguments as error:  # names parameters only
            problem = str(error)
        except RecursionError:
            problem = _TOO_DEEP
        except Exception as error:  # constructors and models are user code
            problem = f"does not fit {_name_of(kind)} ({type(error).__name__})"
        raise NotRepresentable("", problem)

    return step


def _name_of(annotation: Any) -> str:
    return annotation.__qualname__ if isinstance(annotation, type) else str(annotation)


def _leaf(kind: Any, forms: Any, to_form: _Convert, from_form: _Convert) -> _Codec:
    """The codec of a type that is stored as one of the JSON types `forms`."""
    return _Codec(_step(kind, kind, to_form), _step(kind, forms, from_form))


def _codec(annotation: Any) -> _Codec:
    origin, args = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if isinstance(annotation, typing.NewType):
        return _codec(annotation.__supertype__)
    if origin is Annotated:
        return _codec(args[0])
    if origin in (Union, UnionType):
        return _union(annotation, args)
    if origin is Literal:
        return _literal(annotation, args)
    if isinstance(origin, type) and origin in _LISTS:
        return _items(annotation, origin, args)
    if isinstance(origin, type) and origin in (dict, Mapping):
        return _dict(annotation, origin, *(args or (str, Any)))
    if isinstance(origin, type) and not args:
        return _LEAVES.get(origin) or _class(origin)
    return _unsupported(annotation)


def _unsupported(annotation: Any) -> _Codec:
    def refuse(_: Any) -> Any:
        raise NotRepresentable("", f"a value annotated as {_name_of(annotation)} cannot be stored")

    return _Codec(refuse, refuse)


def _union(annotation: Any, args: tuple[Any, ...]) -> _Codec:
    """The first part that fits; refused when written if reading would choose another."""
    codecs = [_codec(arg) for arg in args]

    def fit(value: Any, side: int) -> tuple[_Codec, Any]:
        errors = []
        for codec in codecs:
            try:
                return codec, codec[side](value)
            except NotRepresentable as error:
                errors.append(error)
        problem = f"{errors[0].problem}, and no other part of {annotation} fits"
        raise NotRepresentable(errors[0].where, problem)

    def write(value: Any) -> Any:
        codec, form = fit(value, _WRITE)
        if fit(form, _READ)[0] is not codec:
            raise NotRepresentable("", f"would come back as another part of {annotation}")
        return form

    return _Codec(write, lambda form: fit(form, _READ)[1])


def _literal(annotation: Any, args: tuple[Any, ...]) -> _Codec:
    pairs = [(arg, _codec(type(arg)).write(arg)) for arg in args]

    def other(given: Any, side: int) -> Any:
        for pair in pairs:
            if type(pair[side]) is type(given) and pair[side] == given:
                return pair[1 - side]
        raise NotRepresentable("", f"is none of {annotation}")

    return _Codec(lambda value: other(value, _WRITE), lambda form: other(form, _READ))


def _items(annotation: Any, origin: Any, args: tuple[Any, ...]) -> _Codec:
    """Lists, sets and tuples. Sets are sorted: the same set is always the same text."""
    accepted, build = _LISTS[origin]
    is_fixed = origin is tuple and args and args[-1] is not ...
    codecs = [_codec(arg) for arg in args if arg is not ...] or [_ANY]
    by_index = dict(enumerate(codecs)) if is_fixed else {}

    def each(side: int, items: Any) -> Any:
        pairs = zip(by_index, items, strict=True) if is_fixed else enumerate(items)
        return _convert(pairs, by_index, side, "[{key}]", codecs[0]).values()

    order = partial(sorted, key=repr) if build in (set, frozenset) else list
    return _Codec(
        _step(annotation, accepted, lambda value: order(each(_WRITE, value))),
        _step(annotation, (list, tuple), lambda form: build(each(_READ, form))),
    )


def _dict(annotation: Any, origin: Any, key: Any, item: Any) -> _Codec:
    codec = _codec(item)

    def each(side: int, items: Any) -> Any:
        return _convert(items.items(), {}, side, ".values()[{index}]", codec)

    if key not in (str, Any):
        return _unsupported(annotation)
    write, read = partial(each, _WRITE), partial(each, _READ)
    return _Codec(_step(annotation, origin, write), _step(annotation, dict, read))


def _class(kind: Any) -> _Codec:
    if issubclass(kind, Enum):
        return _leaf(kind, object, lambda member: member.value, kind)
    if is_dataclass(kind):
        return _record(kind)
    if hasattr(kind, "__struct_fields__"):  # of msgspec
        msgspec = sys.modules["msgspec"]
        return _model(kind, msgspec.to_builtins, partial(msgspec.convert, type=kind))
    if hasattr(kind, "model_validate"):  # of pydantic
        dump = partial(kind.model_dump, mode="json", by_alias=True, round_trip=True)
        return _model(kind, dump, kind.model_validate)
    return _unsupported(kind)


def _model(kind: Any, dump: _Convert, load: _Convert) -> _Codec:
    """A model that knows its own JSON; it is loaded once before it is sent."""

    def checked(value: Any) -> Any:
        form = _DECODER.decode(_ENCODER.encode(dump(value)))  # makes tuples lists
        load(form)
        return form

    return _Codec(_step(kind, kind, checked, is_exact=True), _step(kind, object, load))


def _record(kind: Any) -> _Codec:
    """A dataclass: an object with what its constructor takes."""

    def write(value: Any) -> Any:
        codecs = _constructor(kind).codecs
        fields = [(name, getattr(value, name)) for name in codecs]
        return _convert(fields, codecs, _WRITE, ".{key}")

    def read(form: Any) -> Any:
        fields = _constructor(kind).bind((), form).arguments
        return kind(**_convert(fields.items(), _constructor(kind).codecs, _READ, ".{key}"))

    return _Codec(_step(kind, kind, write, is_exact=True), _step(kind, dict, read))


# Called when first needed, since a class may hold itself.
_constructor = cache(Shape)


def _aware(moment: datetime) -> datetime:
    if moment.utcoffset() is None:
        raise NotRepresentable("", "a datetime without a time zone is no instant; give it one")
    return moment


def _finite(number: Decimal) -> Decimal:
    if not number.is_finite():
        raise NotRepresentable("", "is NaN or infinite")
    return number


def _seconds(duration: timedelta) -> float:
    seconds = duration.total_seconds()
    if timedelta(seconds=seconds) != duration:  # from 272 years on, if there are microseconds
        raise NotRepresentable("", "is too long to be kept to the microsecond")
    return seconds


def _int(value: int) -> int:
    return value if isinstance(value, bool) else int(value)


_FLOAT = _step(float, (int, float), float)
# What is accepted, and what is made of a list.
_LISTS: dict[Any, tuple[Any, Any]] = {
    Sequence: ((list, tuple), list),
    **{kind: (kind, kind) for kind in (list, tuple, set, frozenset)},
}
_LEAVES: dict[Any, _Codec] = {
    **dict.fromkeys((Any, object, Parameter.empty), _ANY),
    NoneType: _leaf(NoneType, NoneType, _same, _same),
    bool: _leaf(bool, bool, _same, _same),
    int: _leaf(int, int, _int, _int),
    float: _Codec(_FLOAT, _FLOAT),
    str: _leaf(str, str, str.__str__, _same),  # str() of an Enum is its name
    bytes: _leaf(bytes, str, lambda b: b64encode(b).decode(), partial(b64decode, validate=True)),
    Decimal: _leaf(Decimal, str, lambda v: str(_finite(v)), lambda text: _finite(Decimal(text))),
    UUID: _leaf(UUID, str, str, UUID),
    Path: _leaf(Path, str, str, Path),
    datetime: _leaf(
        datetime,
        str,
        lambda value: _aware(value).isoformat(),
        lambda text: _aware(datetime.fromisoformat(text)),
    ),
    # A datetime is a date too: its text is refused.
    date: _leaf(date, str, lambda d: str(date.fromisoformat(d.isoformat())), date.fromisoformat),
    timedelta: _leaf(timedelta, (int, float), _seconds, lambda form: timedelta(seconds=form)),
}
