"""The model card (README.md) of a packed checkpoint.

It tells a stranger what this is, how it was made, how well it is known to work, and how to load and remake it. Nothing
in it depends on the run: no time, no date, no place. A killed and resumed run writes the same bytes. Figures that are
measured later come in by `add_evaluation`, between two marks, and may be replaced as often as one likes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant.checkpoint import words
from quant.checkpoint.shards import write_text
from quant.checkpoint.words import Report
from quant.errors import CheckpointError

BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"
FOLDER, PIPELINE = "path/to/this/folder", "path/to/the/pipeline"
MOST_LINES, MOST_NAMES = 20, 5
FIGURES = (  # label, where it is in an evaluation's report, format
    ("perplexity per token", "perplexity", "token", ".5g"),
    ("bits per byte", "perplexity", "bits_per_byte", ".5g"),
    ("KL divergence to the original, nats per token", "divergence", "kl", ".4g"),
    ("same first choice as the original", "divergence", "top1", ".2%"),
    ("cosine of hidden states, per token", "hidden", "token", ".5f"),
    ("cosine of hidden states, per line", "hidden", "sentence", ".5f"),
)


def card(report: Report) -> str:
    """The card for the content of report.json."""
    bits, name, specs = report["bits"], str(report["model"]["name"]).rstrip("/"), words.specs_words(report["sites"])
    says = f"{bits['measured']:.5g} bits per weight" if report["sites"] else "its embedding and head packed"
    troubles = [f"- {_code(text)}: {_code(site)}" for site, text in words.notes(report)]
    left = [
        f"- {_code(reason)}: {', '.join(_code(name) for name in words.capped(names, MOST_NAMES))}"
        for reason, names in words.by_reason(report["left_float"]).items()
    ]
    return f"""{_front_matter(report)}

# {_code(name.rpartition("/")[2])}, {says}

{_code(name)} with {len(report["sites"]):,} weight matrices packed by bitwright: {_code(specs)}.
Everything else is the original, bit for bit{_folded(report)}.

{_table(_sizes(report))}

## How to load it

{_loading(report)}

## How it was made

```bash
{words.plain(report["command"], 4000)}
```

The same bytes come out on the same kind of machine with the same versions; `recipe.json` and `plan.json` in this folder
hold every setting.

{_table([(label, _code(value)) for label, value in words.provenance_rows(report)])}

## Evaluation

{BEGIN}
Not evaluated yet: {_code(f"quant-eval {_place(report)} --against")} the original.
{END}

## What did not go as asked

{chr(10).join(words.capped(troubles, MOST_LINES)) or "Nothing."}

## Left in float

{chr(10).join(words.capped(left, MOST_LINES)) or "No weight matrix."}

## Limits

{_limits(report)} The limits, biases and license terms of the base
model hold here as well.
"""


def add_evaluation(folder: str | Path, results: Mapping[str, Any]) -> None:
    """Puts measured figures into the card of the checkpoint in `folder`, in place of earlier ones.

    `results`: what `quant.eval`'s `Report.to_dict()` gives for the checkpoint; figures it lacks are left out. Times and
    memory are not taken over: the card says what holds on every machine.

    Raises:
        CheckpointError: the folder has no README.md.
    """
    path = Path(folder) / "README.md"
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise CheckpointError(f"{path}: cannot be read ({reason}); figures go into a checkpoint's own card") from None
    section = f"{BEGIN}\n{_evaluation(results)}\n{END}"
    start, end = before.find(BEGIN), before.find(END)
    if 0 <= start < end:
        after = before[:start] + section + before[end + len(END) :]
    else:  # somebody rewrote the card and left no mark
        after = f"{before.rstrip()}\n\n## Evaluation\n\n{section}\n"
    write_text(path, after)


def _folded(report: Report) -> str:
    return ", but for rotations folded into it" if report.get("folding", {}).get("folded") else ""


def _limits(report: Report) -> str:
    if report["source"].get("library") == "diffusers":
        return "Figures of drawn images show less than an eye does: judge it on your own prompts."
    return "A perplexity shows less than is lost on text unlike the calibration text: judge it on your own task."


def _front_matter(report: Report) -> str:
    """YAML, of which JSON is a part: so are names that are not ours."""
    source, asked = report["source"], report["sites"] and words.code_bits(report["recipe"]["spec"])
    lines = [f"{key}: {json.dumps(source[key])}" for key in ("license", "base_model") if source[key]]
    lines += ["base_model_relation: quantized"] if source["base_model"] else []
    tags = ["bitwright", "quantized", *([f"{asked}-bit"] if asked else [])]
    lines += [
        f"library_name: {source.get('library', 'transformers')}",
        f"tags: {json.dumps(tags)}",
        "quantization:",
        "  method: bitwright",
    ]
    lines += [f"  format_version: {report['format_version']}", f"  bits_per_weight: {report['bits']['measured']:.5g}"]
    return "\n".join(["---", *lines, "---"])


def _sizes(report: Report) -> list[tuple[str, str]]:
    bits, source = report["bits"], report["source"]
    codes = sorted({code for site in report["sites"] if (code := words.code_bits(site["spec"]))})
    after = sum(report["files"].values())
    smaller = source["bytes"] / max(1, after)
    return [
        ("bits of each code", " or ".join(map(str, codes)) or "see plan.json"),
        ("bits promised", f"{bits['promised']:.5g} per quantized weight, scales and zeros and all else included"),
        ("bits measured on disk", f"{bits['measured']:.5g} per quantized weight"),
        ("quantized", f"{bits['weights']:,} of {source['parameters']:,} weights, {bits['packed_bytes']:,} bytes"),
        *((("embedding and head", _code(words.ends_words(report["ends"]))),) if "ends" in report else ()),
        ("all weight files", f"{after:,} bytes, {smaller:.2f} times smaller than the original's {source['bytes']:,}"),
        ("license of the base model", _code(source["license"] or "unknown: its folder does not state one")),
        ("commit of the base model", _code(source["revision"] or "unknown: a local folder")),
    ]


def _place(report: Report) -> str:
    """What to load: a text encoder lies in the pipeline's folder, and a transformer is found from there."""
    source = report["source"]
    inside = source["component"] if source.get("library") != "diffusers" else ""
    return f"{PIPELINE}/{inside}" if inside else FOLDER


def _loading(report: Report) -> str:
    component, architecture = report["source"]["component"], report["source"]["architecture"]
    if report["source"].get("library") == "diffusers":
        return _loading_pipeline(component, architecture)
    folder, generates = _place(report), architecture.endswith("ForCausalLM")
    tokenizer = folder.replace("text_encoder", "tokenizer")
    kind = "AutoModelForCausalLM" if generates else architecture if component else "AutoModel"
    whole = f', and so does `DiffusionPipeline.from_pretrained("{PIPELINE}")`' if component else ""
    use = """
tokens = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))"""
    return f"""```python
import quant  # the package bitwright
from transformers import AutoTokenizer

model = quant.load("{folder}", device="cpu")  # verified by checksums; packed weights stay packed
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}"){use if generates else ""}
```

{_code(f'{kind}.from_pretrained("{folder}")')} works too{whole}, once `quant` is imported.
`quant.load(..., dequantize=True)` gives a plain float model. Without `quant`, transformers refuses the folder."""


def _loading_pipeline(component: str, architecture: str) -> str:
    whole = f"""from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{FOLDER}")
transformer = quant.load("{FOLDER}", device="cpu")"""
    alone = f"""from diffusers import {architecture}

transformer = {architecture}.from_pretrained("{FOLDER}")"""
    return f"""```python
import quant  # the package bitwright, which teaches diffusers to read this
{whole if component else alone}  # verified by checksums; packed weights stay packed
```

`quant.load(..., dequantize=True)` gives a plain float model. Without `quant`, diffusers refuses the folder."""


def _evaluation(results: Mapping[str, Any]) -> str:
    """The figures as a table, and what they depend on."""
    lines = ["| | this checkpoint | original |", "|---|---|---|"]
    for label, part, key, form in FIGURES:
        value = (results.get(part) or {}).get(key)
        original = (results.get("original") or {}).get(key) if part == "perplexity" else None
        if value is not None:
            lines.append(f"| {label} | {value:{form}} | {'' if original is None else f'{original:{form}}'} |")
    settings = results["settings"]
    stride = f", stride {settings['stride']}" if settings.get("stride") else ""
    most, scored = settings.get("max_windows"), (results.get("perplexity") or {}).get("windows")
    few = f"only the first {most} " if most and (scored is None or scored >= most) else ""
    against = f" The original is {_code(results['against'])}." if results.get("against") else ""
    return "\n".join(lines) + (
        f"\n\nText {_code(settings['text'])}, sha256 {_code(settings['text_sha256'])}; "
        f"{few}{settings['window_rule']} windows of {settings['window']} tokens{stride}; {settings['dtype']}.{against}"
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)])


def _code(value: object) -> str:
    """Untrusted text as code: one line, nothing that ends the code or the table's cell."""
    return f"`{words.plain(value, 1000).replace('`', chr(39)).replace('|', '/')}`"
