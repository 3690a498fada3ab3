"""Fine-tunes a pruned model in two processes."""

import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from maskopt.plugins.trainer import KeepMasks
from tests.processes import forked_ranks


def main(folder):
    """Train as one of the processes."""
    model = LlamaForCausalLM.from_pretrained(folder / "pruned")
    windows = torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(folder / "work"),
        num_train_epochs=3,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        ddp_backend="gloo",
    )
    data = [{"input_ids": window, "labels": window} for window in windows]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[KeepMasks()])
    trainer.train()
    trainer.save_model(str(folder / "trained"))


if __name__ == "__main__":
    sys.exit(any(forked_ranks(2, lambda: main(Path(sys.argv[1])))))
