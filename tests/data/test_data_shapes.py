import random

import pytest
import torch

from lit_peft.data.collate import Collate, CollatePacked
from lit_peft.data.loader import ShardedSampler
from lit_peft.data.pack import best_fit, cannot_pack
from lit_peft.data.truncate import truncate, windows


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_always_leaves_something_to_learn(side):
    draw = random.Random(0)
    for _ in range(500):
        length = draw.randint(2, 60)
        ids, mask = list(range(length)), [draw.random() < 0.2 for _ in range(length)]
        mask[0] = False
        room = draw.randint(8, 40)
        short, learned = truncate(ids, mask, room, side)
        assert len(short) == len(learned) <= room
        assert len(short) == min(length, room) or side == "left"
        assert any(learned[1:]) == any(mask)
        assert all(mask[i] == m for i, m in zip(short, learned, strict=True))
        assert short == sorted(set(short))


def test_truncation_keeps_answer_and_cue_and_cuts_the_chosen_side():
    ids, mask = list(range(40)), [False] * 35 + [True] * 5
    assert truncate(ids, mask, 20, "right")[0] == [*range(7), *range(27, 40)]
    assert truncate(ids, mask, 20, "left")[0] == list(range(20, 40))
    long_answer = [False] * 10 + [True] * 30
    kept, learned = truncate(ids, long_answer, 20, "right")
    assert kept == list(range(2, 22))
    assert sum(learned) == 12


def test_windows_lose_and_double_nothing():
    assert [i for piece in windows(list(range(23)), 8) for i in piece] == list(range(23))


def test_best_fit_packs_everything_once_and_tightly():
    draw = random.Random(1)
    lengths = [draw.randint(1, 64) for _ in range(300)]
    bins = best_fit(lengths, 64)
    assert sorted(i for b in bins for i in b) == list(range(300))
    assert max(sum(lengths[i] for i in b) for b in bins) <= 64
    assert len(bins) <= 1.05 * sum(lengths) / 64 + 1


def test_padding_masks_by_position_even_where_pad_is_eos():
    batch = Collate(pad=2)(
        [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {"input_ids": [7, 2], "labels": [-100, 2]}]
    )
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def tiny_models():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    for attention in ("sdpa", "eager"):
        yield LlamaForCausalLM(
            LlamaConfig(
                vocab_size=50,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=64,
                attn_implementation=attention,
            )
        )
        yield GPT2LMHeadModel(
            GPT2Config(
                vocab_size=50,
                n_embd=32,
                n_layer=2,
                n_head=4,
                bos_token_id=0,
                eos_token_id=0,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                attn_implementation=attention,
            )
        )


def loss_and_gradient(model, batch):
    model.zero_grad()
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("flat", [False, True])
def test_packed_loss_and_gradients_equal_unpacked(flat):
    torch.manual_seed(0)
    rows = []
    for length in (5, 3, 7, 4, 1, 6, 2):
        ids = torch.randint(3, 50, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": ids})  # even the first token: it must not be learned
    bins = [[rows[i] for i in b] for b in best_fit([len(row["input_ids"]) for row in rows], 12)]
    assert len(bins) > 1
    assert max(map(len, bins)) > 1
    packed = CollatePacked(pad=0, flat=flat)(bins)
    assert "attention_mask" not in packed
    assert packed["input_ids"].shape[0] == (1 if flat else len(bins))
    for model in tiny_models():
        assert cannot_pack(model) is None
        model.train()
        one, many = loss_and_gradient(model, Collate(0)(rows)), loss_and_gradient(model, dict(packed))
        torch.testing.assert_close(many[0], one[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(many[1], one[1], rtol=1e-5, atol=1e-5)


def test_models_that_would_mix_packed_rows_are_named():
    class Own(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None): ...

    class Positions(torch.nn.Module):
        def forward(self, input_ids, position_ids=None): ...

    assert "takes no position_ids" in cannot_pack(Own())
    assert "does not build its attention mask" in cannot_pack(Positions())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sharding_gives_each_row_once_and_equal_lengths(world):
    samplers = [ShardedSampler(range(10), shuffle=True, seed=3, replicas=world, rank=r) for r in range(world)]
    dealt = [list(sampler) for sampler in samplers]
    assert {len(rows) for rows in dealt} == {len(samplers[0])}
    assert sorted(i for rows in dealt for i in rows if i >= 0) == list(range(10))
    # The same global order for every number of processes.
    order = [i for together in zip(*dealt, strict=True) for i in together if i >= 0]
    assert order == list(ShardedSampler(range(10), shuffle=True, seed=3))


def test_every_epoch_has_its_own_order():
    sampler = ShardedSampler(range(50), shuffle=True)
    first = list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
    sampler.set_epoch(0)
    assert first == list(sampler)


def test_weights_are_met_and_small_sources_go_round():
    groups = [0] * 900 + [1] * 100
    drawn = list(ShardedSampler(range(1000), shuffle=True, groups=groups, weights=[1.0, 3.0]))
    assert len(drawn) == 1000
    small = [i for i in drawn if i >= 900]
    assert abs(len(small) - 750) < 3 * (1000 * 0.75 * 0.25) ** 0.5
    counts = [small.count(i) for i in range(900, 1000)]
    assert max(counts) - min(counts) <= 1
    large = [i for i in drawn if i < 900]
    assert len(large) == len(set(large))
