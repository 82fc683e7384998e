"""Code for a GPU without a GPU: tensors on the device "meta", which have shapes and no numbers.

An operation on a tensor of the CPU and a tensor of another device is refused there as on a GPU, and
code that asks for `device.type` takes its branch for GPUs. What reads a number (lengths, masks)
cannot run on "meta".
"""

from types import SimpleNamespace

import pytest
import torch

from fgrlhf.advantage import penalise_kl, reward_to_go, standardise
from fgrlhf.baseline import generalised_advantage, value_loss
from fgrlhf.bench import __main__ as loop_bench
from fgrlhf.checks import startup
from fgrlhf.data.fields import UserError
from fgrlhf.engine import distributed, lora
from fgrlhf.engine.graph import Decoder
from fgrlhf.model import KVCache, LLaMA, LLaMAConfig
from fgrlhf.rollout import choose
from kernels import exact_kl, linear_logp, three_matmuls

SIZES = LLaMAConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=24, ffn_dim=24,
                    max_seq_len=40)
META = torch.device("meta")


def test_a_tensor_of_the_cpu_among_others_is_noticed():
    with pytest.raises((RuntimeError, NotImplementedError), match="device"):
        torch.zeros(3, device=META) + torch.zeros(3)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_decoding_step_keeps_to_its_device(adapted, temperature):
    with META:
        policy = LLaMA(SIZES)
    if adapted:
        policy = lora.adapt(policy, 2)
    with torch.no_grad():
        cache = KVCache(SIZES, 3, 12, META, torch.float32)
        hidden = policy.hidden(torch.ones(3, 5, dtype=torch.long, device=META), cache=cache)
        made = Decoder(policy, cache, torch.ones(3, dtype=torch.long, device=META),
                       torch.zeros(3, 7, dtype=torch.float64, device=META),
                       lambda logits, u: choose(logits, u, temperature))
        made.put(hidden[:, -1])
        made.step(), made.step()
    assert {x.device for x in (*made.state(), made.drawn, made.logp, cache.keys)} == {META}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_keep_to_their_device(dtype):
    hidden, head = (torch.zeros(n, 16, device=META, dtype=dtype) for n in (700, 24))
    ids, slopes = torch.zeros(700, dtype=torch.long, device=META), torch.zeros(700, device=META)
    with torch.no_grad():
        made = three_matmuls.gradients(hidden, head, ids, 1.0, lambda rows, logp: slopes[rows],
                                       (True, True))
        scored = linear_logp.score(hidden, head, ids, 1.0, True)
        kl, *sums = exact_kl.divergence(hidden, head, hidden, head, 1.0)
        back = exact_kl.gradients(hidden, head, hidden, head, 1.0, *sums, slopes, (True, True))
    assert {x.device for x in (*made, *scored, kl, *back)} == {META}


def test_advantages_keep_to_their_device():
    x, mask = torch.zeros(3, 5, device=META), torch.ones(3, 5, dtype=torch.bool, device=META)
    penalised = penalise_kl(x, x, x, mask, 0.1)
    found = [standardise(reward_to_go(penalised, mask, 0.5), mask, how)
             for how in ("rms", "mean-std", "none")]
    found += [*generalised_advantage(penalised, x, mask, 1.0, 0.9),
              value_loss(x, x, x, mask, 0.2, 3)]
    assert {tensor.device for tensor in found} == {META}


def test_the_rows_of_a_kernel_on_a_gpu_change_no_result(monkeypatch):
    """ROWS, the only size that no other test sets: 1024 rows at a time give the same as 64."""
    hidden, head = torch.randn(300, 8), torch.randn(40, 8)
    ids = torch.arange(300) % 40
    run = lambda: three_matmuls.gradients(hidden, head, ids, 1.0, lambda rows, logp: logp,
                                          (True, True))
    before = run()
    monkeypatch.setattr(three_matmuls, "ROWS", (1024, 1024))
    torch.testing.assert_close(run(), before)


# ----- what asks CUDA -----------------------------------------------------------------------------

def test_pick_device_makes_a_gpu_the_current_device(monkeypatch):
    """CUDA graphs are captured on a stream of the current device: --device cuda:1 needs this."""
    chosen, second = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(
        device=second, item=lambda: 0.0))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert distributed.pick_device("cuda:1") == second and chosen == [second]


def test_free_bytes_of_a_gpu_include_what_pytorch_keeps(monkeypatch):
    for name, value in {"mem_get_info": (100, 1000), "memory_reserved": 70,
                        "memory_allocated": 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert startup.free_bytes(torch.device("cuda")) == 100 + 40


def test_the_profile_of_the_loop_is_for_a_cpu(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--profile", "--device", "cuda", "--work"])
    monkeypatch.setattr(loop_bench, "pick_device", lambda name: torch.device(name, 0))
    monkeypatch.setattr(loop_bench.timing, "machine", lambda options: {})
    with pytest.raises(UserError, match="--profile: expected --device cpu, got cuda:0"):
        loop_bench.main()
