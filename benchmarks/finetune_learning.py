"""A small model learns to document functions: pretrained on the standard library's sources, tuned on its docstrings.

`uv run --with matplotlib python benchmarks/finetune_learning.py FOLDER` makes a Llama of 1.2 M parameters, pretrains
it on the sources of this Python's standard library, and tunes it on pairs of a function's head and the first line of
its docstring: once all weights, once LoRA (`--only lora` leaves the other out). The pairs kept back are answered before
and after, by plain transformers, and by Hugging Face peft around the pretrained model; what counts is that the answer
has the form of a docstring and ends by itself. FOLDER gets everything, with the curves in `finetuning.svg` and
`finetuning_lora.svg`.
"""

import argparse
import ast
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

PRETRAINING_STEPS, LENGTH, ASKED = 200, 128, 100
# What is tuned -> learning rate, and the curve's file.
KINDS = {"full": (1e-3, "finetuning.svg"), "lora": (5e-3, "finetuning_lora.svg")}
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ message.content + '\\n' }}{% else %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def main(root: Path, kinds: list[str]) -> None:
    pairs = list(dict.fromkeys(documented()))
    kept_back = pairs[::20]
    write(root / "train.jsonl", [pair for at, pair in enumerate(pairs) if at % 20])
    write(root / "valid.jsonl", kept_back)
    print(f"{len(pairs):,} functions with a docstring, {len(kept_back):,} kept back")
    pretrain(root)
    for kind in kinds:
        tune(root, kind)
        plot(root, kind)
    asked = kept_back[:ASKED]
    for name in ("pretrained", *kinds):
        answers = [answer_of(root, name, head) for head, _ in asked]
        well_formed = sum(map(is_docstring, answers))
        print(f"{name}: {well_formed} of {len(asked)} answers are one docstring and end by themselves")
        for (head, _), said in list(zip(asked, answers, strict=True))[:3]:
            print(f"  {head!r} -> {said[:90]!r}")


def documented() -> Iterator[tuple[str, str]]:
    """(head, first line of the docstring) of the library's functions, in the order of its files."""
    from megatron.bridge.data.standard_library import python_stdlib_texts

    for text in python_stdlib_texts():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
                head, first = f"def {node.name}({ast.unparse(node.args)}):", docstring.splitlines()[0].strip()
                if first and len(head) < 100 and len(first) < 100 and "<|" not in head + first:
                    yield head, f'"""{first}"""'


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": head, "completion": text}) + "\n" for head, text in pairs), "utf-8")


def pretrain(root: Path) -> None:
    """The quickstart's model and text; the result as a Hugging Face folder."""
    from megatron.bridge.training.quickstart import stages
    from megatron.bridge.training.quickstart.journal import QuickstartOptions

    options = QuickstartOptions(
        hf=None, text=None, tp=1, pp=1, steps=PRETRAINING_STEPS, seq_length=LENGTH, batch=8, lr=3e-3
    )
    paths = stages.Paths(root, root / "model")
    print(stages.make_model(paths.hf, LENGTH))
    stages.convert(paths, options)
    stages.preprocess(paths, None)
    result = stages.train(paths, options, PRETRAINING_STEPS)
    stages.export(paths, options)
    paths.export.rename(root / "pretrained")
    print(f"pretrained for {result.iteration} steps to a loss of {result.loss:.3f}")


def tune(root: Path, kind: str) -> None:
    """All weights, exported as a model, or LoRA, exported as an adapter for peft."""
    from megatron.bridge.peft import LoRA
    from megatron.bridge.training.best import KeepBest
    from megatron.bridge.training.finetune import finetune, finetune_config, plan_length
    from megatron.bridge.training.hf_export import ExportHF
    from megatron.bridge.training.run_folder import use_run_folder

    cfg = finetune_config(
        root / "pretrained",
        [str(root / "train.jsonl")],
        valid_data=[str(root / "valid.jsonl")],
        sequence_length=LENGTH,
        dataset_format="prompt_completion",
        prompt_template="custom",
        custom_template=TEMPLATE,
        truncation="drop",
    )
    rate, _ = KINDS[kind]
    cfg.optimizer.lr, cfg.optimizer.min_lr = rate, rate / 10
    if kind == "lora":
        cfg.peft = LoRA(dim=16, alpha=32)
    plan_length(cfg, epochs=2)
    use_run_folder(cfg, root / "tuning" / kind)
    best = KeepBest()
    finetune(cfg, callbacks=[best, ExportHF(root / kind, adapter=kind == "lora")])
    print(f"{kind}: the lowest validation loss is {best.loss:.3f}, at step {best.iteration}")


def answer_of(root: Path, name: str, head: str) -> str:
    """What was exported says, greedily, in transformers or peft; an end of the text is written out."""
    import torch

    tokenizer, model = _loaded(root, name)
    inputs = tokenizer(head + "\n", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return str(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :]))


@cache
def _loaded(root: Path, name: str) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = root / ("pretrained" if name == "lora" else name)
    model = AutoModelForCausalLM.from_pretrained(base)
    if name == "lora":
        model = PeftModel.from_pretrained(model, root / name)
    return AutoTokenizer.from_pretrained(base), model.eval()


def is_docstring(answer: str) -> bool:
    """Whether it opens and closes once and then ends."""
    end = '"""<|end_of_text|>'
    return answer.startswith('"""') and answer.endswith(end) and answer.count('"""') == 2


def plot(root: Path, kind: str) -> None:
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (root / "tuning" / kind / "metrics.jsonl").read_text("utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for name, label in (("loss", "training"), ("valid_loss", "validation")):
        points = [(record["iteration"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points, strict=True), label=label, marker="o" if name == "valid_loss" else None, linewidth=1)
    axes.set(xlabel="step", ylabel="loss per trained token")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(root / KINDS[kind][1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=list(KINDS), help="leave the other out")
    given = parser.parse_args()
    main(given.folder, list(KINDS) if given.only is None else [given.only])
