"""The table of methods: true to the classes, and fast."""

import inspect
import json
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest

from lit_peft.adapter import Adapter
from lit_peft.catalogue import FACTS, METHODS
from lit_peft.mixin import PEFT
from lit_peft.verbs import methods


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
        assert adapter.peft_type == facts.peft_type
        assert (adapter.merge is not Adapter.merge) == facts.merges
    else:
        assert facts.merges, "what is trained in place is merged already"
        assert facts.peft_type in inspect.getsource(cls.parts)
    assert facts.paper.startswith("https://") or name == "full"


def test_table_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    methods.run()
    shown = capsys.readouterr().out
    assert all(name in shown for name in METHODS)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_one_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    methods.run("bitfit")
    shown = capsys.readouterr().out
    assert "from lit_peft import BitFit" in shown
    assert "https://arxiv.org/abs/2106.10199" in shown
    methods.run(json=True)
    assert list(json.loads(capsys.readouterr().out)) == list(METHODS)
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
