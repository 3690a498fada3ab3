"""Whole experts dropped: the model computes what it does when its routers never choose them, reloads, and generates."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from maskopt.errors import MaskoptError
from maskopt.shrinking import ExpertsReport, drop_experts, shrink
from tests.models.conftest import VOCABULARY
from tests.models.families import build

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "gpt_oss": {},
    "olmoe": {},
    "granitemoe": {},
    "llama4_text": {},
    "ernie4_5_moe": {},
    "deepseek_v2": {},
    "deepseek_v3": {"num_local_experts": 8},  # in two groups, of which one is chosen
    "dots1": {"n_routed_experts": 8},
}
_ROUTER = re.compile(r"(^|\.)(router|gate)(\.\w+)*\.weight$")


def tokens(count: int = 3) -> list[Tensor]:
    return list(torch.randint(3, VOCABULARY, (count, 2, 16), generator=torch.Generator().manual_seed(1)))


def random(family: str, experts: int | None = None, **changes: Any) -> PreTrainedModel:
    """A random model of which a correction of each expert's score, where there is one, is random, too."""
    if experts is not None:
        changes |= {"num_local_experts": experts, "num_experts": experts}
    model = build(family, **{**FAMILIES.get(family, {}), **changes})
    for name, each in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            each.data.copy_(0.1 * torch.randn_like(each))
    return model


class NeverChosen(TorchFunctionMode):
    """Routers whose scores of some experts are as low as they can be.

    Parameters
    ----------
    dropped : mapping of Tensor to sequence of int
        Experts by the weight of their router.
    """

    def __init__(self, dropped: Mapping[Tensor, Iterable[int]]) -> None:
        super().__init__()
        self._dropped = {id(weight): list(experts) for weight, experts in dropped.items()}
        self._kept = list(dropped)  # as long as they exist, no other tensor has their identity

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is functional.linear:
            # Some routers compute with a copy of their weight in float32.
            for weight, (_, experts) in zip(self._kept, self._dropped.items(), strict=True):
                if args[1] is weight or (args[1].shape == weight.shape and torch.equal(args[1], weight)):
                    return found.index_fill(-1, torch.tensor(experts), -torch.inf)
        return found


def routers(model: PreTrainedModel, report: ExpertsReport) -> dict[Tensor, tuple[int, ...]]:
    """The weight of each router, and what it must not choose."""
    found = {}
    for block in report.blocks:
        module = model.get_submodule(block.name)
        weights = [each for name, each in module.named_parameters() if _ROUTER.search(name)]
        found[next(each for each in weights if each.shape[0] == block.before)] = block.dropped
        for name, buffer in (*module.named_buffers(), *module.named_parameters()):
            if name.endswith("e_score_correction_bias"):
                buffer.data[..., list(block.dropped)] = -torch.inf
    return found


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=tokens()[0], use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_models_compute_reload_and_generate_without_experts(family: str, tmp_path: Path) -> None:
    model = random(family)
    dense = copy.deepcopy(model)
    report = drop_experts(model, tokens(), 0.5 if FAMILIES[family] == {} else 0.25)
    assert report.blocks
    assert report.parameters == (dense.num_parameters(), model.num_parameters())
    after = logits(model)
    with NeverChosen(routers(dense, report)):
        torch.testing.assert_close(after, logits(dense), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "fewer")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fewer").eval()
    assert type(again) is type(dense)
    assert again.num_parameters() == report.parameters[1] < report.parameters[0]
    assert torch.equal(logits(again), after)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCABULARY + 1}
    assert torch.equal(model.generate(tokens()[0], **settings), again.generate(tokens()[0], **settings))


def _outputs(model: PreTrainedModel, name: str, run: Callable[[], object]) -> list[Tensor]:
    """The outputs of a module in a run of the model."""
    found: list[Tensor] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    hook = model.get_submodule(name).register_forward_hook(see)
    with torch.no_grad():
        run()
    hook.remove()
    return found


def _error(model: PreTrainedModel, name: str, dropped: Iterable[int], inputs: list[Tensor]) -> float:
    """||y - y'||^2 / ||y||^2 of a module whose router never chooses some experts; the blocks before are dense."""

    def run() -> None:
        for ids in inputs:
            model(input_ids=ids, use_cache=False)

    before = _outputs(model, name, run)
    weight = model.get_submodule(name).gate.weight
    with NeverChosen({weight: dropped}):
        after = _outputs(model, name, run)
    lost = sum(float((one - two).double().square().sum()) for one, two in zip(before, after, strict=True))
    return lost / sum(float(one.double().square().sum()) for one in before)


def test_of_few_choices_the_best_one_is_made() -> None:
    model, inputs = random("mixtral", 6), tokens()
    dense = copy.deepcopy(model)
    report = drop_experts(model, inputs, 0.34)
    for block in report.blocks:
        errors = {pair: _error(dense, block.name, pair, inputs) for pair in itertools.combinations(range(6), 2)}
        assert block.dropped == min(errors, key=lambda pair: errors[pair])
        assert block.error == pytest.approx(errors[block.dropped], rel=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_of_many_choices_no_exchange_that_was_tried_is_better(family: str) -> None:
    made = {}
    for method in ("best", "reap", "random"):
        model = random(family, 16)
        made[method] = drop_experts(model, tokens(), 0.25, method=method).blocks  # type: ignore[arg-type]
    for best, reap, chance in zip(*made.values(), strict=True):
        assert best.error <= min(reap.error, chance.error) * (1 + 1e-6)
        for each in (best, reap, chance):
            assert len(set(each.dropped)) == 4
            if family == "deepseek_v3":  # as many of each group
                assert sum(expert < 8 for expert in each.dropped) == 2


def test_the_mean_length_decides_with_reap() -> None:
    model = random("mixtral")
    dense, inputs = copy.deepcopy(model), tokens()
    block = drop_experts(model, inputs, 0.25, method="reap").blocks[0]
    module: Any = dense.get_submodule(block.name)
    means = []
    for expert in range(4):
        whole = _outputs(dense, block.name, lambda: [dense(input_ids=ids, use_cache=False) for ids in inputs])
        weight = module.experts.down_proj[expert]
        before = weight.detach().clone()
        weight.data.zero_()
        less = _outputs(dense, block.name, lambda: [dense(input_ids=ids, use_cache=False) for ids in inputs])
        weight.data.copy_(before)
        lengths = (torch.cat(whole) - torch.cat(less)).flatten(0, -2).norm(dim=-1)
        means.append(float(lengths[lengths > 0].mean()))
    assert block.dropped == (means.index(min(means)),)


def test_padding_has_no_part_in_the_choice() -> None:
    ids = torch.cat(tokens())
    padded = torch.cat([ids, torch.full((len(ids), 8), 5)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(len(ids), 8, dtype=torch.int64)], 1)
    reports = [
        drop_experts(random("mixtral", 8), [batch], 0.25).blocks
        for batch in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask})
    ]
    for one, two in zip(*reports, strict=True):
        assert one.dropped == two.dropped
        assert one.error == pytest.approx(two.error, rel=1e-3)


def test_neurons_of_the_experts_that_stay_can_go_afterwards() -> None:
    model = random("qwen3_moe", moe_intermediate_size=16)
    drop_experts(model, tokens(), 0.5)
    report = shrink(model, tokens(), neurons=0.5, refit="units")
    assert {width.after for width in report.widths} == {8}
    assert report.loads_with == "transformers"


def test_half_precision_stays() -> None:
    model = random("mixtral").to(torch.bfloat16)
    drop_experts(model, tokens(), 0.5)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert bool(logits(model).isfinite().all())


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in (*model.named_parameters(), *model.named_buffers())}


REFUSED = {
    "no experts": ("llama", 0.5, "has no experts to drop"),
    "too few for the router": ("mixtral", 0.75, "routers cannot do with 0.25"),
    "less than one": ("mixtral", 0.1, "less than one"),
    "a router of groups": ("dots1", 0.75, "groups of experts of which as many"),
}


@pytest.mark.parametrize(("family", "fraction", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_said_and_the_model_is_as_it_was(family: str, fraction: float, words: str) -> None:
    model = random(family)
    before, config = state(model), model.config.to_dict()
    with pytest.raises(MaskoptError, match=words):
        drop_experts(model, tokens(), fraction)
    assert model.config.to_dict() == config
    assert all(torch.equal(each, before[name]) for name, each in state(model).items())


def test_the_model_is_as_it_was_after_a_late_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random("dots1")
    before, output = state(model), logits(model)

    def fail(*_: object) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr("maskopt.shrinking.experts.cut_model", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        drop_experts(model, tokens(), 0.25)
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(each, before[name]) for name, each in after.items())
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize("wrong", [{"fraction": 0}, {"fraction": 1.0}, {"fraction": "half"}, {"method": "lottery"}])
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MaskoptError):
        drop_experts(random("mixtral"), tokens(), **{"fraction": 0.5, **wrong})
