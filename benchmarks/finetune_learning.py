"""A small model learns to document functions: pretrained on the standard library's sources, tuned on its docstrings.

`uv run --with matplotlib python benchmarks/finetune_learning.py FOLDER` makes a Llama of 1.2 M parameters, pretrains
it on the sources of this Python's standard library, and tunes it (all weights) on pairs of a function's head and the
first line of its docstring. The pairs kept back are answered before and after, by plain transformers; what counts is
that the answer has the form of a docstring and ends by itself. FOLDER gets everything, with the curve in
`finetuning.svg`.
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PRETRAINING_STEPS, LENGTH, ASKED = 200, 128, 100
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ message.content + '\\n' }}{% else %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def main(root: Path) -> None:
    pairs = list(dict.fromkeys(documented()))
    kept_back = pairs[::20]
    write(root / "train.jsonl", [pair for at, pair in enumerate(pairs) if at % 20])
    write(root / "valid.jsonl", kept_back)
    print(f"{len(pairs):,} functions with a docstring, {len(kept_back):,} kept back")
    pretrain(root)
    tune(root)
    asked = kept_back[:ASKED]
    for name in ("pretrained", "tuned"):
        answers = [answer_of(root / name, head) for head, _ in asked]
        well_formed = sum(map(is_docstring, answers))
        print(f"{name}: {well_formed} of {len(asked)} answers are one docstring and end by themselves")
        for (head, _), said in list(zip(asked, answers, strict=True))[:3]:
            print(f"  {head!r} -> {said[:90]!r}")
    plot(root)


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


def tune(root: Path) -> None:
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
    cfg.optimizer.lr, cfg.optimizer.min_lr = 1e-3, 1e-4
    plan_length(cfg, epochs=2)
    use_run_folder(cfg, root / "tuning")
    result = finetune(cfg, callbacks=[KeepBest(), ExportHF(root / "tuned")])
    print(f"tuned for {result.iteration} steps, validation loss {result.valid_loss:.3f}")


def answer_of(folder: Path, head: str) -> str:
    """What the exported model says, greedily, in plain transformers; an end of the text is written out."""
    import torch

    tokenizer, model = _loaded(folder)
    inputs = tokenizer(head + "\n", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return str(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :]))


_cache: dict[Path, Any] = {}


def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if folder not in _cache:
        _cache[folder] = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    return _cache[folder]


def is_docstring(answer: str) -> bool:
    """Whether it opens and closes once and then ends."""
    end = '"""<|end_of_text|>'
    return answer.startswith('"""') and answer.endswith(end) and answer.count('"""') == 2


def plot(root: Path) -> None:
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (root / "tuning/metrics.jsonl").read_text("utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for name, label in (("loss", "training"), ("valid_loss", "validation")):
        points = [(record["iteration"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points, strict=True), label=label, marker="o" if name == "valid_loss" else None, linewidth=1)
    axes.set(xlabel="step", ylabel="loss per trained token")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(root / "finetuning.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
