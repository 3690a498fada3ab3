"""Train the small demo model that the package ships.

The text is the Python standard library's own source code as found on this machine (see ``maskopt.demo.corpus``).  The
script trains a byte-level BPE tokenizer and a Llama-architecture causal language model of about 1.2 million parameters
on the training modules, evaluates it on the held-out modules and writes a Hugging Face model folder.

    pip install -e ".[hf]"
    python benchmarks/train_demo_model.py --output maskopt/demo/model --minutes 70 --threads 1
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from maskopt.demo import corpus

VOCABULARY_SIZE = 1024
CONTEXT_LENGTH = 512
# A line break takes the blank lines and the indentation that follow it into the same piece, so that BPE can learn
# "end of line, indent by eight" as one token.  A letter run may take one leading mark or space (".append", "_name").
SPLIT_PATTERN = r"\s*[\r\n]+\s*|[^\s\p{L}\p{N}]?\p{L}+| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass
class Settings:
    """Settings of a training run; stored with its checkpoint."""

    minutes: float
    max_steps: int
    threads: int
    batch_tokens: int
    short_length: int
    short_fraction: float
    muon_learning_rate: float
    adam_learning_rate: float
    weight_decay: float
    warmup_steps: int
    clip: float
    precision: str
    seed: int


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer.

    Parameters
    ----------
    documents : list of str
        Training documents.

    Returns
    -------
    PreTrainedTokenizerFast
        The tokenizer; decoding gives back the exact text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[corpus.DOCUMENT_SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=corpus.DOCUMENT_SEPARATOR,
        eos_token=corpus.DOCUMENT_SEPARATOR,
        clean_up_tokenization_spaces=False,
        # The text is tokenised once as a whole and then cut into windows, so no length limit is declared.
        model_max_length=10**9,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Build the untrained model.

    Parameters
    ----------
    seed : int
        Seed of the initial weights.

    Returns
    -------
    LlamaForCausalLM
        The model in float32.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


def batches(tokens: np.ndarray, length: int, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of windows without end: in every epoch the stream is cut at a new random offset.

    Parameters
    ----------
    tokens : numpy.ndarray
        The training token stream.
    length : int
        Tokens per window; one more is taken for the last target.
    rows : int
        Windows per batch.
    seed : int
        Seed of offsets and order.

    Yields
    ------
    torch.Tensor
        Token ids of shape ``(rows, length + 1)``.
    """
    generator = np.random.default_rng(seed)
    while True:
        offset = int(generator.integers(length))
        starts = np.arange(offset, len(tokens) - length - 1, length)
        generator.shuffle(starts)
        for first in range(0, len(starts) - rows + 1, rows):
            window = np.stack([tokens[start : start + length + 1] for start in starts[first : first + rows]])
            yield torch.from_numpy(window.astype(np.int64))


def next_token_loss(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of every token of a window after the first.

    Parameters
    ----------
    model : Any
        The causal language model, possibly compiled.
    window : torch.Tensor
        Token ids of shape ``(rows, length)``.

    Returns
    -------
    torch.Tensor
        Scalar loss in nats per token.
    """
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), window[:, 1:].reshape(-1))


def attention_in_float32(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention in float32: on a CPU the bfloat16 backward kernel is half as fast as this one.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer.
    query, key, value : torch.Tensor
        Heads of shape ``(batch, heads, length, width)``.
    attention_mask : torch.Tensor or None
        Unused: training windows are full and causal.
    scaling : float or None, optional
        Factor of the scores.

    Returns
    -------
    tuple
        The output of shape ``(batch, length, heads, width)`` and None for the attention weights.
    """
    groups = query.shape[1] // key.shape[1]
    with torch.autocast("cpu", enabled=False):
        output = torch.nn.functional.scaled_dot_product_attention(
            query.float(),
            key.float().repeat_interleave(groups, dim=1),
            value.float().repeat_interleave(groups, dim=1),
            is_causal=True,
            scale=scaling,
        )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("attention_in_float32", attention_in_float32)


@torch.no_grad()
def evaluate(model: Any, tokens: np.ndarray, max_windows: int | None = None) -> float:
    """Return the average loss over consecutive windows of 512 tokens.

    Parameters
    ----------
    model : Any
        The causal language model.
    tokens : numpy.ndarray
        The token stream.
    max_windows : int or None, optional
        Evaluate only so many windows, evenly spaced.

    Returns
    -------
    float
        Nats per token.
    """
    windows = tokens[: len(tokens) // CONTEXT_LENGTH * CONTEXT_LENGTH].reshape(-1, CONTEXT_LENGTH).astype(np.int64)
    if max_windows is not None and max_windows < len(windows):
        windows = windows[np.linspace(0, len(windows) - 1, max_windows).astype(int)]
    total = 0.0
    for first in range(0, len(windows), 16):
        part = torch.from_numpy(windows[first : first + 16])
        total += float(next_token_loss(model, part)) * len(part)
    return total / len(windows)


def unigram_loss(train: np.ndarray, held_out: np.ndarray) -> float:
    """Return the held-out loss of token frequencies counted on the training stream, with add-one smoothing.

    Parameters
    ----------
    train : numpy.ndarray
        Training token stream.
    held_out : numpy.ndarray
        Held-out token stream.

    Returns
    -------
    float
        Nats per token.
    """
    counts = np.bincount(train, minlength=VOCABULARY_SIZE) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def make_optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices inside the blocks and AdamW for the embedding and the norms.

    Parameters
    ----------
    model : LlamaForCausalLM
        The model.
    settings : Settings
        Settings of the run.

    Returns
    -------
    list of torch.optim.Optimizer
        The optimizers; every group keeps its peak learning rate under ``peak``.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers." in name)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay, momentum=0.95),
        torch.optim.AdamW(others, lr=settings.adam_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def train(
    model: LlamaForCausalLM,
    train_tokens: np.ndarray,
    held_out_tokens: np.ndarray,
    settings: Settings,
    checkpoint: Path,
    resume: bool,
) -> dict[str, float]:
    """Train the model within the time budget.

    Parameters
    ----------
    model : LlamaForCausalLM
        The model, trained in place.
    train_tokens : numpy.ndarray
        Training token stream.
    held_out_tokens : numpy.ndarray
        Held-out token stream, only for the printed losses.
    settings : Settings
        Settings of the run.
    checkpoint : pathlib.Path
        File for the state of the run, written every five minutes.
    resume : bool
        Continue from the checkpoint.

    Returns
    -------
    dict
        Steps, tokens and seconds.
    """
    optimizers = make_optimizers(model, settings)
    step, seen, elapsed_before = 0, 0, 0.0
    if resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seen, elapsed_before = state["step"], state["tokens"], state["seconds"]
        print(f"resumed at step {step} after {elapsed_before / 60:.1f} min", flush=True)

    if settings.precision == "bfloat16":
        model.set_attn_implementation("attention_in_float32")
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.precision == "bfloat16")
    sources = {
        length: batches(train_tokens, length, settings.batch_tokens // length, settings.seed + length + step)
        for length in {settings.short_length, CONTEXT_LENGTH}
    }
    budget = settings.minutes * 60
    started = time.monotonic()
    last_report = last_save = started
    running = 0.0
    model.train()
    while True:
        elapsed = elapsed_before + time.monotonic() - started
        progress = max(elapsed / budget, step / settings.max_steps if settings.max_steps else 0.0)
        if progress >= 1:
            break
        # Linear decay to zero: the best simple schedule when the end of the run is known.
        scale = min(1.0, (step + 1) / settings.warmup_steps) * (1 - progress)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
        # Short windows first: they cost less attention; the later part trains all positions.
        length = settings.short_length if progress < settings.short_fraction else CONTEXT_LENGTH
        window = next(sources[length])
        with autocast:
            loss = next_token_loss(model, window)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        seen += window.shape[0] * length
        running = float(loss.detach()) if step == 1 else 0.95 * running + 0.05 * float(loss.detach())

        now = time.monotonic()
        if now - last_report > min(240.0, budget / 6):
            last_report = now
            model.eval()
            held_out = evaluate(model, held_out_tokens, max_windows=64)
            model.train()
            elapsed = elapsed_before + time.monotonic() - started
            print(
                f"step {step:5d}  tokens {seen / 1e6:6.2f}M  train loss {running:.4f}  held-out loss {held_out:.4f} "
                f"(perplexity {math.exp(held_out):.2f})  {seen / elapsed:.0f} tokens/s  "
                f"{(budget - elapsed) / 60:.1f} min left",
                flush=True,
            )
        if now - last_save > 300:
            last_save = now
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "tokens": seen,
                "seconds": elapsed_before + now - started,
                "settings": asdict(settings),
            }
            # Written aside and renamed, so that an interruption never leaves half a checkpoint.
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            os.replace(partial, checkpoint)
    model.eval()
    model.set_attn_implementation("sdpa")
    return {"steps": step, "tokens": seen, "seconds": elapsed_before + time.monotonic() - started}


@torch.no_grad()
def prune_rows_by_magnitude(model: Any, sparsity: float) -> None:
    """Zero the smallest weights in every row of every linear layer inside the blocks.

    Parameters
    ----------
    model : Any
        The causal language model, changed in place.
    sparsity : float
        Fraction of every row that is set to zero.
    """
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            count = int(sparsity * layer.in_features)
            smallest = layer.weight.abs().topk(count, dim=1, largest=False).indices
            layer.weight.scatter_(1, smallest, 0.0)


def processor_name() -> str:
    """Return the processor's name, where the system tells it.

    Returns
    -------
    str
        Name of the processor, or its architecture.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({platform.machine()})" if names else platform.machine()


MODEL_CARD = """\
---
license: mit
language:
- code
library_name: transformers
pipeline_tag: text-generation
tags:
- pruning
- demo
---

# maskopt demo model

A Llama-architecture causal language model with {parameters:,} parameters, trained on Python source code. It exists so
that the pruning methods of maskopt can be tried and tested within seconds, offline, on a laptop. It is a demo for
pruning only; it is too small to write useful code.

## Data

The text is the Python standard library's own source code as installed on the training machine (Python {python}; the
Python Software Foundation License). No text is part of this folder. `maskopt.demo.corpus` finds the same files on your
machine: everything but tests, generated tables, example programs and files under 1000 characters.

The split is by top-level module: a module is held out if the CRC-32 of its name (without leading underscore; modules
that share long passages count as one) is 13 modulo 14. A module that is held out is so on all machines. Other Python
versions have slightly different files, so their held-out figures differ slightly from the ones below.

| | files | characters | tokens |
|---|---:|---:|---:|
| training | {train_files:,} | {train_characters:,} | {train_tokens:,} |
| held out | {held_out_files:,} | {held_out_characters:,} | {held_out_tokens:,} |

## Model

{layers} blocks, hidden size {hidden}, {heads} heads and {kv_heads} key-value heads of width {head_dim}, feed-forward
size {intermediate}, tied embeddings, context {context} tokens, weights in bfloat16. The tokenizer is a byte-level BPE
with {vocabulary} tokens, trained on the training modules; it gives back every text exactly. Documents start with
`{separator}`, which is one token; the tokenizer adds nothing by itself.

## Training

{steps:,} steps of {batch_tokens:,} tokens, {seen:,} tokens in all ({epochs:.1f} epochs), {minutes:.0f} minutes on
{threads} thread(s) of one {processor} with arithmetic in {precision}. Muon (peak learning rate {muon}, weight decay
{decay}) for the matrices inside the blocks, AdamW (peak learning rate {adam}) for the embedding and the norms, linear
decay to zero, windows of {short_length} tokens in the first {short_fraction:.0%} of the time and of {context} tokens
after that, seed {seed}. Learning rates and batch size were set after a few short runs whose held-out loss was compared;
the weights are those of the last step. torch {torch}, transformers {transformers}, tokenizers {tokenizers}, numpy
{numpy}.

To train it again (the weights will differ: the run is ended by the clock):

```
pip install -e ".[hf]"
{command}
```

## Evaluation

All held-out text, tokenised once and cut into consecutive windows of {context} tokens; average negative log-likelihood
of every token of a window after its first; the weights in this folder, loaded in bfloat16 and evaluated in float32.

| | perplexity per token | bits per character |
|---|---:|---:|
| this model | {perplexity:.2f} | {bits:.3f} |
| token frequencies (unigram) | {unigram_perplexity:.1f} | {unigram_bits:.3f} |
| this model, smallest 50 % of every row set to zero | {perplexity_50:.2f} | {bits_50:.3f} |
| this model, smallest 60 % of every row set to zero | {perplexity_60:.2f} | {bits_60:.3f} |

On the training text (the same number of windows) the perplexity per token is {train_perplexity:.2f}, and
{train_perplexity_per_character:.3f} per character against {perplexity_per_character:.3f} on the held-out text.

## Licence

The weights, the tokenizer and this card are under the MIT License of maskopt.
"""


def write_folder(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    output: Path,
    settings: Settings,
    figures: dict[str, float],
    command: str,
) -> dict[str, float]:
    """Write the model folder and its card, with figures measured on the weights as written.

    Parameters
    ----------
    model : LlamaForCausalLM
        The trained model; converted to bfloat16.
    tokenizer : PreTrainedTokenizerFast
        The tokenizer.
    output : pathlib.Path
        The folder.
    settings : Settings
        Settings of the run.
    figures : dict
        Steps, tokens and seconds of the run.
    command : str
        Command that trains the model again.

    Returns
    -------
    dict
        Losses in nats per token.
    """
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    # The general class name, which all transformers versions can load.
    tokenizer_config = output / "tokenizer_config.json"
    fields = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        fields.pop(name, None)
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16).to(torch.float32).eval()

    plain = AutoTokenizer.from_pretrained(output)
    training_text, held_out_text = corpus.training_text(seed=settings.seed), corpus.held_out_text()
    train_tokens = np.asarray(plain(training_text)["input_ids"], dtype=np.uint16)
    held_out_tokens = np.asarray(plain(held_out_text)["input_ids"], dtype=np.uint16)
    reloaded = load()
    losses = {
        "dense": evaluate(reloaded, held_out_tokens),
        "train": evaluate(reloaded, train_tokens, max_windows=len(held_out_tokens) // CONTEXT_LENGTH),
        "unigram": unigram_loss(train_tokens, held_out_tokens),
    }
    for percent in (50, 60):
        pruned = load()
        prune_rows_by_magnitude(pruned, percent / 100)
        losses[f"magnitude_{percent}"] = evaluate(pruned, held_out_tokens)

    per_character = len(held_out_tokens) / len(held_out_text)
    config = model.config
    card = MODEL_CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        python=platform.python_version(),
        train_files=len(corpus.training_files()),
        train_characters=len(training_text),
        train_tokens=len(train_tokens),
        held_out_files=len(corpus.held_out_files()),
        held_out_characters=len(held_out_text),
        held_out_tokens=len(held_out_tokens),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        context=CONTEXT_LENGTH,
        vocabulary=VOCABULARY_SIZE,
        separator=corpus.DOCUMENT_SEPARATOR,
        steps=int(figures["steps"]),
        batch_tokens=settings.batch_tokens,
        seen=int(figures["tokens"]),
        epochs=figures["tokens"] / len(train_tokens),
        minutes=figures["seconds"] / 60,
        threads=settings.threads,
        processor=processor_name(),
        precision=settings.precision,
        muon=settings.muon_learning_rate,
        adam=settings.adam_learning_rate,
        decay=settings.weight_decay,
        short_length=settings.short_length,
        short_fraction=settings.short_fraction,
        seed=settings.seed,
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        numpy=np.__version__,
        command=command,
        perplexity=math.exp(losses["dense"]),
        bits=losses["dense"] * per_character / math.log(2),
        unigram_perplexity=math.exp(losses["unigram"]),
        unigram_bits=losses["unigram"] * per_character / math.log(2),
        perplexity_50=math.exp(losses["magnitude_50"]),
        bits_50=losses["magnitude_50"] * per_character / math.log(2),
        perplexity_60=math.exp(losses["magnitude_60"]),
        bits_60=losses["magnitude_60"] * per_character / math.log(2),
        train_perplexity=math.exp(losses["train"]),
        train_perplexity_per_character=math.exp(losses["train"] * len(train_tokens) / len(training_text)),
        perplexity_per_character=math.exp(losses["dense"] * per_character),
    )
    (output / "README.md").write_text(card, encoding="utf-8")
    return losses


def parse_arguments() -> argparse.Namespace:
    """Parse the command line.

    Returns
    -------
    argparse.Namespace
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint file (default: <output>.checkpoint.pt)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--minutes", type=float, default=70.0, help="time budget of the training loop")
    parser.add_argument("--max-steps", type=int, default=0, help="end after so many steps; 0: time budget alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--short-length", type=int, default=256, help="window length in the first part of the run")
    parser.add_argument("--short-fraction", type=float, default=0.6, help="fraction of the run with short windows")
    parser.add_argument("--muon-learning-rate", type=float, default=0.02)
    parser.add_argument("--adam-learning-rate", type=float, default=0.008)
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the matrices inside the blocks")
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="of the arithmetic")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, write the model folder and evaluate what was written."""
    arguments = parse_arguments()
    settings = Settings(**{name: getattr(arguments, name) for name in Settings.__dataclass_fields__})
    torch.set_num_threads(settings.threads)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    checkpoint: Path = arguments.checkpoint or output.with_name(output.name + ".checkpoint.pt")

    documents = [file.text for file in corpus.training_files()]
    tokenizer = train_tokenizer(documents)
    training_text, held_out_text = corpus.training_text(seed=settings.seed), corpus.held_out_text()
    train_tokens = np.asarray(tokenizer(training_text)["input_ids"], dtype=np.uint16)
    held_out_tokens = np.asarray(tokenizer(held_out_text)["input_ids"], dtype=np.uint16)
    if tokenizer.decode(held_out_tokens.tolist(), clean_up_tokenization_spaces=False) != held_out_text:
        raise RuntimeError("The tokenizer does not give back the held-out text.")
    unigram = unigram_loss(train_tokens, held_out_tokens)
    print(
        f"{len(documents)} training files, {len(training_text)} characters, {len(train_tokens)} tokens; held out: "
        f"{len(held_out_text)} characters, {len(held_out_tokens)} tokens; unigram perplexity {math.exp(unigram):.1f}",
        flush=True,
    )

    model = build_model(settings.seed)
    print(f"{sum(p.numel() for p in model.parameters())} parameters; {settings}", flush=True)
    figures = train(model, train_tokens, held_out_tokens, settings, checkpoint, arguments.resume)

    command = "python " + shlex.join(sys.argv[:1] + [word for word in sys.argv[1:] if word != "--resume"])
    losses = write_folder(model, tokenizer, output, settings, figures, command)
    checkpoint.unlink(missing_ok=True)
    print(json.dumps({**figures, **losses, "perplexity": math.exp(losses["dense"])}), flush=True)


if __name__ == "__main__":
    main()
