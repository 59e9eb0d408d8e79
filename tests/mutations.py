"""The small wrong changes that `mutants.py` makes to a module: found in its syntax tree.

Texts, messages, annotations and defaults of fields stay as they are.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

# Words that are taken for each other. A string or an attribute is replaced by the next of its row.
SWAPPED: tuple[tuple[str, ...], ...] = (
    ("data", "fsdp", "context", "tensor", "tensor2"),
    ("gather", "replicas"),
    ("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    ("torus", "dcn"),
    ("wire_bytes", "parameter_bytes", "reduce_bytes"),
    ("q", "kv", "hidden"),
    ("queries", "keys"),
    ("tokens", "residual"),
    ("m", "n"),
    ("unit_s", "memory_s"),
)
KINDS: tuple[tuple[str, ...], ...] = (  # strings alone
    ("forward", "backward"),
    ("matmul", "elementwise", "attention"),
)
NEXT = {word: row[(i + 1) % len(row)] for row in (*SWAPPED, *KINDS) for i, word in enumerate(row)}
ATTRIBUTES = {word for row in SWAPPED for word in row}
FUNCTIONS = {
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "min": "max",
    "greater": "greater_equal",
    "greater_equal": "greater",
    "less": "less_equal",
    "less_equal": "less",
    "equal": "not_equal",
    "not_equal": "equal",
    "ceil": "floor",
    "any": "all",
}
OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}


@dataclass(frozen=True, order=True)
class Mutant:
    """One change: the text of `path` from `start` to `end` becomes `after`."""

    path: str
    line: int
    start: int
    end: int
    before: str
    after: str
    around: str  # the line with a mark where the change begins

    @property
    def key(self) -> str:
        """What names the mutant from run to run, wherever its line moves."""
        return f"{self.path}: {self.around}: {self.before} -> {self.after}"


class Finder(ast.NodeVisitor):
    """Finds all mutants of one module."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text
        self.found: set[Mutant] = set()
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line.encode()))
        self.visit(ast.parse(text))

    def place(self, node: ast.AST) -> tuple[int, int]:
        """Return where a node's text begins and ends, in bytes."""
        assert isinstance(node, (ast.expr, ast.stmt, ast.keyword))
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def source(self, node: ast.AST) -> str:
        start, end = self.place(node)
        return self.text.encode()[start:end].decode()

    def change(self, node: ast.AST, after: str) -> None:
        """Note the mutant in which the text of `node` is `after`."""
        start, end = self.place(node)
        before = self.source(node)
        if before != after:
            number = self.text.encode()[:start].count(b"\n")
            line, column = self.text.splitlines()[number], start - self.starts[number]
            around = f"{line[:column]}|{line[column:]}".strip()
            self.found.add(Mutant(self.path, number + 1, start, end, before, after, around))

    def generic_visit(self, node: ast.AST) -> None:
        """Visit what runs: no annotations, docstrings, messages or defaults of fields."""
        if isinstance(node, ast.keyword) and node.arg == "strict":
            return  # of a zip: it checks lengths and changes no result
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)):
                    continue
                if isinstance(child, ast.AST):
                    self.visit(child)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        if isinstance(node.value, ast.Call):
            self.change(node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.change(node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.value, ast.BinOp) and isinstance(node.value.op, ast.BitOr):
            return  # a union of types
        self.visit(node.value)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            if not isinstance(statement, (ast.AnnAssign, ast.Assign)):
                self.visit(statement)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.change(node, str(not value))
        elif isinstance(value, int):
            self.change(node, str(value + 1))
        elif isinstance(value, float):
            self.change(node, repr(2 * value if value else 1.0))
        elif isinstance(value, str) and value in NEXT:
            self.change(node, f'"{NEXT[value]}"')

    def visit_BinOp(self, node: ast.BinOp) -> None:
        left, right = self.source(node.left), self.source(node.right)
        wrapped = [
            f"({text})" if isinstance(side, (ast.BinOp, ast.IfExp, ast.Compare)) else text
            for side, text in ((node.left, left), (node.right, right))
        ]
        if type(node.op) in OPERATORS:
            _, other = OPERATORS[type(node.op)]
            self.change(node, f"({wrapped[0]} {other} {wrapped[1]})")
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
            self.change(node, wrapped[0])
        if isinstance(node.op, (ast.Add, ast.Mult)):
            self.change(node, wrapped[1])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self.change(node, f"({self.source(node.operand)})")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = " or " if isinstance(node.op, ast.And) else " and "
        self.change(node, f"({other.join(f'({self.source(value)})' for value in node.values)})")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            other = COMPARISONS[type(node.ops[0])][1]
            sides = self.source(node.left), self.source(node.comparators[0])
            self.change(node, f"{sides[0]} {other} {sides[1]}")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if self.source(node.test) != "TYPE_CHECKING":
            self.change(node.test, f"not ({self.source(node.test)})")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.change(node.test, f"not ({self.source(node.test)})")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "where":
            if len(node.args) == 3:
                where, yes, no = (self.source(arg) for arg in node.args)
                self.change(node, f"{self.source(node.func)}({where}, {no}, {yes})")
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "logical_not":
            self.change(node, f"({self.source(node.args[0])})")
        elif isinstance(node.func, ast.Attribute) and node.func.attr in FUNCTIONS:
            self.change(node.func, f"{self.source(node.func.value)}.{FUNCTIONS[node.func.attr]}")
        elif isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            self.change(node.func, FUNCTIONS[node.func.id])
        for keyword in node.keywords:
            if keyword.arg in ("count", "messages", "hbm_bytes", "vector_ops"):
                self.change(keyword.value, "1" if keyword.arg in ("count", "messages") else "0.0")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and node.attr in ATTRIBUTES:
            self.change(node, f"{self.source(node.value)}.{NEXT[node.attr]}")
        self.generic_visit(node)

    def visit_List(self, node: ast.List) -> None:
        self._shorter(node, "[]")

    def visit_Tuple(self, node: ast.Tuple) -> None:
        if any(isinstance(item, ast.Starred) for item in node.elts):
            self._shorter(node, "()")
        else:
            self.generic_visit(node)

    def _shorter(self, node: ast.List | ast.Tuple, brackets: str) -> None:
        """Leave out one of several tasks."""
        for item in node.elts:
            if isinstance(item, (ast.Starred, ast.Call)):
                self.change(item, f"*{brackets}")
        self.generic_visit(node)
