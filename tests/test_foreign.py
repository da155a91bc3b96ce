"""Folders of adapter-hub's `adapters` and of pyreft: the loaded model computes what their formulas say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from lit_peft import hub, load
from lit_peft.methods.reft import edited
from lit_peft.named import adapters, disabled, routed
from lit_peft.saved import locate
from lit_peft.verbs import inspect
from lit_peft.zoo import compose
from tests import foreign_folders as made
from tests.foreign_folders import (
    BOTTLENECK,
    COMPACTER,
    ENCODERS,
    HOULSBY,
    LAYERS,
    LORA,
    PARALLEL,
    PREFIX,
    REFT,
    D,
    P,
    at,
    base_of,
)
from tests.models import VOCAB


def plain(kind: str, base: Path) -> Any:
    auto = AutoModelForSequenceClassification if kind in ENCODERS else AutoModelForCausalLM
    return auto.from_pretrained(base, attn_implementation="eager").eval()


def loaded(kind: str, folder: Path, base: Path | None = None) -> Any:
    task = "classification" if kind in ENCODERS else "sft"
    module: Any = load(folder, task=task, backbone=None if base is None else str(base), device="cpu")
    if kind in ENCODERS:  # the folder has no head: take the reference's
        reference = plain(kind, base or Path(json.loads((folder / "adapter_config.json").read_text())["model_name"]))
        module.model.classifier.load_state_dict(reference.classifier.state_dict())
    return module


def ids() -> Tensor:
    return torch.randint(8, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def blocks(kind: str, model: Any) -> list[Any]:
    return list(
        {
            "llama": lambda: model.model.layers,
            "gpt2": lambda: model.transformer.h,
            "bert": lambda: model.bert.encoder.layer,
            "roberta": lambda: model.roberta.encoder.layer,
        }[kind]()
    )


def changed(module: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Change a module's (first) output."""

    def hook(_: Any, args: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    module.register_forward_hook(hook)


def branch(t: Mapping[str, Tensor], config: Mapping[str, Any], key: str, rule: Tensor | None) -> Callable[..., Tensor]:
    """f(h) of one bottleneck, from the file's tensors in float64."""
    g = {name.removeprefix(f"{key}."): value.double() for name, value in t.items() if name.startswith(f"{key}.")}
    act = {"relu": F.relu, "swish": F.silu, "gelu": F.gelu}[config["non_linearity"]]

    def dense(name: str) -> tuple[Tensor, Tensor]:
        if rule is None:
            return g[f"{name}.weight"].t(), g[f"{name}.bias"]
        products = [
            torch.kron(a.double(), w) for a, w in zip(rule, g[f"{name}.W_left"] @ g[f"{name}.W_right"], strict=True)
        ]
        return torch.stack(products).sum(0), g[f"{name}.b"]

    def f(h: Tensor) -> Tensor:
        x = h.double()
        (down, down_bias), (up, up_bias) = dense("adapter_down.0"), dense("adapter_up")
        y = act(x @ down + down_bias) @ up + up_bias
        y = y * (g["scaling"] if "scaling" in g else config["scaling"])
        if "gate.weight" in g:
            y = y * torch.sigmoid(x @ g["gate.weight"].t() + g["gate.bias"]).mean(1, keepdim=True)
        return y.to(h.dtype)

    return f


def with_bottlenecks(kind: str, model: Any, config: Mapping[str, Any], t: Mapping[str, Tensor]) -> None:
    rule = next((value for key, value in t.items() if key.endswith("phm_rule")), None)
    for layer, block in enumerate(blocks(kind, model)):
        for place in ("mh", "output") if config["mh_adapter"] else ("output",):
            f = branch(t, config, at(kind, layer, f"{made.CLASSES[kind][2][place]}.adapters.task"), rule)
            if kind in ENCODERS:
                whole = block.attention.output if place == "mh" else block.output

                def forward(hidden_states: Tensor, input_tensor: Tensor, whole: Any = whole, f: Any = f) -> Tensor:
                    h, u, norm = whole.dense(hidden_states), input_tensor, whole.LayerNorm
                    if config["is_parallel"]:
                        out = norm(h + f(u) + u)
                    elif config["original_ln_before"]:
                        out = norm(h + f(norm(h + u)) + u)
                    else:
                        out = norm(h + f(h) + u)
                    return out  # type: ignore[no-any-return]

                whole.forward = forward
            elif config["is_parallel"]:
                norm = block.post_attention_layernorm if kind == "llama" else block.ln_2
                read: list[Tensor] = []
                norm.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
                changed(block.mlp, lambda h, f=f, read=read: h + f(read.pop()))
            elif config["original_ln_before"]:
                changed(block, lambda h, f=f: h + f(h))
            else:
                inner = block.mlp if place == "output" else getattr(block, "self_attn", None) or block.attn
                changed(inner, lambda h, f=f: h + f(h))


def prefix_of(kind: str, config: Mapping[str, Any], t: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer, (kv_heads, p, head_dim)."""
    g = {key.partition("self_prefix.")[2]: value.double() for key, value in t.items() if "self_prefix." in key}
    if config["flat"]:
        rows = g["control_trans"]
    else:
        hidden = torch.tanh(g["wte.weight"] @ g["control_trans.0.weight"].t() + g["control_trans.0.bias"])
        rows = hidden @ g["control_trans.2.weight"].t() + g["control_trans.2.bias"]
    parts = rows.view(P, 2 * LAYERS, made.KV[kind] // 8, 8).permute(1, 2, 0, 3).float()
    return [(parts[2 * layer], parts[2 * layer + 1]) for layer in range(LAYERS)]


def with_prefix(kind: str, model: Any, config: Mapping[str, Any], t: Mapping[str, Tensor]) -> None:
    """Encoders: attention written out, over the prefix and the text."""
    for layer, (block, (key, value)) in enumerate(zip(blocks(kind, model), prefix_of(kind, config, t), strict=True)):
        core, gates = block.attention.self, at(kind, layer, "attention.self.prefix_tuning.prefix_gates.task")

        def forward(h: Tensor, *_: Any, core: Any = core, k: Any = key, v: Any = value, gates: str = gates, **__: Any):  # type: ignore[no-untyped-def]
            rows, length = h.shape[:2]
            heads = [p(h).view(rows, length, 4, 8).transpose(1, 2) for p in (core.query, core.key, core.value)]
            g = torch.ones(rows, 1, 1, 1)
            if f"{gates}.weight" in t:
                g = torch.sigmoid(h @ t[f"{gates}.weight"].t() + t[f"{gates}.bias"]).mean(1)[:, :, None, None]
            keys, values = torch.cat([k * g, heads[1]], 2), torch.cat([v * g, heads[2]], 2)
            out = ((heads[0] @ keys.transpose(2, 3)) / 8**0.5).softmax(-1) @ values
            return out.transpose(1, 2).flatten(2), None

        core.forward = forward


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("settings", [{}, HOULSBY, COMPACTER, {"scaling": "learned"}, {"scaling": "channel"}], ids=str)
@torch.no_grad()
def test_bottlenecks(settings: dict[str, Any], kind: str, tmp_path: Path) -> None:
    base, config = base_of(kind, tmp_path), {**BOTTLENECK, **settings}
    tensors = made.bottleneck(kind, config)
    folder = made.write_adapters(tmp_path / "a", kind, base, config, tensors, pickled=bool(settings))
    reference = plain(kind, base)
    before = reference(input_ids=ids()).logits
    with_bottlenecks(kind, reference, config, tensors)
    expected = reference(input_ids=ids()).logits
    module = loaded(kind, folder)
    assert torch.allclose(module.model(input_ids=ids()).logits, expected, atol=2e-4, rtol=1e-4)
    assert (expected - before).abs().max() > 1e-2
    with disabled(module):
        assert torch.allclose(module.model(input_ids=ids()).logits, before, atol=1e-5)


@pytest.mark.parametrize("settings", [PARALLEL, {**PARALLEL, "scaling": "learned"}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
@torch.no_grad()
def test_parallel_bottlenecks(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base, config = base_of(kind, tmp_path), {**BOTTLENECK, **settings}
    tensors = made.bottleneck(kind, config)
    folder = made.write_adapters(tmp_path / "a", kind, base, config, tensors)
    reference = plain(kind, base)
    with_bottlenecks(kind, reference, config, tensors)
    expected = reference(input_ids=ids()).logits
    module = loaded(kind, folder)
    assert torch.allclose(module.model(input_ids=ids()).logits, expected, atol=1e-4, rtol=1e-4)
    with disabled(module):
        before = module.model(input_ids=ids()).logits
    assert torch.allclose(before, plain(kind, base)(input_ids=ids()).logits, atol=1e-5)
    if kind == "llama":
        with routed(module, ["default", None]):
            mixed = module.model(input_ids=ids()).logits
        assert torch.allclose(mixed[0], expected[0], atol=1e-4, rtol=1e-4)
        assert torch.allclose(mixed[1], before[1], atol=1e-5)
        again: Any = load(module.save_adapter(tmp_path / "ours"), device="cpu")
        assert torch.allclose(again.model(input_ids=ids()).logits, expected, atol=1e-4, rtol=1e-4)


def behind_prefix(kind: str, reference: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """Decoders: a cache, whose text begins at position 0 all the same."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(prefix_of(kind, config, tensors)):
        cache.update(key[None].expand(2, -1, -1, -1), value[None].expand(2, -1, -1, -1), layer)
    mask, positions = torch.ones(2, P + 9, dtype=torch.long), torch.arange(9)[None].expand(2, -1)
    out = reference(input_ids=ids(), attention_mask=mask, position_ids=positions, past_key_values=cache)
    logits: Tensor = out.logits
    return logits


@torch.no_grad()
def test_mam_on_a_decoder(tmp_path: Path) -> None:
    base, parallel = base_of("llama", tmp_path), {**BOTTLENECK, **PARALLEL}
    tensors = made.prefix("llama", PREFIX) | made.bottleneck("llama", parallel)
    union = {"architecture": "union", "configs": [PREFIX, parallel]}
    folder = made.write_adapters(tmp_path / "a", "llama", base, union, tensors)
    reference = plain("llama", base)
    with_bottlenecks("llama", reference, parallel, tensors)
    expected = behind_prefix("llama", reference, PREFIX, tensors)
    assert torch.allclose(loaded("llama", folder).model(input_ids=ids()).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("flat", [False, True])
@torch.no_grad()
def test_prefixes(flat: bool, kind: str, tmp_path: Path) -> None:
    base, config = base_of(kind, tmp_path), {**PREFIX, "flat": flat}
    tensors = made.prefix(kind, config)
    folder = made.write_adapters(tmp_path / "a", kind, base, config, tensors)
    reference = plain(kind, base)
    if kind == "bert":
        with_prefix(kind, reference, config, tensors)
        expected = reference(input_ids=ids()).logits
    else:  # a cache, whose text begins at position 0 all the same
        cache = DynamicCache()
        for layer, (key, value) in enumerate(prefix_of(kind, config, tensors)):
            cache.update(key[None].expand(2, -1, -1, -1), value[None].expand(2, -1, -1, -1), layer)
        mask, positions = torch.ones(2, P + 9, dtype=torch.long), torch.arange(9)[None].expand(2, -1)
        expected = reference(input_ids=ids(), attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    found = loaded(kind, folder).model(input_ids=ids()).logits
    assert torch.allclose(found, expected, atol=1e-4)


@torch.no_grad()
def test_unions(tmp_path: Path) -> None:
    """MAM and UniPELT on encoders; a decoder would need gates that look ahead."""
    base = base_of("roberta", tmp_path)
    gated = [{**PREFIX, "use_gating": True}, {**BOTTLENECK, "use_gating": True}, LORA]
    for name, parts in (("mam", [PREFIX, {**BOTTLENECK, **PARALLEL}]), ("unipelt", gated)):
        tensors: dict[str, Tensor] = {}
        for part in parts:
            build = {"prefix_tuning": made.prefix, "lora": made.gated_lora}
            tensors |= build.get(str(part.get("architecture")), made.bottleneck)("roberta", part)
        config = {"architecture": "union", "configs": parts}
        folder = made.write_adapters(tmp_path / name, "roberta", base, config, tensors)
        reference = plain("roberta", base)
        with_prefix("roberta", reference, parts[0], tensors)
        with_bottlenecks("roberta", reference, parts[1], tensors)
        for layer, block in enumerate(blocks("roberta", reference)):
            for leaf in ("query", "value") if name == "unipelt" else ():
                key = at("roberta", layer, f"attention.self.{leaf}.loras.task")
                a, b, w, c = (tensors[f"{key}.{end}"] for end in ("lora_A", "lora_B", "gate.weight", "gate.bias"))
                linear = getattr(block.attention.self, leaf)

                def forward(x: Tensor, linear: Any = linear, a: Any = a, b: Any = b, w: Any = w, c: Any = c) -> Tensor:
                    g = torch.sigmoid(x @ w.t() + c).mean(1, keepdim=True)
                    return F.linear(x, linear.weight, linear.bias) + g * (x @ a.t() @ b.t())

                linear.forward = forward
        module = loaded("roberta", folder)
        found = module.model(input_ids=ids()).logits
        assert torch.allclose(found, reference(input_ids=ids()).logits, atol=1e-4), name
        assert type(module).__name__.lower().startswith(name)


def with_edits(
    kind: str, model: Any, values: Mapping[tuple[int, int], tuple[Tensor, ...]], first: int, last: int, form: str
) -> None:
    for layer, block in enumerate(blocks(kind, model)):
        if (layer, 0) not in values:
            continue

        def change(h: Tensor, layer: int = layer) -> Tensor:
            marks = edited(torch.ones(h.shape[:2]), first, last)
            out = h.double()
            for place in (1, 2):
                r, w, b, *c = (t.double() for t in values.get((layer, place - 1), values[layer, 0]))
                x = h.double()
                source = x @ w.t() + b
                if form in ("loreft", "noreft"):
                    source = source - x @ r.t() - (c[0] if c and form == "noreft" else 0)
                out = torch.where((marks == place)[..., None], x + source @ r, out)
            return out.to(h.dtype)

        changed(block, change)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["loreft", "noreft", "direft"])
@torch.no_grad()
def test_edits_of_adapters(form: str, tied: bool, kind: str, tmp_path: Path) -> None:
    base, config = base_of(kind, tmp_path), {**REFT, "tied_weights": tied, "orthogonality": form == "loreft"}
    if form != "loreft":
        config["subtract_projection"] = form == "noreft"
    tensors, values = made.reft(kind, config)
    folder = made.write_adapters(tmp_path / "a", kind, base, config, tensors, pickled=tied)
    reference = plain(kind, base)
    with_edits(kind, reference, values, 2, 1, form)
    module = loaded(kind, folder)
    found = module.model(input_ids=ids()).logits
    assert torch.allclose(found, reference(input_ids=ids()).logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta"])
@pytest.mark.parametrize(
    "name", ["LoreftIntervention", "DireftIntervention", "NoreftIntervention", "NodireftIntervention"]
)
@torch.no_grad()
def test_edits_of_pyreft(name: str, kind: str, tmp_path: Path) -> None:
    base = base_of(kind, tmp_path)
    form = name.removesuffix("Intervention").lower()
    tied = form in ("loreft", "noreft")
    layers = (1,) if form == "direft" else (0, 1)
    values = made.write_pyreft(tmp_path / "a", kind, name, tied=tied, layers=layers, by_path=kind == "roberta")
    assert locate(tmp_path / "a") == ("adapter", tmp_path / "a")
    reference = plain(kind, base)
    with_edits(kind, reference, values, 2, 3, form)
    task = "classification" if kind in ENCODERS else "sft"
    method = "loreft" if form == "loreft" else "direft"
    labels = {"labels": ["a", "b", "c"]} if kind in ENCODERS else {}
    module: Any = compose(method, task)(str(base), reft={"first": 2, "last": 3}, adapter=str(tmp_path / "a"), **labels)
    with pytest.warns(UserWarning, match=r"does not say which tokens.*first 2 and the last 3"):
        module.configure_model()
    module.eval()
    if kind in ENCODERS:
        module.model.classifier.load_state_dict(reference.classifier.state_dict())
    found = module.model(input_ids=ids()).logits
    assert torch.allclose(found, reference(input_ids=ids()).logits, atol=1e-4)


@torch.no_grad()
def test_what_was_read_is_saved_as_ours_and_joins_as_a_named_set(tmp_path: Path) -> None:
    base, config = base_of("llama", tmp_path), {**REFT}
    tensors, _ = made.reft("llama", config)
    folder = made.write_adapters(tmp_path / "a", "llama", base, config, tensors)
    module = loaded("llama", folder)
    expected = module.model(input_ids=ids()).logits
    again: Any = load(module.save_adapter(tmp_path / "ours"), device="cpu")
    assert torch.allclose(again.model(input_ids=ids()).logits, expected, atol=1e-5)
    stored = sum(t.numel() for t in hub.contents(tmp_path / "ours")[0][1].values())
    assert stored == LAYERS * 2 * (2 * made.R * D + made.R)  # not the frames of width d that the folder has
    other: Any = compose("loreft", "sft")(str(base))
    other.configure_model()
    other.load_adapter(folder, "theirs")
    other.eval()
    with adapters(other, "theirs"):
        assert torch.allclose(other.model(input_ids=ids()).logits, expected, atol=1e-5)


def test_inspect_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_of("llama", tmp_path)
    made.write_adapters(tmp_path / "a", "llama", base, BOTTLENECK, made.bottleneck("llama", BOTTLENECK))
    made.write_pyreft(tmp_path / "b", "llama", "LoreftIntervention")
    for name, word in (("a", "pfeiffer"), ("b", "loreft")):
        inspect.run(str(tmp_path / name))
        assert word in capsys.readouterr().out


@torch.no_grad()
def test_a_head_beside_the_adapter(tmp_path: Path) -> None:
    base, config = base_of("bert", tmp_path), {**BOTTLENECK}
    folder = made.write_adapters(tmp_path / "a", "bert", base, config, made.bottleneck("bert", config))
    head = {"classifier.weight": torch.randn(3, D), "classifier.bias": torch.randn(3)}
    torch.save(head, folder / "pytorch_model_head.bin")
    module: Any = load(folder, task="classification", device="cpu")
    assert torch.equal(module.model.classifier.weight, head["classifier.weight"])
    torch.save({"heads.task.1.weight": torch.randn(D, D)}, folder / "pytorch_model_head.bin")
    with pytest.warns(UserWarning, match="starts anew"):
        load(folder, task="classification", device="cpu")
