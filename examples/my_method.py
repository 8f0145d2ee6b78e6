"""A method of your own: only rollouts that beat every other of their group train. Run: python examples/my_method.py"""

from handrail import Group, Method, Tools, train


class WinnerOnly(Method):
    def credit(self, groups: list[Group], tools: Tools) -> list[Group]:
        def winner(group: Group) -> Group:
            best = max(member.reward for member in group.trajectories)
            alone = [member.reward for member in group.trajectories].count(best) == 1
            return Group(group.problem, [member.credited(float(alone and member.reward == best)) for member in group.trajectories])

        return [winner(group) for group in groups]


if __name__ == "__main__":
    print(train("examples/quick.toml", output="runs/my-method", method=WinnerOnly)["eval"])
