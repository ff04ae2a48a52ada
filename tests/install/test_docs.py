"""Pages are right: generated parts, links, files, variables, commands, seams, version."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import util
from pathlib import Path

import pytest

import foldcp
from bench.machine import ROOT
from bench.pages.__main__ import pages, stale
from foldcp.cli.main import BENCHES
from foldcp.config import VARIABLES, Config

NAMES = [str(p.relative_to(ROOT)) for p in pages()] + ["CONTRIBUTING.md", "CHANGELOG.md"]
NAMES += ["examples/README.md"]
TEXTS = {name: (ROOT / name).read_text() for name in NAMES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
ARCHAIC = r"\b(told|gone|heard|dear|likewise|thereof|said of)\b"


def test_generated_parts_are_fresh() -> None:
    found = [str(path.relative_to(ROOT)) for path, _ in stale()]
    assert not found, f"stale: run python -m bench.pages ({', '.join(found)})"


def test_every_page_is_in_the_navigation_once() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(n.removeprefix("docs/") for n in NAMES if n.startswith("docs/"))
    assert len(TEXTS["README.md"].splitlines()) <= 150


def _slugs(path: Path) -> set[str]:
    """Anchors of a page as Python-Markdown makes them."""
    text = FENCE.sub("", path.read_text())
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in heads}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXTS[name])):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name} links to {target}"
        assert not anchor or anchor in _slugs(path), f"{name} links to {target}"


def _code(text: str, languages: str = "bash python text") -> Iterator[str]:
    """Inline code and the lines of code blocks."""
    for language, block in FENCE.findall(text):
        yield from block.splitlines() if language in languages.split() else ()
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


@pytest.mark.parametrize("name", NAMES)
def test_named_files_and_tests_exist(name: str) -> None:
    roots = "foldcp|foldcp_kernels|csrc|tests|bench|docs|examples"
    for code in _code(TEXTS[name]):
        for path in re.findall(rf"(?<![\w/.])(?:{roots})/[\w./-]*\w", code):
            here = path.startswith("docs/results/") or "*" in code
            assert here or (ROOT / path).exists(), f"{name} names {path}"
        for test in re.findall(r"^test_\w+", code):
            files = (ROOT / "tests").rglob("test_*.py")
            assert any(f"def {test}(" in f.read_text() for f in files), f"{name} names {test}"


def test_named_cases_exist() -> None:
    (file,) = (ROOT / "tests").rglob("test_predict.py")
    cases = set(re.findall(r'^ +"(\w+)": Wanted\(', file.read_text(), re.M))
    named = set(re.findall(r"`\[(\w+)\]`", TEXTS["docs/features.md"]))
    assert named and named <= cases


def test_named_variables_exist() -> None:
    for name, text in TEXTS.items():
        for variable in re.findall(r"\bFOLDCP_[A-Z]\w*", text):
            assert variable in VARIABLES, f"{name} names {variable}"
    listed = re.findall(r"^\| `(FOLDCP\w*)` \|", TEXTS["docs/variables.md"], re.M)
    assert listed == list(VARIABLES)


@cache
def _options_of_boltz() -> set[str]:
    main = Path(util.find_spec("boltz").origin).with_name("main.py")
    return set(re.findall(r'"--([\w-]+)"', main.read_text()))


def _check_bench(module: str, options: list[str]) -> None:
    path = ROOT / "bench" / module.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert file.is_file(), module
    sources = "".join(f.read_text() for f in (file, *path.glob("*.py")))
    if module == "rings" and "--model" in options:
        sources += (ROOT / "bench/rings_model.py").read_text()
    if module == "stock":
        return  # hands its options to Boltz
    for option in options:
        assert f'"{option}"' in sources, option


def _check_command(words: list[str]) -> None:
    """Fail unless a command could run as it is typed."""
    given = dict(w.split("=", 1) for w in words if re.match(r"[A-Z_]+=", w))
    Config.from_env({k: v for k, v in given.items() if k.startswith("FOLDCP")})
    words = [w for w in words if not re.match(r"[A-Z_]+=", w)]
    options = [w.partition("=")[0] for w in words if w.startswith("--")]
    head, rest = Path(words[0]).name, words[1:]
    if head == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{w}:", makefile, re.M) for w in rest), words
        assert all(re.search(rf"^{name} \?=", makefile, re.M) for name in given), words
    elif head == "python" and rest[0] == "-m" and rest[1].startswith("bench."):
        _check_bench(rest[1].removeprefix("bench."), options)
    elif head == "foldcp" and rest[0] == "bench" and rest[1:]:
        assert rest[1] in BENCHES, words
        _check_bench(rest[1], options)
    elif head == "foldcp" or "predict" in rest:
        commands = ("predict", "doctor", "report", "compare", "plan", "bench")
        assert head != "foldcp" or rest[0] in commands, words
        after = rest[rest.index("predict") + 1 :] if "predict" in rest else []
        for option in (w for w in after if w.startswith("--")):
            assert option[2:] in _options_of_boltz() | {"nproc", "mesh", "help"}, option


@pytest.mark.parametrize("name", NAMES)
def test_commands_can_be_typed(name: str) -> None:
    starts = r"([A-Z_]+=\S+ )*(boltz predict|foldcp|make|\S*python -m|torchrun|srun|mpirun) "
    found = 0
    for code in _code(TEXTS[name], "bash"):
        command = re.sub(r"\s+#.*|\.\.\.$", "", code).strip()
        if re.match(starts, command) and "..." not in command:
            try:
                _check_command(shlex.split(command))
            except Exception as error:
                raise AssertionError(f"{name}: `{command}`: {error}") from error
            found += 1
    assert found or name not in ("README.md", "docs/running.md", "docs/benchmarking.md")


def _replaced(path: Path) -> Iterator[str]:
    """Names of Boltz's modules that a file assigns to, as it writes them."""
    tree = ast.parse(path.read_text())
    imported = {"main", "module", "model", "pl_module", "dataset"}  # parameters and loops
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("boltz"):
            imported |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            for one in target.elts if isinstance(target, ast.Tuple) else (target,):
                if isinstance(one, ast.Attribute) and ast.unparse(one).split(".")[0] in imported:
                    yield ast.unparse(one)


def test_the_page_of_seams_lists_every_replaced_name() -> None:
    files = (ROOT / "foldcp/boltz").rglob("*.py")
    found = {name for f in files for name in _replaced(f)}
    assert len(found) > 30
    page = TEXTS["docs/design/boltz-seams.md"]
    listed = set(re.findall(r"`((?:[a-z]\w*\.)(?:\w+\.)*\w+)`", page))
    modules = {"model.template_module"}  # listed among the modules of the model
    assert found - modules <= listed, f"not on the page: {sorted(found - modules - listed)}"
    starts = {name.split(".")[0] for name in found} - {"model"}
    there = {name for name in listed if name.split(".")[0] in starts}
    loops = {"main.download_boltz1", "main.download_boltz2", "main.py"}  # by setattr
    assert there - loops <= found, f"no longer replaced: {sorted(there - loops - found)}"


@pytest.mark.parametrize("room", sorted(p.name for p in (ROOT / "foldcp").iterdir() if p.is_dir()))
def test_sources_point_to_pages(room: str) -> None:
    for path in (ROOT / "foldcp" / room).rglob("*.py"):
        text = path.read_text()
        assert "foldcp design" not in text, f"{path} cites a document that is not here"
        for page in re.findall(r"\bdocs/[\w/-]+\.md", text):
            assert (ROOT / page).is_file(), f"{path} cites {page}"


def test_the_version_stands_once() -> None:
    version = foldcp.__version__
    assert (ROOT / "foldcp/_version.py").read_text().count(version) == 1
    files = [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.cff"), ROOT / "Makefile"]
    files += [
        f for top in ("foldcp", "foldcp_kernels", "tests") for f in (ROOT / top).rglob("*.py")
    ]
    written = re.compile(rf"(?<![\d.]){re.escape(version)}(?![\d.])")
    twice = [f.name for f in files if f.name != "_version.py" and written.search(f.read_text())]
    assert not twice, f"{version} stands in {twice} too: take foldcp.__version__"
    released = re.findall(r"^## \[([\d.]+)\]", TEXTS["CHANGELOG.md"], re.M)
    assert released[0] == version and "## [Unreleased]" in TEXTS["CHANGELOG.md"]


def test_words_of_today() -> None:
    for name, text in TEXTS.items():
        found = re.findall(ARCHAIC, FENCE.sub("", text))
        assert not found, f"{name} says {found}"
