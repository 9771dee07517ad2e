"""LoRA folders that the `peft` package writes, and what its model and ours say with them.

    python benchmarks/adapters_peer.py CHECKPOINT      # of a Python that has peft beside this package

Random adapters in four forms (some layers, all with rsLoRA, patterns of ranks and alphas, a regular expression) over a
text model in float32: tells whether greedy tokens are equal, and the largest difference of the first token's five
likeliest log-probabilities. Exit code 1 where tokens differ, or the difference is 1e-4 or more.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sensorium import LLM, LoRARequest, SamplingParams

FORMS: Mapping[str, Mapping[str, Any]] = {
    "some layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all, rsLoRA": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2, "layers.0.self_attn.q_proj": 6},
        "alpha_pattern": {"k_proj": 24},
    },
    "regular expression": {"r": 3, "lora_alpha": 5, "target_modules": r".*layers\.1\..*(gate|up)_proj"},
}
PROMPTS = ([5, 9, 11, 40, 7], [7, 3], [100, 101, 102, 103, 104, 105, 106])
TOKENS, TOP = 12, 5
MOST = 1e-4
Said = tuple[list[int], dict[int, float]]  # greedy tokens, and log-probabilities of the first one's likeliest


def theirs(base: str, folder: Path, form: Mapping[str, Any]) -> list[Said]:
    """What peft's model says; the adapter is left in the folder."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **form)).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    adapted.save_pretrained(folder)
    said = []
    for ids in PROMPTS:
        given = torch.tensor([ids])
        with torch.no_grad():
            scores = torch.log_softmax(adapted(given).logits[0, -1], -1).topk(TOP)
            made = adapted.generate(
                input_ids=given, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
            )
        likeliest = dict(zip(scores.indices.tolist(), scores.values.tolist(), strict=True))
        said.append((made[0, len(ids) :].tolist(), likeliest))
    return said


def ours(llm: LLM, adapter: LoRARequest) -> list[Said]:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=TOP)
    said = []
    for answer in llm.generate([list(ids) for ids in PROMPTS], params, lora_request=adapter):
        first = answer.outputs[0]
        scores = {token: one.logprob for token, one in (first.logprobs or [{}])[0].items()}
        said.append((first.token_ids, scores))
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    base, is_right = parser.parse_args().checkpoint, True
    with tempfile.TemporaryDirectory() as name, LLM(base, dtype="float32", threads=1) as llm:
        for number, (form, config) in enumerate(FORMS.items()):
            folder = Path(name) / str(number)
            expected = theirs(base, folder, config)
            found = ours(llm, LoRARequest(form, number, str(folder)))
            equal = [one[0] == other[0] for one, other in zip(expected, found, strict=True)]
            worst = max(
                abs(scores.get(token, -torch.inf) - value)
                for (_, wanted), (_, scores) in zip(expected, found, strict=True)
                for token, value in wanted.items()
            )
            print(f"{form:<20} {sum(equal)} of {len(equal)} answers equal, log-probabilities to {worst:.1e}")
            is_right = is_right and all(equal) and worst < MOST
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
