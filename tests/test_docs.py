"""The documents: the tests that they name are there, links lead somewhere, what they show runs, and lines are short."""

import ast
import builtins
import json
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import peft
import pytest
import tiny_pipelines
import torch
import transformers
from adapter_types import CASES
from conftest import batches, make_model

import oplora
from oplora.__main__ import _parser

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import diffusion_flags  # noqa: E402
import llm_flags  # noqa: E402
import vlm_flags  # noqa: E402

DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").rglob("README.md"),
        ROOT / "examples/README.md",
    ]
)
NAMES = {document: str(document.relative_to(ROOT)) for document in DOCUMENTS}


def names_in_tests() -> set[str]:
    sources = [file.read_text() for file in (ROOT / "tests").rglob("*") if file.suffix in (".py", ".c", ".cpp")]
    return {name for source in sources for name in re.findall(r"\b(test_\w+)\(", source)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES.get)
def test_every_test_that_is_named_exists(document: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", document.read_text()))
    assert named <= names_in_tests()


def test_adapter_table_has_a_row_for_every_case() -> None:
    rows = re.findall(r"^\| ([^|]+?) \|", (ROOT / "docs/adapters.md").read_text(), re.M)
    assert sorted(name for name in rows if name in CASES) == sorted(CASES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES.get)
def test_relative_links_lead_to_files(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text) + re.findall(r"^\[\w+\]: (?!http)(\S+)", text, re.M):
        assert (document.parent / target).exists(), target


def test_readme_is_read_in_a_minute() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES.get)
def test_lines_are_short(document: Path) -> None:
    """But for tables of figures: those that a script writes between markers, and the paper's claims with theirs."""
    text = re.sub(r"<!-- (.+?)(?::begin)? -->\n.*?<!-- (?:\1:end|/\1) -->", "", document.read_text(), flags=re.S)
    lines = text.splitlines()
    if document.name == "evidence_tables.md":
        lines = [line for line in lines if not line.startswith("|")]
    assert [line for line in lines if len(line) > 100] == []


# ---- code ----


def blocks_of(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.S | re.M)


WITH_PYTHON = [document for document in DOCUMENTS if blocks_of(document, "python")]


def stage() -> dict[str, Any]:
    """What a page's code may leave out: something to train, and pipelines to save."""
    model = make_model()
    optimizer = oplora.AdamW(model)
    inputs, _ = next(batches(1, torch.float32))
    model(inputs).sum().backward()
    optimizer.step()
    pipeline = tiny_pipelines.PIPELINES["sd"]()
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    pipeline.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return {
        **{"model": model, "base": model.get_base_model(), "optimizer": optimizer, "pipeline": pipeline},
        **{"unet": pipeline.unet, "te": pipeline.text_encoder, "batches": [], "blocks": []},
        **{"loss": model(inputs).sum(), "oplora": oplora, "torch": torch, "logging": MagicMock()},
        "trainable": lambda model: [p for p in model.parameters() if p.requires_grad],
        "TrainerCallback": transformers.TrainerCallback,
        "args": transformers.TrainingArguments(output_dir="out", report_to="none"),
    }


def left_out(code: str, known: dict[str, Any]) -> set[str]:
    """Names that the code takes from elsewhere."""
    loaded = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    return loaded - known.keys() - set(vars(builtins))


class Trainers(types.ModuleType):
    """A trainer's module that is not installed: whatever is asked of it is there. tests/trainers has the real calls."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        return type(name, (), {}) if name[0].isupper() else MagicMock(name=name)


def modules_of(code: str) -> set[str]:
    """All that it imports from, and what these are in."""
    named = [node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and node.module]
    return {".".join(parts[: i + 1]) for parts in (name.split(".") for name in named) for i in range(len(parts))}


@pytest.mark.parametrize("document", WITH_PYTHON, ids=NAMES.get)
def test_code_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other. A block that imports oplora has to stand alone; others find what the page leaves out:
    a model, an optimizer, and stand-ins that take any call."""
    monkeypatch.chdir(tmp_path)
    named: dict[str, Any] = {}
    for code in blocks_of(document, "python"):
        for module in modules_of(code):
            if module.split(".")[0] in ("axolotl", "swift", "llamafactory"):
                monkeypatch.setitem(sys.modules, module, Trainers(module))
        if re.match(r"import oplora\b", code):
            exec(compile(code, document.name, "exec"), {"__name__": "__main__"})
            continue
        for loader in ("peft.PeftModel", "transformers.AutoModelForImageTextToText", "diffusers.DiffusionPipeline"):
            monkeypatch.setattr(f"{loader}.from_pretrained", MagicMock())
        named = {**stage(), **named}
        stand_ins = {name: MagicMock(name=name) for name in left_out(code, named)}
        if "accelerator" in stand_ins:
            stand_ins["accelerator"].prepare.side_effect = lambda *prepared: prepared
        if "deepspeed" in stand_ins:
            stand_ins["deepspeed"].initialize.return_value = [MagicMock()] * 4
        if "dist" in stand_ins:
            stand_ins["dist"].get_world_size.return_value = 1
        code = code.replace("=...,", "=0.01,").replace("=...)", "=0.01)")
        exec(compile(code, document.name, "exec"), namespace := {"__name__": "page", **named, **stand_ins})
        named |= {name: namespace[name] for name in namespace.keys() - stand_ins.keys() - {"__builtins__"}}


def commands_of(document: Path) -> list[list[str]]:
    """Of blocks that are marked as shell, and of indented lines that begin as one."""
    text = "\n".join(blocks_of(document, "sh"))
    begins = r"make|oplora|python -m oplora|python examples/|python3? benchmarks/"
    indented = re.findall(rf"^    ((?:{begins}).*?)(?:  .*)?$", document.read_text(), re.M)
    lines = [*text.replace("\\\n", " ").splitlines(), *indented]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES.get)
def test_commands_are_understood(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {
        "finetune_llm.py": llm_flags.flags_of,
        "finetune_vlm.py": vlm_flags.flags_of,
        "finetune_diffusion.py": lambda doc: diffusion_flags.flags_of(doc, None),
    }
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in commands_of(document):
        while "=" in words[0]:  # of the environment
            words = words[1:]
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets
        elif words[0] == "oplora" or words[1:3] == ["-m", "oplora"]:
            arguments = words[1:] if words[0] == "oplora" else words[3:]
            _parser().parse_args(arguments)
        elif words[0].startswith("python") and words[1].endswith(".py"):
            script = ROOT / words[1]
            assert script.is_file()
            if script.name in flags:
                monkeypatch.setattr(sys, "argv", words[1:])
                flags[script.name](docstring_of(script))


def docstring_of(script: Path) -> str:
    return ast.get_docstring(ast.parse(script.read_text())) or ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES.get)
def test_json_is_json(document: Path) -> None:
    for block in blocks_of(document, "json"):
        json.loads(block)


# ---- the site ----


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert re.search(rf": {page.name}$", menu, re.M), page.name


def test_every_public_name_is_in_the_reference() -> None:
    reference = (ROOT / "docs/api.md").read_text()
    assert set(re.findall(r"^::: oplora\.(\w+)", reference, re.M)) == set(oplora.__all__)
