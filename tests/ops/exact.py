"""What the tests of ops compare with: float64, and a small Llama under LoRA in float64."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lit_peft import LoRAConfig, place
from lit_peft.low_rank.linear import LoRALinear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def agree(got: Tensor | None, wanted: Tensor | None, tolerance: float) -> None:
    assert (got is None) == (wanted is None)
    if got is not None and wanted is not None and wanted.numel():
        wanted = wanted.double()
        assert (got.double() - wanted).norm() <= tolerance * max(float(wanted.detach().norm()), 1e-9)


def llama(**settings: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, object] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**(shape | settings))).double().requires_grad_(False)  # type: ignore[arg-type]
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            nn.init.normal_(module.weight, mean=1.0)  # type: ignore[arg-type]
    return model


def adapted(config: LoRAConfig | None = None, **settings: object) -> LlamaForCausalLM:
    model = llama(**settings)
    place(model, lambda path, m: path.endswith("_proj"), lambda base: LoRALinear(base, config or LoRAConfig(r=2)))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.double()
            nn.init.normal_(module.lora_b["default"])
    return model


def gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss, list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
