"""Folders as `adapters` and pyreft write them, with random tensors, built from their formats alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from tests.models import save_tiny

D, LAYERS, R, P, M, N = 32, 2, 3, 4, 8, 4  # width, layers, rank, prefix length, bottleneck, Kronecker products
ENCODERS = ("bert", "roberta")
CLASSES = {
    "llama": ("LlamaForCausalLM", "model.layers.{}", {"mh": "attention_adapters", "output": "output_adapters"}),
    "gpt2": ("GPT2LMHeadModel", "transformer.h.{}", {"mh": "attention_adapters", "output": "output_adapters"}),
    "bert": ("BertAdapterModel", "bert.encoder.layer.{}", {"mh": "attention.output", "output": "output"}),
    "roberta": ("RobertaAdapterModel", "roberta.encoder.layer.{}", {"mh": "attention.output", "output": "output"}),
}
KV = {"llama": 16, "gpt2": 32, "bert": 32, "roberta": 32}  # kv_heads * head_dim
BOTTLENECK: dict[str, Any] = {
    **{"mh_adapter": False, "output_adapter": True, "original_ln_before": True, "original_ln_after": True},
    **{"residual_before_ln": True, "adapter_residual_before_ln": False, "ln_before": False, "ln_after": False},
    **{"is_parallel": False, "scaling": 1.0, "non_linearity": "relu", "reduction_factor": D / M, "use_gating": False},
    **{"inv_adapter": None, "cross_adapter": False, "leave_out": [], "dropout": 0.0, "phm_layer": False, "phm_dim": N},
    **{"factorized_phm_W": True, "shared_W_phm": False, "shared_phm_rule": True, "factorized_phm_rule": False},
    **{"phm_rank": 1, "phm_bias": True, "init_weights": "bert", "stochastic_depth": 0.0},
}
HOULSBY = {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"}
PARALLEL = {"is_parallel": True, "original_ln_before": False, "scaling": 4.0}
COMPACTER = {**HOULSBY, "phm_layer": True, "non_linearity": "gelu"}
PREFIX: dict[str, Any] = {
    **{"architecture": "prefix_tuning", "encoder_prefix": True, "cross_prefix": True, "leave_out": [], "flat": False},
    **{"prefix_length": P, "bottleneck_size": 6, "non_linearity": "tanh", "dropout": 0.0, "use_gating": False},
    **{"shared_gating": True},
}
LORA: dict[str, Any] = {
    **{"architecture": "lora", "selfattn_lora": True, "r": R, "alpha": 2, "dropout": 0.0, "attn_matrices": ["q", "v"]},
    **{"composition_mode": "add", "use_gating": True, "use_dora": False, "leave_out": [], "vera_d": None},
}
REFT: dict[str, Any] = {
    **{"architecture": "reft", "layers": "all", "prefix_positions": 2, "suffix_positions": 1, "r": R, "dtype": None},
    **{"orthogonality": True, "tied_weights": False, "dropout": 0.05, "non_linearity": None, "output_reft": True},
}


def base_of(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    return save_tiny(kind, folder / "base", task="classification" if kind in ENCODERS else "lm")


def at(kind: str, layer: int, rest: str) -> str:
    return f"{CLASSES[kind][1].format(layer)}.{rest}"


def bottleneck(kind: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    for layer in range(LAYERS):
        for place in ("mh", "output") if config["mh_adapter"] else ("output",):
            key = at(kind, layer, f"{CLASSES[kind][2][place]}.adapters.task")
            for name, wide, tall in (("adapter_down.0", D, M), ("adapter_up", M, D)):
                if config["phm_layer"]:
                    tensors[f"{key}.{name}.W_left"] = torch.randn(N, wide // N, 1)
                    tensors[f"{key}.{name}.W_right"] = torch.randn(N, 1, tall // N)
                    tensors[f"{key}.{name}.b"] = torch.randn(tall)
                else:
                    tensors[f"{key}.{name}.weight"] = torch.randn(tall, wide) * 0.3
                    tensors[f"{key}.{name}.bias"] = torch.randn(tall) * 0.3
            if config["scaling"] in ("learned", "channel"):
                tensors[f"{key}.scaling"] = torch.rand(1 if config["scaling"] == "learned" else D) + 0.5
            if config["use_gating"]:
                tensors[f"{key}.gate.weight"], tensors[f"{key}.gate.bias"] = torch.randn(1, D), torch.randn(1)
    if config["phm_layer"]:
        tensors[f"{CLASSES[kind][1].split('.')[0]}.shared_parameters.task.phm_rule"] = torch.randn(N, N, N) * 0.1
    return tensors


def prefix(kind: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    wide, mu = LAYERS * 2 * KV[kind], config["bottleneck_size"]
    pool = (
        {"control_trans": torch.randn(P * wide)}
        if config["flat"]
        else {
            "wte.weight": torch.randn(P, D),
            "control_trans.0.weight": torch.randn(mu, D) * 0.3,
            "control_trans.0.bias": torch.randn(mu),
            "control_trans.2.weight": torch.randn(wide, mu),
            "control_trans.2.bias": torch.randn(wide),
        }
    )
    attention = {"llama": "self_attn", "gpt2": "attn"}.get(kind, "attention.self")
    tensors = {}
    for layer in range(LAYERS):  # each layer holds the one pool
        for leaf, tensor in pool.items():
            key = at(kind, layer, f"{attention}.prefix_tuning.pool.prefix_tunings.task.self_prefix.{leaf}")
            tensors[key] = tensor.clone()
        if config["use_gating"]:
            key = at(kind, layer, f"{attention}.prefix_tuning.prefix_gates.task")
            tensors[f"{key}.weight"], tensors[f"{key}.bias"] = torch.randn(1, D), torch.randn(1)
    return tensors


def gated_lora(kind: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    for layer in range(LAYERS):
        for name in ("query", "value"):
            key = at(kind, layer, f"attention.self.{name}.loras.task")
            tensors[f"{key}.lora_A"], tensors[f"{key}.lora_B"] = torch.randn(R, D) * 0.3, torch.randn(D, R) * 0.3
            tensors[f"{key}.gate.weight"], tensors[f"{key}.gate.bias"] = torch.randn(1, D), torch.randn(1)
    return tensors


class Frame(nn.Module):
    """What pyreft turns hidden states with: a weight (d, r)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))


def turned(rows: int, columns: int) -> nn.Module:
    """A weight in torch's orthogonal parametrisation, moved away from its start as by training."""
    frame = orthogonal(Frame(rows, columns))
    with torch.no_grad():
        original = frame.parametrizations.weight.original
        original.add_(torch.randn_like(original).tril(-1) if rows > columns else torch.randn_like(original).triu(1))
    return frame


def reft(kind: str, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[tuple[int, int], tuple[Tensor, ...]]]:
    """Tensors of a folder; and (R (r, d), W, b) of each layer and unit."""
    tensors, values = {}, {}
    for layer in range(LAYERS):
        for unit in range(1 if config["tied_weights"] else 2):
            key = at(kind, layer, f"reft_layer.refts.task.units.{unit}")
            w, b = torch.randn(R, D) * 0.3, torch.randn(R)
            tensors[f"{key}.learned_source.weight"], tensors[f"{key}.learned_source.bias"] = w, b
            if config["orthogonality"]:
                frame = turned(R, D)
                tensors |= {f"{key}.projection.{name}": tensor for name, tensor in frame.state_dict().items()}
                r = frame.weight.detach()
            else:
                r = tensors[f"{key}.projection.weight"] = torch.randn(R, D) * 0.3
            values[layer, unit] = (r, w, b)
    return tensors, values


def write_adapters(
    folder: Path, kind: str, base: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], *, pickled: bool = True
) -> Path:
    """Write what `save_adapter` of the library does."""
    folder.mkdir(parents=True, exist_ok=True)
    note = {
        "config": config,
        "hidden_size": D,
        "model_class": CLASSES[kind][0],
        "model_name": str(base),
        "model_type": kind,
        "name": "task",
        "version": "adapters.1.2.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps(note))
    if pickled:
        torch.save(tensors, folder / "pytorch_adapter.bin")
    else:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter.safetensors")
    return folder


def write_pyreft(
    folder: Path, kind: str, classes: str, *, tied: bool = True, layers: tuple[int, ...] = (0, 1), by_path: bool = False
) -> dict[tuple[int, int], tuple[Tensor, ...]]:
    """Write what `ReftModel.save` does; returns (R or P (r, d), W, b, c) of each layer and place."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    names, representations = [], []
    for place in range(1 if tied else 2):  # all layers for the first tokens, then all for the last
        for layer in layers:
            path = f"{CLASSES[kind][1].rpartition('.')[0]}[{layer}].output"
            where = f"comp_{path.replace('.', '_')}" if by_path else f"layer_{layer}_comp_block_output"
            names.append(f"{where}_unit_pos_nunit_1#{place}")
            component = path if by_path else "block_output"
            representations.append([layer, component, "pos", 1, R, *[None] * 9])
            w, b, c = torch.randn(R, D) * 0.3, torch.randn(R), torch.zeros(R)
            edit: dict[str, Tensor] = {}
            if classes in ("LoreftIntervention", "DireftIntervention"):
                frame = turned(D, R)
                r = frame.weight.detach().t()
                if classes == "LoreftIntervention":  # its own short form
                    edit = {"weight": w, "bias": b, "rotate_layer": frame.weight.detach()}
                else:
                    edit = {f"rotate_layer.{name}": tensor for name, tensor in frame.state_dict().items()}
            else:
                r, c = torch.randn(R, D) * 0.3, torch.randn(R)
                edit = {"proj_layer.weight": r, "proj_layer.bias": c}
            if classes != "LoreftIntervention":
                edit |= {"learned_source.weight": w, "learned_source.bias": b}
                edit |= {"embed_dim": torch.tensor(D), "interchange_dim": torch.tensor(D)}
            torch.save(edit, folder / f"intkey_{names[-1]}.bin")
            values[layer, place] = (r, w, b, c)
    note = {
        "representations": representations,
        "intervention_types": [f"<class 'pyreft.interventions.{classes}'>"] * len(names),
        "sorted_keys": names,
        "model_type": f"<class 'transformers.models.{kind}.modeling_{kind}.{CLASSES[kind][0]}'>",
        "intervention_dimensions": [D] * len(names),
        "intervention_constant_sources": [True] * len(names),
        "mode": "parallel",
        "transformers_version": "4.45.1",
    }
    (folder / "config.json").write_text(json.dumps(note))
    return values
