"""The planned bytes against what torch really allocates, on models small enough to try."""

from dataclasses import replace

import pytest
import torch

from fgrlhf.config import UserError, parse
from fgrlhf.memory import Config, activation_bytes, main, memory
from fgrlhf.model import PRESETS, KVCache, LLaMA, LLaMAConfig

SMALL = LLaMAConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100, ffn_dim=172)


def saved_bytes(config: LLaMAConfig, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of all distinct storages autograd keeps, the parameters' left out."""
    model = LLaMA(config).to(dtype)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage              # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(torch.zeros(batch, length, dtype=torch.long))
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4}, {"n_layers": 1, "ffn_dim": 300}])
def test_activation_bytes_are_what_autograd_keeps(dtype, changes):
    config = replace(SMALL, **changes)
    assert activation_bytes(config, 2, 50, dtype.itemsize) == saved_bytes(config, 2, 50, dtype)


def test_memory_of_weights_optimizer_and_cache_is_what_torch_allocates():
    for dtype in (torch.float32, torch.bfloat16):
        table = memory(SMALL, 3, 17, dtype)
        model = LLaMA(SMALL).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.tensor([[1, 2]])).sum().backward()
        optimizer.step()
        moments = [state[name] for state in optimizer.state.values()
                   for name in ("exp_avg", "exp_avg_sq")]
        cache = KVCache(SMALL, 3, 17, dtype=dtype)
        assert table["weights"] == sum(p.nbytes for p in model.parameters())
        assert table["gradients"] == sum(p.grad.nbytes for p in model.parameters())
        assert table["optimizer"] == sum(t.nbytes for t in moments)
        assert table["KV cache"] == cache.keys.nbytes + cache.values.nbytes


def test_memory_of_llama_7b_by_hand():
    table = memory(PRESETS["7B"], 4, 100, torch.bfloat16)
    assert table["weights"] == 2 * 6_738_415_616
    assert table["KV cache"] == 2 * 2 * 32 * 4 * 100 * 4096         # K and V, bf16, layers, B, T, D
    assert table["  checkpointed"] < table["activations"] / 8


def test_main_prints_the_table_and_refuses_other_presets(capsys):
    main(parse(Config, ["--preset", "7B", "--batch", "4", "--length", "100"]))
    out = capsys.readouterr().out
    assert "6,738,415,616 parameters" in out and "13,476,831,232 bytes      12.55 GiB" in out
    for flags in ([], ["--preset", "8B"], ["--preset", "7B", "--model", "x"],
                  ["--preset", "7B", "--batch", "0"]):
        with pytest.raises(UserError, match="expected --"):
            main(parse(Config, flags))
