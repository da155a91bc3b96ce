"""The names of `--method` and `--task` and where their classes are. Plain data: imports nothing, answers at once."""

METHODS: dict[str, str] = {
    "lora": "methods.lora.LoRA",
    "rslora": "methods.lora.RsLoRA",
    "bitfit": "methods.bitfit.BitFit",
    "freeze": "methods.freeze.Freeze",
    "full": "methods.full.Full",
}

TASKS: dict[str, str] = {
    "sft": "tasks.sft.SFT",
    "classification": "tasks.classification.Classification",
}
