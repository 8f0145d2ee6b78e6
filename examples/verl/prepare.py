"""Write any source that Handrail reads as a dataset for verl, with references and plans.

Run: ``python examples/verl/prepare.py problems.jsonl train.parquet``. A third argument names the
``data_source``, by which verl picks a reward function; that of "math" reads the answer behind "Answer:", else
in ``\\boxed{}``. The prompts must ask for one of them.
"""

import sys
from typing import Any

from datasets import Dataset

from handrail import load_problems


def rows(source: str, reward: str = "math") -> list[dict[str, Any]]:
    return [
        {
            "data_source": reward,
            "prompt": [{"role": "user", "content": each.prompt}]
            if isinstance(each.prompt, str)
            else each.prompt,
            "reward_model": {"style": "rule", "ground_truth": each.answer},
            "extra_info": {"index": index},
            "id": each.id,
            "references": list(each.references),
            "plan": each.plan,
        }
        for index, each in enumerate(load_problems(source))
    ]


if __name__ == "__main__":
    source, target, *reward = sys.argv[1:]
    Dataset.from_list(rows(source, *reward)).to_parquet(target)
