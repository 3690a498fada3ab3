"""Fine-tunes a pruned model whose weights FSDP divides among two processes."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, TrainingArguments

from maskopt.errors import MaskoptError
from maskopt.plugins.trainer import KeepMasks, keeping_masks
from tests.processes import forked_ranks


def whole(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def divided(folder):
    """Return the pruned model, each block and what lies outside of them divided among the processes."""
    model = LlamaForCausalLM.from_pretrained(folder / "pruned")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def steps(model, masks, count):
    """Take steps of an optimizer, and yield the largest gradient of what the masks prune before each."""
    windows = torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(0))
    own = windows[dist.get_rank() :: dist.get_world_size()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    with torch.no_grad():  # after which FSDP leaves the weights outside of the blocks whole
        model(input_ids=own)
    with keeping_masks(model, optimizer, masks):
        for _ in range(count):
            model(input_ids=own, labels=own).loss.backward()
            gradients = {name: model.get_parameter(name).grad.full_tensor() for name in masks or ()}
            yield max((float(gradient[~masks[name]].abs().max()) for name, gradient in gradients.items()), default=0.0)
            optimizer.step()
            optimizer.zero_grad()


def callback_steps(model, count):
    """Take steps as the Trainer does with the callback."""
    kept = KeepMasks()
    arguments = TrainingArguments(output_dir="unused", report_to=[], use_cpu=True, fsdp=True)
    kept.on_train_begin(arguments, None, None, model=model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(count):
        model(input_ids=torch.ones(2, 8, dtype=torch.int64), labels=torch.ones(2, 8, dtype=torch.int64)).loss.backward()
        optimizer.step()
        kept.on_optimizer_step(arguments, None, None)
        optimizer.zero_grad()
    kept.on_train_end(arguments, None, None)


def refused(model, masks=None):
    """Return the sentence with which a model is refused."""
    try:
        with keeping_masks(model, torch.optim.SGD(model.parameters(), lr=0.1), masks):
            return ""
    except MaskoptError as error:
        return str(error)


def main(folder):
    """Train as one of the processes."""
    dist.init_process_group("gloo")
    model = divided(folder)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    list(steps(model, None, 4))
    found = {"zeros": whole(model)}
    callback_steps(model, 2)
    found["callback"] = whole(model)

    model, name = divided(folder), "model.layers.0.mlp.down_proj.weight"
    mask = torch.ones(model.get_parameter(name).shape, dtype=torch.bool)
    mask[1:5, ::3] = False
    told = {"gradients": list(steps(model, {name: mask}, 3))}
    found["mask"] = whole(model)

    told["shape"] = refused(model, {name: mask[1:]})
    first = FullyShardedDataParallel(LlamaForCausalLM.from_pretrained(folder / "pruned"), device_id=torch.device("cpu"))
    told["first"] = refused(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().fill_(1.0)
        # A zero that one process alone has is reason enough for all of them.
        if dist.get_rank() == 1:
            model.get_parameter(name).to_local()[0, 0] = 0.0
    told["one"] = refused(model)
    with torch.no_grad():
        model.get_parameter(name).to_local().fill_(1.0)
    told["none"] = refused(model)
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
        (folder / "told.json").write_text(json.dumps(told))
    dist.barrier()  # nobody leaves before both are done
    dist.destroy_process_group()
    # FSDP of version 1 leaves threads that now and then abort the end of the interpreter; nothing is left to be done.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(any(forked_ranks(2, lambda: main(Path(sys.argv[1])))))
