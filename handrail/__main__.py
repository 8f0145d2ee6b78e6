"""``python -m handrail``, the same as ``handrail``; launchers of several processes take modules by name."""

from handrail.cli import main

if __name__ == "__main__":
    main()
