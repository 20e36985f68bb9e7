"""What must not be in our sources, whoever edits them next."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT


def tracked(pattern: str) -> list[Path]:
    command = ["git", "ls-files", "-co", "--exclude-standard", "--", pattern]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / line for line in done.stdout.splitlines()]


def calls(path: Path) -> list[tuple[str, dict[str, str], int]]:
    """Return the calls in a file: what is called, the keywords' values, and the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            keywords = {k.arg or "**": ast.unparse(k.value) for k in node.keywords}
            found.append((ast.unparse(node.func), keywords, node.lineno))
    return found


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
SOURCES = tracked("*.py")


def limited_unpicklers(tree: ast.Module) -> list[ast.Attribute]:
    """Return where pickle is used harmlessly: by an Unpickler that chooses what it may find."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(
            isinstance(inner, ast.FunctionDef) and inner.name == "find_class" for inner in node.body
        ):
            found += [b for b in node.bases if ast.unparse(b) == "pickle.Unpickler"]
    return found


def test_pickle_is_read_only_with_a_list_of_what_it_may_hold():
    """CIFAR-10's files are pickles. test_data.py shows that such a list holds."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        limited = limited_unpicklers(tree)
        assert not limited or path == ROOT / "utils.py", path
        for node in ast.walk(tree):
            if "tests" in path.parts or not isinstance(node, ast.Attribute) or node in limited:
                continue
            name = ast.unparse(node)
            assert not name.startswith("pickle.") or name == "pickle.UnpicklingError", name
    assert limited_unpicklers(ast.parse((ROOT / "utils.py").read_text()))
    careless = ast.parse("class Any(pickle.Unpickler):\n    pass")
    assert not limited_unpicklers(careless)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_else_is_unpickled_and_no_shell_is_asked(path):
    may_pickle = "tests" in path.parts or path == ROOT / "utils.py"  # see the test before
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
            found = {name.partition(".")[0] for name in names} & PICKLES
            # Tests may make what attackers send; by its own name, so that it is found here.
            assert found <= ({"pickle"} if may_pickle else set()), f"{node.lineno}"
            renamed = [alias.asname for alias in node.names if alias.name == "pickle"]
            assert not any(renamed) and getattr(node, "module", "") != "pickle", f"{node.lineno}"
    for name, keywords, line in calls(path):
        where = f"{path.name} line {line}: {name}"
        if name.endswith("torch.load"):
            assert keywords.get("weights_only") == "True", where
        if name.endswith(("np.load", "numpy.load")):
            assert keywords.get("allow_pickle") == "False", where
        harmless = ("pickle.dumps", "pickle.UnpicklingError")
        assert name.rpartition(".")[0] not in PICKLES or name in harmless, where
        assert not name.endswith(("yaml.load", "yaml.unsafe_load", "yaml.full_load")), where
        assert keywords.get("shell", "False") == "False", where
        assert name not in ("eval", "exec", "os.system", "os.popen", "tempfile.mktemp"), where


def test_the_search_covers_the_product():
    names = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert {"server.py", "client.py", "utils.py", "plumbing/security/gate.py"} <= names
    assert any(name == "subprocess.run" for name, _, _ in calls(Path(__file__)))


@pytest.mark.parametrize(
    "path", tracked("*requirements*.txt"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_requirements_are_pinned_exactly(path):
    for line in path.read_text().splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement and not requirement.startswith(("-r ", "--")):
            assert re.fullmatch(r"[A-Za-z0-9._\[\]-]+==[A-Za-z0-9.+!]+( *;.*)?", requirement), line


@pytest.mark.parametrize(
    "path",
    [*tracked("Dockerfile"), *tracked("*/Dockerfile"), *tracked("*.sh")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_images_and_scripts_install_pinned_packages_and_copy_no_secret(path):
    text = path.read_text().replace("\\\n", " ")
    for command in re.findall(r"pip3? install ([^&|;\n]*)", text):
        for word in command.split():
            plain = re.fullmatch(r"[\"']?([a-z][a-z0-9_-]*)[\"']?", word)
            assert not plain, f"{plain and plain[1]} has no exact pin: {command}"
    for line in re.findall(r"^(?:COPY|ADD) .*", text, re.MULTILINE):
        sources = [word for word in line.split()[1:-1] if not word.startswith("--")]
        assert not {".", "./", "*"} & set(sources), line
        assert not re.search(r"\.pem|\.crt|sqlite|keys(?!\.py)", line), line
    assert not re.search(r"^(ARG|ENV) .*(TOKEN|JOIN|SECRET)", text, re.MULTILINE)
