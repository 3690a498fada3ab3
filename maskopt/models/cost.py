"""What pruning a model costs, counted from its configuration: operations and bytes, without its weights."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from maskopt.errors import MaskoptError
from maskopt.models.blocks import find_blocks
from maskopt.models.context import context_length
from maskopt.models.experts import StackedLayer
from maskopt.models.layers import Layer
from maskopt.models.memory import gram_bytes, inside_bytes, layer_bytes, states_bytes
from maskopt.models.offload import parameters_in, set_aside
from maskopt.models.selection import Selection, select_layers
from maskopt.models.states import stays
from maskopt.models.windows import FURTHER
from maskopt.recovery import Level, Recovery
from maskopt.recovery.fit import TRIAL
from maskopt.weights import ConditionalADMM

__all__ = ["Cost", "product_speed", "pruning_cost"]

_HELD_OUT = 8  # calibration windows for each one that is held out
_RUNS = 2  # of a block: in the dense and in the pruned model, whose parts run once
_PASS = 3  # forwards that a forward and a backward pass cost
_FIT = 16  # bytes for each parameter that is fitted, at most
_HALF = 0.625  # of a symmetric product that is computed, in four panels
_DOUBLE = 2.0  # cost of a float64 operation, in float32 ones, where they are vectorised


@dataclass(frozen=True)
class Cost:
    """Counted work of pruning with the default method, errors upstream corrected.

    Attributes
    ----------
    parameters, pruned : int
        Of the model, and of the layers that are pruned.
    tokens : int
        Of the calibration.
    running, grams, targets, solving : float
        Multiplications and additions in float32: of the blocks, of the Gram matrices, of the targets, and of masks with
        weights; those in float64 count twice.
    fitting : float
        Of the recovery, if there is one: forward and backward passes in the model's own type, at the same prices.
    model_bytes, block_bytes : int
        Of all weights, and of the largest block's.
    rest_bytes : int
        Of what lies outside the blocks, and stays in memory.
    states_bytes : int
        Of the states of all windows in both models.
    inside_bytes : int
        Of inputs and outputs inside a block that wait for a later turn, at most.
    gram_bytes : int
        Of the Gram matrices of one turn, at most, and those of a solution.
    layer_bytes : int
        Of weights, targets and residuals of layers that are solved together, at most.
    fit_bytes : int
        Of the optimizer and what else is kept for each parameter of a block, or of all blocks, that is fitted, at most.
    whole : bool
        Whether all weights are in memory, not one block's: for a recovery of the model.
    """

    parameters: int
    pruned: int
    tokens: int
    running: float
    grams: float
    targets: float
    solving: float
    fitting: float
    model_bytes: int
    block_bytes: int
    rest_bytes: int
    states_bytes: int
    inside_bytes: int
    gram_bytes: int
    layer_bytes: int
    fit_bytes: int
    whole: bool

    @property
    def operations(self) -> float:
        """All of them."""
        return self.running + self.grams + self.targets + self.solving + self.fitting

    def device_bytes(self, memory: int) -> int:
        """Return about how many bytes a device needs: without states and what waits, as far as they exceed their part.

        Parameters
        ----------
        memory : int
            Of the solver, as for `prune`.
        """
        kept = [size for size in (self.states_bytes, self.inside_bytes) if stays(size, memory)]
        # A block is fitted when its layers are solved.
        work = max(self.gram_bytes + self.layer_bytes + memory, self.fit_bytes)
        weights = self.model_bytes if self.whole else self.block_bytes + self.rest_bytes
        return weights + work + sum(kept)

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary that `json.dump` takes."""
        return {**asdict(self), "operations": self.operations}


def pruning_cost(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    samples: int = 128,
    seqlen: int | None = None,
    recovery: Recovery | None = None,
) -> Cost:
    """Count what pruning a model costs.

    The model runs once on one window with tensors that have no data, so that attention is counted, too.

    Parameters
    ----------
    kind : type of PreTrainedModel
        The model's class.
    config : PreTrainedConfig
        Its configuration.
    samples : int
        Calibration windows; an eighth as many are held out.
    seqlen : int, optional
        Tokens per window; by default 2048, or the model's context length if shorter.
    recovery : Recovery, optional
        Settings of a recovery that follows, on twice as many windows.

    Returns
    -------
    Cost

    Raises
    ------
    MaskoptError
        If the model cannot be run without data.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    >>> pruning_cost(LlamaForCausalLM, config, samples=8, seqlen=16).tokens
    128
    """
    with torch.device("meta"):
        model = kind(config)
    blocks = find_blocks(model)
    for block in blocks:
        for _, module, key in parameters_in(block):
            set_aside(module, key)
    selection = select_layers(model)
    length = min(2048, context_length(model) or 2048) if seqlen is None else seqlen
    tokens = samples * length
    all_tokens = tokens + math.ceil(samples / _HELD_OUT) * length
    running, outside, groups = _traced(kind, config, selection, length)
    fitted = 0 if recovery is None else FURTHER * tokens
    method = ConditionalADMM()
    products = method.iterations + method.stages + 1 + method.polish
    # Errors before and after, of pruning everything, and two on held-out windows.
    evaluations = 5 * _HALF * _DOUBLE
    grams = targets = solving = deviations = 0.0
    stream = getattr(config.get_text_config(), "hidden_size", 0)
    for group in groups:
        d, rows = group[0].shape[1], sum(layer.shape[0] for layer in group)
        share = _share(model, group[0])
        paired = not isinstance(group[0], StackedLayer)
        grams += 2 * d**2 * share * (_HALF * all_tokens + (tokens if paired else 0))
        deviations += 2 * d**2 * share * _HALF * fitted + d**3
        if paired and len(group) == 1 and rows == stream:  # makes up for what the residual stream has lost
            grams += 2 * rows * d * tokens
        targets += _DOUBLE * (d**3 / 3 + 4 * rows * d**2) if paired else 0.0
        solving += (method.stages + 1) * d**3 + 2 * rows * d**2 * (products + evaluations)
    size = (getattr(config, "dtype", None) or model.dtype).itemsize
    sizes = [sum(p.numel() for p in block.module.parameters()) for block in blocks]
    fitting = 0.0
    if recovery is not None:
        held_out = all_tokens - tokens
        fitting = _fitting(recovery, "block", running / length, fitted, held_out) + _RUNS * running * fitted / length
        if recovery.rule_for("block").moves:
            fitting += running * fitted / length + deviations
        if recovery.level == "model":
            whole = (running + outside) / length
            fitting += _fitting(recovery, "model", whole, fitted, held_out) + whole * (fitted + held_out)
    return Cost(
        parameters=model.num_parameters(),
        pruned=sum(math.prod(layer.shape) for layer in selection.layers),
        tokens=tokens,
        running=_RUNS * running * all_tokens / length,
        grams=grams,
        targets=targets,
        solving=solving,
        fitting=fitting,
        model_bytes=size * model.num_parameters(),
        block_bytes=size * max(sizes),
        rest_bytes=size * (model.num_parameters() - sum(sizes)),
        states_bytes=states_bytes(model, size, all_tokens + fitted),
        inside_bytes=inside_bytes(model, blocks, groups, size, tokens),
        gram_bytes=gram_bytes(selection.layers),
        layer_bytes=layer_bytes(groups),
        fit_bytes=0 if recovery is None else _FIT * (sum(sizes) if recovery.level == "model" else max(sizes)),
        whole=recovery is not None and recovery.level == "model",
    )


def _fitting(recovery: Recovery, level: Level, running: float, fitted: int, held_out: int) -> float:
    """Return the operations of fits at a level, where a forward pass needs `running` for each token."""
    passes = recovery.passes(level, fitted)
    trials = 1 / TRIAL if recovery.step_size is None else 0.0
    again = 1 if recovery.checkpoint and level == "model" else 0
    measured = passes + 1 + (1 if trials else 0)  # on windows that are held out
    return running * ((_PASS + again) * passes * (1 + trials) * fitted + measured * held_out)


def product_speed(device: str = "cpu", seconds: float = 0.5) -> float:
    """Return measured multiplications and additions a second in float32 products on a device.

    Parameters
    ----------
    device : str
    seconds : float
        How long to measure, at least.
    """
    size = 1024 if device.startswith("cpu") else 8192  # that keep a device busy while the host asks for the next one
    x = torch.rand(size, size, device=device)
    count, began = 0, 0.0
    while began == 0.0 or time.perf_counter() - began < seconds:
        (x @ x)[0, 0].item()
        if began == 0.0:  # the first one prepares
            began = time.perf_counter()
        else:
            count += 1
    return 2.0 * size**3 * max(1, count) / (time.perf_counter() - began)


def _traced(
    kind: type[PreTrainedModel], config: PreTrainedConfig, selection: Selection, length: int
) -> tuple[float, float, list[list[Layer]]]:
    """Return the operations of all blocks and of what is outside on one window, and layers grouped by their inputs."""
    groups: dict[object, list[Layer]] = {
        layer: [layer] for layer in selection.layers if isinstance(layer, StackedLayer)
    }
    held: list[Any] = []  # as long as they exist, no other tensor has their identity
    total = [0.0]
    try:
        with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad(), ExitStack() as undo:
            model = kind(config)
            if groups:
                model.set_experts_implementation("batched_mm")  # needs no look at the data

            def see(layer: Layer, args: Any) -> None:
                held.append(args[0])
                groups.setdefault(id(args[0]), []).append(layer)

            def count(sign: int) -> None:
                total[0] += sign * counter.get_total_flops()

            for layer in selection.layers:
                if not isinstance(layer, StackedLayer):
                    module = model.get_submodule(layer.name)
                    hook = module.register_forward_pre_hook(lambda _, args, layer=layer: see(layer, args))
                    undo.callback(hook.remove)
            for block in selection.blocks:
                module = model.get_submodule(block.name)
                undo.callback(module.register_forward_pre_hook(lambda *_: count(-1)).remove)
                undo.callback(module.register_forward_hook(lambda *_: count(1)).remove)
            model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
            outside = counter.get_total_flops() - total[0]
    except Exception as error:
        raise MaskoptError(
            f"The operations of a {kind.__name__} cannot be counted without its weights ({type(error).__name__})."
        ) from error
    return total[0], outside, list(groups.values())


def _share(model: PreTrainedModel, layer: Layer) -> float:
    """Return the fraction of the tokens that reach a layer."""
    if not isinstance(layer, StackedLayer):
        return 1.0
    config = model.config.get_text_config()
    chosen = next((getattr(config, name) for name in _CHOSEN if isinstance(getattr(config, name, None), int)), 1)
    return min(1.0, chosen / layer.stack.number)


_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k")
