import inspect
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from http import HTTPStatus
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NewType,
    Optional,
    Protocol,
    TypeVar,
)
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from sqlqueue.codec import (
    MAX_BYTES,
    MAX_DEPTH,
    Shape,
    decode_headers,
    decode_value,
    encode_call,
    encode_value,
)
from sqlqueue.errors import BadArguments, NotRepresentable

SECRET = "hunter2"
T = TypeVar("T")


class Color(Enum):
    RED = "red"


class Mixed(Enum):
    RED = "red"
    NONE = None


class Level(IntEnum):
    HIGH = 3


class Unit(StrEnum):
    METRE = "m"


class Text(str):
    pass


class Moment(datetime):
    pass


@dataclass
class Item:
    price: Decimal
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Order:
    id: UUID
    items: list[Item]
    note: str | None = None
    total: int = field(init=False, default=0)


@dataclass(frozen=True)
class BulkOrder(Order):
    pass


@dataclass
class Tree:
    branches: "list[Tree]"


@dataclass(eq=False)
class Link:
    next: "Link | None" = None


@dataclass
class Secretive:
    password: InitVar[str] = ""


@dataclass
class Positive:
    number: int

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"not positive: {self.number} {SECRET}")


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    at: datetime
    sizes: set[int] = set()
    shelves: dict[int, tuple[bytes, ...]] = {}
    name: str = pydantic.Field(default="x", alias="fullName")

    @pydantic.computed_field
    def size(self) -> int:
        return len(self.sizes)


class Unreadable(pydantic.BaseModel):
    name: str = pydantic.Field(validation_alias="in", serialization_alias="out")


class Struct(msgspec.Struct):
    at: datetime
    pair: tuple[int, str]
    price: Decimal
    names: dict[str, bytes] = {}


class Weight(pydantic.BaseModel):
    kg: float | None


class Height(msgspec.Struct):
    m: float | None


class Box(Generic[T]):
    pass


class Readable(Protocol):
    def read(self) -> str: ...


UserId = NewType("UserId", int)
AN_ID = UUID("0197f0d2-8f1c-7c0e-a2a5-1f0e6c1f9d3b")
NOON = datetime(2026, 3, 1, 12, 0, 0, 1, timezone(timedelta(hours=-3, minutes=-30)))
AN_ORDER = Order(id=AN_ID, items=[Item(Decimal("1.10"), 2), Item(Decimal("3"))])

ROUND_TRIPS = [
    (Any, {"a": [1, 2.5, True, None, "é\n😀"]}, '{"a":[1,2.5,true,null,"é\\n😀"]}'),
    (object, "x", '"x"'),
    (None, [1], "[1]"),
    (bool, True, "true"),
    (int, 10**4299, str(10**4299)),
    (float, 1.5, "1.5"),
    (str, "", '""'),
    (Decimal, Decimal("1.10"), '"1.10"'),
    (UUID, AN_ID, f'"{AN_ID}"'),
    (datetime, NOON, '"2026-03-01T12:00:00.000001-03:30"'),
    (date, date(2026, 3, 1), '"2026-03-01"'),
    (timedelta, timedelta(days=-1, microseconds=1), '"-PT86399.999999S"'),
    (timedelta, timedelta.max, '"P999999999DT86399.999999S"'),
    (bytes, b"\0\xff", '"AP8="'),
    (Path, Path("/a/b"), '"/a/b"'),
    (Color, Color.RED, '"red"'),
    (Level, Level.HIGH, "3"),
    (Unit, Unit.METRE, '"m"'),
    (list, [1, "x"], '[1,"x"]'),
    (list[date], [date(2026, 3, 1)], '["2026-03-01"]'),
    (Sequence[bytes], [b""], '[""]'),
    (set[str], {"b"}, '["b"]'),
    (frozenset[UUID], frozenset({AN_ID}), f'["{AN_ID}"]'),
    (tuple, (1, "x"), '[1,"x"]'),
    (tuple[date, ...], (), "[]"),
    (tuple[int, Decimal], (1, Decimal(2)), '[1,"2"]'),
    (dict, {"a": 1}, '{"a":1}'),
    (dict[str, tuple[int, ...]], {"a": (1,)}, '{"a":[1]}'),
    (dict[UUID, object], {AN_ID: [1]}, f'{{"{AN_ID}":[1]}}'),
    (Mapping[str, bytes], {"a": b"a"}, '{"a":"YQ=="}'),
    (Optional[int], 3, "3"),  # noqa: UP045
    (list[Color | None], [Color.RED, None], '["red",null]'),
    (int | float, 3.0, "3.0"),
    (Order | list[int], [1], "[1]"),
    (Literal["a", 1], 1, "1"),
    (Annotated[Decimal, "positive"], Decimal(1), '"1"'),
    (UserId, UserId(7), "7"),
    (
        Order,
        AN_ORDER,
        f'{{"id":"{AN_ID}","items":[{{"price":"1.10","count":2}},{{"price":"3","count":1}}],'
        f'"note":null}}',
    ),
    (Tree, Tree([Tree([]), Tree([])]), '{"branches":[{"branches":[]},{"branches":[]}]}'),
    (
        Model,
        Model(at=NOON, sizes={1}, shelves={2: (b"x",)}, fullName="n"),
        '{"at":"2026-03-01T12:00:00.000001-03:30","sizes":[1],"shelves":{"2":["x"]},'
        '"fullName":"n"}',
    ),
    (
        Struct,
        Struct(NOON, (1, "x"), Decimal("1.10")),
        '{"at":"2026-03-01T12:00:00.000001-03:30","pair":[1,"x"],"price":"1.10","names":{}}',
    ),
]


@pytest.mark.parametrize(
    ("annotation", "value", "stored"), ROUND_TRIPS, ids=[str(case[0]) for case in ROUND_TRIPS]
)
def test_a_value_comes_back_as_it_was_given(annotation, value, stored):
    assert encode_value(value, annotation) == stored
    back = decode_value(stored, annotation)
    assert back == value
    assert type(back) is type(value)


def test_jsonb_gives_back_what_was_stored(server_url):
    engine = create_engine(server_url)
    with engine.connect() as conn:
        for annotation, value, stored in ROUND_TRIPS:
            through = text("select cast(cast(:stored as jsonb) as text)")
            back = decode_value(conn.scalar(through, {"stored": stored}), annotation)
            assert back == value
            assert type(back) is type(value)
    engine.dispose()


@given(value=st.floats(allow_nan=False, allow_infinity=False))
@example(value=1e16)
@example(value=1.7976931348623157e308)
def test_a_number_without_a_point_is_a_float_where_one_is_expected(value):
    assume(value.is_integer())

    back = decode_value(str(int(value)), float)

    assert type(back) is float
    assert back == value


@given(value=st.timedeltas())
def test_a_duration_is_kept_to_the_microsecond(value):
    assert decode_value(encode_value(value, timedelta), timedelta) == value


UNSUPPORTED = [
    (date | datetime, "Type unions may not contain more than one str-like type"),
    (Item | Order, "Type unions may not contain more than one dataclass"),
    (Mixed, "Enums must contain either all str or all int values"),
    (Literal["a", Color.RED], "Literal may only contain None/booleans/integers/strings"),
    (Secretive, "dataclasses with `InitVar` fields are not supported"),
]


@pytest.mark.parametrize(("annotation", "why"), UNSUPPORTED, ids=[case[1] for case in UNSUPPORTED])
def test_an_annotation_that_cannot_be_stored_is_refused_by_the_first_call(annotation, why):
    def task(first: annotation = None, second: int = 1): ...
    def returning(second: int) -> annotation: ...

    with pytest.raises(BadArguments, match=f"task: first: .* cannot be stored: {why}"):
        Shape(task).encode((), {"second": 1})
    with pytest.raises(BadArguments, match=f"returning: return: .* cannot be stored: {why}"):
        Shape(returning).encode((1,), {})


def test_a_subclass_is_kept_as_what_the_annotation_says():
    assert encode_value(HTTPStatus.OK, int) == "200"
    assert encode_value(Unit.METRE, str) == '"m"'
    assert encode_value(Unit.METRE) == '"m"'
    assert encode_value(Text("x"), str) == '"x"'
    assert encode_value(Moment(2026, 3, 1, tzinfo=UTC), datetime) == '"2026-03-01 00:00:00+00:00"'
    assert decode_value(encode_value(3, float), float) == 3.0


def test_an_absent_result_needs_no_annotation():
    assert encode_value(None, int) == "null"
    assert decode_value("null", int) is None
    assert decode_value(encode_value([None], list[int | None]), list[int | None]) == [None]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def endless_link() -> Link:
    link = Link()
    link.next = link
    return link


REFUSED = [
    # What JSON does not hold, and nobody said how to store.
    (Any, NOON, "result: a datetime would come back changed; annotate it"),
    (Any, (SECRET,), "result: a tuple would come back"),
    (Any, {SECRET}, "result: a set would come back"),
    (Any, Item(Decimal(1)), "result: a Item would come back"),
    (Any, [0, {"a": 1, SECRET: b""}], "result: a list would come back changed"),
    (Any, {1: SECRET}, "result: a dict would come back changed"),
    (dict, [{SECRET: 1}], "result: Expected `object`, got `array`"),
    # What jsonb does not hold.
    (Any, SECRET + "\0", "result: holds a NUL character or a lone surrogate"),
    (str, SECRET + "\ud800", "result: holds a NUL character or a lone surrogate"),
    (dict[str, int], {SECRET + "\0": 1}, "result: holds a NUL"),
    (Any, {SECRET + "\udfff": 1}, "result: holds a NUL"),
    (Path, Path("\udcff"), "result: holds a NUL"),
    (Any, float("nan"), "result: a float would come back changed"),
    (list[float], [1.0, float("inf")], r"result\[1\]: Expected `float`, got `null`"),
    (float | None, float("nan"), "result: a float would come back changed"),
    (Decimal, Decimal("NaN"), "result: a Decimal would come back changed"),
    (Any, -(10**4300), r"result: does not fit typing.Any \(ValueError\)"),
    (Any, nested(MAX_DEPTH), "result: is nested deeper than 64 levels"),
    (Any, endless(), "result: is nested deeper than 64 levels"),
    (Link, endless_link(), "result: is nested deeper than 64 levels, or holds itself"),
    (Any, SECRET * MAX_BYTES, f"result: {7 * MAX_BYTES + 2} bytes, {MAX_BYTES} allowed"),
    # What does not fit its annotation.
    (int, SECRET, "result: Expected `int`, got `str`"),
    (int, 1.0, "result: Expected `int`, got `float`"),
    (int, True, "result: Expected `int`, got `bool`"),
    (float, 2**53 + 1, "result: a int would come back changed"),
    (float, 10**400, "result: Number out of range"),
    (bool, 1, "result: Expected `bool`, got `int`"),
    (str, 1, "result: Expected `str`, got `int`"),
    (str, AN_ID, "result: a UUID would come back changed"),
    (datetime, "2026-03-01", r"result: does not fit .*datetime'> \(ValidationError\)"),
    (datetime, "2026-03-01T12:00:00Z", "result: a str would come back changed"),
    (datetime, datetime(2026, 3, 1), "result: a datetime without a time zone is no instant"),
    (date, NOON, r"result: does not fit .*date'> \(ValidationError\)"),
    (UUID, str(AN_ID), "result: a str would come back changed"),
    (Color, "red", "result: a str would come back changed"),
    (Color, SECRET, r"result: does not fit .*Color'> \(ValidationError\)"),
    (Literal["a", 1], True, r"result: Expected `int | str`, got `bool`"),
    (list[int], (1,), "result: a tuple would come back changed"),
    (list[int], [1, SECRET], r"result\[1\]: Expected `int`, got `str`"),
    (Sequence[str], SECRET, "result: Expected `array`, got `str`"),
    (tuple[int, str], (1,), "result: Expected `array` of length 2"),
    (tuple[int, str], (1, 2), r"result\[1\]: Expected `str`, got `int`"),
    (dict[str, int], {"a": 1, "b": SECRET}, r"result\[\.\.\.\]: Expected `int`, got `str`"),
    (Order, Order(id=AN_ID, items=[Item(None)]), r"result\.items\[0\]\.price: Expected `decimal`"),
    (Order | None, Order(id=1, items=[]), r"result\.id: Expected `uuid`, got `int`"),
    (Item, BulkOrder(id=AN_ID, items=[]), "result: Object missing required field `price`"),
    (Order, BulkOrder(id=AN_ID, items=[]), "result: a BulkOrder would come back changed"),
    (int | date, SECRET, r"result: does not fit int \| datetime.date \(ValidationError\)"),
    (
        Model,
        Struct(NOON, (1, "x"), Decimal(1)),
        r"result: does not fit .*Model'> \(ValidationError\)",
    ),
    (Unreadable, Unreadable(**{"in": SECRET}), r"result: does not fit .*Unreadable'> \(Validation"),
    (Weight, Weight(kg=float("nan")), "result: a Weight would come back changed"),
    (Height, Height(float("nan")), "result: a Height would come back changed"),
    # Annotations that do not say how to store a value.
    (Readable, SECRET, r"result: does not fit .*Readable'> \(TypeError\)"),
    (Box[int], Box(), "result: a Box cannot be stored"),
    (Callable[[], int], int, "result: a type cannot be stored"),
]


@pytest.mark.parametrize(
    ("annotation", "value", "message"), REFUSED, ids=[case[2] for case in REFUSED]
)
def test_what_would_not_come_back_is_refused_without_being_quoted(annotation, value, message):
    with pytest.raises(NotRepresentable, match=f"^{message}") as caught:
        encode_value(value, annotation)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


UNREADABLE = [
    (Any, f'{{"{SECRET}', r"result: does not fit typing.Any \(DecodeError\)"),
    (Any, "[" * 100_000, "result: is nested deeper"),
    (Any, "9" * 5000, r"result: does not fit typing.Any \(ValidationError\)"),
    (Any, "[1e400]", r"result\[0\]: Number out of range"),
    (Any, "[NaN]", r"result: does not fit typing.Any \(DecodeError\)"),
    (Any, "[" * 64 + "]" * 64, "result: is nested deeper"),
    (float, "1" + "0" * 400, "result: Number out of range"),
    (int, "1.0", "result: Expected `int`, got `float`"),
    (datetime, f'"{SECRET}"', r"result: does not fit .*datetime'> \(ValidationError\)"),
    (datetime, '"2026-03-01T12:00:00"', "result: a datetime without a time zone"),
    (timedelta, "1e300", "result: Expected `duration`, got `float`"),
    (Decimal, f'"{SECRET}"', r"result: does not fit .*Decimal'> \(ValidationError\)"),
    (UUID, f'"{SECRET}"', r"result: does not fit .*UUID'> \(ValidationError\)"),
    (bytes, '"é"', r"result: does not fit .*bytes'> \(ValidationError\)"),
    (bytes, '"YQ==!"', r"result: does not fit .*bytes'> \(ValidationError\)"),
    (bytes, f'"{SECRET}"', r"result: does not fit .*bytes'> \(ValidationError\)"),
    (Color, f'"{SECRET}"', r"result: does not fit .*Color'> \(ValidationError\)"),
    (
        Literal["a"],
        f'"{SECRET}"',
        r"result: does not fit typing.Literal\['a'\] \(ValidationError\)",
    ),
    (set[Any], "[[]]", r"result: does not fit set\[typing.Any\] \(TypeError\)"),
    (tuple[int, str], "[1]", "result: Expected `array` of length 2"),
    (Item, '{"count": 1}', "result: Object missing required field `price`"),
    (Item, f'["{SECRET}"]', "result: Expected `object`, got `array`"),
    (Positive, '{"number": 0}', r"result: does not fit .*Positive'> \(ValueError\)"),
    (Model, f'{{"at": "{SECRET}"}}', r"result: does not fit .*Model'> \(ValidationError\)"),
    (Struct, f'{{"at": "{SECRET}"}}', r"result: does not fit .*Struct'> \(ValidationError\)"),
    (Order | None, f'"{SECRET}"', r"result: Expected `object \| null`, got `str`"),
]


@pytest.mark.parametrize(
    ("annotation", "stored", "message"), UNREADABLE, ids=[case[2] for case in UNREADABLE]
)
def test_what_does_not_fit_when_read_is_refused_without_being_quoted(annotation, stored, message):
    with pytest.raises(NotRepresentable, match=f"^{message}") as caught:
        decode_value(stored, annotation)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_the_limits_themselves_are_allowed():
    whole = "x" * (MAX_BYTES - 2)
    assert len(encode_value(whole)) == MAX_BYTES
    assert encode_value(nested(MAX_DEPTH - 1)) == "[" * 63 + "]" * 63
    with pytest.raises(NotRepresentable, match="1048577 bytes"):
        encode_value("é" + whole[:-1])


def plain(order_id: int, at: date, note: str = "none", *, dry: bool = False): ...
def nameless(first: date, /, second: date = date.min, *rest: date): ...
def optional(first=1, /, second=2, *, third=3): ...
def spread(first: date, second=2, *rest: Decimal, last=None): ...
def keywords(first, /, second=2, **extra: date): ...
def anything(*args, **kwargs): ...
def nothing(): ...


MARCH, APRIL = date(2026, 3, 1), date(2026, 4, 1)
CALLS = [
    (nothing, (), {}, "{}"),
    (plain, (42, MARCH), {}, '{"order_id":42,"at":"2026-03-01"}'),
    (plain, (42,), {"dry": True, "at": MARCH}, '{"order_id":42,"dry":true,"at":"2026-03-01"}'),
    (plain, (42, MARCH, ""), {}, '{"order_id":42,"at":"2026-03-01","note":""}'),
    (nameless, (MARCH,), {}, '{"*":["2026-03-01"]}'),
    (nameless, (MARCH,), {"second": APRIL}, '{"second":"2026-04-01","*":["2026-03-01"]}'),
    (nameless, (MARCH,) * 3, {}, '{"second":"2026-03-01","*":["2026-03-01","2026-03-01"]}'),
    (optional, (), {}, "{}"),
    (optional, (), {"second": 5}, '{"second":5}'),
    (optional, (4,), {"third": None}, '{"third":null,"*":[4]}'),
    (spread, (MARCH,), {"last": 1}, '{"first":"2026-03-01","last":1}'),
    (spread, (MARCH, 3, Decimal(4)), {}, '{"first":"2026-03-01","second":3,"*":["4"]}'),
    (keywords, (1,), {"first": MARCH}, '{"first":"2026-03-01","*":[1]}'),
    (keywords, (1,), {"extra": MARCH}, '{"extra":"2026-03-01","*":[1]}'),
    (anything, (1, None), {"args": 2, "kwargs": []}, '{"args":2,"kwargs":[],"*":[1,null]}'),
]


def call(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """What each parameter of `function` gets from a call."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


@pytest.mark.parametrize(("function", "args", "kwargs", "stored"), CALLS)
def test_a_call_comes_back_as_it_was_made(function, args, kwargs, stored):
    shape = Shape(function)
    assert shape.encode(args, kwargs) == stored
    assert call(function, *shape.decode(stored)) == call(function, args, kwargs)


@given(
    function=st.sampled_from(
        [
            optional,
            anything,
            lambda first, /, second=2, **extra: None,
            lambda a, b=2, *c, d=4, **e: None,
        ]
    ),
    args=st.lists(st.integers()),
    kwargs=st.dictionaries(st.sampled_from([*"abcdef", "second", "third"]), st.none()),
)
def test_any_call_comes_back_as_it_was_made_or_is_refused(function, args, kwargs):
    shape = Shape(function)
    try:
        given = call(function, args, kwargs)
    except TypeError:
        with pytest.raises(BadArguments):
            shape.encode(tuple(args), kwargs)
    else:
        stored = shape.encode(tuple(args), kwargs)
        assert call(function, *shape.decode(stored)) == given


@pytest.mark.parametrize(
    ("args", "kwargs", "stored"),
    [
        ((), {}, "{}"),
        ((), {"order_id": 42, "at": "2026-03-01"}, '{"order_id":42,"at":"2026-03-01"}'),
        ((42,), {"at": "2026-03-01"}, '{"at":"2026-03-01","*":[42]}'),
    ],
)
def test_a_call_of_unknown_code_is_stored_by_name_and_in_order(args, kwargs, stored):
    assert encode_call(args, kwargs) == stored


@pytest.mark.parametrize(
    ("function", "stored", "arguments"),
    [
        (plain, '{"*":[42,"2026-03-01"],"dry":true}', (42, MARCH, "none", True)),
        (nameless, '{"*":["2026-03-01","2026-04-01"]}', (MARCH, APRIL, ())),
        (nameless, '{"*":["2026-03-01","2026-04-01","2026-03-01"]}', (MARCH, APRIL, (MARCH,))),
        (spread, '{"*":["2026-03-01",3,"4"]}', (MARCH, 3, (Decimal(4),), None)),
        (spread, '{"*":["2026-03-01"],"second":3}', (MARCH, 3, (), None)),
    ],
)
def test_positional_arguments_of_unknown_code_find_their_parameters(function, stored, arguments):
    assert tuple(call(function, *Shape(function).decode(stored)).values()) == arguments


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "message"),
    [
        (plain, (1,), {}, "plain: missing a required argument: 'at'"),
        (plain, (), {"at": SECRET}, "plain: missing a required argument: 'order_id'"),
        (plain, (1, MARCH), {"order_id": 2}, "plain: multiple values for argument 'order_id'"),
        (plain, (1, MARCH, "", True), {}, "plain: too many positional arguments"),
        (plain, (1, MARCH), {"on": SECRET}, "plain: got an unexpected keyword argument 'on'"),
        (nothing, (SECRET,), {}, "nothing: too many positional arguments"),
        (nameless, (), {"second": MARCH}, "nameless: missing a required .*'first'"),
    ],
)
def test_a_call_that_does_not_fit_the_signature_is_refused(function, args, kwargs, message):
    with pytest.raises(BadArguments, match=f"^{message}") as caught:
        Shape(function).encode(args, kwargs)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("function", "stored", "message"),
    [
        (plain, '{"order_id":1}', "plain: missing a required argument: 'at'"),
        (plain, '{"order_id":1,"at":"2026-03-01","old":2}', "plain: got an unexpected .*'old'"),
        (plain, '{"*":[1],"order_id":1,"at":"2026-03-01"}', "plain: multiple values for"),
        (plain, '{"*":[1],"order_id":1}', "plain: multiple values for argument 'order_id'"),
        (nothing, '{"*":[1]}', "nothing: too many positional arguments"),
        (nameless, '{"second":"2026-03-01"}', "nameless: missing a required .*'first'"),
        # Stored when there was no `second`: 4 would silently take its place.
        (spread, '{"first":"2026-03-01","*":["4"]}', "spread: multiple values for .*'first'"),
    ],
)
def test_arguments_that_no_longer_fit_the_signature_are_refused(function, stored, message):
    with pytest.raises(BadArguments, match=f"^{message}"):
        Shape(function).decode(stored)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ('{"*":{}}', r"\*: Expected `array`, got `object`"),
        ("[]", "arguments: Expected `object`, got `array`"),
    ],
)
def test_what_is_no_object_of_arguments_is_refused(stored, message):
    with pytest.raises(NotRepresentable, match=f"^{message}"):
        Shape(plain).decode(stored)


def test_a_new_parameter_with_a_default_reads_what_was_stored_before():
    def before(order_id: int): ...
    def after(order_id: int, *, urgent: bool = False): ...

    stored = Shape(before).encode((42,), {})

    assert Shape(after).decode(stored) == ([], {"order_id": 42})


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "message"),
    [
        (plain, (SECRET, MARCH), {}, "order_id: Expected `int`, got `str`"),
        (nameless, (SECRET,), {}, r"first: does not fit .*date'> \(ValidationError\)"),
        (
            nameless,
            (MARCH, MARCH, MARCH, SECRET),
            {},
            r"rest: does not fit tuple.* \(ValidationError\)",
        ),
        (keywords, (1,), {SECRET: 1}, r"extra\[\.\.\.\]: Expected `date`, got `int`"),
        (keywords, (NOON,), {}, "first: a datetime would come back"),
        (keywords, (1, nested(MAX_DEPTH)), {}, "second: is nested deeper"),
    ],
)
def test_an_argument_that_is_refused_is_named(function, args, kwargs, message):
    with pytest.raises(NotRepresentable, match=f"^{message}") as caught:
        Shape(function).encode(args, kwargs)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("encode", [encode_call, Shape(anything).encode])
def test_names_and_sizes_that_cannot_be_stored_are_refused(encode):
    with pytest.raises(NotRepresentable, match=r'^arguments: no argument can be named "\*"'):
        encode((), {"*": SECRET})
    with pytest.raises(NotRepresentable, match=r"^kwargs: holds a NUL") as caught:
        encode((), {SECRET + "\0": 1})
    assert SECRET not in str(caught.value)
    with pytest.raises(NotRepresentable, match=f"^arguments: {MAX_BYTES + 10} bytes"):
        encode(("x" * MAX_BYTES,), {})


def test_a_stored_argument_that_is_refused_is_named():
    with pytest.raises(NotRepresentable, match=r"^at: does not fit .*date"):
        Shape(plain).decode(f'{{"order_id":1,"at":"{SECRET}"}}')
    with pytest.raises(NotRepresentable, match=r"^rest\[0\]: Expected `date`, got `int`"):
        Shape(nameless).decode('{"*":["2026-03-01","2026-03-01",3]}')
    with pytest.raises(NotRepresentable, match=r"^note: Expected `str`, got `array`"):
        Shape(plain).decode('{"order_id":1,"at":"2026-03-01","note":[1e400]}')
    with pytest.raises(NotRepresentable, match=r"^arguments: does not fit .*DecodeError"):
        Shape(plain).decode("")


def test_annotations_may_be_text_and_name_what_is_defined_later():
    def task(order: "Later", at: "datetime | None" = None) -> "Later": ...

    shape = Shape(task)
    stored = shape.encode((Later(MARCH),), {})

    assert stored == '{"order":{"day":"2026-03-01"}}'
    assert shape.decode(stored) == ([], {"order": Later(MARCH)})
    assert shape.returns is Later
    assert Shape(plain).returns is Any


def test_annotations_that_name_nothing_are_an_error_when_needed():
    def task(order: "Missing"): ...  # noqa: F821

    shape = Shape(task)
    with pytest.raises(BadArguments, match=r"task: .* cannot be looked up: name 'Missing' is not"):
        shape.encode((1,), {})


@dataclass
class Later:
    day: date


def test_the_session_of_a_transactional_task_is_no_argument():
    def task(session: Any, order_id: int): ...

    shape = Shape(task, skip_first=True)

    assert shape.decode(shape.encode((42,), {})) == ([], {"order_id": 42})
    with pytest.raises(BadArguments, match="unexpected keyword argument 'session'"):
        shape.encode((42,), {"session": None})
    for without in (nothing, lambda *, session: None):
        with pytest.raises(BadArguments, match="no first parameter to take the session"):
            Shape(without, skip_first=True)


def test_headers_are_read():
    assert decode_headers('{"a":"b"}') == {"a": "b"}
    assert decode_headers(None) == {}


def test_optional_libraries_are_not_imported():
    code = "import sys, sqlqueue.codec; print({'pydantic'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)  # what a float holds
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda items: st.lists(items) | st.dictionaries(st.text("abc*é\n"), items),
)


@given(value=JSON | st.integers())
def test_any_json_comes_back_without_an_annotation(value):
    back = decode_value(encode_value(value))
    assert json.dumps(back) == json.dumps(value)


ANNOTATIONS = [annotation for annotation, *_ in [*ROUND_TRIPS, *REFUSED, *UNREADABLE]]


@settings(max_examples=300)
@given(
    stored=st.text() | st.text('[]{}",:0123456789.eE-+ntf') | JSON.map(json.dumps),
    annotation=st.sampled_from(ANNOTATIONS),
)
def test_any_text_is_read_or_refused(stored, annotation):
    with suppress(NotRepresentable):
        decode_value(stored, annotation)


@given(
    stored=st.text()
    | st.dictionaries(st.sampled_from(["first", "second", "last", "*", "x"]), JSON).map(json.dumps),
    function=st.sampled_from([plain, nameless, optional, spread, keywords, anything, nothing]),
)
def test_any_text_is_read_as_arguments_or_refused(stored, function):
    shape = Shape(function)
    try:
        positional, named = shape.decode(stored)
    except (BadArguments, NotRepresentable):
        return
    inspect.signature(function).bind(*positional, **named)


@given(value=JSON | st.text() | st.floats() | st.binary(), annotation=st.sampled_from(ANNOTATIONS))
def test_any_value_is_written_or_refused(value, annotation):
    try:
        stored = encode_value(value, annotation)
    except NotRepresentable:
        return
    assert decode_value(stored, annotation) == value
