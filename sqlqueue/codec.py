"""Arguments and results as JSON text and back, driven by annotations, by way of msgspec.

The rule: what is written is read back at once, and refused unless it equals what was given. So a
datetime without an annotation, which would come back as text, is an error and no surprise. No
message holds a value or a key of a mapping, since those may be secret: only types, positions and
the names of arguments and fields.

msgspec says what is stored how; pydantic models, paths, and subclasses of str, float and date are
added here. jsonb changes three things: a float from 1e16 up comes back as an int unless it is
annotated as float, -0.0 comes back as 0.0, and the keys of objects change their order.
"""

import inspect
from collections.abc import Callable
from datetime import date, datetime
from functools import cache, cached_property
from pathlib import PurePath
from types import GenericAlias
from typing import Any, get_type_hints

from msgspec import Raw, ValidationError, json, to_builtins

from sqlqueue.errors import BadArguments, NotRepresentable

MAX_BYTES = 1 << 20  # of UTF-8: the arguments of one call, or one result
MAX_DEPTH = 64  # lists and objects inside one another, the object of arguments included
_TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels, or holds itself"
_NO_TEXT = "holds a NUL character or a lone surrogate, which Postgres cannot store"


class Plain:
    """A cipher that is none. Others turn JSON text, an object, into other such text, and back."""

    def seal(self, text: str) -> str:
        """Return what is stored."""
        return text

    def open(self, text: str) -> str:
        """Return what was sealed."""
        return text


class Shape:
    """How the arguments of one function are stored: one JSON object, by the names of parameters.

    Values that have no name of their own (positional-only ones and `*args`) are a list under the
    key "*". Annotations are looked up when first needed, so they may name what is defined later.
    With `skip_first` the first parameter is no argument: a transactional task's session.
    """

    def __init__(self, function: Callable[..., Any], skip_first: bool = False) -> None:
        self._function = function
        self._name = getattr(function, "__qualname__", type(function).__qualname__)
        parameters = list(inspect.signature(function).parameters.values())
        if skip_first and not any(p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters[:1]):
            raise BadArguments(f"{self._name} has no first parameter to take the session")
        parameters = parameters[skip_first:]
        self._signature = inspect.Signature(parameters)
        # The names of each kind of parameter, in the order of the kinds.
        names = [[p.name for p in parameters if p.kind == kind] for kind in range(5)]
        self._nameless, self._order, self._rest, by_name, self._extra = names
        self._all = frozenset(self._order + by_name)
        # What has no name of its own is required and not in `_all`: such calls never just fit.
        self._required = {p.name for p in parameters if p.default is p.empty}.union(self._nameless)

    def encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Write the arguments of a call as JSON text; defaults are not filled in.

        Raises BadArguments if they do not fit the signature, NotRepresentable if one of them
        does not fit its annotation or cannot be stored.
        """
        if not (args or kwargs or self._required):
            return "{}"
        named = dict(zip(self._order, args, strict=False)) | kwargs
        if not self._fits(named) or len(named) != len(args) + len(kwargs):
            named = self._bind(args, kwargs).arguments
        stored = {name: _write(name, one, self._decoders[name]) for name, one in named.items()}
        nameless = [stored.pop(name) for name in self._nameless if name in stored]
        for name in self._rest:
            nameless += json.decode(stored.pop(name, "[]"), type=list[Raw])
        for name in self._extra:
            stored |= json.decode(stored.pop(name, "{}"), type=dict[str, Raw])
        if "*" in stored:
            raise NotRepresentable("arguments", 'no argument can be named "*"')
        return _text("arguments", stored | {"*": nameless} if nameless else stored)

    def decode(self, text: str) -> tuple[list[Any], dict[str, Any]]:
        """Read the positional and keyword arguments to call the function with.

        Raises BadArguments if they do not fit its signature (any more), NotRepresentable if a
        value does not fit its annotation.
        """
        named = {} if text == "{}" else _read("arguments", text, _OBJECT, checked=False)
        if self._fits(named):
            return [], {name: _read(name, raw, self._decoders[name]) for name, raw in named.items()}
        nameless = _read("*", named.pop("*", "[]"), _decoder(list[Raw]), checked=False)
        at = len(self._nameless)
        if len(nameless) > at and named.keys() >= set(self._order):
            # Values for *args: what was named before them must be passed by position too.
            nameless[at:at] = [named.pop(name) for name in self._order]
        bound = self._bind(nameless, named)
        for name, raw in bound.arguments.items():
            bound.arguments[name] = _read(name, json.encode(raw), self._decoders[name])
        return list(bound.args), bound.kwargs

    def _fits(self, named: dict[str, Any]) -> bool:
        """Whether a call with these names needs no binding: all have names, none is missing."""
        return self._required <= named.keys() <= self._all

    def _bind(self, args: Any, kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """Match arguments with parameters. Raises BadArguments, which names no values."""
        try:
            return self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise BadArguments(f"{self._name}: {error}") from error

    @property
    def returns(self) -> Any:
        """The annotation of the result, for `encode_value`; Any if there is none."""
        return self._decoders["return"].type

    @cached_property
    def _decoders(self) -> "dict[str, json.Decoder[Any]]":
        """By parameter, and of the result, so that it is known to be storable before a job runs."""
        try:
            hints = get_type_hints(self._function, include_extras=True)
        except Exception as error:  # annotations are user code
            raise BadArguments(f"{self._name}: annotations cannot be looked up: {error}") from error
        types = {name: hints.get(name, Any) for name in (*self._signature.parameters, "return")}
        types |= {name: GenericAlias(tuple, (types[name], ...)) for name in self._rest}
        types |= {name: GenericAlias(dict, (str, types[name])) for name in self._extra}
        return {name: _decoder(one, f"{self._name}: {name}: ") for name, one in types.items()}


# Writes a call of a function that is not known here: those who name it read it by theirs.
encode_call = Shape(lambda *args, **kwargs: None).encode


def encode_value(value: Any, annotation: Any = None) -> str:
    """Write a result as JSON text; None whatever the annotation. Raises NotRepresentable."""
    if value is None:
        return "null"
    return _text("result", _write("result", value, _decoder(annotation or Any)))


def decode_value(text: str, annotation: Any = None) -> Any:
    """Read a result. Raises NotRepresentable if it does not fit the annotation."""
    return None if text == "null" else _read("result", text, _decoder(annotation or Any))


def decode_headers(text: str | None) -> dict[str, str]:
    """Read the headers of a job."""
    return json.decode(text or "{}", type=dict[str, str])


def _text(where: str, tree: Any) -> str:
    text = json.encode(tree)
    if len(text) > MAX_BYTES:
        raise NotRepresentable(where, f"{len(text)} bytes, {MAX_BYTES} allowed; store it elsewhere")
    return text.decode()


def _write(where: str, value: Any, decoder: "json.Decoder[Any]") -> Raw:
    """Write `value` as JSON that reads back equal."""
    try:
        text = json.encode(value, enc_hook=_plain)
        if _read(where, text, decoder) == value:
            return Raw(text)
    except Exception as error:  # models and their comparisons are user code
        raise _refusal(where, error, decoder.type) from None
    raise NotRepresentable(where, f"a {type(value).__name__} would come back changed; annotate it")


def _read(where: str, text: Any, decoder: "json.Decoder[Any]", *, checked: bool = True) -> Any:
    try:
        value = decoder.decode(text)
        if checked and type(value) is not int and (type(value) is not str or "\0" in value):
            _check(where, to_builtins(value, builtin_types=(datetime,), enc_hook=_plain))
    except Exception as error:  # constructors and models are user code
        raise _refusal(where, error, decoder.type) from None
    return value


def _refusal(where: str, error: BaseException, kind: Any) -> NotRepresentable:
    """Describe an error without the values that its text may quote."""
    error = error.__cause__ or error  # msgspec wraps those of constructors and models
    text, _, path = str(error).partition(" - at `$")
    if isinstance(error, NotRepresentable):
        return NotRepresentable(error.where or where, error.problem)
    if isinstance(error, ValidationError) and text.startswith(("Expected", "Object", "Number")):
        return NotRepresentable(where + path.rstrip("`"), text)
    if isinstance(error, RecursionError | UnicodeEncodeError):
        return NotRepresentable(where, _TOO_DEEP if isinstance(error, RecursionError) else _NO_TEXT)
    return NotRepresentable(where, f"does not fit {kind} ({type(error).__name__})")


def _check(where: str, tree: Any, room: int = MAX_DEPTH - 1) -> None:
    """Refuse what msgspec takes and Postgres or we do not; `tree` may be `room` levels deep."""
    if isinstance(tree, str) and "\0" in tree:
        raise NotRepresentable(where, _NO_TEXT)
    if isinstance(tree, datetime) and tree.utcoffset() is None:
        raise NotRepresentable(where, "a datetime without a time zone is no instant; give it one")
    if isinstance(tree, dict | list | tuple):
        if room == 0:
            raise NotRepresentable(where, _TOO_DEEP)
        for one in (*tree, *tree.values()) if isinstance(tree, dict) else tree:
            _check(where, one, room - 1)


def _plain(value: Any) -> Any:
    """Turn what msgspec does not know into what it does."""
    if hasattr(value, "model_validate"):  # of pydantic
        return value.model_dump(mode="json", by_alias=True, round_trip=True)
    if isinstance(value, PurePath | date | str | float):  # a subclass, but for paths
        return float(value) if isinstance(value, float) else str(value)
    raise NotRepresentable("", f"a {type(value).__qualname__} cannot be stored; annotate it")


def _rebuilt(kind: Any, form: Any) -> Any:
    """Undo `_plain`."""
    if hasattr(kind, "model_validate"):
        return kind.model_validate(form)
    return kind(form) if issubclass(kind, PurePath) else form


@cache
def _decoder(annotation: Any, where: str = "") -> "json.Decoder[Any]":
    try:
        return json.Decoder(annotation, dec_hook=_rebuilt)
    except Exception as error:  # annotations are user code
        raise BadArguments(f"{where}{annotation} cannot be stored: {error}") from error


_OBJECT = _decoder(dict[str, Raw])
