"""Trains the demonstration model: a Llama of 0.9 M parameters, small enough to commit and honest enough to judge.

A toy model is only useful for developing quantizers if it reacts like a real one. An undertrained model hides every
error: its weights still carry little, so 2-bit rounding hardly moves its perplexity. One trained for too long on 1.7 MB
of text learns it by heart: its held-out perplexity rises again and even 4 bits cost 6 %. The recipe therefore takes a
high learning rate, stops while held-out perplexity still falls, and prints what decides whether the result is a judge:
held-out perplexity in floating point, and after plain rounding to nearest (RTN, asymmetric min/max, groups of 64
inputs) of all decoder linears at 4, 3 and 2 bits. `demo/TRAINING.md` has the figures and the runs that were worse.

    python demo/train.py --out demo/model      trains, then saves tokenizer and weights as a Hugging Face folder
    python demo/train.py --check demo/model    prints the perplexities of a saved folder

Perplexity is over non-overlapping windows of 512 tokens; the first token of a window is context only and the last
ragged window is dropped. Shape suffixes: `N` windows, `B` sequences, `T` tokens, `O` out, `G` groups, `I` inputs of a
group.
"""

import argparse
import copy
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from quant.calibration.python_docs import python_docs

WINDOW = 512
EOS = "<|endoftext|>"


def train_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with `vocabulary` entries, the end-of-text token included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, model_max_length=WINDOW)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Returns the token ids of `text`: `[tokens]` int64, no special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def build_model(args: argparse.Namespace, eos: int) -> LlamaForCausalLM:
    """Returns an initialized float32 model; every linear has input and output sizes that are multiples of 64."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=128,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos)
    return model


def build_optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of the decoder and AdamW without weight decay for norms and the tied embedding.

    Muon (Jordan, 2024) is chosen for what it makes of the model: after 700 steps it reached the held-out perplexity of
    1100 steps of AdamW, and 2-bit RTN cost a factor of 2.15 instead of 1.57.
    """
    matrices = [linear.weight for _, linear in decoder_linears(model)]
    known = {id(weight) for weight in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    muon = torch.optim.Muon(matrices, lr=args.rate, weight_decay=args.decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.4 * args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def schedule(step: int, steps: int) -> float:
    """Returns the factor on the learning rate: a linear warm-up over 2 % of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batches(tokens: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields `[B, T]` int64 windows forever; each epoch cuts the text at a new offset and shuffles its windows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(WINDOW, (1,), generator=generator))
        usable = (len(tokens) - offset) // WINDOW * WINDOW
        windows_NT = tokens[offset : offset + usable].view(-1, WINDOW)
        order = torch.randperm(len(windows_NT), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield windows_NT[order[start : start + size]]


def decoder_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Returns the linears inside the decoder blocks, in forward order of the blocks."""
    named = model.get_submodule("model.layers").named_modules(prefix="model.layers")
    return [(name, module) for name, module in named if isinstance(module, nn.Linear)]


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor) -> float:
    """Returns exp of the mean next-token loss over the full windows of `tokens` (`[tokens]` int64)."""
    windows_NT = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    total = 0.0
    for x_BT in windows_NT.split(8):
        total += float(model(input_ids=x_BT, labels=x_BT, use_cache=False).loss) * len(x_BT)
    return math.exp(total / len(windows_NT))


def rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Returns `weight` (`[out, in]` float32) rounded to nearest on an asymmetric min/max grid per `group` inputs."""
    w_OGI = weight.reshape(len(weight), -1, group)
    low_OG1, high_OG1 = w_OGI.amin(-1, keepdim=True), w_OGI.amax(-1, keepdim=True)
    levels = 2**bits - 1
    scale_OG1 = ((high_OG1 - low_OG1) / levels).clamp_min(1e-8)
    zero_OG1 = (-low_OG1 / scale_OG1).round()
    code_OGI = (w_OGI / scale_OG1 + zero_OG1).round().clamp(0, levels)
    return ((code_OGI - zero_OG1) * scale_OG1).reshape(weight.shape)


def rtn_perplexity(model: nn.Module, tokens: torch.Tensor, bits: int) -> float:
    """Returns the perplexity of a copy of `model` with decoder linears rounded to `bits` bits, groups of 64 inputs."""
    model = copy.deepcopy(model)
    for _, linear in decoder_linears(model):
        linear.weight.data = rounded(linear.weight.data, bits, group=64)
    return perplexity(model, tokens)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a Hugging Face folder with bfloat16 weights; `model` keeps its dtype."""
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(folder: Path) -> None:
    """Prints held-out perplexity of a saved folder, computed in float32: unquantized, 4-bit RTN and 2-bit RTN."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = encode(tokenizer, python_docs("heldout"))
    plain = perplexity(model, tokens)
    print(f"Python {platform.python_version()}, {len(tokens)} held-out tokens, windows of {WINDOW}")
    print(f"float          {plain:8.4f}")
    for bits in (4, 3, 2):
        value = rtn_perplexity(model, tokens, bits)
        print(f"RTN {bits} bit g64  {value:8.4f}  x{value / plain:.4f}")


def train(args: argparse.Namespace) -> None:
    """Trains to step `args.stop` of a schedule of `args.steps`; writes `args.out` every `args.report` steps."""
    torch.manual_seed(args.seed)
    stop = min(args.stop, args.steps)
    text = python_docs("train")
    tokenizer = train_tokenizer(text, args.vocabulary)
    tokens, heldout = encode(tokenizer, text), encode(tokenizer, python_docs("heldout"))
    model = build_model(args, tokenizer.eos_token_id)
    optimizers = build_optimizers(model, args)
    rates = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: schedule(step, args.steps)) for each in optimizers]
    parameters = sum(p.numel() for p in model.parameters())
    inside = sum(linear.weight.numel() for _, linear in decoder_linears(model))
    print(f"{parameters} parameters, {inside} in decoder linears", flush=True)
    print(f"{len(tokens)} train tokens, {stop * args.batch * WINDOW / 1e6:.1f} M to see", flush=True)
    start, mean = time.perf_counter(), 0.0
    for step, x_BT in zip(range(1, stop + 1), batches(tokens, args.batch, args.seed), strict=False):
        with torch.autocast("cpu", torch.bfloat16):  # 1.3 times the tokens/s of float32 on a CPU with AVX512-BF16
            loss = model(input_ids=x_BT, labels=x_BT, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *rates):
            each.step()
        model.zero_grad()
        mean += (loss.item() - mean) / min(step, 100)
        if step % args.report == 0 or step == stop:
            model.eval()
            held, minutes = perplexity(model, heldout), (time.perf_counter() - start) / 60
            model.train()
            print(f"step {step:6d}  {minutes:6.2f} min  train loss {mean:.4f}  held-out {held:.4f}", flush=True)
            save(model, tokenizer, args.out)
    check(args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, help="print the perplexities of a saved folder and stop")
    parser.add_argument("--out", type=Path, default=Path("demo/model"), help="folder to write")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps that the schedule is made for")
    parser.add_argument("--stop", type=int, default=1400, help="end after this many steps, before the schedule does")
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {WINDOW} tokens in a step")
    parser.add_argument("--rate", type=float, default=1e-2, help="peak learning rate of Muon; AdamW has 0.4 of it")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of the matrices")
    parser.add_argument("--layers", type=int, default=4, help="decoder blocks")
    parser.add_argument("--intermediate", type=int, default=384, help="width of the MLP")
    parser.add_argument("--vocabulary", type=int, default=1024, help="entries of the tokenizer")
    parser.add_argument("--report", type=int, default=200, help="steps between held-out perplexities")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initialization and of the order of the text")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the last bits of the result depend on it")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    if args.check:
        check(args.check)
    else:
        train(args)


if __name__ == "__main__":
    main()
