"""What the server of ``tests.forks`` does once for all verifiers that are forked from it."""

from handrail.verifiers.builtin import BUILTIN, warm_up

for name in BUILTIN:
    warm_up(name)
