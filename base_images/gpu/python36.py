"""Let the Python 3.6 of JetPack 4 run the project's sources as they are; for its image alone.

    python3 python36.py client.py      in the sources' directory, while the image is built

sitecustomize.py in the image imports this module whenever Python starts, which does two things:

- Modules are translated when they are imported: annotations become strings (which is what
  `from __future__ import annotations` means), and `(name := value)` becomes a call. What was
  imported once while the image was built is not translated again.
- What the sources use of newer standard libraries is added to this one.

Parso, the parser of Jedi, reads newer syntax with an old Python.
"""

import ast
import functools
import gc
import importlib.machinery
import importlib.util
import math
import operator
import os
import pathlib
import platform
import queue
import sys
import types
import typing

SYNTAX = "3.8"  # of the sources
FUTURE = "from __future__ import annotations"
ANNOTATIONS = {"tfpdef": ":", "annassign": ":", "funcdef": "->"}  # what stands before them


# --- Syntax ---------------------------------------------------------------------------


def translate(source):
    """Return `source`, of Python 3.8, for Python 3.6; and the numbers of the lines added to it.

    Raises:
        SyntaxError: `:=` outside of a function, or in one without lines of its own.
    """
    import parso

    edits = []  # (start, end, text), each position a line and a column
    names = {}  # by function: what := assigns in it
    for node in _nodes(parso.load_grammar(version=SYNTAX).parse(source)):
        mark = ANNOTATIONS.get(node.type)
        marks = [i for i, child in enumerate(getattr(node, "children", ())) if child == mark]
        if marks:
            annotation = node.children[marks[0] + 1]
            if annotation.type != "string":
                *lines, last = annotation.get_code(include_prefix=False).split("\n")
                text = repr(" ".join([*lines, last])) + " \\\n" * len(lines)
                edits.append((annotation.start_pos, annotation.end_pos, text))
        elif ":=" in getattr(node, "children", ()):  # in a call's parentheses it is an argument
            name, sign, value = node.children
            edits.append((name.start_pos, sign.end_pos, f"_assign_{name.value}("))
            edits.append((value.end_pos, value.end_pos, ")"))
            function = parso.tree.search_ancestor(node, "funcdef", "lambdef", "classdef")
            if function is None or function.children[-1].type != "suite":
                raise SyntaxError(f"line {node.start_pos[0]}: := outside of a function")
            assigned = names.setdefault(function, [])
            if name.value not in assigned:
                assigned.append(name.value)
        elif node.type == "import_from" and node.get_code(include_prefix=False) == FUTURE:
            edits.append((node.start_pos, node.end_pos, "pass"))
    added = []
    for function, assigned in names.items():
        first, lines = _assigning(function, assigned)
        edits.append(((first, 0), (first, 0), "".join(lines)))
        added += [first] * len(lines)
    return _edited(source, edits), sorted(added)


def _nodes(node):
    yield node
    for child in getattr(node, "children", ()):
        yield from _nodes(child)


def _assigning(function, names):
    """Return where a function's statements begin, and lines for there: functions that assign."""
    statements = [child for child in function.children[-1].children if child.type != "newline"]
    docstring = statements[0].type == "simple_stmt" and statements[0].children[0].type == "string"
    line, column = statements[1 if docstring else 0].start_pos
    parameters = [parameter.name.value for parameter in function.get_params()]
    lines = []
    for name in names:
        if name not in parameters:  # nonlocal needs it to be there
            lines.append(f"{name} = None\n")
        head = f"def _assign_{name}(_new): nonlocal {name}"
        lines.append(f"{head}; {name} = _new; return _new\n")
    return line, [" " * column + text for text in lines]


def _edited(source, edits):
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for start, end, text in sorted(edits, key=operator.itemgetter(0), reverse=True):
        first, last = (starts[line - 1] + column for line, column in (start, end))
        source = source[:first] + text + source[last:]
    return source


def compiled(source, path):
    """Return the code of a translated module; its lines have the numbers of the original."""
    text, added = translate(source)
    tree = ast.parse(text, path)
    before = [line + i for i, line in enumerate(added)]  # the added lines, in `text`
    for node in ast.walk(tree):
        if hasattr(node, "lineno"):
            node.lineno -= sum(line < node.lineno for line in before)
    return compile(tree, path, "exec", dont_inherit=True)


class Loader(importlib.machinery.SourceFileLoader):
    """Imports modules, translated if this Python cannot read them."""

    def source_to_code(self, data, path, **options):
        try:
            return super().source_to_code(data, path, **options)
        except SyntaxError:
            source = importlib.util.decode_source(data)
            if FUTURE in source or ":=" in source:
                return compiled(source, path)
            raise


def install_loader():
    """Let all further imports go by `Loader`."""
    machinery = importlib.machinery
    hook = machinery.FileFinder.path_hook(
        (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
        (Loader, machinery.SOURCE_SUFFIXES),
        (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
    )
    # The last one finds files in directories; before it is the one for archives.
    sys.path_hooks[-1] = hook
    sys.path_importer_cache.clear()


# --- Libraries ------------------------------------------------------------------------


class cached_property:
    """functools.cached_property of Python 3.8."""

    def __init__(self, function):
        self.function = function

    def __get__(self, instance, owner=None):
        value = instance.__dict__[self.function.__name__] = self.function(instance)
        return value


def unlink(path, missing_ok=False):
    """Path.unlink of Python 3.8."""
    try:
        path._accessor.unlink(path)  # as Python 3.6 does
    except FileNotFoundError:
        if not missing_ok:
            raise


def protobuf_builder():
    """Return google.protobuf.internal.builder, which generated code uses from 3.20 on."""
    builder = types.ModuleType("google.protobuf.internal.builder")

    def message_class(descriptor, module):
        from google.protobuf import message, reflection, symbol_database

        nested = descriptor.nested_types_by_name.items()
        content = {name: message_class(inner, module) for name, inner in nested}
        content.update(DESCRIPTOR=descriptor, __module__=module)
        made = reflection.GeneratedProtocolMessageType(descriptor.name, (message.Message,), content)
        symbol_database.Default().RegisterMessage(made)
        return made

    def build_descriptors(file, module):  # which code for protobuf in pure Python names
        def build(descriptor, name):
            module[name] = descriptor
            for inner, nested in getattr(descriptor, "nested_types_by_name", {}).items():
                build(nested, f"{name}_{inner.upper()}")

        for kinds in (file.message_types_by_name, file.enum_types_by_name):
            for name, descriptor in kinds.items():
                build(descriptor, f"_{name.upper()}")

    def build_top(file, name, module):
        from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

        module["DESCRIPTOR"] = file
        for enum, descriptor in file.enum_types_by_name.items():
            module[enum] = EnumTypeWrapper(descriptor)
            module.update({value.name: value.number for value in descriptor.values})
        for message, descriptor in file.message_types_by_name.items():
            module[message] = message_class(descriptor, name)

    builder.BuildMessageAndEnumDescriptors = build_descriptors
    builder.BuildTopDescriptorsAndMessages = build_top
    return builder


def install_libraries():
    """Add what newer Pythons, and protobuf from 3.20 on, have."""
    from typing_extensions import Protocol

    typing.Protocol = Protocol
    functools.cached_property = cached_property
    gc.freeze = lambda: None
    math.prod = lambda numbers: functools.reduce(operator.mul, numbers, 1)
    pathlib.Path.unlink = unlink
    queue.SimpleQueue = queue.Queue
    sys.modules["google.protobuf.internal.builder"] = protobuf_builder()
    # NumPy's BLAS takes a Nano's processor for a newer one, and ends with an illegal instruction:
    # https://github.com/numpy/numpy/issues/18131
    if platform.machine() == "aarch64":
        os.environ.setdefault("OPENBLAS_CORETYPE", "ARMV8")


# --- While the image is built -----------------------------------------------------------


def main(program):
    """Translate all modules in the working directory once, and import what a device needs.

    The program itself is translated in place, since Python runs that without an import.
    """
    sys.path.insert(0, "")
    path = pathlib.Path(program)
    path.write_text(translate(path.read_text(encoding="utf-8"))[0], encoding="utf-8")
    for name in ("torch_trainer", "utils", "resnet", *_modules("federated", "plumbing")):
        try:
            importlib.util.find_spec(name).loader.get_code(name)
        except SyntaxError as error:
            if name in NEEDED:
                raise
            print(f"{name} is for a server: {error}")
    importlib.import_module(path.stem)
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:  # CUDA's libraries are on the board alone
        print(f"translated; not imported, since torch is not: {error}")
    else:
        importlib.import_module("torch_trainer")
        print("translated and imported")


NEEDED = (
    "torch_trainer",
    "utils",
    "resnet",
    "plumbing.threads",
    "federated.classes",
    "federated.partitions",
)  # which the program imports once torch can be


def _modules(*packages):
    for package in packages:
        for path in sorted(pathlib.Path(package).glob("**/*.py")):
            yield ".".join(path.with_suffix("").parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
elif sys.version_info < (3, 7):  # noqa: UP036
    install_loader()
    install_libraries()
