"""All values of ErrorInfo.reason in the source of core/ and server/."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.paths import ROOT

SOURCES = sorted([*ROOT.glob("core/**/*.py"), *ROOT.glob("server/**/*.py")])


@dataclass(frozen=True, slots=True)
class Use:
    """A use of a reason, with the error class or the function that creates the error."""

    reason: str
    given_to: str
    place: str


class Unreadable(Exception):  # noqa: N818 - a refusal, not an error
    """A reason that is not a literal where it is used, so that a search does not find it."""


def uses_in(sources: dict[str, str]) -> list[Use]:
    """All reasons in these files, by name and text."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    positions = {
        callee: position for tree in trees.values() for callee, position in _positions(tree)
    }
    return [
        use
        for name, tree in trees.items()
        for call, parameters in _calls(tree)
        for use in _uses(call, parameters, positions, name)
    ]


def _positions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(function or class, index) of each parameter or dataclass field named `reason`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields = [n.target.id for n in node.body if _is_field(n)]  # type: ignore[attr-defined]
            if "reason" in fields:
                yield node.name, fields.index("reason")
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    names = _parameters(method)[1:]
                    if "reason" in names and not _is_keyword_only(method):
                        name = node.name if method.name == "__init__" else method.name
                        yield name, names.index("reason")
    for function in getattr(tree, "body", []):
        if isinstance(function, ast.FunctionDef) and not _is_keyword_only(function):
            names = _parameters(function)
            if "reason" in names:
                yield function.name, names.index("reason")


def _calls(
    tree: ast.AST, parameters: frozenset[str] = frozenset()
) -> Iterator[tuple[ast.Call, frozenset[str]]]:
    """Each call with the parameters of its enclosing function."""
    for node in ast.iter_child_nodes(tree):
        inner = parameters
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = frozenset(_parameters(node))
        if isinstance(node, ast.Call):
            yield node, parameters
        yield from _calls(node, inner)


def _uses(
    call: ast.Call, parameters: frozenset[str], positions: dict[str, int], file: str
) -> Iterator[Use]:
    given = [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
    callee = _name(call.func)
    position = positions.get(callee)
    if position is not None and len(call.args) > position:
        given.append(call.args[position])
    for value in given:
        place = f"{file}:{value.lineno}"
        for reason in _literals(value, parameters, place):
            yield Use(reason, callee, place)


def _literals(value: ast.expr, parameters: frozenset[str], place: str) -> Iterator[str]:
    match value:
        case ast.Constant(value=str(reason)):
            yield reason
        case ast.IfExp():
            yield from _literals(value.body, parameters, place)
            yield from _literals(value.orelse, parameters, place)
        case ast.JoinedStr(values=[*_, ast.Constant(value=str(suffix))]):
            # The prefix is computed: `*_NOT_FOUND` stands for one reason per kind of id.
            yield f"*{suffix}"
        case ast.Attribute(attr="reason"):
            pass  # Handed on; it was written where that object was made.
        case ast.Name(id=name) if name in parameters:
            pass  # Handed on; it is written where this function is called.
        case _:
            raise Unreadable(f"{place}: write the reason as a literal in the call")


def _name(function: ast.expr) -> str:
    """The called name. For `InvalidArgument.of` it is the class."""
    if isinstance(function, ast.Attribute):
        return _name(function.value) if function.attr == "of" else function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _is_keyword_only(function: ast.FunctionDef) -> bool:
    return any(argument.arg == "reason" for argument in function.args.kwonlyargs)


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
