"""A method of your own: all-wrong groups imitate their reference, all other groups do GRPO.

Of the five verbs (samples, reward, guide, credit, surrogate) it overrides two; Method has GRPO's version of
each. ``guide`` and ``credit`` work on one group, and await what they need: Generate, Score, Verify or Ask.

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
