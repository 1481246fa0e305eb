"""How the package is laid out: layers, public names, docstrings, and the headers of statements."""

import ast
import inspect
import re
import subprocess
import tokenize
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import sqlqueue
from sqlqueue.options import Options
from sqlqueue.store import Executes, Store
from tests.test_plans import ASKED, Noted, Notes

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sqlqueue"
MODULES = sorted(PACKAGE.rglob("*.py"))
STATEMENTS = sorted((PACKAGE / "sql").glob("*.sql"))

WORDS = {"errors", "literal", "notes", "retry", "options", "codec", "policy", "schedule"}
STORE = {"store"}
EDGE = {"cli", "dashboard", "demo", "bench", "embedded", "metrics", "reports", "telemetry",
    "testing", "integrations", "pytest_plugin", "__main__",
}  # fmt: skip
LAYERS = ("words", "store", "engine", "edge")
PLACES = {"ready", "waiting", "scheduled", "lease", "run"}

PUBLIC = [
    "BadArguments", "Call", "Cancel", "DuplicateJob", "Ended", "IdOutOfRange", "Job", "JobFailed",
    "JobNotFound", "LeaseLost", "NotEnded", "NotRepresentable", "Options", "Policy", "Queue",
    "QueueFull", "Rate", "Retry", "RetryIn", "Run", "Schedule", "SchemaMismatch", "Snooze",
    "SqlqueueError", "Task", "Unique", "UniqueKeyBusy", "UnsupportedTransaction", "Worker",
    "WorkerOptions", "current_run",
]  # fmt: skip


def name_of(path: Path) -> str:
    """The first name below the package: `store` of sqlqueue/store.py, `bench` of its package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(name: str) -> int:
    layer = (
        "words" if name in WORDS else "store" if name in STORE else
        "edge" if name in EDGE else "engine"
    )  # fmt: skip
    return LAYERS.index(layer)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from runtime_nodes(child)


def imported_by(path: Path) -> set[str]:
    """The modules of sqlqueue that a module imports, at whatever moment."""
    found = set()
    for node in runtime_nodes(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            module = rest.partition(".")[0]
            if package == "sqlqueue" and module:
                found.add(module)
    return found


# Layers


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_nothing_from_the_layers_below_it(path) -> None:
    layer = layer_of(name_of(path))

    for module in imported_by(path):
        is_module = (PACKAGE / f"{module}.py").exists() or (PACKAGE / module).is_dir()
        # What the package itself offers is made of the engine.
        assert layer_of(module if is_module else "queue") <= layer, module


def test_the_layers_name_modules_that_exist() -> None:
    assert {name_of(path) for path in MODULES} >= WORDS | STORE | EDGE


def test_what_is_public_is_what_this_list_says() -> None:
    named = {name: one for name, one in vars(sqlqueue).items() if not name.startswith("_")}
    assert sorted(name for name in named if not inspect.ismodule(named[name])) == sorted(PUBLIC)
    for name in PUBLIC:
        assert inspect.getdoc(getattr(sqlqueue, name)), name


# Docstrings


def protocol_methods(tree: ast.Module) -> set[str]:
    """The methods that a protocol of the module documents, for all that follow it."""
    return {
        method.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and ast.get_docstring(method)
    }


def undocumented(tree: ast.Module) -> list[str]:
    """The public classes, functions and methods without a docstring."""
    missing = [] if ast.get_docstring(tree) else ["the module"]
    known = protocol_methods(tree)

    def look(node: ast.Module | ast.ClassDef, prefix: str) -> None:
        for child in node.body:
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            is_stub = isinstance(child.body[-1], ast.Expr) and ast.unparse(child.body[-1]) == "..."
            if child.name.startswith("_") or is_stub:  # of an overload or a protocol
                continue
            is_method = isinstance(node, ast.ClassDef)
            is_override = is_method and (child.name in known or bool(node.bases))
            if not ast.get_docstring(child) and not is_override:
                missing.append(prefix + child.name)
            if isinstance(child, ast.ClassDef):
                look(child, f"{child.name}.")

    look(tree, "")
    return missing


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_whatever_is_public_has_a_docstring(path) -> None:
    assert undocumented(tree_of(path)) == []


# Size


def lines_of_python(path: Path) -> int:
    """Lines that are not blank, comments or docstrings."""
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    silent = (
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENCODING, tokenize.ENDMARKER,
    )  # fmt: skip
    lines = {n for t in tokens if t.type not in silent for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(tree_of(path)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node)
            and node.body[0].end_lineno
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def lines_of_sql(path: Path) -> int:
    lines = path.read_text("utf-8").splitlines()
    return sum(bool(line.strip()) and not line.strip().startswith("--") for line in lines)


def test_all_of_it_can_be_read() -> None:
    python = {path: lines_of_python(path) for path in MODULES}
    core = sum(count for path, count in python.items() if name_of(path) not in EDGE)
    core += sum(map(lines_of_sql, STATEMENTS))

    assert core < 3000
    assert sum(python.values()) + sum(map(lines_of_sql, STATEMENTS)) < 7500
    assert {path.name: count for path, count in python.items() if count >= 400} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_function_is_long(path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            doc = node.body[0] if ast.get_docstring(node) else None
            length = node.end_lineno - node.lineno
            length -= (doc.end_lineno or 0) - doc.lineno if doc else 0
            assert length < 50, f"{node.name} has {length} lines"


# Statements

MAYBE = timedelta(seconds=1)
VERBS: dict[str, Callable[[Store, Executes, int], object]] = ASKED | {
    "admit": lambda store, conn, worker: store.admit(conn, "q", 1),
    "take_keys": lambda store, conn, worker: store.take_keys(
        conn, [], [], "skip", False, None, None, None
    ),
    "cancel": lambda store, conn, worker: store.cancel(conn, "", ""),
    "log": lambda store, conn, worker: store.log(conn, "[]"),
    "count_runs": lambda store, conn, worker: store.count_runs(conn, "[]"),
    "retry": lambda store, conn, worker: store.retry(conn, ""),
    "due_schedules": lambda store, conn, worker: store.due_schedules(conn),
    "fire": lambda store, conn, worker: store.fire(conn, "s", [], None, None),
    "set_schedules": lambda store, conn, worker: store.set_schedules(conn, "[]", None),
    "gated": lambda store, conn, worker: store.gated(conn, []),
    "set_policy": lambda store, conn, worker: store.set_policy(conn, "queue", "q", None),
    "begin": lambda store, conn, worker: conn.exec_driver_sql(*store.begin(MAYBE)),
    "enqueue": lambda store, conn, worker: store.enqueue(conn, [], [], "t", Options().params),
    "pass_on": lambda store, conn, worker: store.pass_on(conn, "q", 0),
    "pause": lambda store, conn, worker: store.pause(conn, "queue", "q", True, "", None, None),
    "register": lambda store, conn, worker: store.register(
        conn, MAYBE, 1, 1, "h", "n", "0", [], []
    ),
    "tidy": lambda store, conn, worker: store.tidy(conn),
    "unregister": lambda store, conn, worker: store.unregister(conn, worker),
    "unknown_since": lambda store, conn, worker: store.unknown_since(conn, ""),
}


def header_of(path: Path) -> dict[str, str]:
    """The first sentence, under "says", and the four lines of the header."""
    lines = path.read_text("utf-8").splitlines()
    header = {"says": lines[0].removeprefix("-- ")}
    for line in lines[2:6]:
        name, value = re.fullmatch(r"-- (\w+) +(\S.*)", line).groups()
        header[name] = value
    return header


def without_comments(sql: str) -> str:
    return re.sub(r"--.*", "", sql)


def tables(keyword: str, sql: str) -> set[str]:
    return set(re.findall(rf"\b{keyword}\s+sqlqueue\.(\w+)", sql))


def what_it_runs(path: Path) -> str:
    """The statement; for one that calls a function of ours, the bodies of all that it calls."""
    sql = without_comments(path.read_text("utf-8"))
    called = re.match(r"\s*select (?:[a-z_, ]+\s*from |cast\()?sqlqueue\.(\w+)\(", sql)
    return bodies(called[1]) if called else sql


def bodies(function: str) -> str:
    """The body of a function, and those of the functions that it performs."""
    versions = sorted((ROOT / "migrations/versions").glob("*.py"))
    functions = "".join(path.read_text("utf-8") for path in versions)
    found = re.findall(
        rf"create function sqlqueue\.{function}\((?:(?!\$\$).)*?\$\$(.*?)\$\$", functions, re.S
    )
    body = without_comments(found[-1])
    called = re.findall(r"(?:perform|if|:=) sqlqueue\.(\w+)\(", body)
    return body + "".join(map(bodies, called))


@pytest.mark.parametrize("path", STATEMENTS, ids=lambda path: path.stem)
def test_the_header_of_a_statement_is_complete(path) -> None:
    header = header_of(path)

    assert list(header) == ["says", "moves", "index", "locks", "caller"]
    assert re.fullmatch(r"[A-Z].*\.", header["says"])
    assert path.read_text("utf-8").splitlines()[1] == "--"


@pytest.mark.parametrize("path", STATEMENTS, ids=lambda path: path.stem)
def test_a_statement_moves_what_its_header_says(path) -> None:
    moves = header_of(path)["moves"]
    arrows = [] if moves == "nothing" else [move.split(" -> ") for move in moves.split(", ")]
    sql = what_it_runs(path)
    left, entered = tables("delete from", sql), tables("insert into", sql)
    left |= tables("update", sql) & {"run"}  # a run that is final no longer

    assert {source for source, _ in arrows} - {"nothing"} == left & PLACES
    assert {target for _, target in arrows} == entered & PLACES


@pytest.mark.parametrize("path", STATEMENTS, ids=lambda path: path.stem)
def test_a_statement_names_an_index_that_exists(path) -> None:
    schema = (ROOT / "docs/reference/schema.sql").read_text("utf-8")
    names = set(re.findall(r"create (?:unique )?index (\w+)", schema))
    names |= {f"{table}_pkey" for table in re.findall(r"create table sqlqueue\.(\w+)", schema)}

    assert set(header_of(path)["index"].split(", ")) <= names | {"none", "the primary keys"}


@pytest.mark.parametrize("path", STATEMENTS, ids=lambda path: path.stem)
def test_a_statement_is_written_in_the_style_of_the_house(path) -> None:
    text = path.read_text("utf-8")
    sql = re.sub(r"'[^']*'", "''", without_comments(text))

    assert max(map(len, text.splitlines())) <= 100
    assert text.endswith("\n")
    assert not re.search(r"[A-Z]", sql)
    assert "::" not in sql
    assert not re.search(r"select\s+(\w+\.)?\*", sql)
    assert "TODO" not in text
    assert not re.search(r"\b(from|into|update|join) (ready|scheduled|lease|run|job|worker)\s", sql)


@pytest.mark.parametrize("path", STATEMENTS, ids=lambda path: path.stem)
def test_a_statement_takes_the_parameters_that_the_store_gives(path) -> None:
    sql = re.sub(r"'[^']*'", "''", without_comments(path.read_text("utf-8")))

    with pytest.raises(Noted) as noted:
        VERBS[path.stem](Store(), Notes(), 1)

    assert set(noted.value.parameters) == set(re.findall(r"(?<!:):([a-z_]+)", sql))


# What is committed


def committed() -> list[Path]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_nothing_names_the_machine_it_was_written_on() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout: nothing is committed from here")
    forbidden = re.compile("|".join(("/" + r"work\b", r"\bshared" + "/", "house" + "-check")))

    for path in committed():
        found = forbidden.search(path.read_text("utf-8", errors="replace"))
        assert found is None, f"{path}: {found and found[0]}"


def test_a_migration_imports_nothing_of_the_package() -> None:
    for path in sorted((ROOT / "migrations").rglob("*.py")):
        names: list[Any] = []
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names.append(node.module)
        assert not any(name.startswith("sqlqueue") for name in names), path
