"""The table of methods: true to the classes, and fast."""

import inspect
import json
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lit_peft.adapter import Adapter
from lit_peft.catalogue import FACTS, METHODS
from lit_peft.mixin import PEFT
from lit_peft.verbs import methods


def page_maker() -> ModuleType:
    spec = spec_from_file_location("tables", Path(__file__).parents[2] / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables: Any = page_maker()


def imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"lit_peft.{module}"), name)


def test_every_method_has_facts() -> None:
    assert list(FACTS) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_facts_are_true(name: str) -> None:
    cls, facts = imported(METHODS[name]), FACTS[name]
    assert issubclass(cls, PEFT)
    assert cls.method == name
    if facts.keyword:
        config = imported(facts.config)
        default = inspect.signature(cls.__init__).parameters[facts.keyword].default
        assert type(default) is config
    else:
        assert facts.config == ""
    if facts.adapter:
        adapter = imported(facts.adapter)
        if isinstance(adapter.peft_type, str):  # otherwise the method's configuration says; see tests/test_support.py
            assert adapter.peft_type in facts.peft_type.split(" + ")
        assert (adapter.merge is not Adapter.merge) == facts.merges
    else:
        assert facts.merges, "what is trained in place is merged already"
        assert facts.peft_type in inspect.getsource(cls.parts)
    assert facts.paper.startswith("https://") or name == "full"


@pytest.mark.parametrize("columns", ["80", "120"])
def test_table_fits(columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    methods.run()
    shown = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", shown, re.M) for name in METHODS)
    assert all(re.search(rf"^{head} ", shown, re.M) for head, _ in methods.SUPPORT.values())
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= int(columns)


@pytest.mark.parametrize("page", tables.PAGES)
def test_page_is_up_to_date(page: str) -> None:
    text = (tables.ROOT / page).read_text()
    assert "<!-- methods: " in text
    assert tables.renewed(text) == text, "run: python docs/tables.py"


def test_tables_name_every_method_and_what_it_supports() -> None:
    for make in tables.TABLES.values():
        heads, _, *rows = make().splitlines()
        assert [row.split("`")[1] for row in rows] == list(METHODS)
        assert {row.count("|") for row in rows} == {heads.count("|")}
    bitfit = next(row for row in tables.support().splitlines() if "`bitfit`" in row).split(" | ")
    assert bitfit[:3] == ["| `bitfit`", "yes", "-"]
    assert "| `old` |" not in tables.renewed("<!-- methods: short -->\n| `old` |\n<!-- /methods -->\n")


def test_one_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    methods.run("bitfit")
    shown = capsys.readouterr().out
    assert "from lit_peft import BitFit" in shown
    assert "https://arxiv.org/abs/2106.10199" in shown
    methods.run("fusion")
    assert "--model.fusion.adapters ..." in capsys.readouterr().out
    methods.run(json=True)
    told = json.loads(capsys.readouterr().out)
    assert list(told) == list(METHODS)
    assert {key: told["bitfit"][key] for key in ("merges", "peft", "sets")} == {
        "merges": True,
        "peft": False,
        "sets": True,
    }
    with pytest.raises(ValueError, match="Did you mean lora"):
        methods.run("lorra")


def test_shorthand() -> None:
    assert methods.shorthand([]) == []
    assert methods.shorthand(["lora", "--json"]) == ["--name=lora", "--json=true"]
    assert methods.shorthand(["--json", "--name", "lora"]) == ["--json=true", "--name", "lora"]


def test_no_model_code_is_imported() -> None:
    code = (
        "import sys; from lit_peft.verbs import methods; methods.run(); methods.run('lora');"
        "heavy = {'torch', 'lightning', 'transformers', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
