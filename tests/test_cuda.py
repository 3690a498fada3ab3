"""The same code on a GPU: only run where there is one."""

import pytest
import torch

import maskopt
from maskopt.solvers import SOLVERS, make_solver
from maskopt.weights import WEIGHTS, make_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETS = [maskopt.PerRow(0.5), maskopt.NM(keep=2, group=4), maskopt.NM(keep=16, group=32), maskopt.Unstructured(0.4)]


@pytest.mark.parametrize("masks", SETS, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS)
def test_cuda_agrees_with_cpu(solver: str, masks: maskopt.PartitionMatroid) -> None:
    instance = maskopt.synthetic("correlated", rows=48, d=64, seed=3)
    on_cpu = maskopt.solve(instance.problem("cpu"), masks, make_solver(solver))
    on_cuda = maskopt.solve(instance.problem("cuda"), masks, make_solver(solver))
    assert on_cuda.mask.device.type == "cuda"
    assert masks.contains(on_cuda.mask)
    # Products are rounded differently, so single masks may differ; their quality does not.
    assert on_cuda.total == pytest.approx(on_cpu.total, rel=0.02)


@pytest.mark.parametrize("masks", SETS, ids=repr)
@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "keep"])
def test_weights_on_cuda_agree_with_cpu(name: str, masks: maskopt.PartitionMatroid) -> None:
    instance = maskopt.synthetic("correlated", rows=48, d=64, seed=3)
    on_cpu = maskopt.solve(instance.problem("cpu"), masks, make_weights(name))
    on_cuda = maskopt.solve(instance.problem("cuda"), masks, make_weights(name))
    assert on_cuda.weight is not None
    assert on_cuda.weight.device.type == on_cuda.mask.device.type == "cuda"
    assert masks.contains(on_cuda.mask)
    assert on_cuda.total == pytest.approx(on_cpu.total, rel=0.02)


def test_recovery_on_cuda_helps_as_on_the_cpu() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    batches = list(torch.randint(1, 61, (64, 24), generator=torch.Generator().manual_seed(0)).split(8))
    masks = maskopt.NM(keep=2, group=4)
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        report = maskopt.prune(
            model, batches, masks, maskopt.ConditionalADMM(), device=device, recover=maskopt.Recovery("model")
        )
        assert all(masks.contains(mask) for mask in report.masks.values())
        losses[device] = [record.after / record.before for record in report.recovery]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.1)
