"""LoRA's adapters, one file for each kind of layer they sit around."""
