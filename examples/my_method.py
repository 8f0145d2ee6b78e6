"""A method of your own: groups that all failed imitate their reference, the others do GRPO. Run: python examples/my_method.py"""

from dataclasses import replace

from handrail import Group, Method, Tools, train


class RepairWhenStuck(Method):
    def guide(self, groups: list[Group], tools: Tools) -> list[Group]:
        stuck = {group.problem.id: tools.reference(group.problem) for group in groups if group.all_wrong}
        return [replace(group, demonstrations=list(filter(None, [stuck.get(group.problem.id)]))) for group in groups]

    def credit(self, groups: list[Group], tools: Tools) -> list[Group]:
        def weighted(group: Group) -> Group:
            return replace(group, demonstrations=[replace(shown, weight=[1.0] * len(shown)) for shown in group.demonstrations])

        return [weighted(group) for group in super().credit(groups, tools)]


if __name__ == "__main__":
    print(train("examples/quick.toml", output="runs/my-method", method=RepairWhenStuck)["eval"])
