"""Where in a layer a block adapter sits, for models that normalise before a sub-layer (Llama) or behind it (BERT).

| | pre-LN: `x + F(LN(x))` | post-LN: `LN(x + F(x))` |
|---|---|---|
| after | around F | around F's last linear layer |
| on the residual sum | around the whole layer | around the LN |
| beside | around F | around the module that adds and normalises, which gets x as its second argument |
"""
