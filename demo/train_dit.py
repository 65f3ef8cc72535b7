"""Trains the demonstration diffusion transformer: 1.8 M parameters, handwritten digits, 45 minutes of one core.

What `demo/train.py` does for language models, for images: a `DiTTransformer2DModel` of diffusers (Peebles & Xie,
"Scalable Diffusion Models with Transformers", arXiv:2212.09748; adaLN-zero, class-conditional, noise prediction) on the
1,797 digits of 8x8 pixels inside scikit-learn. Half of them train it, enlarged to 16x16 and turned, scaled and shifted
a little so that 898 images are not learned by heart; the other half trains what judges its samples and is never seen
by it. Weights are averaged over the steps (EMA) and stored in float16.

The folder is a diffusers folder without a VAE, since the model draws pixels: `model_index.json` names a DiTPipeline
whose `vae` is null, beside it `transformer/`, `scheduler/` and `judge.safetensors`, a perceptron that scikit-learn
trained on the other half. `docs/diffusion.md` says how such a folder is sampled and judged.

    python demo/train_dit.py --out demo/dit      trains, then saves
    python demo/train_dit.py --check demo/dit    samples, and says what two classifiers recognise, rounded weights too

Shape suffixes: `B` images, `C` channels, `H` and `W` pixels, `N` all images.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from torch import nn
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate, mse_loss

SIZE, CLASSES = 16, 10
STEPS, PER_CLASS = 50, 50


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns images `[N, 1, 16, 16]` float32 in [-1, 1] and labels `[N]` int64: to train on, then to judge with."""
    pixels, target = load_digits(return_X_y=True)
    small_NCHW = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    x_NCHW = interpolate(small_NCHW, size=(SIZE, SIZE), mode="bicubic", align_corners=False).clamp(-1, 1)
    y_N = torch.tensor(target, dtype=torch.int64)
    order = torch.randperm(len(y_N), generator=torch.Generator().manual_seed(0))
    mine, other = order[: len(order) // 2], order[len(order) // 2 :]
    return x_NCHW[mine], y_N[mine], x_NCHW[other], y_N[other]


def moved(x_BCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns images turned by up to 8 degrees, scaled by up to 6 % and shifted by up to a pixel, empty pixels -1."""
    u_B5 = torch.rand(len(x_BCHW), 5, generator=generator) * 2 - 1
    angle_B, wide_B, high_B = u_B5[:, 0] * math.radians(8), 1 + 0.06 * u_B5[:, 1], 1 + 0.06 * u_B5[:, 2]
    shift_B2 = u_B5[:, 3:] * 2 / SIZE
    cos_B, sin_B = angle_B.cos(), angle_B.sin()
    rows = (wide_B * cos_B, -high_B * sin_B, shift_B2[:, 0], wide_B * sin_B, high_B * cos_B, shift_B2[:, 1])
    grid = affine_grid(torch.stack(rows, -1).view(-1, 2, 3), list(x_BCHW.shape), align_corners=False)
    return grid_sample(x_BCHW + 1, grid, mode="bicubic", align_corners=False).clamp(0, 2) - 1


def build_model(args: argparse.Namespace) -> DiTTransformer2DModel:
    """Returns an initialized model; the gates of every block and the last layer start at zero (adaLN-zero)."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=args.layers,
        sample_size=SIZE,
        patch_size=args.patch,
        num_embeds_ada_norm=CLASSES,
        norm_elementwise_affine=False,
    )
    for name, module in model.named_modules():
        if name.endswith(("norm1.linear", "proj_out_2")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model.eval()  # its own label dropout would draw anew in every block: labels are dropped in `train`


def build_optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Returns Muon for attention and MLP, AdamW for embedders, modulation and everything that is not a matrix."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and (".attn1." in name or ".ff." in name)]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
    muon = torch.optim.Muon(matrices, lr=args.rate, weight_decay=args.decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=0.4 * args.rate, betas=(0.9, 0.99), weight_decay=0.0)]


def schedule(step: int, steps: int) -> float:
    """Returns the factor on the learning rate: a linear warm-up over 2 % of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 50)
    return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def noise_loss(
    model: nn.Module, scheduler: DDIMScheduler, x_BCHW: torch.Tensor, y_B: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Returns the mean squared error of the predicted noise at random timesteps."""
    t_B = torch.randint(0, scheduler.config.num_train_timesteps, (len(x_BCHW),), generator=generator)
    noise = torch.randn(x_BCHW.shape, generator=generator)
    return mse_loss(model(scheduler.add_noise(x_BCHW, noise, t_B), t_B, y_B).sample, noise)


@torch.no_grad()
def sample(
    model: nn.Module, scheduler: DDIMScheduler, y_B: torch.Tensor, seed: int, steps: int, guidance: float
) -> torch.Tensor:
    """Returns images `[B, 1, 16, 16]` in [-1, 1], drawn from noise of `seed` with classifier-free guidance above 1."""
    x = torch.randn(len(y_B), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(steps)
    null_B = torch.full_like(y_B, CLASSES)
    for t in scheduler.timesteps:
        if guidance > 1:
            twice = model(torch.cat([x, x]), t.expand(2 * len(x)), torch.cat([y_B, null_B])).sample
            with_label, without = twice.chunk(2)
            noise = without + guidance * (with_label - without)
        else:
            noise = model(x, t.expand(len(x)), y_B).sample
        x = scheduler.step(noise, t, x).prev_sample
    return x.clamp(-1, 1)


def small(x_NCHW: torch.Tensor) -> torch.Tensor:
    """Returns `[N, 64]`: the images as 8x8 pixels in [-1, 1], what the classifiers see."""
    return avg_pool2d(x_NCHW, 2).flatten(1)


def judges(x_NCHW: torch.Tensor, y_N: torch.Tensor) -> dict[str, SVC | MLPClassifier]:
    """Returns two scikit-learn classifiers trained on the half that the model never saw."""
    made = {"svc": SVC(C=10, gamma=0.03), "mlp": MLPClassifier((64,), alpha=0.1, max_iter=1000, random_state=0)}
    return {name: judge.fit(small(x_NCHW).numpy(), y_N.numpy()) for name, judge in made.items()}


def save_judge(judge: MLPClassifier, path: Path) -> None:
    """Writes the perceptron as a state dict of a Sequential whose layers the metadata names; no pickle, no code."""
    tensors = {}
    for index, (weight, bias) in zip((2, 4), zip(judge.coefs_, judge.intercepts_, strict=True), strict=True):
        tensors[f"{index}.weight"] = torch.tensor(weight.T, dtype=torch.float32).contiguous()
        tensors[f"{index}.bias"] = torch.tensor(bias, dtype=torch.float32)
    save_file(tensors, path, {"layers": "avgpool/2 flatten linear relu linear"})


def save(model: DiTTransformer2DModel, scheduler: DDIMScheduler, folder: Path) -> None:
    """Writes the diffusers folder; `model` keeps its dtype."""
    copy.deepcopy(model).half().save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "id2label": {str(digit): str(digit) for digit in range(CLASSES)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Returns `weight` (`[out, in]` float32) rounded to nearest on an asymmetric min/max grid per `group` inputs."""
    w_OGI = weight.reshape(len(weight), -1, group)
    low_OG1, high_OG1 = w_OGI.amin(-1, keepdim=True), w_OGI.amax(-1, keepdim=True)
    scale_OG1 = ((high_OG1 - low_OG1) / (2**bits - 1)).clamp_min(1e-8)
    zero_OG1 = (-low_OG1 / scale_OG1).round()
    code_OGI = (w_OGI / scale_OG1 + zero_OG1).round().clamp(0, 2**bits - 1)
    return ((code_OGI - zero_OG1) * scale_OG1).reshape(weight.shape)


def check(model: DiTTransformer2DModel, scheduler: DDIMScheduler) -> None:
    """Prints what the judges recognise: real digits, samples of the model, and of the model rounded to nearest."""
    x_NCHW, y_N, other_NCHW, other_N = digits()
    known = judges(other_NCHW, other_N)
    right = {name: judge.score(small(x_NCHW).numpy(), y_N.numpy()) for name, judge in known.items()}
    print("real digits               " + "  ".join(f"{name} {value:.3f}" for name, value in right.items()), flush=True)
    asked = torch.arange(CLASSES).repeat(PER_CLASS)
    first: torch.Tensor | None = None
    for bits, guidance in ((16, 1.0), (16, 1.5), (4, 1.0), (3, 1.0), (2, 1.0)):
        made = copy.deepcopy(model)
        for name, module in made.named_modules():
            if bits < 16 and isinstance(module, nn.Linear) and (".attn1." in name or ".ff." in name):
                module.weight.data = rounded(module.weight.data, bits, group=64)
        x = sample(made, scheduler, asked, 1, STEPS, guidance)
        first = x if first is None else first
        right = {name: judge.score(small(x).numpy(), asked.numpy()) for name, judge in known.items()}
        ratio = float((10 * torch.log10(4 / (x - first).square().mean((1, 2, 3)).clamp_min(1e-12))).mean())
        loss = float(torch.stack(held_out(made, scheduler, other_NCHW, other_N)).mean())
        print(
            f"{'float' if bits == 16 else f'RTN {bits} bit':12}guidance {guidance}  "
            + "  ".join(f"{name} {value:.3f}" for name, value in right.items())
            + f"  held-out noise error {loss:.5f}"
            + (f"  PSNR {ratio:.2f} dB" if bits < 16 else ""),
            flush=True,
        )


@torch.no_grad()
def held_out(model: nn.Module, scheduler: DDIMScheduler, x_NCHW: torch.Tensor, y_N: torch.Tensor) -> list[torch.Tensor]:
    """Returns the noise loss on the held-out half, four times over it with fixed noise."""
    return [noise_loss(model, scheduler, x_NCHW, y_N, torch.Generator().manual_seed(seed)) for seed in range(4)]


def train(args: argparse.Namespace) -> None:
    """Trains to step `args.stop` of a schedule of `args.steps`; writes averaged weights every `args.report` steps."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    x_NCHW, y_N, other_NCHW, other_N = digits()
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)
    model = build_model(args)
    average = copy.deepcopy(model)
    optimizers = build_optimizers(model, args)
    rates = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: schedule(step, args.steps)) for each in optimizers]
    args.out.mkdir(parents=True, exist_ok=True)
    save_judge(judges(other_NCHW, other_N)["mlp"], args.out / "judge.safetensors")
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(x_NCHW)} images", flush=True)
    start, mean = time.perf_counter(), 0.0
    stop = min(args.stop, args.steps)
    for step in range(1, stop + 1):
        picked = torch.randint(0, len(x_NCHW), (args.batch,), generator=generator)
        without = torch.rand(args.batch, generator=generator) < 0.1  # for classifier-free guidance
        labels = torch.where(without, torch.tensor(CLASSES), y_N[picked])
        loss = noise_loss(model, scheduler, moved(x_NCHW[picked], generator), labels, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *rates):
            each.step()
        model.zero_grad()
        with torch.no_grad():
            share = min(args.average, step / (step + 10))
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - share)
        mean += (loss.item() - mean) / min(step, 200)
        if step % args.report == 0 or step == stop:
            held = float(torch.stack(held_out(average, scheduler, other_NCHW, other_N)).mean())
            minutes = (time.perf_counter() - start) / 60
            print(f"step {step:6d}  {minutes:6.2f} min  train {mean:.5f}  held-out (EMA) {held:.5f}", flush=True)
            save(average, scheduler, args.out)
    check(load(args.out)[0], scheduler)


def load(folder: Path) -> tuple[DiTTransformer2DModel, DDIMScheduler]:
    """Returns the model in float32 and its scheduler from a saved folder."""
    model = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    return model.eval(), DDIMScheduler.from_pretrained(folder / "scheduler")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, help="judge a saved folder and stop")
    parser.add_argument("--out", type=Path, default=Path("demo/dit"), help="folder to write")
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps that the schedule is made for")
    parser.add_argument("--stop", type=int, default=6000, help="end after this many steps, before the schedule does")
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate of Muon; AdamW has 0.4 of it")
    parser.add_argument("--decay", type=float, default=0.01, help="weight decay of the matrices")
    parser.add_argument("--average", type=float, default=0.999, help="share of the old in the averaged weights")
    parser.add_argument("--layers", type=int, default=5, help="transformer blocks")
    parser.add_argument("--patch", type=int, default=4, help="pixels along the side of a patch")
    parser.add_argument("--report", type=int, default=400, help="steps between held-out losses")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initialization and of everything drawn")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the last bits of the result depend on it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.check:
        check(*load(args.check))
    else:
        train(args)


if __name__ == "__main__":
    main()
