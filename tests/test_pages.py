"""The pages: their examples run, their configurations are read, their links lead somewhere, their tables say the truth.

A python block after `<!-- runnable -->` is executed, with a small stock pipeline in the place of `from_pretrained`'s;
the blocks of a page share their names, as a reader's session does. Every other python block must be Python, and import
names that are there.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import re
import sys
import textwrap
from pathlib import Path

import diffusers
import pytest
import typer
import yaml
from tiny import TINY
from transfers import HostTransfers

import diffusers_accel
from diffusers_accel import AccelConfig
from diffusers_accel.cli.main import app
from diffusers_accel.config.cache import POLICY_NAMES
from diffusers_accel.config.reading import parse_yaml
from diffusers_accel.core.streaming import TRANSFERS
from diffusers_accel.kernels.attention import KERNELS
from diffusers_accel.kernels.linear import LINEARS
from diffusers_accel.policies import POLICIES
from diffusers_accel.presets import PRESETS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(<!-- runnable -->\n)?```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """(whether it is marked as runnable, text) of a page's blocks in a language."""
    return [(bool(mark), text) for mark, found, text in FENCE.findall(page.read_text("utf-8")) if found == language]


def prose(page):
    """A page without its blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def loaded(path):
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 250


# --- examples --------------------------------------------------------------------------------------------------------

# The small pipeline that stands for what a class loads.
STANDS_FOR = {"FluxPipeline": "flux"}
# Arguments that make a call small, whatever the page asks for.
SMALL = {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 16}


@pytest.fixture
def readers_machine(monkeypatch, tmp_path):
    """A machine on which `from_pretrained` gives small pipelines, and a GPU is where the pipeline is already."""
    stock = diffusers.FluxPipeline.__call__

    @functools.wraps(stock)
    def __call__(self, *args, **kwargs):
        return stock(self, *args, **{**kwargs, **SMALL})

    monkeypatch.setattr(diffusers.FluxPipeline, "__call__", __call__)
    monkeypatch.setattr(
        diffusers.DiffusionPipeline,
        "from_pretrained",
        classmethod(lambda cls, *args, **kwargs: TINY[STANDS_FOR[cls.__name__]].build()),
    )
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda self, *args, **kwargs: self)
    monkeypatch.setattr(HostTransfers, "made", [])
    monkeypatch.setitem(TRANSFERS, "cpu", HostTransfers)
    monkeypatch.chdir(tmp_path)
    records = [registry._records for registry in (KERNELS, LINEARS, POLICIES)]
    before = [dict(each) for each in records]
    names = set(POLICY_NAMES)
    yield
    for each, earlier in zip(records, before, strict=True):
        each.clear()
        each.update(earlier)
    POLICY_NAMES.clear()
    POLICY_NAMES.update(names)


RUNNABLE = [page for page in PAGES if any(runs for runs, _ in blocks(page, "python"))]


def test_pages_have_examples_that_run():
    assert {"README.md", "docs/quickstart.md", "docs/guides/attention.md"} <= set(map(name_of, RUNNABLE))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_examples_run(page, readers_machine):
    names = {"__name__": "page"}
    for runs, text in blocks(page, "python"):
        if runs:
            exec(compile(text, name_of(page), "exec"), names)
    for pipe in [each for each in names.values() if isinstance(each, diffusers.DiffusionPipeline)]:
        if diffusers_accel.api.session_of(pipe) is not None:
            diffusers_accel.restore(pipe)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_are_python_with_names_that_exist(page):
    for _, text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers_accel"):
                module = importlib.import_module(node.module)
                for each in node.names:
                    assert hasattr(module, each.name), f"{node.module} has no {each.name}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("accelerate", "explain", "launch"):
                asked(node)


def asked(call):
    """The configuration that a call in a page asks for; whatever is no literal is left out.

    A class of ours stands for the mapping of its arguments, as it does in a configuration.
    """

    def value(node):
        if isinstance(node, ast.Call):
            kind = getattr(diffusers_accel, node.func.id)
            return kind(**{each.arg: value(each.value) for each in node.keywords})
        return ast.literal_eval(node)

    preset = call.args[1] if len(call.args) > 1 else None
    if isinstance(preset, ast.Constant):
        assert preset.value in PRESETS or preset.value.endswith(".yaml"), f"no preset {preset.value!r}"
    sections = {each.arg: each.value for each in call.keywords if each.arg is not None}
    # Names that the page itself registers are no business of this test.
    own = ("mine", "copied", "every-other")
    given = {name: value(node) for name, node in sections.items()}
    return AccelConfig.from_dict({name: each for name, each in given.items() if each not in own})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_calls_in_sentences_and_tables_can_be_read(page):
    for span in SPAN.findall(prose(page)):
        if re.fullmatch(r"(accelerate|explain|launch)\((?!.*\.\.\.).*\)", span):
            asked(ast.parse(span, mode="eval").body)
        elif re.fullmatch(r"\w+Config\(.*\)", span) and "..." not in span and "=," not in span and "=)" not in span:
            node = ast.parse(span, mode="eval").body
            asked(ast.Call(ast.Name("accelerate"), [], [ast.keyword(_section(node.func.id), node)]))


def _section(kind):
    return getattr(diffusers_accel, kind).section


def test_a_wrong_call_is_noticed():
    with pytest.raises(diffusers_accel.ConfigError, match="attension"):
        asked(ast.parse('accelerate(pipe, attension="sdpa")', mode="eval").body)
    with pytest.raises(AssertionError, match="no preset"):
        asked(ast.parse('accelerate(pipe, "quick")', mode="eval").body)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_configurations_are_read(page):
    for _, text in blocks(page, "yaml"):
        assert AccelConfig.from_dict(parse_yaml(text)) != AccelConfig()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_their_options(page):
    command = typer.main.get_command(app)
    for _, text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = line.partition("#")[0].split()
            if words[:1] != ["diffusers-accel"]:
                continue
            options = {option for each in command.commands[words[1]].params for option in each.opts}
            unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
            assert not unknown, line


# --- links and names -------------------------------------------------------------------------------------------------


def slug(heading):
    """A heading's anchor, by GitHub's rules and those of the site's generator, which agree on these pages."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[\s]", "-", re.sub(r"[^\w\s-]", "", text.strip().lower()))


def anchors(page):
    found = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE):
        found.add(re.sub("-+", "-", slug(heading)))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file() and there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    text = page.read_text("utf-8")
    for path in re.findall(r"\b(?:benchmarks|examples|docs|tests|diffusers_accel)/[\w./*-]*\w\.\w+", text):
        assert list(ROOT.glob(path)), path
    for path in re.findall(r"(?<![\w/*.-])([\w-]+(?:-\*)?\.json)\b", text):
        assert list((ROOT / "benchmarks" / "results").glob(path)) or path in ("config.json", "model_index.json"), path


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text("utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    found = set(re.findall(r"^::: diffusers_accel\.(\w+)$", text, re.MULTILINE))
    assert found >= set(diffusers_accel.__all__)
    configs = {name for name in diffusers_accel.__all__ if name.endswith("Config")} - {"AccelConfig"}
    assert set(re.findall(r"\{\{ fields: (\w+) \}\}", text)) == configs


def test_tables_of_fields():
    fields = loaded(ROOT / "docs" / "fields.py")
    page = fields.on_page_markdown("{{ fields: SeaCacheConfig }}\n")
    assert "| `threshold` | `float` (at least 0) | `0.25` |" in page and "{{" not in page
    assert '| `"wait"`, `"raise"` | `\'wait\'` |' in fields.table("RequestConfig")
    assert "| `flux.1-dev` | threshold 0.25 |" in fields.on_page_markdown("{{ rows }}")


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text("utf-8"))
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES if page != README)


def test_the_generator_is_pinned():
    import tomllib

    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {re.match(r"[\w-]+", each)[0] for each in extra} <= set(pins)
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["strict"] is True


# --- what the code says ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_the_matrix_is_what_features_say():
    """`python docs/matrix.py` writes it anew."""
    matrix = loaded(ROOT / "docs" / "matrix.py")
    found = matrix.matrix()
    assert "✓" in found and "no" in found
    for page in matrix.PAGES:
        assert matrix.between(page.read_text("utf-8"))[1] == found, name_of(page)


def test_the_matrix_notices_a_refusal(monkeypatch):
    matrix = loaded(ROOT / "docs" / "matrix.py")
    pipes = [TINY["flux"].build(), TINY["pixart"].build()]
    with matrix.two_ranks():
        assert [matrix.cell("CUDA graphs", each) for each in (pipes[:1], pipes[1:], pipes)] == ["✓", "no", "some"]


@pytest.mark.filterwarnings("ignore")
def test_the_budgets_are_what_the_planner_says():
    """`python docs/budgets.py` writes them anew."""
    budgets = loaded(ROOT / "docs" / "budgets.py")
    found = budgets.table()
    assert "level 2" in found and "level 0" in found and " GiB on" in found
    assert budgets.between(budgets.PAGE.read_text("utf-8"))[1] == found


@functools.cache
def literals():
    """All text that the package's code has, f-strings in their parts."""
    found = []
    for path in (ROOT / "diffusers_accel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [each.value if isinstance(each, ast.Constant) else "…" for each in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_are_real():
    """Every message in a first column, piece by piece between the places where names and numbers stand."""
    text, rows = literals(), 0
    for line in (ROOT / "docs" / "troubleshooting.md").read_text("utf-8").splitlines():
        found = re.match(r"\| `([^`]+)` \|", line)
        if found is None:
            continue
        rows += 1
        for piece in found[1].split("…"):
            piece = re.sub(r"^[()\s.]+$", "", piece.strip())
            assert not piece or piece in text, found[1]
    assert rows > 60


def test_docstrings_of_public_functions_name_their_parameters():
    """The reference is made from them."""
    for name in ("accelerate", "warmup", "launch", "calibrate", "from_pretrained", "register_attention"):
        function = getattr(diffusers_accel, name)
        text = textwrap.dedent(inspect.getdoc(function))
        for parameter in inspect.signature(function).parameters:
            assert re.search(rf"^ +{parameter}: ", text, re.MULTILINE), (name, parameter)
