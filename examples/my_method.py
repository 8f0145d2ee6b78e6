"""A method of your own: groups that all failed imitate their reference, the others do GRPO.

Of the five verbs (samples, reward, guide, credit, surrogate) it overrides two; Method has GRPO's of each.
A verb works on one group, and awaits what it needs: Generate, Score, Verify or Ask.

Run: python examples/my_method.py
"""

from dataclasses import replace

import torch

from handrail import Context, Group, Method, train


class RepairWhenStuck(Method):
    async def guide(self, group: Group, ctx: Context) -> Group:
        reference = ctx.reference(group.problem) if group.all_wrong else None
        return group if reference is None else group.add(replace(reference, in_baseline=False))

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        for shown in group.imitated:
            group = group.swap(shown, shown.with_columns(imitation_weight=torch.ones(len(shown))))
        return await super().credit(group, ctx)


if __name__ == "__main__":
    print(train("examples/quick.toml", output="runs/my-method", method=RepairWhenStuck)["eval"])
