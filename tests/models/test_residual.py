"""Which layers add to the residual stream, and what those make up for, against the models' own streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskopt.errors import MaskoptError
from maskopt.models import find_blocks, prune
from maskopt.models.batches import prepare_batches
from maskopt.models.replay import Replay, evaluation_mode
from maskopt.oracles import Unstructured
from maskopt.problems import LayerReconstruction
from maskopt.solvers import Wanda
from tests.models.families import build

Batches = list[dict[str, Tensor]]

_USUAL = {"self_attn.o_proj": 1.0, "mlp.down_proj": 1.0}
FOUND: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "llama": ({}, _USUAL),
    "phi3": ({}, _USUAL),
    "gpt_bigcode": ({}, {"attn.c_proj": 1.0, "mlp.c_proj": 1.0}),
    "gpt_neox": ({}, {"attention.dense": 1.0, "mlp.dense_4h_to_h": 1.0}),
    "bloom": ({}, {"self_attention.dense": 1.0, "mlp.dense_4h_to_h": 1.0}),
    "granite": ({"residual_multiplier": 0.25}, dict.fromkeys(_USUAL, 0.25)),
    "mamba": ({}, {"mixer.out_proj": 1.0}),
    "mixtral": ({}, {"self_attn.o_proj": 1.0}),  # experts are weighed token by token
    "qwen2_moe": ({}, {"self_attn.o_proj": 1.0}),  # and so is the shared one
    "gemma3_text": ({}, {}),  # outputs are normed on their way
    "olmo2": ({}, {}),
    "bert": ({}, {}),  # the stream itself is normed
}


def replayed(model: PreTrainedModel, batches: Batches) -> Replay:
    with evaluation_mode(model):
        return Replay(model, find_blocks(model), prepare_batches(model, batches), writing=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FOUND)
def test_layers_that_add_to_the_stream_are_found(
    family: str, dtype: torch.dtype, make_batches: Callable[..., Batches]
) -> None:
    changes, expected = FOUND[family]
    model = build(family, **changes).to(dtype)
    replay = replayed(model, make_batches())
    for block in replay.order:
        found = {name: replay.course.writers.get(module) for name, module in block.module.named_modules()}
        assert {name: factor for name, factor in found.items() if factor is not None} == pytest.approx(
            expected, rel=1e-2 if dtype == torch.bfloat16 else 1e-6
        )


def test_an_outlier_in_the_stream_hides_no_layer(make_batches: Callable[..., Batches]) -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] *= 1e4
    replay = replayed(model, make_batches())
    assert len(replay.course.writers) == 2 * len(replay.order)


class Streams:
    """Inputs of layers, and the residual stream before each layer that adds to it, of a model as it is."""

    def __init__(
        self, model: PreTrainedModel, blocks: dict[nn.Module, dict[nn.Module, float]], batches: Batches
    ) -> None:
        self.inputs: dict[nn.Module, list[Tensor]] = {}
        self.before: dict[nn.Module, list[Tensor]] = {}
        stream = torch.zeros(())
        hooks = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal stream
            stream = (args[0] if args else kwargs["hidden_states"]).double()

        def see(module: nn.Module, args: Any) -> None:
            self.inputs.setdefault(module, []).append(args[0].double().flatten(0, -2))

        def adding(factor: float) -> Callable[..., None]:
            def add(module: nn.Module, args: Any, output: Tensor) -> None:
                nonlocal stream
                self.before.setdefault(module, []).append(stream.flatten(0, -2))
                stream = stream + factor * output.double().view(stream.shape)

            return add

        for block, factors in blocks.items():
            hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    hooks.append(module.register_forward_pre_hook(see))
            hooks += [module.register_forward_hook(adding(factor)) for module, factor in factors.items()]
        with torch.no_grad():
            for batch in batches:
                model.eval()(**batch)
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["gpt_neox", "granite", "bloom", "mixtral", "llama"])
@pytest.mark.parametrize("exclude", [False, True], ids=["all", "first-left-out"])
def test_layers_make_up_for_what_the_stream_has_lost(
    family: str, exclude: bool, make_batches: Callable[..., Batches], recorder: Any
) -> None:
    """Sums over the streams of both models, once the pruned one is as it is in the end."""
    changes, expected = FOUND[family]
    model, dense, batches = build(family, **changes), build(family, **changes), make_batches()
    left_out = [f"*{next(iter(expected))}"] if exclude else []
    report = prune(
        model,
        batches,
        Unstructured(0.5),
        recorder,
        propagate="corrected",
        correction=1.0,
        exclude=["lm_head", *left_out],
    )
    seen = []
    for one in (model, dense):
        blocks = {
            block.module: {block.module.get_submodule(name): factor for name, factor in expected.items()}
            for block in find_blocks(one)
        }
        seen.append(Streams(one, blocks, batches))
    checked = 0
    for record, problem in zip(report.layers, recorder.problems, strict=True):
        end = next((end for end in expected if record.name.endswith(end)), None)
        if end is None:
            continue
        now, before = model.get_submodule(record.name), dense.get_submodule(record.name)
        y, x = torch.cat(seen[0].inputs[now]), torch.cat(seen[1].inputs[before])
        lost = torch.cat(seen[1].before[before]) - torch.cat(seen[0].before[now])
        weight = before.weight.detach().double()
        aim = LayerReconstruction.towards(weight, y.T @ y, x.T @ y, lost=lost.T @ y / expected[end]).target
        own = LayerReconstruction.towards(weight, y.T @ y, x.T @ y).target
        size = float(aim.abs().max())
        torch.testing.assert_close(problem.target.double(), aim, rtol=0, atol=2e-3 * size)
        if checked:  # the stream before the first layer of all has lost nothing
            assert float((own - aim).abs().max()) > 2e-2 * size
        checked += 1
    assert checked == (len(expected) - exclude) * len(find_blocks(model))


def test_layers_may_aim_at_their_own_outputs_alone(make_batches: Callable[..., Batches], recorder: Any) -> None:
    model, dense, batches = build("llama"), build("llama"), make_batches()
    report = prune(model, batches, Unstructured(0.5), recorder, propagate="corrected", correction=1.0, target="layer")
    assert report.settings["target"] == "layer"
    now, before = (Streams(one, {block.module: {} for block in find_blocks(one)}, batches) for one in (model, dense))
    for record, problem in zip(report.layers, recorder.problems, strict=True):
        module = dense.get_submodule(record.name)
        y, x = torch.cat(now.inputs[model.get_submodule(record.name)]), torch.cat(before.inputs[module])
        aim = LayerReconstruction.towards(module.weight.detach().double(), y.T @ y, x.T @ y).target
        torch.testing.assert_close(problem.target.double(), aim, rtol=0, atol=2e-3 * float(aim.abs().max()))


@pytest.mark.parametrize("target", ["block", None, 1])
def test_a_target_is_the_stream_or_the_layer(target: Any, make_batches: Callable[..., Batches]) -> None:
    with pytest.raises(MaskoptError, match="target must be one of stream, layer; got"):
        prune(build("llama"), make_batches(), Unstructured(0.5), Wanda(), target=target)
