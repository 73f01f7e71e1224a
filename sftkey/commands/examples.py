"""Examples at the end of each command's help."""

from __future__ import annotations

EXAMPLES = {
    "train": (
        "sftkey train smollm2-135m/demo",
        "sftkey train my.yaml name=slower trainer.learning_rate=5e-5",
    ),
    "check": (
        "sftkey check my.yaml",
        "sftkey check qwen3-8b/gsm8k --gpu 24GB --plan-only",
    ),
    "ls": ("sftkey ls", "sftkey ls --json"),
    "cp": ("sftkey cp qwen3-8b/gsm8k my.yaml",),
    "show": (
        "sftkey show my.yaml --rows 5",
        "sftkey show smollm2-135m/demo stages.key.loss_on=answer",
    ),
    "adapt": (
        "sftkey adapt Qwen/Qwen3-4B --data my.jsonl -o my.yaml --gpu 24GB",
        "sftkey adapt Qwen/Qwen3-4B --like qwen3-8b/gsm8k -o my.yaml",
    ),
    "evaluate": (
        "sftkey evaluate runs/mine",
        "sftkey evaluate runs/mine --model mine-merged",
        "sftkey evaluate runs/mine --generations answers.jsonl --stage key",
    ),
    "compare": ("sftkey compare runs/mine runs/other",),
    "diagnose": (
        "sftkey diagnose my.yaml",
        "sftkey diagnose my-sft-model --data my.jsonl --rows 100",
    ),
    "study": ("sftkey study study.yaml --plan", "sftkey study study.yaml"),
    "generate": (
        'sftkey generate runs/mine "What is 2 + 3?"',
        'sftkey generate runs/mine "What is 2 + 3?" --stage base --json',
    ),
    "errors": ("sftkey errors runs/mine", "sftkey errors runs/mine --kind unparsed --json"),
    "chat": ("sftkey chat runs/mine", "sftkey chat runs/mine --stages --thinking"),
    "report": ("sftkey report runs/mine",),
    "merge": ("sftkey merge runs/mine -o mine-merged",),
    "export": (
        "sftkey export runs/mine --to vllm -o mine-vllm",
        "sftkey export runs/mine --to gguf -o mine.gguf --llama-cpp llama.cpp",
    ),
    "card": ("sftkey card runs/mine",),
    "push": ("sftkey push runs/mine me/mine --private",),
    "prompts": (
        "sftkey prompts my.yaml --split validation",
        "sftkey prompts runs/mine",
    ),
    "env": ("sftkey env",),
}


def epilog(command: str) -> str:
    r"""Return what stands below a command's options; click leaves what follows a `\b` as it is."""
    examples = EXAMPLES[command]
    head = "Example:" if len(examples) == 1 else "Examples:"
    return "\n".join(["\b", head, *(f"  {example}" for example in examples)])
